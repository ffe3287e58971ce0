"""A folder that HF peft wrote itself comes back as a design of ours, with the logits that it gives in peft."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exported import TEXTS, Saved, base, close, peft_logits
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peftscape.search.export import load
from peftscape.spaces.words import InputError

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Failed to load the CUDA extension:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting boft_n_butterfly_factor to 1:UserWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),  # of norms, which LN tuning adapts
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    root = tmp_path_factory.mktemp("bases")
    return lambda family: base(root, family)


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["query", "value", "intermediate.dense"]
#: Family, peft's configuration, and the methods that it must come back as.
FOLDERS: dict[str, tuple[str, peft.PeftConfig, set[str]]] = {
    "lora": ("llama", peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL), {"lora"}),
    "lora of several ranks": (
        "bert",
        peft.LoraConfig(
            r=4, target_modules=BERT, rank_pattern={"query": 2, r"layer\.0.*value": 3},
            alpha_pattern={"intermediate.dense": 5}, use_rslora=True,
        ),
        {"lora"},
    ),
    "lora on some layers": (
        "llama", peft.LoraConfig(target_modules=["q_proj", "up_proj"], layers_to_transform=[0, 2]), {"lora"},
    ),
    "lora of a fused linear": (
        "gpt2", peft.LoraConfig(r=3, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True), {"lora"},
    ),
    "dora": ("bert", peft.LoraConfig(r=4, target_modules=BERT, use_dora=True), {"dora"}),
    "dora of a fused linear": (
        "gpt2", peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, use_dora=True), {"dora"},
    ),
    "lora with biases": ("roberta", peft.LoraConfig(r=4, target_modules=BERT, bias="all"), {"lora", "bitfit"}),
    "lora of a fused linear with biases": (
        "gpt2", peft.LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True, bias="all"), {"lora", "bitfit"},
    ),
    "dora with biases": (
        "roberta", peft.LoraConfig(r=4, target_modules=BERT, use_dora=True, bias="all"), {"dora", "bitfit"},
    ),
    "adalora": ("bert", peft.AdaLoraConfig(init_r=6, target_r=3, total_step=9, target_modules=BERT), {"adalora"}),
    "ia3": (
        "llama",
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        {"ia3"},
    ),
    "vera": ("bert", peft.VeraConfig(r=8, target_modules=BERT), {"vera"}),
    "loha": ("bert", peft.LoHaConfig(r=4, target_modules=BERT, rank_pattern={"query": 2}), {"loha"}),
    "lokr": ("llama", peft.LoKrConfig(r=2, decompose_both=True, target_modules=["q_proj", "up_proj"]), {"lokr"}),
    "oft": ("llama", peft.OFTConfig(oft_block_size=8, target_modules=["q_proj", "down_proj"]), {"oft"}),
    "boft": ("bert", peft.BOFTConfig(boft_block_size=4, target_modules=BERT), {"boft"}),
    "ln tuning": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm", "post_attention_layernorm", "norm"]),
                  {"ln_tuning"}),
    "prompt": ("llama", peft.PromptTuningConfig(num_virtual_tokens=3), {"prompt_tuning"}),
    "mica": ("bert", peft.LoraConfig(r=2, target_modules=BERT, init_lora_weights="mica"), {"peft:LORA"}),
    "miss": ("llama", peft.MissConfig(r=4, target_modules=ALL, init_weights="bat"), {"peft:MISS"}),
    "delora": ("bert", peft.DeloraConfig(r=3, target_modules=BERT, layers_to_transform=[0, 2]), {"peft:DELORA"}),
    "unilora": ("bert", peft.UniLoraConfig(r=2, theta_d_length=32, target_modules=BERT), {"peft:UNILORA"}),
    "vblora": (
        "bert", peft.VBLoRAConfig(num_vectors=8, vector_length=8, target_modules=r".*attention.*\.(key|dense)"),
        {"peft:VBLORA"},
    ),
    "prefix": ("bert", peft.PrefixTuningConfig(num_virtual_tokens=4), {"prefix_tuning"}),
}  # fmt: skip


def written(folder: Path, config: peft.PeftConfig, directory: Path) -> None:
    """As a user of peft trains and saves an adapter, its numbers far from their start."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    config.task_type = "SEQ_CLS"
    adapted = peft.get_peft_model(model, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    adapted.save_pretrained(directory)
    AutoTokenizer.from_pretrained(folder).save_pretrained(directory)


@pytest.mark.parametrize("name", FOLDERS)
def test_pefts_own_folder_gives_equal_logits(name: str, saved: Saved, tmp_path: Path) -> None:
    family, config, names = FOLDERS[name]
    written(saved(family), config, tmp_path)
    found = load(tmp_path, model=saved(family))
    assert {p.method.name for p in found.design.placements} == names
    # Behind peft's prompts padding has positions of its own.
    close(found.logits(TEXTS), peft_logits(saved(family), tmp_path, one_by_one=name == "prompt"))
    assert found.card.outputs == 3
    assert load(tmp_path).design == found.design, "the backbone is found where peft says"


def test_a_design_says_what_pefts_configuration_said(saved: Saved, tmp_path: Path) -> None:
    family, config, _ = FOLDERS["lora of several ranks"]
    written(saved(family), config, tmp_path)
    rows = load(tmp_path).design.json()["placements"]
    assert sorted((r["sites"], r["layers"], r["rank"], r["alpha"], r["scaling"]) for r in rows) == [
        (["q"], "all", 2, 8.0, "rslora"),
        (["up"], "all", 4, 5.0, "rslora"),
        (["v"], [0], 3, 8.0, "rslora"),
        (["v"], [1, 2], 4, 8.0, "rslora"),
    ]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (peft.MissConfig(r=4, target_modules=["pooler.dense"]), "bert has no such site"),
        (peft.MissConfig(r=4, target_modules=["0.attention.self.query", "1.attention.self.key"]), "which no design"),
        (peft.LoraConfig(r=4, target_modules=["query"], bias="all"), "pooler.dense.bias: bert has no such site"),
        (peft.LoraConfig(r=4, target_modules=["query"]), "no method of peftscape is what this LORA does"),
        (peft.DeloraConfig(r=4, target_modules=["query"], rank_pattern={"layer.1.*": 2}), "rank_pattern: "),
    ],
)
def test_a_tuner_that_no_design_says_is_refused(
    config: peft.PeftConfig, said: str, saved: Saved, tmp_path: Path
) -> None:
    written(saved("bert"), config, tmp_path)
    if isinstance(config, peft.LoraConfig) and config.bias == "none":
        # Loading would change the base weights again.
        _edit(tmp_path, init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 1})
    with pytest.raises(InputError, match=said):
        load(tmp_path, model=saved("bert"))


