"""Generation with what earlier tokens have left against whole texts run again, transformers' own, and lanes alone.

The models are tiny, with random weights far from a fresh start, in float64.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import peft
import pytest
import torch
from contract import CONFIGS as ONE_STACK
from peft_pair import lively
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, MistralConfig, PreTrainedConfig
from two_stacks import CONFIGS as TWO_STACKS

from peftscape.search import generation
from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import Asked, EncodedSplit
from peftscape.search.generation import generate, in_chunks, keeps_past, past_bytes, written
from peftscape.search.head import make_head
from peftscape.search.lane import new_lane
from peftscape.spaces.design import Design
from peftscape.spaces.methods import methods
from peftscape.spaces.sites import site_map

WORDS = 60
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": ONE_STACK["llama"],  # grouped queries, rotary positions
    "gpt2": ONE_STACK["gpt2"],
    "t5": TWO_STACKS["t5"],
    "bart": TWO_STACKS["bart"],
}
families = pytest.mark.parametrize("family", CONFIGS)
#: Of the sequence's own length classes several, and one token alone.
PROMPTS = [np.random.default_rng(n).integers(4, WORDS, size=n) for n in (3, 19, 9, 1)]
#: What reads more of a text than one token, or moves it.
READERS: list[dict[str, Any]] = [
    {"method": "loreft", "first": 2, "last": 2},
    {"method": "lst", "size": 8},
    {"method": "tiny_attention"},
    {"method": "tiny_attention", "sites": ["ffn"], "gate": True},
    {"method": "prompt_tuning", "length": 3},
    {"method": "prefix_tuning", "length": 2},
    {"method": "prefix_tuning", "length": 3, "positions": "keep", "gate": True},
    {"method": "parallel_adapter", "size": 4, "gate": True, "drop": 1},
    {"method": "boft", "gate": True},  # on both sides of a site
]


@functools.cache
def turns() -> dict[str, list[dict[str, Any]]]:
    """Every method in one family, in turn, or in the next that has a place for it."""
    found: dict[str, list[dict[str, Any]]] = {family: [] for family in CONFIGS}
    sites = {family: site_map(config.to_dict()) for family, config in CONFIGS.items()}
    order = list(CONFIGS)
    for i, (name, kind) in enumerate(methods().items()):
        row = {"method": name, **({"size": 4} if "size" in kind.domains() else {})}
        design = Design.from_json({"placements": [row]})
        taking = [family for family in order[i % 4 :] + order[: i % 4] if not design.check(sites[family])]
        if not design.solo:
            found[taking[0]].append(row)
    return found


def opened(config: PreTrainedConfig, rows: list[dict[str, Any]]) -> Cohort:
    backbone = Backbone.from_config(copy.deepcopy(config), dtype="float64")
    lively(backbone.model.parameters(), seed=1)
    head = make_head(backbone, kind="lm", outputs=2)
    lengths = np.array([len(row) for row in PROMPTS])
    split = EncodedSplit(PROMPTS, None, np.zeros(len(PROMPTS), dtype=np.float32), 0, lengths)
    cohort = Cohort(backbone, head, split, batch_size=2)
    designs = [Design.from_json({"placements": [row]}) for row in rows]
    lanes = [
        new_lane(design, seed=i, steps=9, backbone=backbone, head=head)
        for i, design in enumerate(designs)
        if not design.check(backbone.sites)
    ]
    for i, lane in enumerate(lanes):
        lively(lane.params.values(), seed=i)
    cohort.admit(*lanes)
    return cohort


def said_and_logits(
    cohort: Cohort, monkeypatch: pytest.MonkeyPatch, **how: Any
) -> tuple[list[list[list[int]]], list[Tensor]]:
    """What is written, and each step's logits of the texts that go on."""
    head, logits = cohort.head, []

    def words(states: Tensor) -> Tensor:
        logits.append(type(head).next_words(head, states))
        return logits[-1]

    monkeypatch.setattr(head, "next_words", words, raising=False)
    return generate(cohort, PROMPTS, most=5, **how), logits


