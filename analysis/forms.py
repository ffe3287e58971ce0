"""The report's forms: HTML, Markdown for pull requests, and a picture of the front."""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from peftscape.analysis import units
from peftscape.analysis.figures import front_figure
from peftscape.analysis.findings import find
from peftscape.analysis.measures import measured
from peftscape.analysis.more_figures import curve_traces
from peftscape.analysis.noise import retest_interval
from peftscape.analysis.notes import failed_runs, spent
from peftscape.analysis.picks import picks
from peftscape.analysis.predicted import PREDICTED, predicted_rows
from peftscape.analysis.report import write_report
from peftscape.analysis.states import counted
from peftscape.analysis.study import SourceError, Study
from peftscape.analysis.table import cost_text, spread

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def write(study: Study, path: str | Path, form: str = "html") -> Path:
    """Writes the report as "html", "md" or "png".

    Raises:
        SourceError: for "png" without a browser, saying how to get one, or where the browser fails.
        ValueError: for another form.
    """
    target = Path(path)
    if form == "html":
        return write_report(study, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if form == "md":
        target.write_text(markdown(study), encoding="utf-8")
        return target
    if form == "png":
        return _picture(study, target)
    raise ValueError(f'expected html, md or png, found "{form}"')


def markdown(study: Study) -> str:
    """The report's answer, front, claims and notes as Markdown; names are escaped."""
    found = find(study)
    costs = units.shown(measured(study.records))
    lines = [f"# {_plain(study.name)}", ""]
    lines += [f"{len(study.records):,} trials: {counted(study.records)}.", ""]
    lines += ["## What to use", ""]
    heads = ["up to", "#", "design", study.quality.name, "test (95 %)", "on front", *(c.short.lower() for c in costs)]
    rows = []
    for pick in picks(study):
        known = found.chance(pick.record.number)
        unit = next((c.unit for c in costs if c.name == study.cost.name), "")
        rows.append(
            [
                units.amount(pick.limit, unit),
                str(pick.record.number),
                pick.record.label,
                units.score(pick.record.validation),
                spread(retest_interval(pick.record)),
                known,
                *(cost_text(pick.record, c) for c in costs),
            ]
        )
    lines += _table(heads, rows) if rows else ["No trial is complete."]
    lines += ["", f"## The front of {' and '.join(axis.name for axis in study.objectives)}", ""]
    lines += _table(
        heads[1:],
        [
            [
                str(r.number),
                r.label,
                units.score(r.validation),
                spread(retest_interval(r)),
                found.chance(r.number),
                *(cost_text(r, c) for c in costs),
            ]
            for r in found.members
        ],
    )
    lines += ["", "## How sure this is", "", *(f"- {_plain(claim)}" for claim in found.claims)]
    if failed := failed_runs(study):
        lines += ["", "## Failed runs", "", *_table(["#", "design", "what", "message", "step"], failed)]
    lines += ["", "## What was spent", "", *_table(["what", "how much"], spent(study))]
    if told := predicted_rows(study):
        heads = ["design alone", "what", "predicted", "measured", "error"]
        lines += ["", "## Predicted and measured", "", *_table(heads, told), "", PREDICTED]
    lines += ["", "## To repeat it", "", f"Read from {_plain(study.source)}.", ""]
    text = json.dumps(study.config, indent=2, ensure_ascii=False, default=str)
    lines += ["```json", text.replace("```", "` ` `"), "```", ""] if study.config else []
    return "\n".join(lines)


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    made = ["| " + " | ".join(map(_plain, heads)) + " |", "|" + "---|" * len(heads)]
    return made + ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: on one line, without HTML or column marks."""
    for mark, safe in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("`", "\\`"),
        ("[", "\\["),
        ("*", "\\*"),
    ):
        text = text.replace(mark, safe)
    return " ".join(text.split())


def browser() -> str | None:
    """The first Chromium or Chrome on the path, or that PEFTSCAPE_BROWSER names."""
    named = os.environ.get("PEFTSCAPE_BROWSER")
    return named or next((found for name in BROWSERS if (found := shutil.which(name))), None)


def _picture(study: Study, target: Path) -> Path:
    program = browser()
    if program is None:
        raise SourceError(
            "--format png needs Chromium or Chrome to draw: install one (Debian and Ubuntu: apt install chromium), "
            "or name it in PEFTSCAPE_BROWSER; --format md needs none"
        )
    from plotly.offline import get_plotlyjs

    cost = next(iter(units.shown([study.cost.name])), units.SHOWN[0])
    figure = front_figure(study, cost, picks(study), curve_traces(find(study).curves))
    data = json.dumps(figure, allow_nan=False).replace("<", "\\u003c")
    page = (
        '<!doctype html><meta charset="utf-8"><body style="margin:0"><div id="p" style="width:1200px;height:760px">'
        f"</div><script>{get_plotlyjs()}</script><script>const f = {data};"
        'f.layout.height = 760; Plotly.newPlot("p", f.data, f.layout, {staticPlot: true});</script>'
    )
    target = target.resolve()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "front.html"
        file.write_text(page, encoding="utf-8")
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,860"]
        more = [f"--user-data-dir={folder}/profile", "--virtual-time-budget=10000", f"--screenshot={target}"]
        done = subprocess.run(
            [program, *options, *more, file.as_uri()], capture_output=True, text=True, timeout=120, check=False
        )
    if done.returncode or not target.is_file():
        raise SourceError(f"{program} drew no picture: {done.stderr.strip()[-300:]}")
    return target
