"""What the TRL tests share: a tiny model with preference data, a short training run, and how two runs are compared.

`material` comes from `../shared/trl_fixtures/make_fixtures.py` where that folder is beside the repository, and always
from `write_material` too, so that a checkout alone tests the same things.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import datasets
import torch
import transformers
import trl
from datasets import Dataset, load_dataset
from places import SHARED
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from dpo_ext.trl import DPOTrainer

datasets.disable_progress_bars()
transformers.utils.logging.disable_progress_bar()

MAKE_FIXTURES = SHARED / "trl_fixtures" / "make_fixtures.py"
FORMATS = ("text_explicit", "text_implicit", "chat_explicit")
LOSSES = ("sigmoid", "ipo", "hinge", "robust")
BETA = 0.1
TIMINGS = ("runtime", "per_second", "preparation_time")

# Stock TRL against itself moves by this much (two versions, four steps, learning rate 1e-3, log-probs near -150):
# loss 1.5e-5 and gradient norm 3.5e-5 relative, `logps/*` 3e-5, `logits/*` 3e-8, entropy 5e-7 absolute.
RELATIVE = ("loss", "grad_norm")
LOGPS_BOUND = 6e-5  # four units in the last place of a float32 near -150
BOUNDS = {
    "loss": 1e-5,
    "grad_norm": 1e-5,
    "logps/": LOGPS_BOUND,
    "accuracies": 1e-7,  # our ratios are float64, TRL's float32
    # What the bounds of its two rewards allow, from which `differences` lets it stray by 1e-6: stock itself moved by 4.5e-6
    # between AVX-512 and AVX2 on one CPU.
    "rewards/margins": 2 * BETA * LOGPS_BOUND,
    "rewards/": BETA * LOGPS_BOUND,
    "logits/": 2e-7,
    "entropy": 2e-6,
    "accuracy": 1e-7,
    "kl": LOGPS_BOUND,
    "num_tokens": 0.0,
    "learning_rate": 0.0,
    "epoch": 0.0,
    "total_flos": 0.0,
    "step": 0.0,
}

_NOUNS = ["river", "lamp", "Käse", "ночь", "fern", "clock", "salt"]
_VERBS = ["holds", "turns", "forgets", "lifts", "paints"]


def _sentence(rng: random.Random, opening: str) -> str:
    words = [
        f"the {rng.choice(_NOUNS)} {rng.choice(_VERBS)} the {rng.choice(_NOUNS)}"
        for _ in range(rng.randint(1, 6))
    ]
    return f"{opening}: {' and '.join(words)} ({rng.randint(0, 99)})."


def write_material(out: Path, pairs: int = 24, seed: int = 0) -> Path:
    """A random two-layer Llama with its tokenizer in `out/model`, and the same pairs in three formats beside it."""
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMATS}
    corpus = []
    for _ in range(pairs):
        turns = [_sentence(rng, "Ask") for _ in range(rng.choice([1, 1, 3]))]
        # The sides open with different letters: where an implicit prompt ends is then beyond dispute.
        good, bad = _sentence(rng, "Yes"), _sentence(rng, "No")
        names = ["Human", "Assistant"]
        prompt = "".join(f"\n\n{names[i % 2]}: {turn}" for i, turn in enumerate(turns))
        prompt += "\n\nAssistant:"
        rows["text_explicit"].append(
            {"prompt": prompt, "chosen": " " + good, "rejected": " " + bad}
        )
        rows["text_implicit"].append({"chosen": f"{prompt} {good}", "rejected": f"{prompt} {bad}"})
        roles = ["user", "assistant"]
        rows["chat_explicit"].append(
            {
                "prompt": [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)],
                "chosen": [{"role": "assistant", "content": good}],
                "rejected": [{"role": "assistant", "content": bad}],
            }
        )
        corpus += [prompt + " " + good, prompt + " " + bad]
    for name, data in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in data)
        (out / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<pad>", "<say>", "<eos>"]
    bpe.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=360,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = (
        "{% for m in messages %}<say>{{ m['role'] }} {{ m['content'] }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<say>assistant {% endif %}"
    )
    tokenizer.save_pretrained(out / "model")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=384,  # more rows than the tokenizer has tokens, as real checkpoints do
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.2,  # with 0.02 every token is equally likely, and a wrong label goes unseen
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(out / "model")
    return out


def shared_material(out: Path) -> Path | None:
    """The fixtures beside the repository, written to `out`; None where they are not there."""
    if not MAKE_FIXTURES.exists():
        return None
    subprocess.run([sys.executable, str(MAKE_FIXTURES), str(out)], check=True, capture_output=True)
    return out


def load(material: Path, name: str, rows: slice | None = None) -> Dataset:
    """One of the formats as a `Dataset`, in a cache folder of its own: TRL's reference cache goes stale in shared ones."""
    data = load_dataset(
        "json",
        data_files=str(material / f"{name}.jsonl"),
        split="train",
        cache_dir=tempfile.mkdtemp(dir=material),
    )
    return data if rows is None else data.select(range(len(data))[rows])


