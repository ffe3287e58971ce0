"""Families as users have them: a saved folder is loaded, starts as transformers' own classifier and trains."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)  # fmt: skip

from peftscape.search.backbone import Backbone, resolve_dtype
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit, encode_split
from peftscape.search.head import Head
from peftscape.search.lane import Lane, new_lane
from peftscape.search.prepare import Look
from peftscape.search.task import Split
from peftscape.spaces.design import Design
from peftscape.spaces.sites import LINEARS
from peftscape.spaces.words import InputError

Saved = Callable[[str], Path]

OUTPUTS, ROWS = 3, 48
WORDS = ("[PAD] [UNK] [CLS] [SEP] who where when what is was the a of in city river year man").split()  # noqa: SIM905
TEXTS = ["who", "where is the city of the river", "when was the man in a city", "what is a year in the river of man"]
_SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": ROWS, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
_GROUPED = {**_SHAPE, "num_key_value_heads": 2, "head_dim": 8}
_RELATIVE = {
    **_SHAPE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
    "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", _SHAPE),
    "roberta": ("roberta", {**_SHAPE, "max_position_embeddings": ROWS + 1}),
    "distilbert": ("distilbert", {**_SHAPE, "hidden_dim": 48}),
    "electra": ("electra", {**_SHAPE, "embedding_size": 16}),
    "deberta-v2": ("deberta-v2", _RELATIVE),
    "deberta-v2 sharing keys": ("deberta-v2", {**_RELATIVE, "share_att_key": True, "norm_rel_ebd": "layer_norm"}),
    "gpt2": ("gpt2", {**_SHAPE, "n_inner": 48}),
    "llama": ("llama", _GROUPED),
    "mistral": ("mistral", {**_GROUPED, "sliding_window": 6}),
    "qwen2": ("qwen2", _GROUPED),
    "gemma": ("gemma", {**_GROUPED, "head_dim": 16}),
    "gemma2": ("gemma2", {**_GROUPED, "sliding_window": 6, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "gemma3 both ways": (
        "gemma3_text",
        {**_GROUPED, "head_dim": 16, "sliding_window": 6, "use_bidirectional_attention": True},
    ),
}
CAUSAL = ("gpt2", "llama", "mistral", "qwen2", "gemma", "gemma2")
NO_PAD = ("gpt2", "llama")
families = pytest.mark.parametrize("family", SETTINGS)


def config(family: str) -> PreTrainedConfig:
    kind, settings = SETTINGS[family]
    found = AutoConfig.for_model(kind, **settings)
    if family in NO_PAD:
        found.pad_token_id = None
    return found


def lively(model: torch.nn.Module) -> None:
    """Weights far from a fresh start, so that attention is uneven and norms differ."""
    source = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.add_(torch.empty(weight.shape).normal_(0, 0.2 if weight.ndim > 1 else 0.05, generator=source))


def tokenizer(family: str) -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if family not in CAUSAL:
        inner.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    types = ["token_type_ids"] if family in ("bert", "electra") else []
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]",
        model_input_names=["input_ids", "attention_mask", *types],
        **({} if family in NO_PAD else {"pad_token": "[PAD]"}),
    )  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """A family's tiny base model with a tokenizer, as it lies in a hub's folder."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family: str) -> Path:
        path = root / family
        if not path.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = AutoModel.from_config(config(family))
            lively(model)
            model.save_pretrained(path)
            tokenizer(family).save_pretrained(path)
        return path

    return folder


def encoded(backbone: Backbone) -> EncodedSplit:
    texts = Split(TEXTS, None, np.arange(len(TEXTS)) % OUTPUTS)
    # transformers reads every Qwen2 folder as byte pairs, whatever tokenizer lies in it.
    words = tokenizer("qwen2") if backbone.sites.family == "qwen2" else backbone.tokenizer
    return encode_split(texts, words, 32)


def opened(path: Path) -> tuple[Backbone, Head, Cohort]:
    backbone = Backbone.load(path, dtype="float32")
    head = Head(backbone, kind="class", outputs=OUTPUTS)
    return backbone, head, Cohort(backbone, head, encoded(backbone), batch_size=2)


def several(backbone: Backbone) -> list[Design]:
    """Designs of this backbone: each method that it can take, alone and then all in one."""
    rows: list[dict[str, Any]] = [
        {"method": "lora", "rank": 3, "sites": [k for k in ("q", "k", "v", "o", "up") if k in backbone.sites.kinds]},
        {"method": "sequential_adapter", "size": 4},
        {"method": "parallel_adapter", "size": 4, "sites": ["attention", "ffn"]},
        {"method": "ia3"},
    ]
    rows += [
        {"method": name, **({"length": 3} if name != "bitfit" else {})}
        for name, kind in (("bitfit", "bias"), ("prefix_tuning", "kv"), ("prompt_tuning", "input"))
        if kind in backbone.sites.kinds
    ]
    designs = [Design.from_json({"placements": p}) for p in ([], *([row] for row in rows), rows)]
    assert not [e for d in designs for e in d.check(backbone.sites)]
    return designs


