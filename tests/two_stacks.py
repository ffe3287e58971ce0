"""Tiny encoder-decoders with random weights (no pretrained one is at hand), and pairs of texts for them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    MBartConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from peftscape.search.encoding import EncodedSplit

PAD, END, VOCAB = 0, 1, 60
ANSWERS = {"ann": "the red one", "bob": "blue", "cem": "a green one", "dan": "red"}
FILL = ["of", "is", "what", "likes", "and", "yes", "no"]
WORDS = ["[PAD]", "</s>", "<s>", "[UNK]", *ANSWERS, "the", "a", "one", "red", "blue", "green", *FILL]
_T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 6, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "pad_token_id": PAD,
    "eos_token_id": END, "decoder_start_token_id": PAD,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
    "pad_token_id": PAD, "bos_token_id": 2, "eos_token_id": END, "forced_eos_token_id": END, "scale_embedding": True,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "t5": T5Config(**_T5),
    "t5-gated": T5Config(**{**_T5, "num_decoder_layers": 1}, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "t5-deep": T5Config(**{**_T5, "num_layers": 3}),
    "bart": BartConfig(**_BART, decoder_start_token_id=END),
    "mbart": MBartConfig(**_BART),
}


def pairs(size: int = 4) -> EncodedSplit:
    """Sources of 3 to 17 tokens and targets of 2 to 9, each ending with `END`."""
    random = np.random.default_rng(7)
    sources, ids = ([np.r_[random.integers(4, VOCAB, size=random.integers(low, high)), END] for _ in range(size)]
                    for low, high in ((2, 17), (1, 9)))  # fmt: skip
    lengths = np.array([len(a) + len(b) for a, b in zip(sources, ids, strict=True)])
    scored = [np.ones(len(row), dtype=np.bool_) for row in ids]
    return EncodedSplit(ids, None, np.zeros(size, dtype=np.float32), 0, lengths, scored=scored, sources=sources)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words, and the end of a text behind each."""
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="</s>")


def make_pair_model(path: Path, family: str) -> Path:
    """A folder with the model, its tokenizer and `pairs.jsonl`, in which a name's answer is written from a question."""
    config = copy.deepcopy(CONFIGS[family])
    config.vocab_size = len(WORDS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForSeq2SeqLM.from_config(config)
        if family == "t5-gated":  # as FLAN's, whose head is its own though its configuration calls it tied
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, 0, 0.2)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    random = np.random.default_rng(0)
    rows = []
    for _ in range(60):
        name = str(random.choice(list(ANSWERS)))
        ask = f"{' '.join(random.choice(FILL, size=random.integers(1, 5)))} {name}"
        rows.append({"source": ask, "target": ANSWERS[name]})
    (path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