def test_what_a_tuner_drew_and_no_lane_would_draw_is_refused(saved: Saved, tmp_path: Path) -> None:
    """SHiRA's places are in peft's file, in a lane they follow from the configuration."""
    written(saved("bert"), peft.ShiraConfig(r=2, target_modules=["query"], random_seed=3), tmp_path)
    close(load(tmp_path, model=saved("bert")).logits(TEXTS), peft_logits(saved("bert"), tmp_path))
    _edit(tmp_path, random_seed=4)
    with pytest.raises(InputError, match="SHIRA drew at random what it does"):
        load(tmp_path, model=saved("bert"))


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_no_design_of_ours_is_refused(saved: Saved, tmp_path: Path) -> None:
    family, config, _ = FOLDERS["lora"]
    written(saved(family), config, tmp_path)
    written(saved("bert"), peft.LoraConfig(target_modules=["pooler.dense"]), tmp_path / "other")
    with pytest.raises(InputError, match=r"no classifier\.weight"):
        load(tmp_path, model=saved("bert"))
    with pytest.raises(InputError, match="bert has no such site"):
        load(tmp_path / "other", model=saved("bert"))
    _edit(tmp_path, lora_bias=True)
    with pytest.raises(InputError, match=r"lora_B\.bias: missing"):
        load(tmp_path)
    _edit(tmp_path, lora_bias=False, init_lora_weights="pissa")
    with pytest.raises(InputError, match="writes the weights that all lanes share; use the method"):
        load(tmp_path)
    _edit(tmp_path, init_lora_weights=True, task_type="QUESTION_ANS")
    with pytest.raises(InputError, match="a sequence or token classifier or a language model was expected"):
        load(tmp_path)
    _edit(tmp_path, task_type="SEQ_CLS", peft_type="POLY")
    with pytest.raises(InputError, match=r"what this POLY does(.|\n)*wants the number of a task"):
        load(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="not a configuration that HF peft wrote"):
        load(tmp_path)
