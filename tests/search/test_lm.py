"""Causal language modelling: losses and gradients against transformers' own model, data in its three forms."""

from __future__ import annotations

import numpy as np
import peft
import pytest
import torch
from language import config, make_decoder, tokenizer
from transformers import AutoModelForCausalLM

from peftscape.search.backbone import Backbone
from peftscape.search.cohort import Cohort
from peftscape.search.encoding import EncodedSplit, encode
from peftscape.search.head import make_head
from peftscape.search.lane import new_lane
from peftscape.search.metrics import METRICS
from peftscape.search.prepare import prepare
from peftscape.search.task import TaskConfig, TaskError, load_task
from peftscape.spaces.design import Design
from peftscape.spaces.methods import methods

LORA = {"method": "lora", "sites": ["q", "v", "down"], "layers": "all", "rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_decoder(tmp_path_factory.mktemp("decoder"))


def design(*placements, **training):
    return Design.from_json({"placements": list(placements), "training": training})


def cohort_of(backbone, split, *designs, batch=6, lively=True):
    head = make_head(backbone, kind="lm", outputs=2)
    cohort = Cohort(backbone, head, split, batch_size=batch)
    lanes = [new_lane(d, seed=i, steps=9, backbone=backbone, head=head) for i, d in enumerate(designs)]
    source = torch.Generator().manual_seed(5)
    for lane in lanes:
        for value in lane.params.values() if lively else ():
            with torch.no_grad():
                value.add_(torch.empty_like(value).normal_(0, 0.2, generator=source))
    cohort.admit(*lanes)
    return cohort, lanes


def some_texts(backbone, *, size=6):
    """Texts whose first tokens, as many as random, are a prompt."""
    random = np.random.default_rng(1)
    ids = [random.integers(4, backbone.sites.vocab, size=n) for n in random.integers(3, 20, size=size)]
    scored = [np.arange(len(row)) >= random.integers(1, len(row)) for row in ids]
    lengths = np.array([len(row) for row in ids])
    return EncodedSplit(ids, None, np.zeros(size, dtype=np.float32), 0, lengths, scored=scored)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")
@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradients_are_those_of_transformers_with_hf_peft(tmp_path, tied):
    folder = make_decoder(tmp_path / "model", tied=tied)
    backbone = Backbone.load(folder, dtype="float32")
    split = some_texts(backbone)
    cohort, (_, lane) = cohort_of(backbone, split, design({**LORA, "rank": 2}), design(LORA))
    cohort.losses([np.arange(6)] * 2).sum().backward()
    rows = cohort.predict(split)[1]

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    targets = ["q_proj", "v_proj", "down_proj"]
    wrapped = peft.get_peft_model(
        model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    ).eval()
    named = {}
    for key, value in lane.params.items():
        _, path, name = key.split("/")[0], *key.split("/")[-2:]
        named[key] = wrapped.get_parameter(f"base_model.model.model.{path}.lora_{name}.default.weight")
        named[key].data.copy_(value.detach())
    longest = int(split.lengths.max())
    ids, labels, mask = (
        torch.zeros(6, longest, dtype=torch.long),
        torch.full((6, longest), -100),
        torch.zeros(6, longest),
    )
    for i, (row, scored) in enumerate(zip(split.ids, split.scored, strict=True)):
        ids[i, : len(row)], mask[i, : len(row)] = torch.from_numpy(row), 1
        labels[i, : len(row)] = torch.from_numpy(np.where(scored, row, -100))
    theirs = wrapped(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    theirs = theirs.detach()
    loss = METRICS["loss"].score(rows, split.targets)
    assert loss == pytest.approx(float(theirs), abs=1e-5)
    assert METRICS["perplexity"].score(rows, split.targets) == pytest.approx(float(theirs.exp()), rel=1e-5)
    assert METRICS["loss"].per_example(rows, split.targets).mean() == pytest.approx(loss, abs=1e-12)
    assert len(named) == 2 * 2 * 3
    for key, parameter in named.items():
        assert parameter.grad.abs().max() > 1e-4
        torch.testing.assert_close(lane.params[key].grad, parameter.grad, atol=1e-5, rtol=1e-4)


EVERY = [
    LORA,
    {"method": "prompt_tuning", "length": 3},
    {"method": "prefix_tuning", "layers": "all", "length": 2},
    {"method": "tiny_attention", "layers": "all", "size": 4},
    {"method": "loreft", "layers": "all", "rank": 2, "first": 2, "last": 2},
    {"method": "parallel_adapter", "sites": ["ffn"], "layers": "all", "size": 4, "gate": True},
    {"method": "prefix_tuning", "layers": "all", "length": 2, "gate": True},
]


def test_no_token_sees_those_after_it_and_packed_texts_have_the_loss_of_single_ones():
    backbone = Backbone.from_config(config(), dtype="float64")
    with torch.no_grad():
        for weight in backbone.model.parameters():
            weight.add_(torch.empty_like(weight).normal_(0, 0.2, generator=torch.Generator().manual_seed(0)))
    split = some_texts(backbone)
    cohort, _ = cohort_of(backbone, split, *map(design, EVERY))
    together = cohort.predict(split)
    for i in range(len(split)):
        row, scored = split.ids[i], split.scored[i]
        first = np.arange(len(row)) == scored.argmax()
        alone = EncodedSplit([row], None, split.targets[:1], 0, split.lengths[i : i + 1], scored=[scored])
        np.testing.assert_allclose(cohort.predict(alone)[:, 0], together[:, i], rtol=2e-6)
        # The first token of the answer alone, with other tokens behind it: nothing changes.
        other = np.where(np.arange(len(row)) > scored.argmax(), (row + 1) % backbone.sites.vocab, row)
        pair = EncodedSplit([row, other], None, split.targets[:2], 0, split.lengths[[i, i]], scored=[first, first])
        losses = cohort.predict(pair)[..., 0]
        assert (losses > 1e-3).all()
        np.testing.assert_allclose(losses[:, 1], losses[:, 0], rtol=2e-6)


def test_the_vocabulary_does_not_multiply_with_the_tokens_in_memory(monkeypatch):
    """The largest tensor of a step, with lanes x tokens x words 16 times as large, is a chunk of it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from peftscape.search import lm_head

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else (out,):
                if isinstance(value, torch.Tensor):
                    self.size = max(self.size, value.numel())
            return out

    backbone = Backbone.from_config(config(words=5000))
    split = some_texts(backbone, size=12)
    found = []
    for chunk in (1 << 16, 1 << 30):
        monkeypatch.setattr(lm_head, "LM_CHUNK", chunk)
        cohort, lanes = cohort_of(backbone, split, *[design(LORA)] * 4, batch=12)
        with Largest() as seen:
            cohort.losses([np.arange(12)] * 4).sum().backward()
        cohort.close()
        found.append((seen.size, [next(iter(lane.params.values())).grad.clone() for lane in lanes]))
    tokens = 4 * int(sum(mark[1:].sum() for mark in split.scored))
    # What is larger is the gradient-free embedding table itself, 5,000 x 32.
    assert found[0][0] <= max(1 << 16, 5000 * 32)
    assert found[1][0] >= tokens * 5000 > 4 * found[0][0]
    for one, other in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)


def words_of(split, i):
    made = tokenizer()
    return made.decode(split.ids[i]), made.decode(split.ids[i][split.scored[i]])


def test_the_forms_of_data_and_what_counts_of_each(base):
    made = tokenizer()
    small = {"validation_size": 10, "test_size": 10, "kind": "lm"}
    columns = {"path": str(base / "pairs.jsonl"), "prompt": "prompt", "completion": "completion"}
    pairs = encode(load_task(TaskConfig(**columns, **small)), made, 32)
    text, learnt = words_of(pairs.train, 0)
    assert text.endswith(f"likes : {learnt}")
    assert learnt.split()[-1] == "</s>"
    assert len(learnt.split()) == 2
    whole = load_task(TaskConfig(**columns, loss_on="all", **small))
    assert words_of(encode(whole, made, 32).train, 0)[1] == text.partition(" ")[2]
    chats = load_task(TaskConfig(path=str(base / "chats.jsonl"), messages="messages", **small))
    text, learnt = words_of(encode(chats, made, 32).train, 0)
    assert text.startswith("user : ")
    assert text.endswith(f"</s> assistant : {learnt}")
    # Long ones: a plain text goes on in a further example, a prompt loses its beginning.
    texts = load_task(TaskConfig(path=str(base / "text.jsonl"), **small))
    blocks = encode(texts, made, 4).train
    assert len(blocks) > len(texts.train)
    assert max(blocks.lengths) == 4
    assert blocks.cut == 0
    cut = encode(pairs.task, made, 4).train
    assert cut.cut == sum(n > 4 for n in pairs.train.lengths) > 10
    assert [words_of(cut, i)[1] for i in range(len(cut))] == [words_of(pairs.train, i)[1] for i in range(len(cut))]
    assert max(cut.lengths) == 4
    with pytest.raises(TaskError, match="prompt and completion go together"):
        load_task(TaskConfig(path=str(base / "pairs.jsonl"), prompt="prompt", **small))
    with pytest.raises(TaskError, match=r"task.messages: row 1 of .* no list of messages"):
        load_task(TaskConfig(path=str(base / "pairs.jsonl"), messages="prompt", **small))
    with pytest.raises(TaskError, match=r'"accuracy" is for classification, the task is lm; .*: loss, perplexity'):
        load_task(TaskConfig(path=str(base / "text.jsonl"), metric="accuracy", **small))


def test_every_method_learns_behind_the_models_own_head():
    """Each in one step: a finite loss whose gradient reaches it, masks and second passes included."""
    backbone = Backbone.from_config(config(), dtype="float64")
    split = some_texts(backbone, size=8)
    placed = [{"method": name} for name in methods() if name not in ("head_only", "full_finetuning")]
    placed += [
        {**LORA, "mask": {"sparsity": 0.5, "score": "grasp"}},
        {**LORA, "mask": {"sparsity": 0.5, "score": "snip"}},
    ]
    designs = [design(row) for row in placed]
    designs = [d for d in designs if not d.check(backbone.sites) and not d.solo]
    assert len(designs) > 30
    cohort, lanes = cohort_of(backbone, split, *designs, batch=4)
    for lane in lanes:
        prepare(lane, cohort)
    before = [{key: value.detach().clone() for key, value in lane.params.items()} for lane in lanes]
    assert np.isfinite(cohort.step()).all()
    cohort.close()
    for lane, old in zip(lanes, before, strict=True):
        assert lane.failure is None, lane.design.label
        assert any(not torch.equal(value, old[key]) for key, value in lane.params.items()), lane.design.label


def test_nothing_trains_with_the_head_alone_and_everything_with_all_weights():
    backbone = Backbone.from_config(config(), dtype="float64")
    split = some_texts(backbone)
    cohort, (nothing,) = cohort_of(backbone, split, design({"method": "head_only"}))
    first = cohort.predict(split)
    cohort.step()
    np.testing.assert_array_equal(cohort.predict(split), first)
    assert (nothing.step, nothing.params, nothing.failure) == (1, {}, None)
    cohort.close()

    cohort, (whole,) = cohort_of(backbone, split, design({"method": "full_finetuning"}), lively=False)
    cohort.losses([np.arange(6)]).sum().backward()
    (delta,) = whole.params.values()
    model = AutoModelForCausalLM.from_config(config()).to(torch.float64)
    model.model.load_state_dict(backbone.model.state_dict())
    model.tie_weights()
    total = torch.zeros((), dtype=torch.float64)
    for row, scored in zip(split.ids, split.scored, strict=True):
        ids, labels = torch.from_numpy(row), torch.from_numpy(np.where(scored, row, -100))
        total = total + model(input_ids=ids[None], labels=labels[None]).loss.double() * int(scored.sum())
    (total / sum(int(scored.sum()) for scored in split.scored)).backward()
    theirs = torch.cat([parameter.grad.flatten() for parameter in model.model.parameters()])
    torch.testing.assert_close(delta.grad, theirs, atol=1e-6, rtol=1e-4)
