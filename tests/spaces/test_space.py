"""Spaces: what they suggest they can tell back, knobs come with their methods, and mistakes are named all at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import optuna
import pytest

from peftscape.spaces.design import Design
from peftscape.spaces.methods import methods
from peftscape.spaces.presets import designs, preset_names, textbook
from peftscape.spaces.sites import SiteMap, site_map
from peftscape.spaces.space import Space
from peftscape.spaces.space_file import read_space
from peftscape.spaces.words import InputError

BERT = {
    "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "gpt2": {"model_type": "gpt2", "n_embd": 128, "n_layer": 5, "n_head": 4, "n_positions": 256, "vocab_size": 99},
    "llama": {
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8,
        "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 99, "max_position_embeddings": 512,
    },
    "deberta": {**BERT, "model_type": "deberta-v2", "num_hidden_layers": 4, "relative_attention": True},
}  # fmt: skip
SITES: dict[str, SiteMap] = {name: site_map(config) for name, config in CONFIGS.items()}


def small(**table: Any) -> SiteMap:
    return site_map({**BERT, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, **table})


def random_trials(count: int) -> Iterator[optuna.Trial]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(count):
        yield study.ask()


def suggested(space: Space, params: dict[str, Any]) -> tuple[Design, dict[str, Any]]:
    """The design of enqueued parameters, and the parameters that were really asked for."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    study.enqueue_trial(params)
    trial = study.ask()
    return space.suggest(trial), trial.params


# -- there and back


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize("name", preset_names())
def test_parameters_of_a_design_suggest_it_again(name: str, family: str) -> None:
    space = read_space(name, SITES[family])
    seen = set()
    for trial in random_trials(60):
        design = space.suggest(trial)
        params = space.params(design)
        again, asked = suggested(space, params)
        assert again == design
        assert asked == params, "every parameter that `params` names is asked for, and no other"
        assert Design.from_json(design.json()) == design
        seen.add(design.digest)
    assert len(seen) > 20


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize("name", preset_names())
def test_what_a_space_suggests_is_possible_but_for_sizes(name: str, family: str) -> None:
    for trial in random_trials(60):
        errors = read_space(name, SITES[family]).suggest(trial).check(SITES[family])
        assert all("wider" in e or "larger" in e or "positions" in e for e in errors)


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize("name", preset_names())
def test_knobs_appear_only_where_their_method_does(name: str, family: str) -> None:
    space = read_space(name, SITES[family])
    options = {o.name: o.method for slot in space.slots for o in slot.options}
    optional = {o.name for slot in space.slots if slot.choice() for o in slot.options}
    for trial in random_trials(60):
        design = space.suggest(trial)
        methods_in = {p.method.name for p in design.placements}
        for asked in trial.params:
            owner = next((o for o in options if asked.startswith(f"{o}.")), None)
            if owner is not None and owner in optional:
                chosen = next(s for s in space.slots for o in s.options if o.name == owner)
                assert trial.params[chosen.name] == options[owner]
            else:
                assert owner or asked.split(".")[0] in ("training", "layers", *(s.name for s in space.slots))
        for placement in methods_in:
            assert placement in options.values()
        for owner in options:
            score, sparsity = f"{owner}.mask.score", f"{owner}.mask.sparsity"
            assert (score in trial.params) == bool(trial.params.get(sparsity)), "a score needs a mask"


def test_one_name_always_means_one_distribution() -> None:
    """TPE with groups needs it, and so does every report on importances."""
    for name in preset_names():
        found: dict[str, Any] = {}
        space = read_space(name, SITES["bert"])
        for trial in random_trials(80):
            space.suggest(trial)
            for key, distribution in trial.distributions.items():
                assert found.setdefault(key, distribution) == distribution


# -- textbook designs


@pytest.mark.parametrize("name", textbook())
def test_textbook_designs_are_possible_on_a_bert(name: str) -> None:
    assert textbook()[name].check(SITES["bert"]) == []


@pytest.mark.parametrize("name", designs("textbook"))
def test_the_unified_space_has_every_textbook_design(name: str) -> None:
    space, design = read_space("unified", SITES["bert"]), textbook()[name]
    again, _ = suggested(space, space.params(design))
    assert again.digest == design.digest


