"""A long search with random faults: does it lose records, and do memory and files grow?

    python benchmarks/soak.py --trials 2000 --out benchmarks/results/soak.md

The model is tiny and a training is two steps, so that a trial takes milliseconds. Sessions are ended at random by
SIGKILL, SIGTERM or SIGINT, or run beside a second worker; lanes turn NaN or run out of memory at random.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from searches import Child, make_base, tiny, trials

from peftscape.search.cohort import Cohort
from peftscape.search.study import run_search


def sick(seed: int) -> None:
    """Make one lane in 100 NaN, and one step in 100 run out of memory."""
    step, dice = Cohort._step, random.Random(seed)

    def shaken(self: Cohort) -> list[float]:
        if dice.random() < 0.01 and len(self.lanes) > 1:
            raise torch.OutOfMemoryError("out of memory, says the soak test")
        if dice.random() < 0.01:
            with torch.no_grad():
                next(iter(self.lanes[0].params.values())).fill_(float("nan"))
        return step(self)

    Cohort._step = shaken


def ended(out: Path) -> dict[int, dict]:
    if not (out / "study.db").is_file():
        return {}
    return {n: t["record"] for n, t in trials(out).items() if "record" in t and t["state"] in ("COMPLETE", "PRUNED")}


def resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--session-s", type=float, default=30.0, help="mean length of a session")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dice = random.Random(asked.seed)
    folder = Path(tempfile.mkdtemp(prefix="peftscape-soak-"))
    base, out = make_base(folder / "base"), folder / "run"
    search = {"examples": 16, "lanes": 8, "retest_seeds": 0}
    of = tiny(base, budget={"trials": asked.trials}, search=search)
    lost = sessions = 0
    causes: dict[str, int] = {}
    sizes: list[tuple[int, int, int]] = []  # records, bytes of the study, resident bytes at the end of a session
    began = time.monotonic()
    while len(before := ended(out)) < asked.trials:
        sessions += 1
        seed = dice.randrange(2**31)

        def work(seed: int = seed) -> None:
            sick(seed)
            run_search(of, out, quiet=True)

        children = [Child(work, folder / "log") for _ in range(dice.choice((1, 1, 2)))]
        until = time.monotonic() + dice.expovariate(1 / asked.session_s) + 5
        peak = 0
        while time.monotonic() < until and any(resident(child.pid) for child in children):
            peak = max([peak, *(resident(child.pid) for child in children)])
            time.sleep(0.2)
        for child in children:
            number = dice.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
            child.kill(number)
            status = child.wait()
            name = {0: "done", 130: "asked to stop", -9: "killed"}.get(status, f"status {status}")
            causes[name] = causes.get(name, 0) + 1
        after = ended(out)
        lost += sum(after.get(number) != record for number, record in before.items())
        sizes.append((len(after), (out / "study.db").stat().st_size, peak))
        print(f"{len(after)} records, {lost} lost, {sizes[-1][1] / 1e6:.1f} MB, peak {peak / 1e6:.0f} MB", flush=True)
    wanted = list(range(asked.trials))
    missing = len(wanted) - len(set(ended(out)) & set(wanted))
    third = max(1, len(sizes) // 3)
    early, late = (max(s[2] for s in part) / 1e6 for part in (sizes[:third], sizes[-third:]))
    files = sum(1 for _ in out.rglob("*"))
    rows = {
        "trials": asked.trials, "sessions": sessions, **causes, "records lost": lost, "numbers missing": missing,
        "seconds": round(time.monotonic() - began), "study, bytes a record": sizes[-1][1] // max(1, sizes[-1][0]),
        "files in the folder": files, "peak memory, first third, MB": round(early),
        "peak memory, last third, MB": round(late),
    }  # fmt: skip
    text = "| soak | |\n|---|---:|\n" + "".join(f"| {name} | {value:,} |\n" for name, value in rows.items())
    print(text)
    if asked.out:
        asked.out.write_text(text)
    if lost or missing:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
