"""How fast is the tokenizer outside English, on first sight and on repeats, beside its peers?

Texts of thirteen kinds from a seeded generator: words of a made vocabulary, drawn by Zipf's law, so
that words repeat as in prose; base64, digits and URLs are random. Ids are compared with those of
`tokenizers` in every text before anything counts. Cold is the first sight of all texts by a
tokenizer that was just loaded and has encoded one short text, the best of some loads; warm is the
best later pass. CPU time of one thread. `--record` appends the table to benches/RESULTS.md;
gigatoken takes part where it is installed.

    RAYON_NUM_THREADS=1 python benches/scripts.py --tokenizer FOLDER [--rows FILE] [--record]
"""

from __future__ import annotations

import argparse
import base64
import gzip
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dpo_ext import Tokenizer

TEXTS, BYTES = 600, 1_000
LOADS, PASSES = 3, 7
COMMON = 4_000

LATIN = "etaoinshrdlucmfwypvbgk"
HAN = "".join(chr(c) for c in range(0x4E00, 0x4E00 + 2500))
KANA = "".join(chr(c) for c in range(0x3041, 0x3097))
HANGUL = "".join(chr(c) for c in range(0xAC00, 0xAC00 + 2000, 3))
THAI = "".join(chr(c) for c in [*range(0xE01, 0xE2F), *range(0xE30, 0xE3A), *range(0xE40, 0xE4D)])
ARABIC = "".join(chr(c) for c in [*range(0x627, 0x63B), *range(0x641, 0x64B)])
CYRILLIC = "".join(chr(c) for c in range(0x430, 0x450))
HINDI = "".join(chr(c) for c in [*range(0x905, 0x93A), *range(0x93E, 0x94E)])
EMOJI = "".join(chr(c) for c in [*range(0x1F300, 0x1F650), *range(0x1F680, 0x1F6C5)])


def words(rng: random.Random, letters: str, longest: int, gap: str, stop: str) -> Iterator[str]:
    """Endless words of a made vocabulary by Zipf's law, with what stands between them."""
    vocabulary = [
        "".join(rng.choices(letters, k=1 + min(rng.randrange(longest), rng.randrange(longest))))
        for _ in range(COMMON)
    ]
    weights = list(accumulate(1 / rank for rank in range(1, COMMON + 1)))
    while True:
        for word in rng.choices(vocabulary, cum_weights=weights, k=rng.randint(4, 16)):
            yield word + gap
        yield stop


def code(rng: random.Random) -> Iterator[str]:
    names = words(rng, LATIN, 9, "", "_")
    while True:
        a, b, c = (next(names) for _ in range(3))
        yield f"    def {a}_{b}(self, {c}: int) -> list[{a.title()}]:\n"
        yield f"        if self.{b} != {rng.randrange(1000)} and {c}[{a}] is None:\n"
        yield f"            return [{a}.{b}({c}=0x{rng.randrange(1 << 20):x}) for {a} in {c}]\n\n"


def urls(rng: random.Random) -> Iterator[str]:
    names = words(rng, LATIN, 9, "", "-")
    while True:
        host, path, page = (next(names) for _ in range(3))
        yield f"https://www.{host}.com/{path}/{page}.html?id={rng.randrange(10**9)}&q={path}%20x\n"


def kinds(rng: random.Random) -> dict[str, Iterator[str]]:
    def random_base64() -> Iterator[str]:
        while True:
            yield base64.b64encode(rng.randbytes(57)).decode() + "\n"

    def digits() -> Iterator[str]:
        while True:
            yield str(rng.randrange(10 ** rng.randint(3, 60))) + rng.choice(", \n")

    return {
        "Latin words": words(rng, LATIN, 12, " ", ".\n"),
        "Cyrillic": words(rng, CYRILLIC, 12, " ", ".\n"),
        "Arabic": words(rng, ARABIC, 9, " ", ".\n"),
        "Hindi": words(rng, HINDI, 9, " ", "\u0964\n"),
        "Korean": words(rng, HANGUL, 5, " ", ".\n"),
        "Chinese": words(rng, HAN, 4, "", "\u3002"),
        "Japanese": words(rng, KANA + HAN[::20], 5, "", "\u3002"),
        "Thai": words(rng, THAI, 9, "", " "),
        "code": code(rng),
        "URLs": urls(rng),
        "base64": random_base64(),
        "digits": digits(),
        "emoji": words(rng, EMOJI, 3, "", " "),
    }


