"""Further workers on this machine: processes that search beside the first and end with it.

A worker reads what to do from its standard input, which stays open as long as its parent lives: however the parent
ends, the system closes it, and the worker saves what is in flight and ends too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peftscape.search.stopping import INTERRUPTED, Stop

if TYPE_CHECKING:
    from peftscape.search.config import SearchConfig

# From the end of its parent a worker has this long to save its lanes.
ORPHAN_S = 4.0
# A worker that was told to end gets this long before it is made to.
LEAVE_S = 8.0
_RUN = "from peftscape.search.crew import work; work()"


@contextmanager
def crew(count: int, config: SearchConfig, out: Path, storage_url: str | None) -> Iterator[None]:
    """`count` workers beside this process while the block runs."""
    from peftscape.search.config_file import config_json

    task = {"config": config_json(config), "out": str(out), "storage_url": storage_url}
    started = []
    try:
        for _ in range(count):
            child = subprocess.Popen([sys.executable, "-c", _RUN], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            started.append(child)
            assert child.stdin is not None
            child.stdin.write(json.dumps(task).encode() + b"\n")
            child.stdin.flush()
        yield
    finally:
        for child in started:
            assert child.stdin is not None
            child.stdin.close()
        for child in started:
            try:
                child.wait(timeout=LEAVE_S)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def work() -> None:
    """The whole life of a worker."""
    from peftscape.search.config_file import config_from_json
    from peftscape.search.study import run_search

    task: dict[str, Any] = json.loads(sys.stdin.readline())
    stop = Stop()
    threading.Thread(target=_follow, args=(stop,), daemon=True).start()
    try:
        config = config_from_json(task["config"])
        run_search(config, Path(task["out"]), storage_url=task["storage_url"], quiet=True, helper=stop)
    except KeyboardInterrupt:
        os._exit(INTERRUPTED)


def _follow(stop: Stop) -> None:
    """Stop when the parent is gone."""
    while sys.stdin.readline():
        pass
    stop.ask(within_s=ORPHAN_S)
