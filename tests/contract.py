"""What every method inherits by being in `spaces/methods/`: the suite below runs on all that are discovered there.

A test file subclasses `MethodContract`. The examples of a method are made from its own knobs and sites, so that a new
file is covered without a line here.

Tolerances of packed against alone, over 12 steps: float64 as the issue has it, 1e-9 relative for each loss and 1e-9
max(|a|, 1e-3) for each trained value. In float32 and bfloat16 sums are taken in another order when lanes are stacked,
and AdamW makes an update of full size out of a gradient that is rounding: losses are held to `LOSS`, in bfloat16 over
the first half of the steps alone.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BertConfig, GPT2Config, LlamaConfig, PreTrainedConfig

from peftscape.search.adapter import Adapter
from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit
from peftscape.search.export import Card, load, save
from peftscape.search.head import Head
from peftscape.search.lane import HEAD, Lane, new_lane
from peftscape.search.prepare import prepare
from peftscape.spaces.design import Design
from peftscape.spaces.knobs import Choice, Ladder, Range
from peftscape.spaces.methods import methods
from peftscape.spaces.methods.base import Method
from peftscape.spaces.price import adapter_size, head_size
from peftscape.spaces.sites import SiteMap, site_map

STEPS, BATCH, OUTPUTS, VOCAB, LAYERS = 12, 3, 4, 60, 2
POINTS = 40  # at which a gradient is looked for
#: Compositions that a method may carry, and methods whose examples do, written `method+composition`.
COMPOSITIONS: dict[str, dict[str, Any]] = {
    "share": {"share": {"kept": 0.5}},
    "gate": {"gate": True},
    "drop": {"drop": 1},
}
COMPOSED = (
    "lora+share", "sequential_adapter+share", "prefix_tuning+share", "lora+gate", "parallel_adapter+gate",
    "prefix_tuning+gate", "lora+drop", "sequential_adapter+drop",
)  # fmt: skip
SEED = 3  # of the lanes that are compared with themselves alone
#: Largest relative difference of a loss between packed and alone.
LOSS = {"float64": 1e-9, "float32": 1e-5, "bfloat16": 2e-2}

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SHAPE),
    "gpt2": GPT2Config(**_SHAPE, n_inner=48),
    "llama": LlamaConfig(**_SHAPE, num_key_value_heads=2),
}
SITES: dict[str, SiteMap] = {family: site_map(config.to_dict()) for family, config in CONFIGS.items()}


# -- what the suite runs on


@functools.cache
def backbone(family: str, dtype: str = "float64") -> Backbone:
    """A tiny frozen model whose attention is uneven, as that of a trained one."""
    made = Backbone.from_config(CONFIGS[family], dtype=dtype)
    source = torch.Generator().manual_seed(1)
    for weight in made.model.parameters():
        wild = torch.empty(weight.shape, dtype=torch.float64).normal_(0, 0.2, generator=source)
        weight.data.add_(wild if weight.ndim > 1 else 0.1 * wild)
    return made


@functools.cache
def head(family: str, dtype: str = "float64") -> Head:
    return Head(backbone(family, dtype), kind="class", outputs=OUTPUTS)


@functools.cache
def split(size: int = 32) -> EncodedSplit:
    """Texts of 2 to 24 tokens, so that a batch spans two or three length classes."""
    random = np.random.default_rng(0)
    ids = [random.integers(3, VOCAB, size=random.integers(2, 25)) for _ in range(size)]
    lengths = np.array([len(row) for row in ids])
    return EncodedSplit(ids, None, random.integers(0, OUTPUTS, size=size), 0, lengths)


def cohort(family: str, dtype: str = "float64") -> Cohort:
    return Cohort(backbone(family, dtype), head(family, dtype), split(), batch_size=BATCH)


def lane(design: Design, seed: int, family: str, dtype: str = "float64", steps: int = STEPS) -> Lane:
    return new_lane(design, seed=seed, steps=steps, backbone=backbone(family, dtype), head=head(family, dtype))


def train(designs: Sequence[tuple[Design, int]], family: str, dtype: str = "float64") -> list[Lane]:
    """Train (design, seed) pairs together to their end."""
    shared = cohort(family, dtype)
    lanes = [lane(design, seed, family, dtype) for design, seed in designs]
    for one in lanes:
        prepare(one, shared)
    shared.admit(*lanes)
    for _ in range(STEPS):
        shared.step()
    shared.close()
    return lanes


@functools.cache
def trained_alone(design: Design, seed: int, family: str, dtype: str = "float64") -> Lane:
    return train([(design, seed)], family, dtype)[0]


# -- the examples of a method


def examples(name: str, family: str) -> list[Design]:
    """Designs with one method: unequal sizes, sites and layers, all choices of its knobs, masks where it has a size."""
    kind, sites = kind_of(name), SITES[family]
    name, _, composition = name.partition("+")
    own = [s for s in kind.default_sites if s in sites.kinds]
    every = [s for s in sites.kinds if s in kind.sites]
    found: dict[str, Design] = {}
    choices = [2 * len(d.values) for d in kind.domains().values() if isinstance(d, Choice)]
    for i in range(4 if composition else max(4, *choices, 4)):
        row: dict[str, Any] = {"method": name, "sites": every if i % 4 == 1 else own, "layers": [[1], "all"][i % 2]}
        for knob, domain in kind.domains().items():
            if knob == kind.size_knob:
                row[knob] = (2, 7, 5, 1)[i % 4]
            elif isinstance(domain, Choice):
                row[knob] = domain.values[i // 2 % len(domain.values)]  # two that share a group, of unequal size
            elif isinstance(domain, Range) and not domain.integer:
                row[knob] = (domain.low * domain.high) ** 0.5 if i % 2 else domain.ends()[0]
            elif isinstance(domain, Ladder | Range):
                row[knob] = getattr(kind(), knob)
        row |= COMPOSITIONS.get(composition, {})
        if kind.size_knob and i % 4 == 3 and not composition:
            row["mask"] = {"sparsity": 0.6, "score": "snip"}
        design = Design.from_json({"placements": [row] if row["sites"] else [], "training": {"lr": (1 + i) * 3e-3}})
        if design.placements and not design.check(sites):
            found[design.digest] = design
    return list(found.values())


def kind_of(name: str) -> type[Method]:
    """The method of examples, whatever they carry."""
    return methods()[name.partition("+")[0]]


def smallest(name: str, family: str) -> Design:
    """The example that is compared with itself alone: padded by others, masked where the method has a size."""
    return examples(name, family)[:4][-1]


@functools.cache
def combinations(family: str) -> list[Design]:
    """All packed methods in one design, in both orders; several on one site; masks beside them."""
    names = [n for n, kind in methods().items() if kind.execution == "packed" and not kind.alone]
    rows = [examples(n, family)[0].json()["placements"][0] for n in names if examples(n, family)]
    prefixes = [row for row in rows if row["sites"] == ["kv"]]  # a layer can have one
    rows = [row for row in rows if row not in prefixes[1:]]
    linears = [s for s in ("k", "v", "down") if s in SITES[family].kinds]
    twice = [
        {"method": "lora", "rank": 3, "sites": linears},
        {"method": "ia3", "sites": linears},
        {"method": "lora", "rank": 5, "sites": linears, "alpha": 2.0, "mask": {"sparsity": 0.5, "score": "magnitude"}},
    ]
    designs = [
        Design.from_json({"placements": found, "training": {"lr": 2e-3, "weight_decay": 0.1, "clip": 0.5}})
        for found in (rows, rows[::-1], twice)
    ]
    assert not [error for design in designs for error in design.check(SITES[family])]
    return designs


#: Each method on the encoder and on one decoder, in turn, where it can adapt them (the mixed cohorts run on all three);
#: and on the families that it cannot adapt.
ALL = [(name, family) for name in (*methods(), *COMPOSED) for family in CONFIGS]
POSSIBLE = [
    (name, family)
    for i, name in enumerate((*methods(), *COMPOSED))
    for family in ("bert", ("gpt2", "llama")[i % 2] if examples(name, ("gpt2", "llama")[i % 2]) else "llama")
    if examples(name, family)
]
PACKED = [pair for pair in POSSIBLE if kind_of(pair[0]).execution != "solo"]
IMPOSSIBLE = [pair for pair in ALL if not examples(*pair)]
on = functools.partial(pytest.mark.parametrize, ("name", "family"))


# -- comparing


def key_biases(design: Design, family: str) -> dict[str, slice]:
    """Where a key bias trains: it adds the same to all scores of a query, which a softmax does not see.

    Its gradient is zero in theory and rounding in practice. (Rotated keys, as Llama's, would be another matter.)
    """
    found = {}
    for site in SITES[family].sites:
        if site.kind == "k" and site.bias:
            columns = slice(*site.span) if site.span else slice(0, site.d_out)
            found |= {f"{i}/bias/{site.path}/b": columns for i in range(len(design.placements))}
    return found


def without_key_biases(tensors: dict[str, Tensor], design: Design, family: str) -> dict[str, Tensor]:
    named = key_biases(design, family)
    kept = {}
    for key, value in tensors.items():
        rows = torch.ones(value.shape, dtype=torch.bool)
        if key in named:
            rows[named[key]] = False
        kept[key] = value.detach()[rows]
    return kept


def assert_trained_alike(packed: Lane, alone: Lane, family: str, dtype: str = "float64") -> None:
    assert packed.failure is None
    assert len(packed.losses) == len(alone.losses) == STEPS
    # A learned mask follows its scores by jumps: rounding to 8 bits turns an entry over sooner or later.
    jumps = dtype == "bfloat16" and any(
        t.binary for p in packed.design.placements for _, _, _, t in p.tensors(SITES[family])
    )
    held = STEPS // 2 if jumps else STEPS
    np.testing.assert_allclose(
        packed.losses[:held], alone.losses[:held], rtol=LOSS[dtype], atol=0, err_msg=packed.design.label
    )
    assert packed.params.keys() == alone.params.keys()
    if dtype != "float64":
        return
    found = without_key_biases(packed.params, packed.design, family)
    for key, wanted in without_key_biases(alone.params, alone.design, family).items():
        allowed = 1e-9 * wanted.abs().clamp(min=1e-3)
        assert bool(((found[key] - wanted).abs() <= allowed).all()), key


def missed(reached: dict[str, Tensor], own: Lane, family: str) -> list[str]:
    """The tensors that no gradient has reached where it should, given where it has.

    Masks may leave an entry no way out; the other examples show that without one there is a way.
    """
    shares = any(p.share for p in own.design.placements)
    found = without_key_biases(reached, own.design, family)
    some = {key for key in found if own.masks or (shares and "score_" not in key)}
    return [key for key, entries in found.items() if not bool(entries.any() if key in some else entries.all())]


def move(lanes: Iterable[Lane], seed: int = 5, size: float = 0.2) -> None:
    """Put trained tensors at a random point; what a mask zeroes stays zero."""
    source = torch.Generator().manual_seed(seed)
    for one in lanes:
        for key, value in one.params.items():
            noise = torch.empty(value.shape, dtype=torch.float64).normal_(0, size, generator=source)
            value.data.add_(noise.to(value) * one.masks.get(key, torch.ones(())).to(value))


def logits(one: Lane, family: str, dtype: str = "float64") -> Tensor:
    alone = cohort(family, dtype)
    alone.admit(one)
    with torch.no_grad():
        found = alone.logits([np.arange(12)], split())[0]
    alone.close()
    return found


HEAD_ONLY = Design.from_json({})


# -- the suite


class MethodContract:
    """What a method owes. Subclass it in a test file."""

    def test_its_class_attributes_say_what_it_is(self) -> None:
        for name, kind in methods().items():
            assert kind.name == name
            assert set(kind.default_sites) <= kind.sites
            assert kind.size_knob is None or kind.size_knob in kind.domains()
            assert set(kind.domains()) <= set(kind().knobs())
            assert kind.__doc__
            for knob, domain in kind.domains().items():
                assert domain.param(knob, getattr(kind(), knob)), "a default lies in its own domain"

    def test_every_method_can_adapt_some_backbone(self) -> None:
        assert {name for name, _ in POSSIBLE} == {*methods(), *COMPOSED}

    @on(IMPOSSIBLE)
    def test_a_backbone_without_its_sites_is_refused_with_a_reason(self, name: str, family: str) -> None:
        errors = Design.from_json({"placements": [{"method": name}]}).check(SITES[family])
        assert [e for e in errors if e.startswith("placements[0].sites: ")], errors

    @on(POSSIBLE)
    def test_the_start_equals_the_backbone_where_it_says_so(self, name: str, family: str) -> None:
        bare = logits(lane(HEAD_ONLY, 3, family), family)
        for design in examples(name, family):
            started = logits(lane(design, 3, family), family)
            if kind_of(name).exact_start:
                assert torch.equal(started, bare), design.label
            else:
                assert not torch.allclose(started, bare, rtol=1e-6), design.label

    @on(POSSIBLE)
    def test_declared_counts_equal_what_a_lane_holds(self, name: str, family: str) -> None:
        for design in examples(name, family):
            built = lane(design, 0, family)
            trained = {k: int(built.masks[k].sum()) if k in built.masks else v.numel() for k, v in built.params.items()}
            on_head = sum(n for key, n in trained.items() if key.startswith(f"{HEAD}/"))
            assert adapter_size(design, SITES[family]) == sum(trained.values()) - on_head
            assert head_size(SITES[family], OUTPUTS, "class") == on_head == head(family).size

    @on(PACKED)
    def test_a_gradient_reaches_every_parameter_at_a_random_point(self, name: str, family: str) -> None:
        for design in examples(name, family):
            own, shared = lane(design, 2, family), cohort(family)
            prepare(own, shared)
            shared.admit(own)
            reached = {key: torch.zeros(value.shape, dtype=torch.bool) for key, value in own.params.items()}
            # At any one point a unit of a ReLU may be dead, an expert not drawn.
            for own.step in range(POINTS):
                if not missed(reached, own, family):
                    break
                move([own], seed=own.step)
                # Without its draws too, in which what is drawn seldom is there at once.
                without = shared.logits([np.arange(16)], split()).square().sum()
                terms = [shared.losses([np.arange(16)]).sum(), without, own.penalty()]
                torch.stack([term for term in terms if term is not None]).sum().backward()
                for key, value in own.params.items():
                    assert value.grad is not None, key
                    reached[key] |= value.grad != 0
            shared.close()
            assert not missed(reached, own, family), design.label

    @on(PACKED)
    def test_a_packed_lane_trains_as_if_alone(self, name: str, family: str) -> None:
        *others, own = examples(name, family)[:3]
        packed = train([*((other, seed) for seed, other in enumerate(others)), (own, SEED)], family)
        assert_trained_alike(packed[-1], trained_alone(own, SEED, family), family)

    @on(POSSIBLE)
    def test_its_file_brings_it_back(self, name: str, family: str, tmp_path: Path) -> None:
        base, on_top = backbone(family, "float32"), head(family, "float32")
        for i, design in enumerate(examples(name, family)[:4]):
            own, shared = lane(design, 1, family, "float32", steps=1), cohort(family, "float32")
            move([own])
            shared.admit(own)
            shared.step()  # its last: what a trained lane holds is what a file keeps
            shared.close()
            card = Card(design=design, head="class", outputs=OUTPUTS, max_length=40)
            wanted = Adapter(card, base, on_top, own.adapter()).encoded_logits(split())
            save(own.adapter(), card, base, on_top, tmp_path / str(i))
            found = load(tmp_path / str(i), model=base)
            np.testing.assert_array_equal(found.encoded_logits(split()), wanted)

    @on(POSSIBLE)
    def test_it_trains_in_the_precisions_that_users_run(self, name: str, family: str) -> None:
        dtype = "float32" if family == "bert" else "bfloat16"
        own, shared = lane(examples(name, family)[-1], 0, family, dtype, steps=20), cohort(family, dtype)
        before = {key: value.detach().clone() for key, value in own.params.items()}
        shared.admit(own)
        shared.step()
        shared.step()
        while own.design.placements[0].expands and not own.done:  # until each expert has been drawn
            if not any(torch.equal(value, before[key]) for key, value in own.params.items()):
                break
            shared.step()
        shared.close()
        assert own.failure is None
        for key, value in own.params.items():
            assert value.dtype == torch.float32, "trained tensors stay in float32"
            assert not torch.equal(value, before[key]), key
