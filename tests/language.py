"""A tiny decoder with a tokenizer of whole words, and texts for it, for the tests of language modelling."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

NAMES = ["ann", "bob", "cem", "dan"]
ANSWERS = {"ann": "red", "bob": "blue", "cem": "green", "dan": "red"}
FILL = ["the", "a", "of", "is", "what", "likes", "and", ":", "yes", "no"]
WORDS = ["[PAD]", "[UNK]", "<s>", "</s>", *NAMES, "red", "blue", "green", *FILL, "user", "assistant"]
TEMPLATE = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' </s> ' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant : ' }}{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = TEMPLATE
    return made


def config(*, tied: bool = True, words: int = len(WORDS)) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=words, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=64, bos_token_id=2, eos_token_id=3, pad_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip


def make_decoder(path: Path, *, tied: bool = True) -> Path:
    """A folder with the model, its tokenizer and data: `text.jsonl`, `pairs.jsonl`, `chats.jsonl`, `classes.csv`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(tied=tied))
        for weight in model.parameters():
            if weight.ndim > 1:
                torch.nn.init.normal_(weight, 0, 0.2)
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    random = np.random.default_rng(0)
    rows: dict[str, list[dict[str, object]]] = {"text": [], "pairs": [], "chats": []}
    table = ["text,label"]
    for _ in range(60):
        name = str(random.choice(NAMES))
        ask = f"{' '.join(random.choice(FILL, size=random.integers(1, 5)))} {name} likes :"
        rows["text"].append({"text": f"{ask} {ANSWERS[name]}"})
        rows["pairs"].append({"prompt": ask, "completion": f" {ANSWERS[name]}"})
        chat = [{"role": "user", "content": ask}, {"role": "assistant", "content": ANSWERS[name]}]
        rows["chats"].append({"messages": chat})
        table.append(f"{ask},{ANSWERS[name]}")
    for kind, values in rows.items():
        (path / f"{kind}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    (path / "classes.csv").write_text("\n".join(table) + "\n")
    return path
