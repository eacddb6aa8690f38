"""How fast does a file of preferences become batches, beside `tokenizers` and TRL, in the same run?

`dpo_ext.bench.bench_data` on three forms of one file of transcripts: gzip, plain, and the same as
chat messages (made here, for a tokenizer with a chat template). Ids are compared with those of both
peers before anything counts. `--record` appends a row a stage to benches/RESULTS.md.

    python benches/data.py FILE.jsonl.gz --tokenizer FOLDER [--record] [--threads 1] [--times 1]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from dpo_ext.bench import FIRST, bench_data

TURNS = {"Human": "user", "Assistant": "assistant"}


def messages(transcript: str) -> list[dict[str, str]]:
    """A transcript with HH's turn markers as messages."""
    out = []
    for part in (
        transcript.replace("\n\nHuman:", "\0Human:")
        .replace("\n\nAssistant:", "\0Assistant:")
        .split("\0")
    ):
        speaker, _, content = part.partition(":")
        if speaker in TURNS:
            out.append({"role": TURNS[speaker], "content": content.strip()})
    return out


def as_chat(line: str) -> str | None:
    """The row as messages, or None where the sides do not end in an answer of their own."""
    row = {name: messages(text) for name, text in json.loads(line).items()}
    chosen, rejected = row["chosen"], row["rejected"]
    same = [m["role"] for m in chosen] == [m["role"] for m in rejected] and chosen[:-1] == rejected[
        :-1
    ]
    if not same or not chosen or chosen[-1]["role"] != "assistant":
        return None
    if not (chosen[-1]["content"] and rejected[-1]["content"]) or chosen == rejected:
        return None
    explicit = {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}
    return json.dumps(explicit, ensure_ascii=False) + "\n"


def rows_of(label: str, result: dict[str, Any], command: str) -> list[str]:
    """A row of RESULTS.md for each of our stages."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"
    where = f"{machine}, Python {sys.version.split()[0]}"
    peers = {stage["name"]: stage for stage in result["stages"] if stage["peer"]}
    whole = {which: peers.get(f"rows to padded batches{which}, peer: TRL") for which in ("", FIRST)}
    encoder = peers.get("encode, peer: tokenizers")
    lines = []
    for stage in result["stages"]:
        if stage["peer"]:
            continue
        base, which = None, FIRST if stage["name"].endswith(FIRST) else ""
        temper = "cold" if which else "warm"
        if stage["name"].startswith("encode"):
            base, name = encoder, "tokenizers encode_batch_fast"
        elif stage["name"].startswith("file to"):
            base, name = whole[which], f"TRL, rows to padded batches, {temper}"
        rate = f"{stage['pairs_per_s']:,.0f} pairs/s"
        if stage["tokens_per_s"]:
            rate += f", {stage['tokens_per_s'] / 1e6:.1f} M tokens/s"
        spread = f"{stage['fastest'] * 1e3:.1f} to {stage['slowest'] * 1e3:.1f}"
        cells = (
            str(date.today()),
            commit,
            where,
            f"{label}, {result['kept']:,} pairs, {result['tokens']:,} tokens, "
            f"{result['threads']} thread(s): {stage['name']}",
            f"{rate}; {stage['seconds'] * 1e3:.1f} ms ({spread}), {temper}",
            "" if base is None else f"{name}: {base['pairs_per_s']:,.0f} pairs/s",
            "" if base is None else f"{stage['pairs_per_s'] / base['pairs_per_s']:.0f}x faster",
            f"`{command}`",
        )
        lines.append(f"| {' | '.join(cells)} |\n")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="gzipped JSONL of chosen and rejected transcripts")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", type=int, default=1, help="repeat the rows of the file")
    arguments = parser.parse_args()
    lines = gzip.decompress(arguments.file.read_bytes()).decode().splitlines(keepends=True)
    lines = lines * arguments.times
    chat = [row for row in map(as_chat, lines) if row is not None]
    command = f"python benches/data.py {arguments.file.name} --tokenizer {arguments.tokenizer.name}"
    command += f" --threads {arguments.threads} --times {arguments.times} --record"
    recorded = []
    with tempfile.TemporaryDirectory() as folder:
        forms = {
            "gzip": (Path(folder, "rows.jsonl.gz"), gzip.compress("".join(lines).encode(), 6)),
            "plain": (Path(folder, "rows.jsonl"), "".join(lines).encode()),
            "chat messages": (Path(folder, "chat.jsonl"), "".join(chat).encode()),
        }
        for form, (path, data) in forms.items():
            path.write_bytes(data)
            print(f"\n{form}")
            result = bench_data(path, arguments.tokenizer, threads=arguments.threads, repeats=9)
            label = f"{arguments.file.name.partition('.')[0]}, {form}, {arguments.tokenizer.name}"
            recorded += rows_of(label, result, command)
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines(recorded)


if __name__ == "__main__":
    main()
