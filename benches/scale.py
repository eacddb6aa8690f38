"""How do encoding, loading shards, planning, and the store grow with the number of pairs?

Every step runs in a process of its own, which says its wall and CPU seconds and by how much its
peak memory grew; each answer is checked. From the smaller and the larger number of pairs comes the
slope, the cost of a further million. Rows are HH-like text of made-up words; ids are the bytes of a
tiny tokenizer or random, so that no model is needed. `--record` appends rows to RESULTS.md.

    python benches/scale.py [--record] [--pairs N] [--text N] [--tokens 400] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import dpo_ext
from dpo_ext import Tokenizer

# The smaller run has so many times fewer pairs. Encoding holds parts of 65,536, so that its memory
# has a slope once both runs have several.
SMALLER = 2
SHARDS = 16
HEAD = """
import json, resource, sys, time
from pathlib import Path
import numpy as np
from dpo_ext import PairDataset, Ragged, Tokenizer
import pyarrow as pa, pyarrow.ipc, pyarrow.parquet

folder, n, tokens = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])

def peak():
    # Not ru_maxrss, which a child has from its parent.
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

def size(*paths):
    return sum(p.stat().st_size for path in paths for p in path.rglob("*") if p.is_file())

def timed(work):
    before, start, cpu = peak(), time.perf_counter(), time.process_time()
    made = work()
    used = {"s": time.perf_counter() - start, "cpu": time.process_time() - cpu}
    return made, {**used, "grown": peak() - before}

def said(used, **more):
    print(json.dumps({**used, **more}))
"""
STEPS = {
    "rows": """