def lane(design: Design, backbone: Backbone, head: Head, steps: int = 3) -> Lane:
    return new_lane(design, seed=1, steps=steps, backbone=backbone, head=head)


def classifier(path: Path, own: Lane) -> Any:
    """transformers' own classifier with the lane's head."""
    model = AutoModelForSequenceClassification.from_pretrained(
        path, num_labels=OUTPUTS, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for key, value in own.params.items():
        if key.startswith("head/"):
            model.get_parameter(key.removeprefix("head/")).data.copy_(value.detach())
    return model


def theirs(path: Path, own: Lane, ids: list[np.ndarray[Any, Any]]) -> Tensor:
    """What transformers' own classifier says, one text at a time."""
    model = classifier(path, own)
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.from_numpy(row)[None]).logits for row in ids])


@families
def test_a_lane_starts_as_transformers_own_classifier_and_trains(family: str, saved: Saved) -> None:
    backbone, head, cohort = opened(saved(family))
    lanes = [lane(design, backbone, head) for design in several(backbone)]
    starts = [i for i, own in enumerate(lanes) if all(p.method.exact_start for p in own.design.placements)]
    cohort.admit(*lanes)
    with torch.no_grad():
        logits = dict(
            zip(map(id, cohort.lanes), cohort.logits([np.arange(len(TEXTS))] * len(lanes), cohort.train), strict=True)
        )
    wanted = theirs(saved(family), lanes[0], cohort.train.ids)
    for i in starts:
        torch.testing.assert_close(logits[id(lanes[i])], wanted, rtol=1e-4, atol=1e-5)
    for _ in range(3):
        cohort.step()
    cohort.close()
    for own in lanes:
        assert (own.failure, own.step, len(own.losses)) == (None, 3, 3)
    if backbone.sites.attention_interface:
        assert set(backbone.attending.calls) == set(range(3)), "attention of every layer goes through ours"


