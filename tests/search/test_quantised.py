"""Backbones in 4 bits: their weights against the paper's own rule, LoRA on them against HF peft, LoftQ's start."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from counted import kept_for
from exported import LABELS, WORDS, tokenizer
from searches import make_base, tiny
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
)

from peftscape.analysis.front import front
from peftscape.search import quantised
from peftscape.search.adapter import Adapter
from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.config import ModelConfig
from peftscape.search.encoding import EncodedSplit
from peftscape.search.export import Card, load, save
from peftscape.search.head import Head
from peftscape.search.lane import Lane, new_lane
from peftscape.search.merge import merged_weights
from peftscape.search.prepare import prepare
from peftscape.search.study import run_search
from peftscape.spaces.design import Design
from peftscape.spaces.kept import kept
from peftscape.spaces.profiles import PROFILES
from peftscape.spaces.words import InputError

_SHAPE: dict[str, Any] = {
    "vocab_size": len(WORDS), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 128, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "bert": BertConfig(**_SHAPE),
    "gpt2": GPT2Config(**_SHAPE, n_inner=128, bos_token_id=2, eos_token_id=3),
    "llama": LlamaConfig(**_SHAPE, num_key_value_heads=2),
}
# arXiv:2305.14314, appendix E.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
OUTPUTS = len(LABELS)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for family, config in CONFIGS.items():
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = AutoModel.from_config(config)
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    torch.nn.init.normal_(parameter, 0, 0.2)
        model.save_pretrained(root / family)
        tokenizer(family).save_pretrained(root / family)
    return {family: root / family for family in CONFIGS}


@pytest.fixture(scope="module")
def packed(folders: dict[str, Path]) -> dict[str, Backbone]:
    return {family: Backbone.load(path, dtype="nf4") for family, path in folders.items()}


def split() -> EncodedSplit:
    random = np.random.default_rng(2)
    ids = [random.integers(4, len(WORDS), size=n) for n in (5, 9, 3, 12)]
    return EncodedSplit(ids, None, np.array([0, 1, 2, 0]), 0, np.array([5, 9, 3, 12]))


def lane_in(base: Backbone, row: dict[str, Any], texts: EncodedSplit | None = None) -> tuple[Lane, Cohort]:
    head = Head(base, kind="class", outputs=OUTPUTS)
    made = new_lane(Design.from_json({"placements": [row]}), seed=0, steps=4, backbone=base, head=head)
    shared = Cohort(base, head, texts or split(), batch_size=4)
    prepare(made, shared)
    shared.admit(made)
    return made, shared


def logits(shared: Cohort) -> Tensor:
    return shared.logits([np.arange(4)], shared.train)[0]


@pytest.mark.parametrize("family", CONFIGS)
def test_weights_are_rounded_as_the_paper_says(
    family: str, packed: dict[str, Backbone], folders: dict[str, Path]
) -> None:
    """Blocks of 64 by their largest, to the nearest of 16 numbers; nothing outside the layers."""
    base, table = packed[family], torch.tensor(NF4)
    whole = Backbone.load(folders[family], dtype="float32")
    assert base.precision == "nf4"
    linears = [s for s in base.sites.sites if s.kind in ("q", "v", "o", "up", "down")]
    assert len(linears) == 10
    for site in linears:
        found, weight = base.frozen(site), whole.frozen(site)["weight"]
        rows = weight if site.span is None else whole.frozen(next(s for s in linears if s.path == site.path))["weight"]
        assert found["weight"].shape == rows.shape == (site.d_out, site.d_in)
        blocks = weight.reshape(-1, 64)
        largest = blocks.abs().amax(dim=1, keepdim=True)
        nearest = table[(blocks.unsqueeze(-1) / largest.unsqueeze(-1) - table).abs().argmin(dim=-1)]
        torch.testing.assert_close(found["weight"], (nearest * largest).view_as(weight), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["residual"](), weight - found["weight"])
        assert base.frozen(site)["weight"] is found["weight"], "restored once for all who hold it"
    for name, value in base.model.named_parameters():
        assert value.is_floating_point() == (value.dtype != torch.uint8)
        inside = any(f"{s.path}." in name for s in base.sites.sites if s.kind == "block")
        assert inside or value.is_floating_point(), name


def test_widths_that_cut_blocks_are_restored_right_or_refused(tmp_path: Path) -> None:
    """bitsandbytes 0.50 gets rows that are no multiple of 64 wrong where the processor has AVX-512."""
    config = copy.deepcopy(CONFIGS["bert"])
    config.intermediate_size = 96
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer("bert").save_pretrained(tmp_path)
    if not quantised._restores(96):
        with pytest.raises(InputError, match="4-bit linears of 96 inputs wrongly on this processor"):
            Backbone.load(tmp_path, dtype="nf4")
        return
    base = Backbone.load(tmp_path, dtype="nf4")
    site, whole = next(s for s in base.sites.sites if s.kind == "down"), Backbone.load(tmp_path, dtype="float32")
    lost = base.frozen(site)["weight"] - whole.frozen(site)["weight"]
    assert lost.norm() < 0.2 * whole.frozen(site)["weight"].norm()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_lora_on_it_is_hf_pefts(family: str, packed: dict[str, Backbone], folders: dict[str, Path]) -> None:
    """Outputs and gradients, with copied weights on a model that transformers quantised itself."""
    base = packed[family]
    own, shared = lane_in(base, {"method": "lora", "rank": 4, "alpha": 8, "sites": ["q", "v", "down"]})
    source = torch.Generator().manual_seed(3)
    for key, value in own.params.items():
        value.data.normal_(0, 0.1 if key.startswith("0/") else 0.5, generator=source)
    outside = ["bert.pooler.dense", "classifier", "score"]
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=outside)
    model = AutoModelForSequenceClassification.from_pretrained(
        folders[family], num_labels=OUTPUTS, quantization_config=settings, device_map="cpu", dtype=torch.float32,
        attn_implementation="eager",
    )  # fmt: skip
    for module in model.modules():  # in evaluation it would compute in bfloat16 where the processor has it
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    modules = [s.path.rpartition(".")[2] for s in base.sites.sites if s.kind in ("q", "v")]
    down = r"layer\.\d+\.output\.dense" if family == "bert" else r"down_proj"
    targets = rf".*({'|'.join(dict.fromkeys(modules))}|{down})$"
    theirs = peft.get_peft_model(
        model, peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets)
    ).eval()
    layers = {
        name.removeprefix(f"base_model.model.{base.sites.prefix}."): module
        for name, module in theirs.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {type(m).__name__ for m in layers.values()} == {"Linear4bit"}
    pairs: list[tuple[Tensor, Tensor]] = []
    for key, value in own.params.items():
        if key.startswith("head/"):
            name = key.removeprefix("head/").replace(".", ".modules_to_save.default.")
            there = theirs.get_parameter(f"base_model.model.{name}")
        else:
            _, _, path, which = key.split("/")
            there = getattr(layers[path], f"lora_{which}")["default"].weight
        there.data.copy_(value.detach())
        pairs.append((value, there))
    assert len(pairs) == len(layers) * 2 + len([k for k in own.params if k.startswith("head/")])
    found = logits(shared)
    wanted = torch.cat([theirs(input_ids=torch.from_numpy(ids)[None]).logits for ids in split().ids])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))
    found.square().sum().backward()  # type: ignore[no-untyped-call]
    wanted.square().sum().backward()  # type: ignore[no-untyped-call]
    for mine, there in pairs:
        assert mine.grad is not None
        assert there.grad is not None
        torch.testing.assert_close(mine.grad, there.grad, rtol=1e-4, atol=1e-5 * float(there.grad.abs().max()))
    shared.close()


def test_loftq_starts_nearer_to_the_whole_model(packed: dict[str, Backbone], folders: dict[str, Path]) -> None:
    base, whole = packed["llama"], Backbone.load(folders["llama"], dtype="float32")
    sites = ["q", "k", "v", "o", "gate", "up", "down"]
    row = {"rank": 32, "alpha": 16, "sites": sites}
    (own, loftq), (_, lora) = (lane_in(base, {"method": name, **row}) for name in ("loftq", "lora"))
    for site in (s for s in base.sites.sites if s.kind in sites):
        a, b = (own.params[f"0/{site.kind}/{site.path}/{n}"].detach() for n in "AB")
        lost = whole.frozen(site)["weight"] - base.frozen(site)["weight"]
        left = torch.linalg.svdvals(lost)[32:]
        assert float((lost - 0.5 * b @ a).norm()) == pytest.approx(float(left.norm()), rel=1e-3, abs=1e-4), (
            "nothing of the rank is nearer"
        )
    lora.close()
    _, plain = lane_in(whole, {"method": "head_only"})
    with torch.no_grad():
        wanted, near = logits(plain), logits(loftq)
        loftq.close()
        lora.admit(_)
        far = logits(lora)
    assert (near - wanted).norm() < 0.8 * (far - wanted).norm()
    lora.close()


@pytest.mark.parametrize(
    "row",
    [
        {"method": "dora"}, {"method": "pissa", "rank": 4}, {"method": "ia3"}, {"method": "fish_mask", "examples": 4},
        {"method": "lst", "size": 8}, {"method": "threshold_mask"}, {"method": "peft:LORA", "config": {"r": 2}},
    ],
    ids=lambda row: row["method"],
)  # fmt: skip
def test_methods_that_read_weights_start_where_the_backbone_is_and_train(
    row: dict[str, Any], packed: dict[str, Backbone]
) -> None:
    base = packed["bert"]
    bare, alone = lane_in(base, {"method": "head_only"})
    with torch.no_grad():
        wanted = logits(alone)
    alone.close()
    own, shared = lane_in(base, row)
    if own.design.placements[0].method.exact_start:
        with torch.no_grad():
            torch.testing.assert_close(logits(shared), wanted, rtol=1e-5, atol=1e-6)
    before = {key: value.detach().clone() for key, value in own.params.items()}
    for _ in range(2):
        shared.step()
    shared.close()
    assert own.failure is None
    assert bare.params.keys() < own.params.keys()
    assert any(not torch.equal(value, before[key]) for key, value in own.params.items() if key.startswith("0/"))


def test_what_is_kept_is_told_in_the_precision_that_it_computes_in(packed: dict[str, Backbone]) -> None:
    base, size = packed["bert"], 48
    ids = [np.random.default_rng(i).integers(4, len(WORDS), size=size) for i in range(4)]
    own, shared = lane_in(
        base, {"method": "lora"}, EncodedSplit(ids, None, np.array([0, 1, 2, 0]), 0, np.full(4, size))
    )
    model = [*base.model.parameters(), *base.model.buffers(), *own.params.values()]
    real = kept_for(model, lambda: shared.losses([np.arange(4)]).sum())[1]
    told = kept(
        own.design, base.sites, PROFILES["peftscape"], tokens=size, batch=4, dtype="nf4", compute=base.computation
    )
    assert told.total == pytest.approx(real, rel=0.05)


def test_a_search_on_it_ends_with_a_report_and_adapters_that_load(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", width=128)
    model = ModelConfig(source=str(base), dtype="nf4", head="mean")
    study = run_search(tiny(base, budget={"trials": 2}, model=model), tmp_path / "run")
    assert [record.state for record in study.records] == ["complete", "complete"]
    assert (tmp_path / "run" / "report.html").is_file()
    best = max(front(study.records, study.objectives), key=lambda record: record.validation or 0)
    assert best.retests
    assert load(tmp_path / "run" / "adapters" / str(best.number)).backbone.quantised == "nf4"


def test_an_adapter_comes_back_on_a_backbone_in_4_bits(packed: dict[str, Backbone], tmp_path: Path) -> None:
    base = packed["bert"]
    own, shared = lane_in(base, {"method": "lora"})
    shared.step()
    shared.close()
    card = Card(design=own.design, head="class", outputs=OUTPUTS, max_length=40)
    save(own.adapter(), card, base, shared.head, tmp_path)
    found = load(tmp_path)
    assert found.backbone.precision == "nf4"
    wanted = Adapter(card, base, shared.head, own.adapter()).encoded_logits(split())
    np.testing.assert_array_equal(found.encoded_logits(split()), wanted)


def test_what_cannot_be_is_refused(
    packed: dict[str, Backbone], folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = packed["bert"]
    full = Design.from_json({"placements": [{"method": "full_finetuning"}]})
    assert full.check(base.sites) == ["placements[0].sites: full_finetuning takes no model of this bert"]
    own, shared = lane_in(base, {"method": "lora"})
    shared.close()
    with pytest.raises(InputError, match="held as nf4"):
        merged_weights(own, base)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r'pip install "peftscape\[quant\]"'):
        Backbone.load(folders["bert"], dtype="nf4")
