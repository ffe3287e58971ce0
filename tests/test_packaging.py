"""A wheel holds every module and every file that the package reads: an editable install would hide what is missing."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("spaces", "search", "analysis")
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info", ".venv", ".git", "runs", "build", "dist")


def on_disk() -> set[str]:
    """Where each file of the package has to be in an installation."""
    found = set()
    for base, folder in [(ROOT / "src" / "peftscape", ""), *((ROOT / name, f"{name}/") for name in FOLDERS)]:
        for path in base.rglob("*"):
            inside = path.relative_to(base)
            linked = not folder and inside.parts[0] in FOLDERS  # links for type checkers
            if path.is_file() and path.suffix != ".pyc" and not linked:
                found.add(f"peftscape/{folder}{inside.as_posix()}")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the working tree."""
    root = tmp_path_factory.mktemp("wheel")
    tree = root / "tree"
    tree.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tree / name, ignore=IGNORED)
    shutil.copytree(ROOT / "src", tree / "src", ignore=IGNORED, symlinks=True)
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    ran = subprocess.run([*command, "-w", str(root)], cwd=tree, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-3000:]
    [built] = root.glob("*.whl")
    return built


def test_the_wheel_holds_every_file_and_no_other(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("peftscape/")}
    assert held == on_disk()


def test_only_one_name_is_installed(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"peftscape"}


def test_the_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    """Its presets, methods and templates are found where an installation has them."""
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    code = """
import sys
from pathlib import Path
sys.path[:] = [sys.argv[1], *(p for p in sys.path if "src" not in Path(p).parts)]
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "").lower()
                    and "editable" not in getattr(f, "__name__", "").lower()]
import peftscape
assert Path(peftscape.__file__).is_relative_to(sys.argv[1]), peftscape.__file__
from peftscape.spaces.methods import methods
from peftscape.spaces.presets import preset, preset_names, textbook
print(*methods(), *(preset(n)["name"] for n in preset_names()), len(textbook()))
"""
    run = [sys.executable, "-P", "-c", code, str(tmp_path)]
    ran = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    from peftscape.spaces.methods import methods
    from peftscape.spaces.presets import preset_names, textbook

    assert ran.stdout.split() == [*methods(), *preset_names(), str(len(textbook()))]


def test_pyproject_names_every_package_on_disk() -> None:
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {ROOT / "src" / "peftscape"}
    for name in FOLDERS:
        folders |= {p.parent for p in (ROOT / name).rglob("*.py")} | {ROOT / name}
    known = {ROOT / table["package-dir"].get(name, "?") for name in table["packages"]}
    assert known == folders


def test_the_command_line_program_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"peftscape": "peftscape.cli:main"}
    assert project["license"] == "Apache-2.0"
    assert (ROOT / "LICENSE").read_text().lstrip().startswith("Apache License")
