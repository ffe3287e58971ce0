"""The designs between a textbook design and the best are trained once; retests keep what each example gave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, BertConfig, PreTrainedTokenizerFast

from peftscape.analysis.ablation import ablation, ends, missing
from peftscape.analysis.outcomes import of_record
from peftscape.analysis.sources import SourceError, Study, load
from peftscape.search.ablate import ablate
from peftscape.search.config import BudgetConfig, ModelConfig, SearchConfig, SearchSettings, TaskConfig
from peftscape.search.study import run_search

# One textbook design lies in it (LoRA of rank 8 on q and v), at a rate too low to learn anything in 48 examples.
SITES = {"choice": [["q", "v"], ["q", "k", "v", "o"]]}
OPTION = {"method": "lora", "rank": {"ladder": [4, 16]}, "alpha": {"choice": [8.0, 16.0]}, "sites": SITES}
SPACE = {"slots": [{"name": "w", "options": [OPTION]}], "training": {"lr": {"log": [1e-3, 5e-2]}}}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "who", "where", "the", "of", "in", "is"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with words for tokens, and `task.csv` beside it."""
    path = tmp_path_factory.mktemp("base")
    shape = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModel.from_config(BertConfig(vocab_size=len(WORDS), hidden_size=32, **shape)).save_pretrained(path)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(path)
    random = np.random.default_rng(0)
    texts = [" ".join([*random.choice(WORDS[6:], 3), WORDS[4 + i % 2]]) + f" {i}" for i in range(260)]
    rows = [f"{text},{'person' if 'who' in text else 'place'}" for text in texts]
    (path / "task.csv").write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def finished(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Study]:
    """A search with two textbook designs and a few others, and its study."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    settings = {"examples": 48, "batch_size": 8, "lanes": 4, "retest_seeds": 2, "sampler": "random"}
    config = SearchConfig(
        name="tiny",
        model=ModelConfig(source=str(base), dtype="float32", head="mean"),
        space=SPACE,
        task=TaskConfig(path=str(base / "task.csv"), validation_size=40, test_size=40),
        search=SearchSettings(**settings, textbook=True),
        budget=BudgetConfig(trials=10),
    )
    return out, run_search(config, out, quiet=True)


def test_retests_keep_what_each_example_gave(finished: tuple[Path, Study]) -> None:
    _, study = finished
    retested = [record for record in study.records if record.retests]
    assert retested
    for record in retested:
        outcomes = of_record(record)
        assert outcomes.keys() == {score.seed for score in record.retests}
        for score in record.retests:
            assert outcomes[score.seed].size == score.n_test == 40
            assert outcomes[score.seed].mean() == pytest.approx(score.test)


def test_what_is_missing_on_the_path_is_trained_once(finished: tuple[Path, Study]) -> None:
    out, study = finished
    found = ends(study.records)
    assert found is not None
    wanted = missing(ablation(study.records, *found))
    after = ablate(out, quiet=True)
    assert wanted
    assert [dict(r.design) for r in after.ablations] == [dict(d) for d in wanted]
    assert all(r.failure is None or r.failure.kind for r in after.ablations)
    assert after.records == load(out).records == study.records  # they count nowhere else
    path = ablation(after.records, *found, after.ablations)
    assert [step.ablation for step in path if step.number is not None].count(True) == len(wanted)
    again = ablate(out, quiet=True)
    assert len(again.ablations) == len(wanted)


def test_a_folder_without_a_path_says_so(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        ablate(tmp_path, quiet=True)
