"""Tiny searches for tests: a model and a task that train in milliseconds, and processes that run them."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings, TaskConfig
from peftscape.search.disk import FULL, DiskError
from peftscape.spaces.words import InputError

KEYS = {"person": "who", "place": "where", "time": "when"}
FILL = ["the", "a", "of", "in", "city", "river", "year", "man", "is", "was"]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *KEYS.values(), *FILL]
BATCH, EXAMPLES = 8, 64
STEPS = EXAMPLES // BATCH
#: One slot that is quick to train; what it suggests is always possible.
SPACE: dict[str, Any] = {
    "slots": [{"name": "w", "options": [{"method": "lora", "rank": {"ladder": [1, 16]}, "layers": ["all", "top"]}]}],
    "training": {"lr": {"log": [1e-3, 1e-2]}},
}


def make_base(path: Path, *, seed: int = 0, width: int = 32, rows: int = 160) -> Path:
    """A tiny BERT with words for tokens, and `task.csv` beside it, in which a word decides."""
    shape = {"num_attention_heads": width // 16, "intermediate_size": 3 * width // 2}
    shape |= {"num_hidden_layers": 2, "max_position_embeddings": 2 * width}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModel.from_config(BertConfig(vocab_size=len(WORDS), hidden_size=width, **shape))
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, 0, 0.05)
    model.save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    random = np.random.default_rng(0)
    lines = ["text,label"]
    for i in range(rows):
        label = list(KEYS)[i % 3]
        text = [*random.choice(FILL, size=random.integers(1, 5)), KEYS[label], KEYS[label]]
        lines.append(f"{' '.join(random.permutation(text))} {i % 7},{label}")
    (path / "task.csv").write_text("\n".join(lines) + "\n")
    return path


def tiny(
    base: Path, *, search: dict[str, Any] | None = None, budget: dict[str, Any] | None = None, **more: Any
) -> SearchConfig:
    settings: dict[str, Any] = {
        "examples": EXAMPLES, "batch_size": BATCH, "lanes": 4, "retest_seeds": 1, "sampler": "random",
        "textbook": False, **(search or {}),
    }  # fmt: skip
    values: dict[str, Any] = {
        "name": "tiny",
        "model": ModelConfig(source=str(base), dtype="float32", head="mean"),
        "space": SPACE,
        "task": TaskConfig(path=str(base / "task.csv"), validation_size=20, test_size=30),
        "search": SearchSettings(**settings),
        "budget": BudgetConfig(**(budget or {"trials": 8})),
    }
    return SearchConfig(**{**values, **more})


class Child:
    """A process of its own that runs a function, with the exit status of the command line.

    It is a copy of this process, so that nothing has to be imported anew.
    """

    def __init__(self, function: Callable[[], Any], log: Path) -> None:
        sys.stdout.flush()
        self.log = log
        self.pid = os.fork()
        if self.pid == 0:
            status = 70
            try:
                os.setpgid(0, 0)
                file = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                os.dup2(file, 1)
                os.dup2(file, 2)
                sys.stdout, sys.stderr = os.fdopen(1, "w", 1, closefd=False), os.fdopen(2, "w", 1, closefd=False)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
                    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                torch.set_num_threads(1)
                status = _run(function)
            finally:
                os._exit(status)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit status, negative for a signal."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        self.kill()
        os.waitpid(self.pid, 0)
        raise AssertionError(f"the process did not end within {timeout_s} s: {self.said()}")

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.is_file() else ""


def _run(function: Callable[[], Any]) -> int:
    try:
        function()
    except KeyboardInterrupt:
        return 130
    except DiskError as error:
        print(error, file=sys.stderr, flush=True)
        return FULL
    except InputError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def until(condition: Callable[[], Any], timeout_s: float = 30.0) -> Any:
    """What the condition gives once it is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come true in time")


def trials(out: Path, name: str = "tiny") -> dict[int, dict[str, Any]]:
    """State and user attributes of all trials in a study's file, read without peftscape."""
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(out / "study.db", timeout=30)) as database:
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'trial_user_attributes'").fetchall():
            return {}
        rows = database.execute(
            "SELECT t.trial_id, t.number, t.state FROM trials t JOIN studies s USING (study_id) WHERE s.study_name = ?",
            (name,),
        ).fetchall()
        found: dict[int, dict[str, Any]] = {}
        for id_, number, state in rows:
            attrs = database.execute("SELECT key, value_json FROM trial_user_attributes WHERE trial_id = ?", (id_,))
            found[number] = {"state": state, **{key: json.loads(value) for key, value in attrs.fetchall()}}
    return found


def complete(out: Path) -> dict[int, dict[str, Any]]:
    """The records of the trials that are complete."""
    if not (out / "study.db").is_file():
        return {}
    return {number: trial["record"] for number, trial in trials(out).items() if trial["state"] == "COMPLETE"}