def test_a_design_outside_a_space_is_refused_with_what_is_outside() -> None:
    unified, lora = (read_space(name, SITES["bert"]) for name in ("unified", "lora"))

    def outside(space: Space, *placements: dict[str, Any], lr: float = 1e-3) -> str:
        design = Design.from_json({"placements": list(placements), "training": {"lr": lr}})
        with pytest.raises(ValueError) as error:  # noqa: PT011
            space.params(design)
        return str(error.value)

    assert "rank: 3 is not a power of two" in outside(unified, {"method": "lora", "rank": 3})
    assert "lr: 1.0 is not between" in outside(unified, lr=1.0)
    assert "layers" in outside(lora, {"method": "lora", "layers": [0, 5]})
    assert "no slot of lora is left for bitfit" in outside(lora, {"method": "lora"}, {"method": "bitfit"})
    assert "no slot of unified is left" in outside(unified, {"method": "lora"}, {"method": "ia3"})
    assert "no masks" in outside(lora, {"method": "lora", "mask": {"sparsity": 0.5}})
    assert "cannot be empty" in outside(lora)


# -- presets by their papers


def test_autopeft_is_zhou_et_al_2023() -> None:
    space = read_space("autopeft", SITES["bert"])
    serial, parallel, prefix = (slot.options[0] for slot in space.slots)
    reductions = [768 >> k for k in range(11)]
    assert reductions[0] == 768
    assert reductions[-1] == 0
    for option, knob in ((serial, "size"), (parallel, "size"), (prefix, "length")):
        domain = option.knobs[knob]
        found = {domain.suggest(optuna.trial.FixedTrial({"x.reduction": k}), "x") for k in range(11)}
        assert sorted(found) == sorted(reductions)
        assert domain.count() == 11
    # One bit a layer, shared by all three.
    assert space.count() == (11**3 * 2**12, 1)


def test_size_zero_and_no_layer_mean_absent() -> None:
    space = read_space("autopeft", SITES["bert"])
    bits = {f"layers.{i}": i in (1, 11) for i in range(12)}
    sizes = {"sequential_adapter.size.reduction": 10, "parallel_adapter.size.reduction": 4}
    params = {**bits, **sizes, "prefix_tuning.length.reduction": 10, "training.lr": 1e-3}
    design, _ = suggested(space, params)
    assert [(p.method.name, p.layers) for p in design.placements] == [("parallel_adapter", (1, 11))]
    assert design.placements[0].method.knobs()["size"] == 48
    assert space.params(design) == params

    design, _ = suggested(space, {**params, **dict.fromkeys(bits, False)})
    assert design.placements == ()
    again, _ = suggested(space, space.params(design))
    assert again == design


def test_slots_that_are_empty_make_head_only() -> None:
    space = read_space("unified", SITES["bert"])
    empty = {slot.name: "none" for slot in space.slots}
    design, asked = suggested(space, {**empty, "training.lr": 1e-3})
    assert design.placements == ()
    assert set(asked) == {*empty, "training.lr"}
    assert space.params(Design.from_json({"placements": [{"method": "head_only"}]})) == asked


# -- what a backbone cannot do


def test_options_that_a_backbone_refuses_are_dropped_and_named() -> None:
    llama = read_space("unified", SITES["llama"])
    assert llama.dropped == ("bitfit on bias: this model has no biases",)
    assert all(o.method != "bitfit" for slot in llama.slots for o in slot.options)
    deberta = read_space("unified", SITES["deberta"])
    assert {d.split(":")[0] for d in deberta.dropped} == {"prefix_tuning on kv", "prompt_tuning on input"}
    for trial in random_trials(40):
        names = {p.method.name for p in deberta.suggest(trial).placements}
        assert not names & {"prefix_tuning", "prompt_tuning"}


# -- counting


class Branch:
    """A trial that takes one path through all that can be asked, and knows the next path."""

    def __init__(self, path: list[int]) -> None:
        self.path, self.asked = path, []

    def _take(self, count: int) -> int:
        at = len(self.asked)
        self.asked.append(count)
        return self.path[at] if at < len(self.path) else 0

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        return list(choices)[self._take(len(choices))]

    def suggest_int(self, name: str, low: int, high: int, log: bool = False) -> int:
        return low + self._take(high - low + 1)

    def suggest_float(self, name: str, low: float, high: float, log: bool = False) -> float:
        return low

    def next(self) -> list[int] | None:
        taken = [self.path[i] if i < len(self.path) else 0 for i in range(len(self.asked))]
        while taken and taken[-1] == self.asked[len(taken) - 1] - 1:
            taken.pop()
        return [*taken[:-1], taken[-1] + 1] if taken else None


def enumerate_designs(space: Space) -> set[str]:
    found: set[str] = set()
    path: list[int] | None = []
    while path is not None:
        branch = Branch(path)
        found.add(space.suggest(branch).digest)  # type: ignore[arg-type]
        path = branch.next()
    return found