def passed(cohort: Cohort, path: str) -> list[int]:
    """How many tokens enter a module, of each of its calls from now on."""
    counts: list[int] = []

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts.append((args[0] if args else kwargs["hidden_states"]).shape[:-1].numel())

    cohort.backbone.model.get_submodule(path).register_forward_pre_hook(count, with_kwargs=True)
    return counts


@families
def test_every_method_writes_what_it_writes_when_whole_texts_run_again(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cohort = opened(CONFIGS[family], [*READERS, *turns()[family]])
    assert len(cohort.lanes) >= len(READERS) - 2 + len(turns()[family])  # T5 has neither a ladder nor gated prefixes
    # Texts that end at different steps, all those of one lane at once.
    third = generate(cohort, PROMPTS, most=1, ends=frozenset())[2]
    ends = frozenset({*range(0, WORDS, 5), *(row[0] for row in third)})
    said, kept = said_and_logits(cohort, monkeypatch, ends=ends)
    again, whole = said_and_logits(cohort, monkeypatch, ends=ends, again=True)
    assert said == again
    assert not any(said[2])
    assert len({len(row) for lane in said for row in lane}) > 2
    for a, b in zip(kept, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    # Lanes and texts by themselves.
    pairs = list(zip(cohort.lanes, said, strict=True))[::6]
    cohort.close()
    for lane, texts in pairs:
        alone = Cohort(cohort.backbone, cohort.head, cohort.train, batch_size=2)
        alone.admit(lane)
        assert [generate(alone, [row], most=5, ends=ends)[0][0] for row in PROMPTS[::2]] == texts[::2]
        alone.close()


@families
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_what_is_written_is_what_transformers_writes_with_hf_peft(family: str) -> None:
    kinds = {"gpt2": ["o", "up"], "llama": ["q", "v", "down"]}.get(family, ["q", "v"])
    lora = {"method": "lora", "sites": kinds, "rank": 4, "alpha": 8}
    cohort = opened(CONFIGS[family], [{"method": "prefix_tuning", "length": 2}, {**lora, "rank": 2}, lora])
    number = next(i for i, lane in enumerate(cohort.lanes) if "r4" in lane.design.label)
    said = generate(cohort, PROMPTS, most=8, ends=frozenset())[number]

    two = cohort.backbone.sites.decoder_layers > 0
    config = copy.deepcopy(CONFIGS[family])
    config._attn_implementation = "eager"
    model = (AutoModelForSeq2SeqLM if two else AutoModelForCausalLM).from_config(config).double().eval()
    base = getattr(model, str(model.base_model_prefix)) if family != "t5" else model
    base.load_state_dict(cohort.backbone.model.state_dict(), strict=False)
    model.tie_weights()
    if not config.tie_word_embeddings:
        model.lm_head.weight.data.copy_(cohort.head.weights["lm_head.weight"])
    places = sorted({key.split("/")[-2] for key in cohort.lanes[number].params})
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=places, fan_in_fan_out=family == "gpt2")
    ).eval()
    for key, value in cohort.lanes[number].params.items():
        path, name = key.split("/")[-2:]
        (place,) = [n for n, _ in wrapped.named_parameters() if f"{path}.lora_{name}." in n]
        wrapped.get_parameter(place).data.copy_(value.detach())
    settings = wrapped.generation_config
    settings.eos_token_id = settings.forced_eos_token_id = None
    for prompt, row in zip(PROMPTS, said, strict=True):
        ids = torch.from_numpy(prompt)[None]
        with torch.no_grad():
            out = wrapped.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        assert out[0, 1 if two else len(prompt) :].tolist() == row
    assert len({tuple(row) for row in said}) > 1


