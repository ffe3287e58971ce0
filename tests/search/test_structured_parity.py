"""Products, rotations and norms compute what HF peft computes with copied weights: outputs and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import pytest
import torch
from peft_pair import CONFIGS, DOWN, MODULES, Pair, close, design, grad
from torch import Tensor
from transformers import Gemma3TextConfig, Qwen3Config

from peftscape.spaces.sites import Site

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    # BOFT looks for its CUDA extension, and does with one factor where there is none.
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
]

RANK = 4
SHAPE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "pad_token_id", "num_key_value_heads",
)  # fmt: skip
Read = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Case:
    """A placement of ours, peft's configuration, and for each tensor of ours where peft holds it.

    A product of four small factors has gradients that are lost in rounding: they can be made `larger`.
    """

    placement: dict[str, Any]
    config: type[peft.PeftConfig]
    entries: dict[str, Any]
    tensors: dict[str, Read]
    larger: float = 1.0


def named(*names: str, prefix: str) -> dict[str, Read]:
    return {name: lambda layer, name=name: getattr(layer, f"{prefix}{name}").default for name in names}  # type: ignore[misc]


CASES = {
    "vera": Case(
        {"method": "vera", "rank": RANK}, peft.VeraConfig, {"r": RANK},
        {"d": lambda layer: layer.vera_lambda_d.default, "b": lambda layer: layer.vera_lambda_b.default},
    ),
    "loha": Case(
        {"method": "loha", "rank": RANK, "alpha": 12.0}, peft.LoHaConfig, {"r": RANK, "alpha": 12},
        {f"w{n}{s}": lambda layer, name=f"hada_w{n}_{s}": getattr(layer, name).default for n in "12" for s in "ab"},
    ),
    "lokr": Case(
        {"method": "lokr", "rank": 2, "alpha": 6.0}, peft.LoKrConfig, {"r": 2, "alpha": 6},
        named("w1", "w2_a", "w2_b", prefix="lokr_"),
    ),
    "lokr both": Case(
        {"method": "lokr", "rank": 1, "alpha": 4.0, "decompose": "both"}, peft.LoKrConfig,
        {"r": 1, "alpha": 4, "decompose_both": True}, named("w1_a", "w1_b", "w2_a", "w2_b", prefix="lokr_"),
        larger=2.0,
    ),
    "lokr whole": Case(
        {"method": "lokr", "rank": 16, "factor": 8}, peft.LoKrConfig,
        {"r": 16, "alpha": 16, "decompose_factor": 8}, named("w1", "w2", prefix="lokr_"),
    ),
    "oft": Case(
        {"method": "oft", "block": 8}, peft.OFTConfig, {"oft_block_size": 8},
        {"R": lambda layer: layer.oft_R.default.weight},
    ),
    "oft cayley": Case(
        {"method": "oft", "block": 4, "rotation": "cayley"}, peft.OFTConfig,
        {"oft_block_size": 4, "use_cayley_neumann": False}, {"R": lambda layer: layer.oft_R.default.weight},
    ),
}  # fmt: skip


def pair_of(family: str, case: Case) -> Pair:
    # GPT-2's q, k and v are one module to peft, and its Conv1D is one that most of these tuners do not know.
    kinds = ["up", "down"] if family == "gpt2" else ["q", "v", "up", "down"]
    modules = "|".join([*(MODULES[family][k].replace(".", r"\.") for k in kinds if k != "down"), DOWN[family]])
    transposed = {"fan_in_fan_out": True} if family == "gpt2" else {}
    return Pair(
        family,
        design(sites=kinds, **case.placement),
        case.config(task_type="SEQ_CLS", target_modules=rf".*\.({modules})", **transposed, **case.entries),
        typed=family == "bert",
    )


@pytest.mark.parametrize(
    ("name", "family"),
    [(name, family) for name in CASES for family in ("bert", "roberta", "llama")] + [("vera", "gpt2")],
)
def test_it_equals_peft(name: str, family: str) -> None:
    case = CASES[name]
    pair = pair_of(family, case)
    sites, layers = pair.lane.sites[0], pair.modules()
    assert layers.keys() == {site.path for site in sites}
    with torch.no_grad():
        for site in sites:
            for own, read in case.tensors.items():
                value = pair.ours(f"{site.kind}/{site.path}", own).mul_(case.larger)
                read(layers[site.path]).copy_(value)
        if name == "vera":
            for shared in ("A", "B"):
                there = getattr(pair.model.base_model, f"vera_{shared}")["default"]
                assert there.shape == pair.lane.fixed[f"0/{shared}"].shape
                there.copy_(pair.lane.fixed[f"0/{shared}"])
    pair.check_outputs()
    pair.check_head()
    for site in sites:
        for own, read in case.tensors.items():
            close(grad(pair, site, own), read(layers[site.path]).grad)
    assert trained(layers) == sum(v.numel() for k, v in pair.lane.params.items() if not k.startswith("head/"))


def trained(layers: dict[str, Any]) -> int:
    return sum(p.numel() for layer in layers.values() for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_boft_of_one_factor_equals_peft(family: str) -> None:
    """peft trains all entries of a matrix and takes its skew-symmetric half; ours are those above the diagonal."""
    b = 4
    case = Case(
        {"method": "boft", "block": b, "factors": 1}, peft.BOFTConfig,
        {"boft_block_size": b, "boft_n_butterfly_factor": 1}, {},
    )  # fmt: skip
    pair = pair_of(family, case)
    sites, layers = pair.lane.sites[0], pair.modules()
    assert layers.keys() == {site.path for site in sites}
    rows, columns = torch.triu_indices(b, b, 1)

    def ours(site: Site, name: str) -> Tensor:
        return pair.ours(f"{site.kind}/{site.path}", name)

    with torch.no_grad():
        for site in sites:
            full = layers[site.path].boft_R.default
            full.zero_()
            full[..., rows, columns] = 2 * ours(site, "R")
            layers[site.path].boft_s.default.copy_(ours(site, "s").unsqueeze(-1))
    pair.check_outputs()
    pair.check_head()
    for site in sites:
        there = layers[site.path].boft_R.default.grad
        close(ours(site, "R").grad, there[..., rows, columns] - there[..., columns, rows])
        close(ours(site, "s").grad, layers[site.path].boft_s.default.grad.squeeze(-1))


NORMS = {"bert": "LayerNorm", "roberta": "LayerNorm", "gpt2": "ln_1|ln_2|ln_f", "llama": r"\w+layernorm|norm"}
NORMS["qwen3"] = NORMS["gemma3"] = r"\w+norm|norm"  # those of single heads among them, in two layouts


@pytest.mark.parametrize("family", NORMS)
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")
def test_ln_tuning_equals_peft(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """peft trains the gains and biases themselves, ours are their changes."""
    qwen = Qwen3Config(**{k: v for k, v in CONFIGS["llama"].to_dict().items() if k in SHAPE}, head_dim=8)
    monkeypatch.setitem(CONFIGS, "qwen3", qwen)
    gemma = Gemma3TextConfig(**{k: v for k, v in CONFIGS["llama"].to_dict().items() if k in SHAPE}, head_dim=8)
    monkeypatch.setitem(CONFIGS, "gemma3", gemma)
    pair = Pair(
        family,
        design(method="ln_tuning"),
        peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=rf".*\.?({NORMS[family]})"),
        typed=family == "bert",
    )
    sites, layers = pair.lane.sites[0], pair.modules()
    assert layers.keys() == {site.path for site in sites}
    held = {"gain": "weight", "shift": "bias"}
    names = {"gain": "weight"} if family in ("llama", "qwen3", "gemma3") else held
    with torch.no_grad():
        for site in sites:
            for own, there in names.items():
                change = pair.ours(f"{site.kind}/{site.path}", own)
                getattr(layers[site.path].ln_tuning_layers.default, there).add_(change)
    pair.check_outputs()
    pair.check_head()
    for site in sites:
        for own, there in names.items():
            close(grad(pair, site, own), getattr(layers[site.path].ln_tuning_layers.default, there).grad)
    assert trained(layers) == sum(v.numel() for k, v in pair.lane.params.items() if not k.startswith("head/"))