SLOTS: list[dict[str, Any]] = [
    {
        "name": "weights", "optional": True, "options": [
            {
                "method": "lora", "rank": {"ladder": [1, 8]}, "alpha": 4.0, "layers": ["all", "top", "alternate"],
                "sites": {"choice": [["q"], ["q", "v"]]},
                "mask": {"sparsity": {"choice": [0.0, 0.5]}, "score": {"choice": ["random", "snip"]}},
            },
            {"method": "ia3", "layers": ["top", "bottom"]},
        ],
    },
    {"name": "adapter", "options": [{"method": "parallel_adapter", "size": {"int": [1, 3]}, "activation": "gelu"}]},
]  # fmt: skip


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_count_is_what_enumeration_finds(layers: int) -> None:
    space = read_space({"slots": SLOTS, "training": {"lr": {"choice": [1e-3, 1e-2]}}}, small(num_hidden_layers=layers))
    total, continuous = space.count()
    assert continuous == 0
    assert len(enumerate_designs(space)) == total


def test_continuous_knobs_are_counted_apart() -> None:
    slots = [SLOTS[0], {**SLOTS[1], "options": [{**SLOTS[1]["options"][0], "scale": {"log": [0.5, 4.0]}}]}]
    sites = small(num_hidden_layers=2)
    space = read_space({"slots": slots, "training": {"lr": {"log": [1e-4, 1e-2]}}}, sites)
    assert space.count() == (read_space({"slots": SLOTS}, sites).count()[0], 2)


@pytest.mark.parametrize("shared", [True, False])
def test_bits_count_every_subset_of_layers(shared: bool) -> None:
    table: dict[str, Any] = {"slots": [{"name": "a", "options": [{"method": "sequential_adapter", "size": 2}]}]}
    if shared:
        table["layers"] = "bits"
    else:
        table["slots"][0]["options"][0]["layers"] = "bits"
    space = read_space(table, small(num_hidden_layers=5))
    assert space.count() == (2**5, 0)
    assert len(enumerate_designs(space)) == 2**5


def test_the_ends_of_every_slot_are_in_the_space() -> None:
    for name, family in itertools.product(preset_names(), SITES):
        space = read_space(name, SITES[family])
        for slot, held in space.ends():
            assert held, slot.name
            for placement in held:
                options = {o.method: o for o in slot.options}
                if placement is not None and space.layers is None:
                    assert options[placement.method.name].params(placement)


def test_a_preset_can_be_changed_in_part() -> None:
    space = read_space({"preset": "lora", "training": {"lr": 1e-3}}, SITES["bert"])
    whole = read_space("lora", SITES["bert"])
    assert space.slots == whole.slots
    assert space.training == {"lr": 1e-3}
    assert [space.count()[1], whole.count()[1]] == [0, 1]


def test_presets_name_what_they_are_and_use_methods_that_exist() -> None:
    assert {"unified", "lora", "autopeft"} <= set(preset_names())
    for name in preset_names():
        space = read_space(name, SITES["bert"])
        assert space.name == name
        assert {o.method for slot in space.slots for o in slot.options} <= set(methods())
    used = {o.method for slot in read_space("unified", SITES["bert"]).slots for o in slot.options}
    assert used >= {p.method.name for design in designs("textbook").values() for p in design.placements}


@pytest.mark.parametrize("alpha", [8, {"choice": [8, 16]}, {"int": [8, 8]}, {"log": [8, 8]}])
def test_a_whole_number_for_a_float_is_the_same_design(alpha: Any) -> None:
    table = {
        "slots": [{"name": "a", "options": [{"method": "lora", "rank": 4, "alpha": alpha}]}],
        "training": {"lr": 1},
    }
    space = read_space(table, SITES["bert"])
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=3))
    design = space.suggest(study.ask())
    assert Design.from_json(design.json()).digest == design.digest
    assert suggested(space, space.params(design))[0].digest == design.digest


def test_only_a_size_of_zero_leaves_a_method_out() -> None:
    """Zero is a value of other knobs: LoReFT's first tokens, AdaMix's agreement."""
    sites = site_map({"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4})
    rows: list[dict[str, Any]] = [{"method": "loreft", "first": 0, "last": 7}, {"method": "adamix", "agreement": 0.0}]
    for row in rows:
        space = read_space({"slots": [{"name": "one", "options": [row]}], "training": {"lr": 1e-3}}, sites)
        design = space.suggest(optuna.trial.FixedTrial({}))
        assert [p.method.name for p in design.placements] == [row["method"]]
        assert space.params(design) == {}


def test_a_mask_without_a_matrix_is_refused() -> None:
    sites = site_map({"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4})
    masked = {"method": "vera", "rank": 4, "mask": {"sparsity": 0.5}}
    try:
        errors = Design.from_json({"placements": [masked]}).check(sites)
    except InputError as error:
        errors = list(error.errors)
    assert any("no matrix to mask" in error for error in errors)