rng = np.random.default_rng(0)
words = np.array(["w" + str(i) for i in range(5000)])
with open(folder / f"rows-{n}.jsonl", "w") as file:
    for i in range(n):
        lengths = rng.integers(max(1, tokens // 50), max(2, tokens // 10), 3)
        a, b, c = (" ".join(words[rng.integers(0, 5000, k)]) for k in lengths)
        row = {"prompt": a, "chosen": " " + b + ".", "rejected": " " + c + "!"}
        file.write(json.dumps(row) + "\\n")
said({}, bytes=0)
""",
    "encode": """
from dpo_ext.data.prepare import prepare
tokenizer = Tokenizer.from_pretrained(folder / "tokenizer")
source, out = folder / f"rows-{n}.jsonl", folder / f"encoded-{n}"
report, used = timed(lambda: prepare(source, tokenizer, out, max_length=None))
assert report.kept == n
pairs = PairDataset.load(out, verify=False)
said(used, bytes=size(out), tokens=int(pairs.tokens.sum()), text=source.stat().st_size)
""",
    "shards": f"""
out = folder / f"shards-{{n}}"
out.mkdir()
step = n // {SHARDS}
for shard in range({SHARDS}):
    rng = np.random.default_rng(shard)
    def lists():
        offsets = np.zeros(step + 1, np.int32)
        np.cumsum(rng.integers(tokens // 20, tokens * 9 // 20 + 1, step), out=offsets[1:])
        ids = rng.integers(0, 50_000, offsets[-1], dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, ids)
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    table = pa.table({{name: lists() for name in names}})
    pa.parquet.write_table(table, out / f"part-{{shard:03}}.parquet", row_group_size=4096)
said({{}}, bytes=size(out))
""",
    "convert": """
pairs, used = timed(lambda: PairDataset.load(folder / f"shards-{n}", cache_dir=folder / f"c-{n}"))
assert len(pairs) == n
said(used, bytes=size(folder / f"c-{n}"), tokens=int(pairs.tokens.sum()))
""",
    "again": """
pairs, used = timed(lambda: PairDataset.load(folder / f"shards-{n}", cache_dir=folder / f"c-{n}"))
assert len(pairs) == n
said(used, bytes=0)
""",
    "open": """
(inner,) = (p for p in (folder / f"c-{n}").iterdir() if (p / "manifest.json").exists())
pairs, used = timed(lambda: PairDataset.load(inner, verify=False))
assert len(pairs) == n
said(used, bytes=(inner / "manifest.json").stat().st_size)
""",
    "plan": """
(inner,) = (p for p in (folder / f"c-{n}").iterdir() if (p / "manifest.json").exists())
pairs = PairDataset.load(inner, verify=False)
plan, used = timed(lambda: pairs.plan(layout="packed", tokens_per_batch=16384, world_size=64))
seen, of_batch = timed(lambda: plan[len(plan) // 2])
assert seen.n_pairs > 0
said(used, bytes=0, batch_ms=1e3 * of_batch["s"], batches=len(plan))
""",
    "store write": """
from dpo_ext.reflogps import ReferenceStore
(inner,) = (p for p in (folder / f"c-{n}").iterdir() if (p / "manifest.json").exists())
pairs = PairDataset.load(inner, verify=False)
values = -np.arange(1.0, 2 * n + 1).reshape(n, 2) / n
store = ReferenceStore(folder / f"store-{n}", fingerprint="bench")
_, used = timed(lambda: store.put(pairs, values))
said(used, bytes=size(folder / f"store-{n}"))
""",
    "store read": """
from dpo_ext.reflogps import ReferenceStore
(inner,) = (p for p in (folder / f"c-{n}").iterdir() if (p / "manifest.json").exists())
pairs = PairDataset.load(inner, verify=False)
store = ReferenceStore(folder / f"store-{n}", fingerprint="bench")
got, used = timed(lambda: store.get(pairs))
assert np.array_equal(got, -np.arange(1.0, 2 * n + 1).reshape(n, 2) / n)
said(used, bytes=0)
""",
}
OF_TEXT = ("rows", "encode")
WORDS = {
    "encode": "encode JSONL into a saved data set (`prepare`)",
    "convert": "load Parquet shards the first time: digest, convert, verify",
    "again": "load them the next time: look at the files, verify",
    "open": "load a saved data set, `verify=False`",
    "plan": "plan an epoch, packed, 64 ranks",
    "store write": "put reference log-probs",
    "store read": "get them",
}


def run(step: str, folder: Path, n: int, tokens: int) -> dict[str, float]:
    code = [sys.executable, "-c", HEAD + STEPS[step], str(folder), str(n), str(tokens)]
    done = subprocess.run(code, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def byte_tokenizer(folder: Path) -> None:
    """A tokenizer whose tokens are bytes, and pairs of letters that are frequent in the rows."""
    letters = [chr(i) for i in range(33, 127)] + [chr(i) for i in range(256, 256 + 162)]
    vocabulary = {token: i for i, token in enumerate(letters)}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    end = {"id": len(vocabulary), "content": "<|end|>", "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    made = {
        "version": "1.0",
        "added_tokens": [{**end, **flags}],
        "pre_tokenizer": {**split, "use_regex": True},
        "decoder": {**split, "use_regex": True},
        "model": model,
    }
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(made))
    config = {"eos_token": "<|end|>", "pad_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    Tokenizer.from_pretrained(folder)


def rows_of(pairs: int, text: int, tokens: int, folder: Path) -> list[str]:
    byte_tokenizer(folder / "tokenizer")
    found: dict[str, list[tuple[int, dict[str, float]]]] = {}
    for divisor in (SMALLER, 1):
        for step in STEPS:
            n = (text if step in OF_TEXT else pairs) // divisor // SHARDS * SHARDS
            found.setdefault(step, []).append((n, run(step, folder, n, tokens)))
    lines = []
    for step, words in WORDS.items():
        (few, small), (many, large) = found[step]
        million = 1e6 / (many - few)
        slope = {key: (large[key] - small[key]) * million for key in ("s", "cpu", "grown", "bytes")}
        apart = ""
        if "batch_ms" in large:
            apart = f"; one of its {large['batches']:,.0f} batches {large['batch_ms']:.1f} ms"
        if "tokens" in large:
            apart += f"; {large['tokens'] / many:.0f} tokens a pair"
        lines.append(
            f"| {words} | {many:,}{apart} | {large['s']:.2f} s, {large['cpu']:.2f} CPU-s "
            f"| {slope['s']:.2f} s, {slope['cpu']:.2f} CPU-s | {large['grown'] / 1e6:.0f} MB "
            f"| {slope['grown'] / 1e6:.0f} MB | {large['bytes'] / many:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--text", type=int, default=400_000, help="rows of text to encode")
    parser.add_argument("--tokens", type=int, default=400, help="about, of a pair; at least 40")
    parser.add_argument("--folder", help="where to work, on a disk with 10 bytes a token")
    parser.add_argument("--record", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = rows_of(args.pairs, args.text, args.tokens, Path(folder))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    head = (
        f"{date.today()}, {commit}, {platform.machine()}, {os.cpu_count()} CPUs, load "
        f"{os.getloadavg()[0]:.1f}, dpo_ext {dpo_ext.__version__}, Python "
        f"{platform.python_version()}, growth with the number of pairs: `python benches/scale.py "
        f"--pairs {args.pairs} --text {args.text} --tokens {args.tokens} --record`"
    )
    table = [
        "| | pairs | time | for a million more | memory | for a million more | bytes a pair |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *rows,
    ]
    text = "\n".join(["", head, "", *table, ""])
    print(text)
    if args.record:
        with (Path(__file__).parent / "RESULTS.md").open("a") as file:
            file.write(text)


if __name__ == "__main__":
    main()
