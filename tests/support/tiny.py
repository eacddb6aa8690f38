"""A tiny tokenizer, a tiny random Llama and preference rows, made here: no hub and no shared file is needed."""

import gzip
import json
import random
from pathlib import Path

TEMPLATE = (
    "{% for message in messages %}<|turn|>{{ message['role'] }}\n{{ message['content'] }}<|end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn|>assistant\n{% endif %}"
)
SUBJECTS = ["the tide", "a glacier", "yeast", "copper", "a bee", "Zürich", "東京", "a café"]
QUESTIONS = ["What moves {}?", "Why does {} change?", "Tell me about {} in one line."]
GOOD = [
    "heat and time",
    "salt water pulls on it",
    "it is older than people",
    "light reaches it in 1.3 s",
]
BAD = ["who cares", "nobody knows; see page 42 🙂", "it costs 3.50 €", "ask again, later"]


def rows(n=24, seed=0):
    """`n` rows of prompt, chosen and rejected text; lengths differ, some text is not ASCII."""
    rng = random.Random(seed)
    return [
        {
            "prompt": f"Human: {rng.choice(QUESTIONS).format(rng.choice(SUBJECTS))}\n\nAssistant:",
            "chosen": " Briefly: " + ", ".join(rng.sample(GOOD, rng.randint(1, 4))) + ".",
            "rejected": " Honestly, " + ", ".join(rng.sample(BAD, rng.randint(1, 4))) + ".",
        }
        for _ in range(n)
    ]


def same_pairs(a, b):
    """Whether two data sets hold the same, report, row numbers and reference log-probs included."""
    import numpy as np

    return (
        a.prompt_ids == b.prompt_ids
        and a.chosen_ids == b.chosen_ids
        and a.rejected_ids == b.rejected_ids
        and (a.pad_id, a.vocab_size, a.report) == (b.pad_id, b.vocab_size, b.report)
        and np.array_equal(a.rows, b.rows)
        and (a.ref_logps is None) == (b.ref_logps is None)
        and (a.ref_logps is None or np.array_equal(a.ref_logps, b.ref_logps))
    )


def write_jsonl(path: Path, data) -> Path:
    """Write rows as JSONL, gzipped if the name says so."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in data)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def tokenizer():
    """A byte-level BPE of 400 tokens with pad, EOS and a chat template, as a transformers tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|turn|>", "<|end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator([text for row in rows(200, seed=1) for text in row.values()], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<|pad|>", eos_token="<|end|>")
    made.chat_template = TEMPLATE
    return made


def model(vocab_size=416, seed=0, **config):
    """A random float32 Llama of two layers whose logits differ enough for a wrong label to show."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "initializer_range": 0.2,  # with the usual 0.02 every token is nearly as likely as any other
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            LlamaConfig(**{**settings, **config}), dtype=torch.float32
        )