def config(out: Path, **options: Any) -> trl.DPOConfig:
    """`DPOConfig` for four float32 steps on the CPU that log everything; `options` override."""
    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(dir=out),
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "max_length": 512,
        "learning_rate": 1e-3,  # the default, 1e-6, moves nothing in four steps
        "beta": BETA,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
    }
    # transformers 4 leaves here what an earlier configuration said.
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    return trl.DPOConfig(**(defaults | options))


# transformers 4 logs four digits.
LOGGED = 1e-6 if int(transformers.__version__.split(".")[0]) > 4 else 5e-5


def tokenizer(material: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(material / "model")


def build(
    kind: type[trl.DPOTrainer],
    material: Path,
    data: Dataset,
    keywords: dict | None = None,
    **options: Any,
) -> trl.DPOTrainer:
    """A trainer of `kind` for the material's model, by path, as its users mostly give it."""
    args = config(material, **options)
    return kind(str(material / "model"), args=args, train_dataset=data, **(keywords or {}))


def without_timings(row: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in row.items() if not any(word in k for word in TIMINGS)}


def history(trainer: trl.DPOTrainer) -> list[dict[str, float]]:
    """`log_history` without wall-clock times."""
    return [without_timings(row) for row in trainer.state.log_history]


def train(
    kind: type[trl.DPOTrainer], material: Path, data: Dataset, **options: Any
) -> list[dict[str, float]]:
    trainer = build(kind, material, data, **options)
    with contextlib.redirect_stdout(None):
        trainer.train()
    return history(trainer)


def stock(material: Path, data: Dataset, **options: Any) -> list[dict[str, float]]:
    return train(trl.DPOTrainer, material, data, **options)


def ours(material: Path, data: Dataset, **options: Any) -> list[dict[str, float]]:
    return train(DPOTrainer, material, data, **options)


def differences(
    expected: list[dict[str, float]],
    found: list[dict[str, float]],
    *,
    skip: tuple[str, ...] = (),
    slack: float = 1.0,
) -> list[str]:
    """Everything by which two histories differ beyond float32 noise, one line each; empty where they agree."""
    if len(expected) != len(found):
        return [f"{len(expected)} rows expected, {len(found)} found"]
    lines = []
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        if want.keys() != got.keys():
            lines.append(f"row {index}: keys differ by {sorted(want.keys() ^ got.keys())}")
        for key in (key for key in got if key.endswith("rewards/margins")):
            chosen, rejected = (
                got[key.replace("margins", side)] for side in ("chosen", "rejected")
            )
            if not abs(got[key] - (chosen - rejected)) <= 1e-6 * max(
                1.0, abs(chosen), abs(rejected)
            ):
                lines.append(
                    f"row {index}, {key}: {got[key]:.9g} of {chosen:.9g} and {rejected:.9g}"
                )
        for key in sorted(want.keys() & got.keys()):
            if any(name in key for name in skip):
                continue
            gap = abs(want[key] - got[key])
            bound = slack * next(bound for name, bound in BOUNDS.items() if name in key)
            if key.endswith(RELATIVE):
                bound *= abs(want[key])
            if not gap <= bound:
                lines.append(
                    f"row {index}, {key}: {want[key]:.9g}, {got[key]:.9g}, bound {bound:.1e}"
                )
    return lines