@families
def test_a_look_at_the_data_gives_each_texts_own_gradient(family: str, saved: Saved) -> None:
    backbone, head, cohort = opened(saved(family))
    own = lane(Design(), backbone, head)
    sites = tuple(site for site in backbone.sites.sites if site.kind in LINEARS)
    squares = Look(own, cohort, sites).squared_gradients(len(TEXTS))
    means = Look(own, cohort, sites).gradients(len(TEXTS))
    cohort.close()
    model = classifier(saved(family), own)
    weights = [model.base_model.get_submodule(site.path).weight for site in sites]
    rows = [
        torch.autograd.grad(model(input_ids=torch.from_numpy(ids)[None], labels=torch.tensor([target])).loss, weights)
        for ids, target in zip(cohort.train.ids, cohort.train.targets.tolist(), strict=True)
    ]
    for site, square, mean, *each in zip(sites, squares, means, *rows, strict=True):
        wanted = torch.stack([g.T if site.transposed else g for g in each])
        wanted = wanted[:, slice(*site.span)] if site.span else wanted
        torch.testing.assert_close(square, wanted.square().mean(dim=0), rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(mean, wanted.mean(dim=0), rtol=1e-3, atol=1e-5)


@families
def test_packed_equals_alone_on_every_family(family: str, saved: Saved) -> None:
    losses = []
    for together in (True, False):
        backbone, head, cohort = opened(saved(family))
        lanes = [lane(design, backbone, head) for design in several(backbone)[-2:]]
        for chosen in [lanes] if together else [[own] for own in lanes]:
            cohort.admit(*chosen)
            for _ in range(3):
                cohort.step()
            cohort.retire(*chosen)
        losses.append([own.losses for own in lanes])
    np.testing.assert_allclose(*losses, rtol=1e-5)


@families
def test_text_longer_than_the_positions_is_cut_but_for_its_closing_token(family: str, saved: Saved) -> None:
    backbone, head, cohort = opened(saved(family))
    limit = backbone.sites.max_positions
    ids = np.random.default_rng(0).integers(4, len(WORDS), size=ROWS + 30)
    own, longer = lane(Design.from_json({}), backbone, head), EncodedSplit([ids], None, np.zeros(1), 0, np.array([1]))
    cohort.admit(own)
    with torch.no_grad():
        found = cohort.logits([np.arange(1)], longer)[0]
    cohort.close()
    if limit is None:  # rotary or relative positions have no end
        kept = ids
    else:
        assert limit == ROWS
        kept = np.r_[ids[: limit - 1], ids[-1]]
    torch.testing.assert_close(found, theirs(saved(family), own, [kept]), rtol=1e-4, atol=1e-5)


def test_texts_are_cut_to_what_prompts_and_prefixes_leave(saved: Saved) -> None:
    backbone, head, cohort = opened(saved("bert"))
    rows = [{"method": "prompt_tuning", "length": 5}, {"method": "prefix_tuning", "length": 7}]
    own = lane(Design.from_json({"placements": rows}), backbone, head)
    ids = np.random.default_rng(0).integers(4, len(WORDS), size=ROWS + 30)
    kept = np.r_[ids[: ROWS - 12 - 1], ids[-1]]
    cohort.admit(own)
    with torch.no_grad():
        found = [
            cohort.logits([np.arange(1)], EncodedSplit([row], None, np.zeros(1), 0, np.array([1])))[0]
            for row in (ids, kept)
        ]
    cohort.close()
    assert torch.equal(*found)


# -- what is refused


@pytest.mark.parametrize("family", ["deberta-v2", "deberta-v2 sharing keys"])
def test_deberta_refuses_prefixes_and_prompts_and_says_why(family: str, saved: Saved) -> None:
    backbone = Backbone.load(saved(family), dtype="float32")
    for name, kind, reason in (
        ("prefix_tuning", "kv", "DeBERTa-v2 computes its attention itself"),
        ("prompt_tuning", "input", "relative positions"),
    ):
        assert kind not in backbone.sites.kinds
        [error] = Design.from_json({"placements": [{"method": name}]}).check(backbone.sites)
        assert error.startswith(f"placements[0].sites: {kind}: ")
        assert reason in error


def test_a_checkpoint_without_a_pooler_is_refused_for_the_class_head(tmp_path: Path) -> None:
    model = BertModel(config("bert"), add_pooling_layer=False)
    model.save_pretrained(tmp_path)
    tokenizer("bert").save_pretrained(tmp_path)
    backbone = Backbone.load(tmp_path, dtype="float32")
    with pytest.raises(InputError, match='its checkpoint has no pooler, which its head reads; use head = "mean"'):
        Head(backbone, kind="class", outputs=2)
    head = Head(backbone, kind="mean", outputs=2)
    cohort = Cohort(backbone, head, encoded(backbone), batch_size=2)
    assert head.shapes == {"weight": (2, 32), "bias": (2,)}
    cohort.close()


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path, saved: Saved) -> None:
    from safetensors.torch import load_file, save_file

    for file in saved("bert").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.attention.self.query.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks weights of BertModel: encoder\.layer\.1\.attention\.self\.query"):
        Backbone.load(tmp_path, dtype="float32")


def test_what_is_not_a_model_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(InputError) as error:
        Backbone.load(tmp_path / "nowhere")
    assert "nowhere" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(InputError):
        Backbone.load(tmp_path)


def test_a_dtype_is_named_or_chosen_by_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    import peftscape.search.backbone as module

    for known in ("float32", "bfloat16", "float64"):
        assert resolve_dtype(known) == known
    for there, chosen in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(module, "has_bfloat16", lambda there=there: there)
        assert resolve_dtype("auto") == chosen
    with pytest.raises(InputError, match='no dtype "half"'):
        resolve_dtype("half")


# -- what is kept


def test_a_backbone_is_frozen_and_trained_values_are_float32(saved: Saved) -> None:
    backbone = Backbone.load(saved("llama"), dtype="bfloat16")
    assert not any(p.requires_grad for p in backbone.model.parameters())
    assert not backbone.model.training
    assert (backbone.dtype, backbone.master_dtype) == (torch.bfloat16, torch.float32)
    assert backbone.tokenizer.pad_token is None


def test_token_types_reach_the_model(saved: Saved) -> None:
    backbone, head, cohort = opened(saved("bert"))
    pairs = Split(TEXTS, TEXTS[::-1], np.zeros(len(TEXTS), dtype=np.int64))
    split = encode_split(pairs, backbone.tokenizer, 32)
    assert split.types is not None
    own = lane(Design.from_json({}), backbone, head)
    cohort.admit(own)
    with torch.no_grad():
        found = cohort.logits([np.arange(len(TEXTS))], split)[0]
    cohort.close()
    model: Any = AutoModelForSequenceClassification.from_pretrained(saved("bert"), num_labels=OUTPUTS).eval()
    for key, value in own.params.items():
        model.get_parameter(key.removeprefix("head/")).data.copy_(value.detach())
    batch = copy.copy(backbone.tokenizer)(TEXTS, TEXTS[::-1], padding=True, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(found, model(**batch).logits, rtol=1e-4, atol=1e-5)