def texts_of(parts: Iterator[str]) -> list[str]:
    texts = []
    for _ in range(TEXTS):
        text = ""
        while len(text.encode()) < BYTES:
            text += next(parts)
        texts.append(text)
    return texts


def chosen(file: Path) -> list[str]:
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["chosen"] for line in lines]


Encode = Callable[[list[str]], Any]


def ours(path: Path) -> Encode:
    tokenizer = Tokenizer.from_file(path)
    assert tokenizer.engine == "bpe"
    return lambda texts: tokenizer.encode_batch(texts, threads=1, add_special_tokens=False)


def crate(path: Path) -> Encode:
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    return lambda texts: tokenizer.encode_batch_fast(texts, add_special_tokens=False)


def gigatoken(path: Path) -> Encode:
    import gigatoken

    tokenizer = gigatoken.Tokenizer(str(path))
    return lambda texts: tokenizer.encode_batch(texts, parallel=False)


def lists(result: Any) -> list[list[int]]:
    """The ids of each text, whatever the engine gives."""
    if hasattr(result, "offsets"):
        bounds = zip(result.offsets[:-1], result.offsets[1:], strict=True)
        return [result.values[a:b].tolist() for a, b in bounds]
    return [np.asarray(getattr(ids, "ids", ids)).tolist() for ids in result]


def timed(encode: Encode, texts: list[str]) -> float:
    start = time.process_time()
    encode(texts)
    return time.process_time() - start


def measured(load: Callable[[Path], Encode], path: Path, texts: list[str], loads: int) -> Any:
    """Ids, and the seconds of the first pass and of later ones."""
    cold = []
    for _ in range(loads):
        encode = load(path)
        encode(["a b"])
        cold.append(timed(encode, texts))
    warm = min(timed(encode, texts) for _ in range(PASSES if loads > 1 else 1))
    return lists(encode(texts)), min(cold), warm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--only", help="one kind of text")
    parser.add_argument(
        "--rows", type=Path, help="a JSONL file: its `chosen` texts are a kind, too"
    )
    parser.add_argument("--record", action="store_true", help="append the table to RESULTS.md")
    arguments = parser.parse_args()
    if os.environ.get("RAYON_NUM_THREADS") != "1":
        sys.exit("set RAYON_NUM_THREADS=1: peers take every core otherwise")
    path = arguments.tokenizer / "tokenizer.json"
    peers: dict[str, Callable[[Path], Encode]] = {"tokenizers": crate}
    try:
        import gigatoken as _  # noqa: F401

        peers["gigatoken"] = gigatoken
    except ImportError:
        print("gigatoken is not installed")
    names = ["dpo_ext", *peers]
    header = ["texts", "tokens"]
    header += [f"{name}, {state}" for name in names for state in ("cold", "warm")]
    header += ["ours to tokenizers, warm"]
    lines = [f"| {' | '.join(header)} |\n", "|" + " --- |" * len(header) + "\n"]
    made = kinds(random.Random(0))
    for kind in ["rows"] * bool(arguments.rows) + list(made):
        if arguments.only not in (None, kind):
            continue
        texts = chosen(arguments.rows) if kind == "rows" else texts_of(made[kind])
        ids, *seconds = measured(ours, path, texts, LOADS)
        for name, load in peers.items():
            found, *theirs = measured(load, path, texts, 1 if name == "tokenizers" else LOADS)
            if found != ids:
                sys.exit(f"{name} gives other ids for {kind}")
            seconds += theirs
        tokens = sum(map(len, ids))
        cells = [kind, f"{tokens:,}", *(f"{tokens / s / 1e6:.1f}" for s in seconds)]
        cells.append(f"{seconds[3] / seconds[1]:.0f}x")
        lines.append(f"| {' | '.join(cells)} |\n")
        print(*cells, sep="\t", flush=True)
    if arguments.record:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        where = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
        title = (
            f"\n## Tokenizing by kind of text, first sight and repeats ({date.today()})\n\n"
            f"{commit}, {where}, Python {sys.version.split()[0]}, {path.parent.name}, M tokens/s "
            f"of CPU on one thread, tokenizers {tokenizers.__version__}: `RAYON_NUM_THREADS=1 "
            f"python benches/scripts.py --tokenizer {path.parent.name} --record`\n\n"
        )
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines([title, *lines])


if __name__ == "__main__":
    main()
