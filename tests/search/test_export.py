"""An exported adapter gives the logits that its lane gave: in HF peft where it can, in ours always."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported import FAMILIES, LABELS, TEXTS, Saved, base, close, peft_logits, trained
from safetensors.torch import load_file

from peftscape.search.backbone import Backbone
from peftscape.search.export import export, load, save
from peftscape.spaces.sites import LINEARS
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


LORA: dict[str, Any] = {"method": "lora", "rank": 4, "alpha": 12.0}
EXPRESSIBLE: dict[str, list[dict[str, Any]]] = {
    "lora": [{**LORA, "sites": ["q", "v"]}],
    "lora on all linears": [{**LORA, "sites": LINEARS, "layers": [0, 2]}],
    "lora of several ranks": [
        {**LORA, "sites": ["q"], "layers": [1]},
        {"method": "lora", "rank": 2, "alpha": 3.0, "sites": ["q", "k", "up"]},
        {"method": "lora", "rank": 1, "alpha": 5.0, "sites": ["down"], "layers": [2]},
    ],
    "lora with a mask": [{**LORA, "sites": ["q", "v"], "mask": {"sparsity": 0.5}}],
    "ia3": [{"method": "ia3"}],
    "ia3 on outputs": [{"method": "ia3", "sites": ["q", "v", "o"], "layers": [1], "inputs": []}],
    "prefix": [{"method": "prefix_tuning", "length": 4}],
    "rslora": [{**LORA, "scaling": "rslora"}, {**LORA, "sites": ["up"]}],
    "lora-fa": [{**LORA, "freeze_a": True, "rate": 4.0}],
    "dora": [{**LORA, "method": "dora", "sites": ["q", "v", "down"], "layers": [0, 2]}],
    "pissa": [{**LORA, "method": "pissa", "sites": ["q", "v", "up"]}],
    "adalora": [{"method": "adalora", "rank": 6, "sites": ["q", "v"]}],
    "qalora": [{**LORA, "method": "qalora", "group": 16}],
    "loftq": [{**LORA, "method": "loftq"}],
    "dylora": [{**LORA, "method": "dylora"}],
    "delta-lora": [{**LORA, "method": "delta_lora", "ratio": 0.7}, {**LORA, "sites": ["k"]}],
    "vera": [{"method": "vera", "rank": 8, "sites": ["o", "up", "down"], "layers": [0, 2]}],
    "loha": [{"method": "loha", "rank": 4, "sites": ["q", "v"]}, {"method": "loha", "rank": 2, "sites": ["up"]}],
    "lokr": [{"method": "lokr", "rank": 2, "sites": ["q", "up"]}],
    "lokr both": [{"method": "lokr", "rank": 1, "decompose": "both", "alpha": 3.0}],
    "krona": [{"method": "krona", "size": 4, "scale": 2.5, "sites": ["q", "up"]}],
    "oft": [{"method": "oft", "block": 8, "sites": ["q", "down"]}],
    "oft cayley": [{"method": "oft", "block": 4, "rotation": "cayley"}],
    "boft": [{"method": "boft", "block": 4, "factors": 1}],
    "ln tuning": [{"method": "ln_tuning"}],
    "ln tuning after attention": [{"method": "ln_tuning", "after": "attention"}],
    "prefix mlp": [{"method": "prefix_tuning_mlp", "length": 4, "hidden": 16}],
    "one lora for all layers": [{**LORA, "sites": ["q", "up"], "share": {"kept": 1.0}}],
    "propetl of lora": [{**LORA, "sites": ["q", "v"], "share": {"kept": 0.6}}],
    "propetl of prefixes": [{"method": "prefix_tuning", "length": 4, "share": {"kept": 0.5}}],
    "lora and bitfit": [{**LORA, "sites": ["q", "up"], "layers": [0, 1]}, {"method": "bitfit", "layers": [1, 2]}],
    "bitfit before lora": [{"method": "bitfit"}, {**LORA, "sites": ["q", "v"]}],
    "bitfit after dora": [{**LORA, "method": "dora", "sites": ["q", "v"]}, {"method": "bitfit"}],
    "two of the family": [{**LORA, "method": "pissa"}, {"method": "lora", "rank": 2, "sites": ["q", "v"]}],
}


#: peft's tuners of these know no Conv1D.
NOT_GPT2 = ("krona", "loha", "lokr", "lokr both", "oft", "oft cayley", "boft")


@pytest.mark.parametrize(
    ("name", "family"), [(n, f) for n in EXPRESSIBLE for f in FAMILIES if n not in NOT_GPT2 or f != "gpt2"]
)
def test_a_peft_folder_gives_equal_logits_in_peft(name: str, family: str, saved: Saved, tmp_path: Path) -> None:
    run = trained(saved(family), *EXPRESSIBLE[name])
    exported = run.export(tmp_path)
    assert exported.format == "peft", exported.reason
    wanted = run.logits()
    close(peft_logits(saved(family), tmp_path), wanted)
    close(load(tmp_path).logits(TEXTS), wanted)


@pytest.mark.parametrize(
    ("tuner", "config", "family"),
    [
        ("MISS", {"r": 4}, "llama"),
        ("SHIRA", {"r": 2, "random_seed": 3}, "bert"),
        ("RANDLORA", {"r": 4}, "bert"),
        ("OSF", {}, "roberta"),
        ("WAVEFT", {"n_frequency": 20}, "gpt2"),
    ],
)
def test_a_tuner_of_peft_comes_back_from_its_folder_in_peft_and_here(
    tuner: str, config: dict[str, Any], family: str, saved: Saved, tmp_path: Path
) -> None:
    run = trained(saved(family), {"method": f"peft:{tuner}", "config": config, "sites": ["v", "up"], "layers": [0, 2]})
    exported = run.export(tmp_path)
    assert exported.format == "peft", exported.reason
    wanted = run.logits()
    close(peft_logits(saved(family), tmp_path), wanted)
    close(load(tmp_path).logits(TEXTS), wanted)
    (tmp_path / "design.json").unlink()  # as another user of peft would hand it over
    found = load(tmp_path, model=saved(family))
    close(found.logits(TEXTS), wanted)
    assert [(p.method, p.layers) for p in found.design.placements] == [
        (p.method, p.layers) for p in run.card.design.placements
    ]


def test_a_tuner_whose_folder_does_not_hold_all_is_our_own_format(saved: Saved, tmp_path: Path) -> None:
    config = {"num_vectors": 8, "vector_length": 8, "save_only_topk_weights": True}
    run = trained(saved("bert"), {"method": "peft:VBLORA", "config": config})
    assert "stores less than it trained" in run.export(tmp_path).reason
    np.testing.assert_array_equal(load(tmp_path).logits(TEXTS), run.logits())


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_prompt_gives_equal_logits_in_peft_where_the_last_token_is_pooled(
    family: str, saved: Saved, tmp_path: Path
) -> None:
    run = trained(saved(family), {"method": "prompt_tuning", "length": 3})
    exported = run.export(tmp_path)
    assert exported.format == "peft"
    assert "texts of one length" in exported.reason
    found = peft_logits(saved(family), tmp_path, one_by_one=True)
    close(found, run.logits())


def test_a_head_of_several_modules_is_exported(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("distilbert"), LORA)
    assert run.export(tmp_path).format == "peft"
    close(peft_logits(saved("distilbert"), tmp_path), run.logits())


def test_regression_predicts_numbers(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("bert"), LORA, outputs=1)
    run.export(tmp_path)
    close(peft_logits(saved("bert"), tmp_path, outputs=1), run.logits())
    assert load(tmp_path).predict(TEXTS) == [{"score": pytest.approx(x, abs=1e-5)} for [x] in run.logits()]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_readme_says_how_to_load_it(family: str, saved: Saved, tmp_path: Path) -> None:
    run = trained(saved(family), LORA)
    run.export(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "Labels by id: person, place, number." in text
    names: dict[str, Any] = {}
    exec(text.split("```python")[1].split("```")[0].replace("THIS FOLDER", str(tmp_path)), names)
    batch = names["tokenizer"](TEXTS, padding=True, return_tensors="pt")
    close(names["model"](**batch).logits.detach().numpy(), run.logits())


INEXPRESSIBLE: dict[str, tuple[list[dict[str, Any]], str]] = {
    "adapter": ([{"method": "sequential_adapter", "size": 4}], "has no sequential_adapter"),
    "combination": ([{"method": "ia3"}, {"method": "bitfit"}], "cannot combine bitfit and ia3"),
    "biases alone": ([{"method": "bitfit"}], "trains the biases beside LORA alone"),
    "biases before": ([{"method": "bitfit"}, {**LORA, "method": "dora"}], "comes last"),
    "head": ([], "trains a head alone"),
    "some layers": ([{"method": "prefix_tuning", "length": 2, "layers": [0, 2]}], "on all layers"),
    "kept positions": ([{"method": "prefix_tuning", "length": 2, "positions": "keep"}], "shifts"),
    "prompt": ([{"method": "prompt_tuning", "length": 2}], "pools a virtual token"),
    "krona of other sides": ([{"method": "krona", "size": 20, "sites": ["up"]}], "does not divide"),
    "twice": ([{"method": "ia3"}, {"method": "ia3", "sites": ["k"]}], "changed twice"),
    "full": ([{"method": "full_finetuning"}], "has no full_finetuning"),
    "everything": (
        [
            {"method": "parallel_adapter", "size": 4, "mask": {"sparsity": 0.7}},
            {"method": "prefix_tuning", "length": 2, "layers": [1], "mask": {"sparsity": 0.5}},
            {"method": "prompt_tuning", "length": 2},
            *({"method": name} for name in ("bitfit", "ia3")),
            {**LORA, "mask": {"sparsity": 0.9}},
        ],
        "cannot combine",
    ),
}


@pytest.mark.parametrize("name", INEXPRESSIBLE)
def test_what_peft_cannot_express_comes_back_in_our_own_format(name: str, saved: Saved, tmp_path: Path) -> None:
    placements, reason = INEXPRESSIBLE[name]
    run = trained(saved("bert"), *placements)
    exported = run.export(tmp_path)
    assert (exported.format, exported.directory) == ("peftscape", tmp_path)
    assert reason in exported.reason
    found = load(tmp_path)
    assert found.design == run.card.design
    assert found.tensors.keys() == run.lane.params.keys()
    for key, value in found.tensors.items():
        assert torch.equal(value, run.lane.params[key]), key
    np.testing.assert_array_equal(found.logits(TEXTS), run.logits())


def test_a_mean_head_is_our_own_format(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("gpt2"), LORA, head="mean")
    assert 'head = "mean"' in run.export(tmp_path).reason
    np.testing.assert_array_equal(load(tmp_path).logits(TEXTS), run.logits())


def test_an_input_scaling_of_a_fused_linear_is_our_own_format(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("gpt2"), {"method": "ia3", "sites": ["q"], "inputs": ["q"]})
    assert "only a part of" in run.export(tmp_path).reason


def test_a_masked_tensor_takes_its_kept_values_and_a_bit_an_entry(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("bert"), {"method": "sequential_adapter", "size": 8, "mask": {"sparsity": 0.75}})
    run.export(tmp_path)
    stored = load_file(tmp_path / "adapter.safetensors")
    key = next(k for k in run.lane.masks)
    size = run.lane.params[key].numel()
    assert stored[f"{key}.kept"].numel() == size // 4
    assert stored[f"{key}.mask"].numel() == size // 8
    assert key not in stored


def test_predictions_name_the_labels(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("bert"), LORA)
    run.export(tmp_path)
    adapter = load(tmp_path)
    found = adapter.predict(TEXTS, batch_size=2)
    wanted = torch.from_numpy(run.logits()).softmax(dim=1)
    assert adapter.labels == LABELS
    assert [row["label"] for row in found] == [LABELS[i] for i in wanted.argmax(dim=1)]
    for row, chances in zip(found, wanted, strict=True):
        assert row["score"] == max(row["probabilities"].values())
        assert list(row["probabilities"].values()) == pytest.approx(chances.tolist(), abs=1e-6)
    pairs = adapter.predict(TEXTS, ["the man"] * len(TEXTS))
    assert pairs[0]["score"] != found[0]["score"]
    assert adapter.predict([]) == []


def test_long_texts_are_cut_and_empty_ones_named(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("gpt2"), LORA)
    run.export(tmp_path)
    adapter = load(tmp_path)
    long = " ".join(["river"] * 32)
    close(adapter.logits([f"{long} city"]), adapter.logits([long]))
    with pytest.raises(InputError, match="text 1 has no tokens"):
        adapter.predict(["city", ""])
    with pytest.raises(InputError, match="1 second texts for 2 texts"):
        adapter.predict(["city", "man"], ["river"])


def test_an_adapter_loads_on_a_backbone_that_is_there(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("llama"), LORA)
    run.export(tmp_path)
    found = load(tmp_path, model=run.backbone)
    assert found.backbone is run.backbone
    half = load(tmp_path, model=Backbone.load(saved("llama"), dtype="bfloat16"))  # the same weights, rounded
    close(half.logits(TEXTS), run.logits(), within=0.2)


def test_another_backbone_is_refused(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("bert"), LORA)
    run.export(tmp_path)
    with pytest.raises(InputError, match="model_type is 'roberta', 'bert' was expected"):
        load(tmp_path, model=saved("roberta"))
    other = Backbone.load(saved("bert"), dtype="float32")
    next(other.model.parameters()).data[0] += 1
    with pytest.raises(InputError, match="other weights"):
        load(tmp_path, model=other)


def test_an_unused_pooler_is_not_part_of_the_backbone(saved: Saved, tmp_path: Path) -> None:
    """transformers makes up the pooler that RoBERTa checkpoints lack, anew at every load."""
    run = trained(saved("roberta"), LORA)
    run.export(tmp_path)
    other = Backbone.load(saved("roberta"), dtype="float32")
    torch.nn.init.normal_(other.model.get_parameter("pooler.dense.weight"))
    np.testing.assert_allclose(load(tmp_path, model=other).logits(TEXTS), run.logits())


def _edit(directory: Path, **changes: Any) -> None:
    path = directory / "design.json"
    card = json.loads(path.read_text())
    card.pop("card_sha256", None)  # as a version before it wrote one
    path.write_text(json.dumps(card | changes))


@pytest.mark.parametrize("form", ["peft", "peftscape"])
def test_a_damaged_folder_says_what_is_wrong(form: str, saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("bert"), LORA)
    args = (run.lane.adapter(), run.card, run.backbone, run.head, tmp_path)
    (export if form == "peft" else save)(*args)
    [tensors] = tmp_path.glob("*.safetensors")
    card, whole = json.loads((tmp_path / "design.json").read_text()), tensors.read_bytes()

    tensors.write_bytes(whole[:-100])
    with pytest.raises(InputError, match=rf"{tensors.name}(.|\n)*were expected: it was cut short"):
        load(tmp_path, model=run.backbone)
    tensors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="changed or damaged"):
        load(tmp_path, model=run.backbone)
    tensors.unlink()
    with pytest.raises(InputError, match="No such file"):
        load(tmp_path, model=run.backbone)
    tensors.write_bytes(whole)

    _edit(tmp_path, design=card["design"] | {"placements": []})
    with pytest.raises(InputError, match="changed by hand"):
        load(tmp_path, model=run.backbone)
    _edit(tmp_path, schema=99)
    with pytest.raises(InputError, match="newer peftscape"):
        load(tmp_path, model=run.backbone)
    _edit(tmp_path, schema=1, design=card["design"], labels=["person"])
    with pytest.raises(InputError, match="1 labels for a head with 3 outputs"):
        load(tmp_path, model=run.backbone)
    _edit(tmp_path, labels=[], head={"kind": "class", "outputs": 4})
    with pytest.raises(InputError, match=r"classifier\.weight: 3 x 32, 4 x 32 was expected"):
        load(tmp_path, model=run.backbone)
    (tmp_path / "design.json").write_text('{"schema": 1}')
    with pytest.raises(InputError, match="'design': missing"):
        load(tmp_path, model=run.backbone)
    (tmp_path / "design.json").unlink()
    if form == "peft":  # what is left is a folder as HF peft writes them
        close(load(tmp_path, model=run.backbone).logits(TEXTS), run.logits())
        return
    with pytest.raises(InputError, match=r"no design\.json"):
        load(tmp_path, model=run.backbone)


def test_tensors_of_another_design_are_refused(saved: Saved, tmp_path: Path) -> None:
    run = trained(saved("bert"), LORA)
    tensors = run.lane.adapter()
    first, second, *_ = tensors
    tensors[first] = tensors[first][:1]
    tensors[second] = tensors[second] * float("nan")
    tensors["0/q/nowhere/A"] = torch.zeros(1)
    del tensors["head/classifier.bias"]
    with pytest.raises(InputError) as error:
        export(tensors, run.card, run.backbone, run.head, tmp_path / "adapter")
    assert len(error.value.errors) == 4
    assert not (tmp_path / "adapter").exists()


def test_writing_again_leaves_nothing_of_the_other_format(saved: Saved, tmp_path: Path) -> None:
    lora, adapter = (
        trained(saved("bert"), LORA),
        trained(saved("bert"), {"method": "sequential_adapter", "size": 4}),
    )
    (tmp_path / "notes.txt").write_text("mine")
    for run, present, absent in (
        (lora, "adapter_model.safetensors", "adapter.safetensors"),
        (adapter, "adapter.safetensors", "adapter_model.safetensors"),
        (lora, "adapter_model.safetensors", "adapter.safetensors"),
    ):
        run.export(tmp_path)
        assert (tmp_path / present).exists()
        assert not (tmp_path / absent).exists()
        assert (tmp_path / "adapter_config.json").exists() == (run is lora)
        assert load(tmp_path).design == run.card.design
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))