@pytest.mark.parametrize("family", ["llama", "bart"])
def test_each_token_runs_once_and_texts_that_are_over_run_no_more(family: str) -> None:
    cohort = opened(CONFIGS[family], [{"method": "lora"}])
    blocks = [site.path for site in cohort.backbone.sites.sites if site.kind == "block"]
    counts, two = passed(cohort, blocks[-1]), family == "bart"
    read = passed(cohort, blocks[0]) if two else []
    (free,) = generate(cohort, PROMPTS, most=9, ends=frozenset())
    assert [len(row) for row in free] == [9] * 4
    prompts = sum(map(len, PROMPTS))
    assert sum(counts) == (4 if two else prompts) + 4 * 8  # linear: the last word said is not read
    assert read == [4 * 19] * two  # a source once, padded to the longest
    counts.clear()
    ends = frozenset({free[0][1], free[2][5]})
    (said,) = generate(cohort, PROMPTS, most=9, ends=ends)
    assert len({len(row) for row in said}) > 1
    # Each word said was read but for the ninth; the first came of the prompt.
    assert sum(counts) == (4 if two else prompts) + sum(min(len(row), 8) for row in said)


@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_a_window_moves_on_and_a_lane_alone_has_weights_or_a_model_of_its_own() -> None:
    shape = {k: getattr(CONFIGS["llama"], k) for k in ("vocab_size", "hidden_size", "intermediate_size")}
    window = MistralConfig(**shape, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, sliding_window=4)
    rows: list[tuple[PreTrainedConfig, dict[str, Any]]] = [
        (window, {"method": "prompt_tuning", "length": 2}), (window, {"method": "full_finetuning"}),
        (CONFIGS["bart"], {"method": "full_finetuning"}), (CONFIGS["t5"], {"method": "peft:lora"}),
        (CONFIGS["bart"], {"method": "peft:lora"}), (CONFIGS["llama"], {"method": "peft:lora"}),
    ]  # fmt: skip
    for config, row in rows:
        cohort = opened(config, [row])
        assert len(cohort.lanes) == 1
        said = generate(cohort, PROMPTS, most=6, ends=frozenset())
        assert said == generate(cohort, PROMPTS, most=6, ends=frozenset(), again=True)
        cohort.close()
    changing = copy.deepcopy(CONFIGS["llama"])
    changing.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert keeps_past(cohort.backbone)
    assert not keeps_past(Backbone.from_config(changing))


def test_as_many_prompts_at_once_as_their_keys_and_values_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = opened(CONFIGS["llama"], [{"method": "lora"}, {"method": "prompt_tuning", "length": 3}])
    assert past_bytes(cohort.backbone) == 2 * 2 * (2 * 8) * 8  # keys and values, layers, heads of 8, float64
    asked = Asked(PROMPTS, 5, frozenset(), str)
    wanted = generate(cohort, PROMPTS, most=5, ends=frozenset())
    sizes: list[int] = []

    def watched(cohort: Cohort, prompts: Any, **how: Any) -> Any:
        sizes.append(len(prompts))
        return generate(cohort, prompts, **how)

    monkeypatch.setattr(generation, "generate", watched)
    monkeypatch.setattr(generation, "PAST_BYTES", 2 * 2 * (19 + 5 + 3) * past_bytes(cohort.backbone))
    assert written(cohort, asked, 1 << 14).tolist() == [[str(row) for row in lane] for lane in wanted]
    assert sizes == [2, 2]


def test_no_more_is_kept_than_the_positions_take(monkeypatch: pytest.MonkeyPatch) -> None:
    cohort = opened(CONFIGS["gpt2"], [{"method": "lora"}, {"method": "prompt_tuning", "length": 3}])
    room = CONFIGS["gpt2"].max_position_embeddings - 19
    sizes: list[int] = []

    class Watched(generation.Past):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            sizes.append(self.size)

    monkeypatch.setattr(generation, "Past", Watched)
    monkeypatch.setattr(generation, "PAST_BYTES", 2 * 2 * (19 + room + 3) * past_bytes(cohort.backbone))
    chunks = list(in_chunks(cohort, PROMPTS[1:2] * 3, most=1 << 40, ends=frozenset(), tokens=1 << 14))
    assert [rows for rows, _ in chunks] == [[0, 1], [2]]
    assert [sorted({len(row) for texts in said for row in texts}) for _, said in chunks] == [[room - 3, room]] * 2
    assert sizes == [19 + room + 3 - 1] * 2
