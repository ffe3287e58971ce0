"""Impossible values anywhere in a space or a design: named errors, never a crash, a hang or an endless allocation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from typer.testing import CliRunner

from peftscape.cli import app
from peftscape.spaces.design import Design
from peftscape.spaces.knobs import MOST
from peftscape.spaces.methods import methods
from peftscape.spaces.sites import SiteMap, site_map
from peftscape.spaces.space_file import read_space
from peftscape.spaces.words import InputError

SPACE: dict[str, Any] = {
    "name": "x",
    "slots": [
        {
            "name": "a", "optional": True,
            "options": [{
                "method": "lora", "rank": {"ladder": [1, 16]}, "alpha": {"float": [1, 2]}, "layers": ["all", "top"],
                "sites": {"choice": [["q"], ["q", "v"]]}, "mask": {"sparsity": 0.5, "score": {"choice": ["snip"]}},
            }],
        },
        {
            "name": "b",
            "options": [{"method": "sequential_adapter", "size": {"reduction": [0, 3]}, "share": {"kept": 0.5},
                         "gate": True, "drop": {"int": [0, 1]}, "sites": ["ffn"]}],
        },
    ],
    "training": {"lr": {"log": [1e-4, 1e-2]}, "warmup": 0.1},
}  # fmt: skip
DESIGN: dict[str, Any] = {
    "placements": [
        {"method": "lora", "sites": ["q"], "layers": [0, 1], "rank": 8, "alpha": 16.0,
         "mask": {"sparsity": 0.5, "score": "random"}},
        {"method": "sequential_adapter", "layers": "0-1", "size": 4, "share": {"kept": 0.5}, "gate": True, "drop": 1},
    ],
    "training": {"lr": 1e-3, "epochs": 2},
}  # fmt: skip
WRONG: list[Any] = [
    None, True, -1, 10**400, math.nan, math.inf, "x", "", [], [["q"]], [{}], {}, {"choice": []}, {"choice": [[["q"]]]},
    {"ladder": [1.5, 4]}, {"ladder": [1, 10**30]}, {"int": [math.nan, 2]}, {"float": [0, math.inf]},
    {"reduction": [-1, 5]}, {"reduction": [0, 10**9]}, {"a": 1, "b": 2},
]  # fmt: skip


@pytest.fixture(scope="module")
def sites(base: Path) -> SiteMap:
    return site_map(str(base))


def changed(value: Any) -> Iterator[tuple[Any, Any]]:
    """The value with each of its parts replaced by each wrong one, and which."""
    for path in _paths(value):
        for wrong in WRONG:
            copied = copy.deepcopy(value)
            at = copied
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = wrong
            yield copied, (path, wrong)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from _paths(value[key], (*path, key))


def test_a_wrong_value_anywhere_in_a_space_is_named_or_harmless(sites: SiteMap) -> None:
    sampler, refused = optuna.samplers.RandomSampler(seed=0), 0
    for table, which in changed(SPACE):
        try:
            space = read_space(table, sites)
        except InputError:
            refused += 1
            continue
        assert isinstance(space.suggest(optuna.create_study(sampler=sampler).ask()).check(sites), list), which
        assert space.count()[0] >= 1, which
    assert refused > 500


def test_a_wrong_value_anywhere_in_a_design_is_named_or_harmless(sites: SiteMap) -> None:
    refused = 0
    for table, which in changed(DESIGN):
        try:
            design = Design.from_json(table)
        except InputError:
            refused += 1
            continue
        assert len(design.digest) == 16
        assert isinstance(design.check(sites), list), which
    assert refused > 200


def test_lists_of_lists_of_sites_are_named_with_what_to_write(sites: SiteMap) -> None:
    table = {"slots": [{"name": "a", "options": [{"method": "lora", "sites": [["q"], ["q", "v"]]}]}]}
    with pytest.raises(InputError, match=r"sites: a list of names was expected.*choice = \["):
        read_space(table, sites)


def test_no_size_of_any_method_is_too_large_to_be_refused(sites: SiteMap) -> None:
    """A billion for each whole number is refused before any tensor is made; what is just allowed is soon checked."""
    tried = 0
    for name, kind in methods().items():
        for knob in (k for k, v in kind().knobs().items() if type(v) is int):
            row, tried = {"method": name, knob: 10**9}, tried + 1
            with pytest.raises(InputError, match=rf"{knob}: "):
                Design.from_json({"placements": [row]})
            with pytest.raises(InputError, match=rf"{knob}: "):
                read_space({"slots": [{"name": "a", "options": [row]}]}, sites)
            assert isinstance(Design.from_json({"placements": [row | {knob: MOST}]}).check(sites), list)
    assert tried > 30


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"method": "adalora", "share": {"kept": 0.5}}, "share: adalora sets tensors of its sites itself"),
        ({"method": "dora", "share": {}}, "share: dora starts from the weights of each of its sites"),
        ({"method": "head_only", "share": {}}, "share: head_only has no tensors of sites"),
        ({"method": "full_finetuning", "drop": 1}, "drop: full_finetuning has the backbone to itself"),
    ],
)
def test_compositions_that_make_no_sense_are_refused_in_designs_and_spaces(
    sites: SiteMap, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words):
        Design.from_json({"placements": [row]})
    with pytest.raises(InputError, match=words):
        read_space({"slots": [{"name": "a", "options": [row]}]}, sites)


@pytest.mark.parametrize("name", ["x" * 600, "loop/run", "search.toml/run"])
def test_folders_that_cannot_be_are_told(tmp_path: Path, name: str) -> None:
    (tmp_path / "search.toml").write_text('[task]\nname = "trec6"\n[budget]\ntrials = 1\n')
    (tmp_path / "loop").symlink_to("loop")
    files = sorted(tmp_path.rglob("*"))
    result = CliRunner().invoke(app, ["search", str(tmp_path / "search.toml"), "--out", str(tmp_path / name)])
    assert result.exit_code == 2, result.output
    assert name in result.stderr
    assert sorted(tmp_path.rglob("*")) == files
