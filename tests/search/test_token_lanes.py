"""Labelled words in lanes: against transformers' classifiers with HF peft, alone, in parts, exported and merged."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from counted import kept_for
from exported import base, close, tokenizer
from labelled import NAMES, labels_of, texts
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer

from peftscape.search.adapter_folder import CARD
from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.export import Card, export, load
from peftscape.search.head import make_head
from peftscape.search.lane import new_lane
from peftscape.search.merge import export_merged
from peftscape.search.metrics import METRICS
from peftscape.search.prepare import prepare
from peftscape.search.splits import Split
from peftscape.search.token_encoding import encode_words
from peftscape.search.token_examples import objects
from peftscape.search.token_words import labels_of as labels_of_texts
from peftscape.search.token_words import word_losses
from peftscape.spaces.design import Design
from peftscape.spaces.heads import layer_name
from peftscape.spaces.price import costs, head_flops, head_size
from peftscape.spaces.sites import site_map

LORA = {"method": "lora", "sites": ["q", "v"], "layers": "all", "rank": 4, "alpha": 8}
PREFIX = {"method": "prefix_tuning", "layers": "all", "length": 2}
PROMPT = {"method": "prompt_tuning", "length": 3}
EVERY = [
    LORA, PREFIX, PROMPT, {"method": "lst", "size": 4}, {"method": "bitfit"},
    {"method": "parallel_adapter", "sites": ["ffn"], "layers": [2], "size": 4, "gate": True},
    {"method": "tiny_attention", "layers": "all", "size": 4},
]  # fmt: skip


FAMILIES = [
    "bert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2", "distilbert", "gpt2", "llama", "mistral",
    "qwen2", "qwen3", "gemma", "gemma2",
]  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


def split_of(rows, family="bert", length=32):
    targets = objects([np.array([NAMES.index(label) for label in labels_of(row)]) for row in rows])
    split = Split([" ".join(row) for row in rows], None, targets, words=[tuple(row) for row in rows])
    return encode_words(split, tokenizer(family), length)


def design(*placements, **training):
    return Design.from_json({"placements": list(placements), "training": training})


def cohort_of(backbone, split, *designs, batch=6, passes=1, first=0):
    """Lanes of the seeds `first`, `first` + 1, ..., their tensors far from the start."""
    head = make_head(backbone, kind="token", outputs=len(NAMES))
    cohort = Cohort(backbone, head, split, batch_size=batch, passes=passes)
    lanes = [new_lane(d, seed=i, steps=9, backbone=backbone, head=head) for i, d in enumerate(designs, start=first)]
    for lane in lanes:
        prepare(lane, cohort)
        source = torch.Generator().manual_seed(lane.seed)
        for value in lane.params.values():
            with torch.no_grad():
                value.add_(torch.empty_like(value).normal_(0, 0.2, generator=source))
    cohort.admit(*lanes)
    return cohort, lanes


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_loss_and_gradients_are_those_of_transformers_with_hf_peft(root, family):
    rows = texts(6, seed=2)
    folder = base(root, family)
    backbone, split = Backbone.load(folder, dtype="float32"), split_of(rows, family)
    cohort, lanes = cohort_of(backbone, split, design(PROMPT), design({**LORA, "rank": 2}), design(LORA))
    lane = lanes[-1]
    losses = cohort.losses([np.arange(6)] * 3)
    losses.sum().backward()
    found = cohort.predict(split, lane)[0]

    model = AutoModelForTokenClassification.from_pretrained(
        folder, num_labels=len(NAMES), attn_implementation="eager", dtype=torch.float32
    )
    targets = [s.path.split(".")[-1] for s in backbone.sites.sites if s.kind in ("q", "v") and s.layer == 0]
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="TOKEN_CLS")
    wrapped = peft.get_peft_model(model, settings).eval()
    start = f"base_model.model.{backbone.sites.within(lm=False)}"
    top = f"base_model.model.{layer_name(backbone.sites)}.modules_to_save.default"
    named = {}
    for key, value in lane.params.items():
        *_, path, name = key.split("/")
        theirs = f"{top}.{name.split('.')[-1]}" if path == "head" else f"{start}{path}.lora_{name}.default.weight"
        named[key] = wrapped.get_parameter(theirs)
        named[key].data.copy_(value.detach())
    batch = tokenizer(family)(rows, is_split_into_words=True, padding=True, return_tensors="pt")
    labels = torch.full(batch["input_ids"].shape, -100)
    for i, row in enumerate(rows):
        before = None
        for k, word in enumerate(batch.word_ids(i)):
            if word is not None and word != before:
                labels[i, k] = NAMES.index(labels_of(row)[word])
            before = word
    out = wrapped(**batch, labels=labels)
    out.loss.backward()
    assert float(losses[cohort.lanes.index(lane)].detach()) == pytest.approx(float(out.loss.detach()), abs=1e-5)
    for i, row in enumerate(found):
        close(row, out.logits[i][labels[i] >= 0].detach().numpy())
    assert len(named) == 2 * 2 * 3 + 2
    for key, parameter in named.items():
        assert parameter.grad.abs().max() > 1e-4
        torch.testing.assert_close(lane.params[key].grad, parameter.grad, atol=1e-5, rtol=1e-4)
    truth = [label for row in rows for label in labels_of(row)]
    said = [NAMES[k] for k in out.logits[labels >= 0].argmax(dim=-1)]
    right = np.mean([a == b for a, b in zip(truth, said, strict=True)])
    assert METRICS["token_accuracy"].score(found, split.targets) == pytest.approx(right)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_lanes_are_what_they_are_alone_in_one_pass_or_in_parts(root, family):
    backbone, split = Backbone.load(base(root, family), dtype="float64"), split_of(texts(20), family)
    designs = [design(one, lr=0.01) for one in EVERY]
    together, lanes = cohort_of(backbone, split, *designs)
    for _ in range(2):
        together.step()
    logits = together.predict(split, *lanes)
    together.close()
    for i, (lane, rows) in enumerate(zip(lanes, logits, strict=True)):
        alone, (own,) = cohort_of(backbone, split, designs[i], passes=1 + i % 3, first=i)
        for _ in range(2):
            alone.step()
        np.testing.assert_allclose(own.losses, lane.losses, rtol=1e-9)
        for found, wanted in zip(alone.predict(split)[0], rows, strict=True):
            close(found, wanted)
        alone.close()
        assert own.losses[0] != own.losses[1]


def test_words_that_prompts_push_out_count_as_unknown(root):
    """GPT-2's last text token takes the place of one that was cut: it is not read as that one's word."""
    rows = [["man"] * 60, ["city", "of"]]
    backbone, split = Backbone.load(base(root, "gpt2"), dtype="float64"), split_of(rows, "gpt2", length=64)
    cohort, _ = cohort_of(backbone, split, design(LORA), design({"method": "prompt_tuning", "length": 10}), batch=2)
    long, short = cohort.predict(split)[[lane.design.prompt_length() > 0 for lane in cohort.lanes].index(True)]
    assert long[:53].any(axis=1).all()
    assert not long[53:].any()
    assert short.any(axis=1).all()
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.concatenate([long, short])), torch.from_numpy(np.concatenate(list(split.targets)))
    )
    told = cohort.losses([np.arange(2)] * 2).tolist()
    assert min(abs(float(losses) - one) for one in told) < 1e-6
    cohort.close()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_adapters_are_saved_exported_and_merged(root, family, tmp_path):
    rows, path = texts(8, seed=4), base(root, family)
    backbone = Backbone.load(path, dtype="float32")
    cohort, lanes = cohort_of(backbone, split_of(rows, family), *map(design, (LORA, PREFIX, PROMPT)))
    wanted = cohort.predict(split_of(rows, family), *lanes)
    cohort.close()
    for lane, logits, form in zip(lanes, wanted, ("peft", "peft", "peftscape"), strict=True):
        card = Card(design=lane.design, head="token", outputs=4, labels=NAMES, max_length=32)
        folder = tmp_path / lane.design.label
        assert export(lane.adapter(), card, backbone, cohort.head, folder).format == form
        adapter = load(folder)
        answers = adapter.predict(rows)
        assert adapter.predict([" ".join(row) for row in rows]) == answers
        for row, answer, own in zip(rows, answers, logits, strict=True):
            assert answer["words"] == row
            assert answer["labels"] == [NAMES[i] for i in own.argmax(axis=1)]
            close(np.array(answer["scores"]), torch.from_numpy(own).softmax(dim=1).amax(dim=1).numpy())
        if form == "peft":
            model = AutoModelForTokenClassification.from_pretrained(path, num_labels=4, dtype=torch.float32)
            assert_model_says(peft.PeftModel.from_pretrained(model, folder).eval(), folder, rows, logits)
    adapter = load(tmp_path / lanes[0].design.label)
    (tmp_path / lanes[0].design.label / CARD).unlink()  # as HF peft itself writes a folder
    theirs = load(tmp_path / lanes[0].design.label, model=path)
    assert [a["scores"] for a in theirs.predict(rows)] == [a["scores"] for a in adapter.predict(rows)]
    assert theirs.card.head == "token"
    answer = adapter.predict([["man"] * 40])[0]["labels"]
    seen = 32 - 2 * (family == "bert")
    assert None not in answer[:seen]
    assert answer[seen:] == [None] * (40 - seen)
    nothing = [{"words": row, "labels": [None] * len(row), "scores": [None] * len(row)} for row in ([], ["", ""])]
    assert adapter.predict([rows[0], [], ["", ""]]) == [*adapter.predict(rows[:1]), *nothing]
    assert adapter.predict([[], ["", ""]]) == nothing
    whole = export_merged(adapter, tmp_path / "whole")
    merged = AutoModelForTokenClassification.from_pretrained(whole).eval()
    assert tuple(merged.config.id2label.values()) == NAMES
    assert_model_says(merged, whole, rows, wanted[0])


def assert_model_says(model, folder, rows, logits):
    batch = AutoTokenizer.from_pretrained(folder)(rows, is_split_into_words=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**batch).logits
    for i, own in enumerate(logits):
        numbers = batch.word_ids(i)
        first = [k for k, n in enumerate(numbers) if n is not None and n not in numbers[:k]]
        close(found[i][first].numpy(), own)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layer_is_named_as_in_transformers(family):
    config = AutoConfig.for_model(family)
    config.num_hidden_layers, config.num_labels = 1, 5
    with torch.device("meta"):
        model = AutoModelForTokenClassification.from_config(config)
    sites = site_map(config.to_dict())
    own = {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith(f"{model.base_model_prefix}.")}
    name = layer_name(sites)
    assert own == {f"{name}.weight": (5, sites.d_model), f"{name}.bias": (5,)}


def test_what_labelling_words_costs(root):
    """Against what torch counts of the head alone, and autograd keeps for it."""
    backbone, rows, count, tokens = Backbone.load(base(root, "bert"), dtype="float32"), [["man"] * 18] * 3, 4, 20
    width, sites, one = backbone.sites.d_model, backbone.sites, design(LORA)
    cohort, [lane] = cohort_of(backbone, split_of(rows), one, batch=3)
    cohort.close()
    params = {name: lane.params[f"head/{name}"][None] for name in cohort.head.shapes}
    states = torch.randn(3 * tokens, width, requires_grad=True)
    labels = torch.from_numpy(labels_of_texts(cohort.train.targets, np.arange(3)[None]))
    cohort.lanes = [lane]
    batch = cohort.packed([np.arange(3)], cohort.train)
    with FlopCounterMode(display=False) as counter:
        loss, kept = kept_for(
            lane.params.values(), lambda: word_losses(cohort.head.logits(params, states, batch), labels).sum()
        )
        loss.backward()
    assert counter.get_total_flops() == 6 * 3 * tokens * width * count

    priced = {head: costs(one, sites, outputs=count, tokens=tokens, batch=3, head=head) for head in ("mean", "token")}
    size = width * count + count
    assert head_size(sites, count, "token") == priced["token"].head == priced["mean"].head == size == lane_size(lane)
    assert priced["token"].train_flops - priced["mean"].train_flops == (tokens - 1) * 6 * size
    assert priced["token"].infer_flops - priced["mean"].infer_flops == (tokens - 1) * 2 * size
    assert head_flops(design(), sites, size, read=tokens) == (2 * tokens * size, 4 * tokens * size)
    # Kept are states and the log-softmax, beside small index arrays; two gradients of the logits come in the backward.
    more = priced["token"].peak_bytes - priced["mean"].peak_bytes
    logits = 4 * 3 * tokens * count
    assert 4 * 3 * tokens * width + logits <= kept <= more
    assert more == 4 * 3 * tokens * width + 3 * logits
    with pytest.raises(ValueError, match="t5 is an encoder-decoder"):
        head_size(site_map({"model_type": "t5"}), 9, "token")


def lane_size(lane):
    return sum(value.numel() for key, value in lane.params.items() if key.startswith("head/"))
