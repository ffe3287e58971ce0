"""Chats: what is written after them against the tokenizer's own template, and those that are too long."""

from __future__ import annotations

import json

import numpy as np
import pytest
from language import TEMPLATE, make_decoder, tokenizer

from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings
from peftscape.search.encoding import encode
from peftscape.search.export import load
from peftscape.search.study import run_search
from peftscape.search.task import TaskConfig, TaskError, load_task
from peftscape.spaces.words import InputError


def turn(role, content):
    return {"role": role, "content": content}


ANN = [turn("user", "what ann likes :"), turn("assistant", "red")]
LONG = [turn("user", "what is the yes a no of cem likes :"), turn("assistant", "green and blue")]


def task_of(path, chats, **more):
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    return TaskConfig(path=str(path), messages="messages", kind="lm", validation_size=4, test_size=4, **more)


def test_the_last_answer_is_wanted_and_all_before_it_is_the_prompt(tmp_path):
    chat = [turn("system", "a the"), *ANN, turn("user", "and bob :"), turn("assistant", " blue "), turn("user", "yes")]
    task = load_task(task_of(tmp_path / "chats.jsonl", [chat] * 20, metric="exact_match"))
    made = tokenizer()
    encoded = encode(task, made, 40)
    theirs = made.apply_chat_template(chat[:4], add_generation_prompt=True, return_dict=False)
    assert encoded.validation.asked.prompts[0].tolist() == theirs
    assert encoded.validation.targets.tolist() == ["blue"] * 3
    assert (encoded.validation.asked.most, encoded.validation.cut) == (2, 0)
    assert encoded.validation.asked.ends == {made.eos_token_id}
    # All answers are learnt, whatever is scored.
    learnt = made.decode(encoded.train.ids[0][encoded.train.scored[0]])
    assert learnt == "red </s> blue </s>"
    # The prompt loses its beginning, as it would before a completion of so many tokens.
    short = encode(task, made, 12)
    assert short.test.asked.prompts[0].tolist() == theirs[-10:]
    assert short.test.cut == 4
    # A mark of the template's own for the end of a turn ends an answer too.
    made.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    made.chat_template = TEMPLATE.replace("</s>", "<turn>")
    assert encode(task, made, 40).test.asked.ends == {made.eos_token_id, made.convert_tokens_to_ids("<turn>")}


def test_of_a_chat_that_is_too_long_an_answer_stays(tmp_path):
    # One that fits, one whose first answer lies behind the length, one whose second does, and one with both.
    task = load_task(task_of(tmp_path / "chats.jsonl", [ANN, LONG, [*ANN, *LONG], [*LONG, *ANN]] * 8))
    made = tokenizer()
    train = encode(task, made, 11).train
    assert train.cut == len(task.train) - task.train.texts.count(json.dumps(ANN))
    whole = ("user : what ann likes : </s> assistant : red </s>", "red </s>")
    kept = ("of cem likes : </s> assistant : green and blue </s>", "green and blue </s>")
    for text, ids, mark in zip(task.train.texts, train.ids, train.scored, strict=True):
        assert (made.decode(ids), made.decode(ids[mark])) == (whole if json.loads(text)[:2] == ANN else kept)
    with pytest.raises(TaskError, match="no token to predict"):
        encode(task, made, 1)


def test_chats_that_cannot_be_written_are_said(tmp_path):
    path = tmp_path / "chats.jsonl"
    with pytest.raises(TaskError, match=r"row 2 of .*by the assistant, but not the first"):
        load_task(task_of(path, [ANN, ANN[1:] * 2, ANN]))
    made = tokenizer()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    made.chat_template = refusal + TEMPLATE
    for metric in ("loss", "exact_match"):
        task = load_task(task_of(path, [[turn("system", "be brief"), *ANN]] * 20, metric=metric))
        with pytest.raises(InputError, match=r'begins with "be brief" .*system, .*System role not supported'):
            encode(task, made, 40)


def test_a_search_is_scored_by_what_its_adapters_write(tmp_path):
    base = make_decoder(tmp_path / "model")
    task = TaskConfig(
        path=str(base / "chats.jsonl"), messages="messages", kind="lm", metric="exact_match", validation_size=10,
        test_size=10,
    )  # fmt: skip
    lora = {"method": "lora", "rank": 4, "sites": ["q", "v", "up", "down"], "layers": "all"}
    config = SearchConfig(
        name="chats", model=ModelConfig(source=str(base), dtype="float32"), task=task,
        space={"slots": [{"name": "w", "options": [lora]}], "training": {"lr": {"log": [2e-2, 4e-2]}}},
        search=SearchSettings(
            objectives="exact_match:max,trainable:min", examples=96, batch_size=8, lanes=1, retest_seeds=0,
            sampler="random", textbook=False,
        ),
        budget=BudgetConfig(trials=1),
    )  # fmt: skip
    (record,) = run_search(config, tmp_path / "run", quiet=True).records
    adapter = load(tmp_path / "run" / "adapters" / str(record.number))
    chats = [json.loads(text) for text in load_task(task).validation.texts]
    said = adapter.generate([json.dumps(chat[:-1]) for chat in chats], most=2)
    assert record.validation == pytest.approx(
        np.mean([a == chat[-1]["content"] for a, chat in zip(said, chats, strict=True)])
    )
    assert record.validation > 0
    # Other JSON is what a user says.
    for words in ("[]", "[1, 2, 3]", '[{"role": "user"}]'):
        assert adapter.generate([words], most=2) == adapter.generate([json.dumps([turn("user", words)])], most=2)
    with pytest.raises(InputError, match="text 0 is no list of messages"):
        adapter.predict([json.dumps(ANN[1:])])
