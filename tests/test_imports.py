"""Imports run one way, `spaces` <- `analysis` <- `search` <- command line, and what answers at once loads little."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import peftscape

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "transformers", "optuna", "sklearn", "plotly", "datasets")
MAY_NOT = {
    "spaces": ("peftscape.analysis", "peftscape.search", "peftscape.cli"),
    "analysis": ("peftscape.search", "peftscape.cli"),
    "search": ("peftscape.cli",),
}


def imported(path):
    """All that a file imports anywhere in it, as dotted names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loaded(code):
    """Which heavy packages a fresh interpreter has loaded after running the code."""
    code += f"\nimport json, sys\nprint()\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    with tempfile.TemporaryDirectory() as empty:  # where no run lies that a command would read
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=empty, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("folder", MAY_NOT)
def test_imports_run_one_way(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        for name in imported(path):
            above = [top for top in MAY_NOT[folder] if name == top or name.startswith(f"{top}.")]
            assert not above, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("folder", ["spaces", "analysis"])
def test_spaces_and_analysis_load_nothing_heavy(folder):
    # Kernels, and the padding of lanes, are imported by the operations that run them.
    found = sorted((ROOT / folder).rglob("*.py"))
    files = [p.relative_to(ROOT) for p in found if not p.name.startswith("fused_") and p.name != "stack.py"]
    names = [".".join(("peftscape", *p.with_suffix("").parts)).removesuffix(".__init__") for p in files]
    assert loaded("import " + ", ".join(names)) == []


def test_importing_the_package_loads_nothing_heavy():
    assert loaded("import peftscape; dir(peftscape); peftscape.__version__") == []
    assert loaded("import peftscape; peftscape.read_config, peftscape.check, peftscape.Design") == []


@pytest.mark.parametrize("name", sorted(peftscape.__all__))
def test_every_public_name_is_there(name):
    assert getattr(peftscape, name) is not None
    assert name in dir(peftscape)


def test_the_types_that_checkers_see_are_those_that_are_loaded():
    tree = ast.parse(Path(peftscape.__file__).read_text(encoding="utf-8"))
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = {
        name: (f"peftscape.{home.partition(':')[0]}", home.partition(":")[2] or name)
        for name, home in peftscape._HOMES.items()
    }
    assert seen == homes


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="lod"):
        peftscape.lod  # noqa: B018


def test_the_function_that_searches_does_not_hide_the_package():
    from peftscape.search import config

    assert peftscape.search.config is config


def commands(status, *lines):
    """What a fresh interpreter has loaded after these commands, which must end with this status."""
    code = f"""
import sys
import tempfile
from peftscape.cli import main
for line in {lines}:
    sys.argv = ["peftscape", *line.split()]
    try:
        main()
    except SystemExit as done:
        assert done.code == {status}, (line, done.code)
"""
    return loaded(code)


def test_commands_that_answer_at_once_load_nothing_heavy():
    assert commands(0, "--help", "methods", "methods --json", "sites minilm", "check", "check --json") == []


def test_errors_load_nothing_heavy():
    assert (
        commands(
            2,
            "check none.toml",
            "search -s search.lnes=3",
            "search --model minlm --out nowhere",
            "sites no/such-model",
            "train none.json --out x",
            "front none",
            "export none x --trial 1",
            "predict none none.csv",
        )
        == []
    )
