"""Where the pairs come from: the generated world, or the user's file; read and encoded by `dpo_ext`
either way.
"""

from __future__ import annotations

import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

from dpo_ext import DataError, PairDataset, Tokenizer
from dpo_ext.demo import world

PAD, EOS = "<pad>", "<eos>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ROWS_READ = 20_000
TEXT_READ = 4_000_000
FEWEST_PAIRS = 40


@dataclass(frozen=True)
class Source:
    """Encoded pairs, split; ``heldout_pairs`` and ``tasks`` are the world's truth about them, None
    for a file.

    ``limits`` says in whole sentences what was left out so that the demo stays short.
    """

    name: str
    train: PairDataset
    heldout: PairDataset
    report: Any
    tokenizer: Tokenizer
    decode: Callable[[Sequence[int]], str]
    end_id: int
    heldout_pairs: list[world.LabelledPair] | None = None
    limits: list[str] = field(default_factory=list)

    @property
    def known_reward(self) -> bool:
        return self.heldout_pairs is not None


def generate(
    out: Path, seed: int, train_pairs: int, heldout_pairs: int
) -> tuple[Path, list[world.LabelledPair], list[str]]:
    """Draws the world and writes its rows to ``out/pairs.jsonl.gz``, training rows first.

    Returns the path, the truth about the held-out rows, and the texts to train a tokenizer on.
    """
    train, heldout = world.draw_world(seed, train_pairs, heldout_pairs)
    path = out / "pairs.jsonl.gz"
    world.write_rows(path, (pair.row for pair in (*train, *heldout)))
    texts = [text for pair in train for text in pair.row.values()]
    return path, heldout, texts


@dataclass(frozen=True)
class Corpus:
    """What the tokenizer is trained on. ``path``: the file to read, the head of the user's if that
    is long.
    """

    path: Path
    texts: list[str]
    chat: bool
    limits: list[str]


def look_at(path: Path, out: Path) -> Corpus:
    """Collects the texts of a file for the tokenizer, and cuts a long file to its first rows.

    Rows that are not JSON objects are passed over here; reading the pairs reports them.
    """
    texts: list[str] = []
    chat, size, rows, cut = False, 0, 0, False
    with _open(path) as lines:
        for line in lines:
            if rows == ROWS_READ:
                cut = True
                break
            rows += 1
            if size < TEXT_READ:
                for text, in_messages in _texts(line):
                    texts.append(text)
                    size += len(text)
                    chat |= in_messages
    limits = []
    if size >= TEXT_READ:
        limits.append(
            f"The tokenizer was trained on the first {TEXT_READ / 1e6:.0f} million characters."
        )
    if cut:
        head = out / "pairs-head.jsonl.gz"
        with _open(path) as lines, gzip.open(head, "wb") as kept:
            kept.writelines(itertools.islice(lines, ROWS_READ))
        path = head
        limits.append(f"Only the first {ROWS_READ:,} rows were read; they are in {head.name}.")
    return Corpus(path, texts, chat, limits)


def train_tokenizer(texts: Sequence[str], vocab_size: int, chat: bool, folder: Path) -> None:
    """A byte-level BPE of ``vocab_size`` at most, saved as transformers would; with a ChatML
    template for messages.
    """
    from tokenizers import Tokenizer as Builder
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = [PAD, EOS, *((TURN_START, TURN_END) if chat else ())]
    builder = Builder(models.BPE())
    builder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    builder.decoder = decoders.ByteLevel()
    builder.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    folder.mkdir(parents=True, exist_ok=True)
    builder.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        # By the model's type transformers 4 would take Llama's class, which puts <s> in front.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": TURN_END if chat else EOS,
    }
    if chat:
        config["chat_template"] = CHATML
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def encode(
    path: Path,
    folder: Path,
    *,
    name: str,
    seed: int,
    max_length: int,
    train_pairs: int,
    heldout_pairs: int,
    truth: list[world.LabelledPair] | None = None,
    limits: Sequence[str] = (),
) -> Source:
    """Reads and encodes the file in Rust, then splits it: the world at its border, a user's file at
    random.
    """
    from tokenizers import Tokenizer as Decoder

    tokenizer = Tokenizer.from_pretrained(folder)
    pairs = PairDataset.from_files(
        path,
        tokenizer,
        max_length=max_length,
        truncation="keep_completions",
        on_bad="skip" if truth is None else "error",
    )
    order = np.arange(len(pairs))
    said = list(limits)
    if truth is None:
        if len(pairs) < FEWEST_PAIRS:
            raise DataError(
                f"{path}: expected at least {FEWEST_PAIRS} usable pairs, found {len(pairs)} in "
                f"{pairs.report.read} "
                f"rows\n{pairs.report}",
                path=path,
                reason="bad_input",
            )
        random.Random(seed).shuffle(order)  # type: ignore[arg-type]
        wanted = train_pairs + heldout_pairs
        if len(pairs) > wanted:
            said.append(f"{wanted:,} of {len(pairs):,} pairs were drawn at random.")
        order = order[:wanted]
        heldout_pairs = min(heldout_pairs, len(order) // 5)
        said.append(
            f"Sides longer than {max_length} tokens were cut to that, the prompt first and from "
            "its start; the data report counts them."
        )
    border = len(order) - heldout_pairs
    decoder = Decoder.from_file(str(folder / "tokenizer.json"))
    vocabulary = decoder.get_vocab()
    return Source(
        name=name,
        train=pairs.select(order[:border]),
        heldout=pairs.select(order[border:]),
        report=pairs.report,
        tokenizer=tokenizer,
        decode=lambda ids: decoder.decode(list(ids), skip_special_tokens=False),
        end_id=vocabulary.get(TURN_END, vocabulary[EOS]),
        heldout_pairs=truth,
        limits=said,
    )


def _open(path: Path) -> IO[bytes]:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]


def _texts(line: bytes) -> Iterator[tuple[str, bool]]:
    """The texts of one row, each with whether it stood in a list of messages."""
    try:
        row = json.loads(line)
    except ValueError:
        return
    if not isinstance(row, dict):
        return
    for key in ("prompt", "chosen", "rejected"):
        value = row.get(key)
        if isinstance(value, str):
            yield value, False
        elif isinstance(value, list):
            for message in value:
                if isinstance(message, dict) and isinstance(message.get("content"), str):
                    yield message["content"], True
                    yield str(message.get("role", "")), True
