"""`data_stats` and the command `stats`: counts against slow ones, merged tokens against a known row."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny
from byte_tokenizer import write_folder

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.cli.stats import data_stats


@pytest.fixture
def world(tmp_path):
    folder = write_folder(tmp_path / "model")
    rows = [*tiny.rows(30), {"prompt": "x", "chosen": "y", "rejected": " "}]
    return (
        tiny.write_jsonl(tmp_path / "rows.jsonl", rows),
        Tokenizer.from_pretrained(folder),
        folder,
    )


def test_lengths_are_the_percentiles_of_the_pairs(world):
    path, tokenizer, _ = world
    result = data_stats(path, tokenizer, show=False)
    pairs = PairDataset.from_files(path, tokenizer, on_bad="skip")
    assert result["pairs"] == len(pairs) == 30
    assert result["report"]["dropped"] == {"empty_completion": 1}
    found = result["lengths"]["longer side"]
    longest = [
        len(p["prompt_ids"]) + max(len(p["chosen_ids"]), len(p["rejected_ids"])) for p in pairs
    ]
    assert (found["q0"], found["q100"]) == (min(longest), max(longest))
    assert found["q50"] == np.median(longest)
    assert found["mean"] == pytest.approx(np.mean(longest))
    both = result["lengths"]["both sides"]["mean"]
    parts = [result["lengths"][name]["mean"] for name in ("prompt", "prompt", "chosen", "rejected")]
    assert both == pytest.approx(sum(parts))


def test_waste_is_that_of_the_batches_themselves(world):
    path, tokenizer, _ = world
    result = data_stats(path, tokenizer, show=False)
    pairs = PairDataset.from_files(path, tokenizer, on_bad="skip")
    waste = {row["layout"]: row for row in result["waste"]}
    batches = list(pairs.plan(layout="padded", pairs_per_batch=4))
    slots = sum(batch.input_ids.size for batch in batches)
    real = sum(int(batch.attention_mask.sum()) for batch in batches)
    assert (waste["padded, 4 pairs"]["slots"], waste["padded, 4 pairs"]["real_tokens"]) == (
        slots,
        real,
    )
    assert waste["padded, 4 pairs"]["fill"] == real / slots
    assert waste["padded, 64 pairs"]["relative"] == 1.0
    assert waste["packed, bins of 8,192"]["real_tokens"] == real


def test_tokens_across_the_end_of_the_prompt_are_found(tmp_path):
    rows = [
        {"prompt": "say:hel", "chosen": "lo there", "rejected": "lo you"},
        {"prompt": "say:hello", "chosen": " there", "rejected": " é you"},
    ]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "model"))
    result = data_stats(path, tokenizer, rows=5, show=False)
    first, second = result["rows"]
    assert result["merged"] == 1
    assert first["chosen"]["merged"], "`hello` is one token, so the prompt's end lies inside it"
    for row, example in zip(rows, (first, second), strict=True):
        for side in ("chosen", "rejected"):
            pieces = example["prompt"] + example[side]["merged"] + example[side]["rest"]
            assert "".join(pieces).startswith(row["prompt"] + row[side])
    assert second["chosen"]["merged"] == []
    apart = data_stats(path, tokenizer, rows=5, boundary="separate", show=False)
    assert all(row["chosen"]["merged"] == [] for row in apart["rows"])


def test_rows_are_shown_in_full_where_the_data_are_cut(world):
    path, tokenizer, _ = world
    result = data_stats(path, tokenizer, rows=2, max_length=64, truncation="keep_end", show=False)
    assert result["report"]["warned"]["truncated"] > 0
    assert [row["row"] for row in result["rows"]] == [1, 30]
    assert "".join(result["rows"][0]["prompt"]).startswith("Human:")


def test_the_command_prints_every_part_and_writes_json(world, tmp_path, capsys):
    pytest.importorskip("typer")
    from dpo_ext import cli

    path, _, folder = world
    out = tmp_path / "stats.json"
    with pytest.raises(SystemExit) as stopped:
        cli.main(
            ["stats", str(path), "--tokenizer", str(folder), "--rows", "1", "--json", str(out)]
        )
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for part in ("31 rows read, 30 kept", "empty_completion: 1", "both sides", "padded, 16 pairs"):
        assert part in printed
    assert "chosen" in printed
    assert "█" in printed
    assert "--rows 3" not in printed
    assert json.loads(out.read_text())["pairs"] == 30


def test_no_row_of_the_data_is_printed_unless_it_is_asked_for(world, capsys):
    pytest.importorskip("typer")
    from dpo_ext import cli

    path, _, folder = world
    with pytest.raises(SystemExit):
        cli.main(["stats", str(path), "--tokenizer", str(folder)])
    printed = capsys.readouterr().out
    assert "Human:" not in printed
    assert "Briefly" not in printed
    assert printed.endswith("--rows 3 spells three of them out, token by token\n")


def test_the_histogram_counts_every_pair_once(world):
    path, tokenizer, _ = world
    result = data_stats(path, tokenizer, show=False)
    counts, edges = result["histogram"]["counts"], result["histogram"]["edges"]
    longest = PairDataset.from_files(path, tokenizer, on_bad="skip").longest
    assert sum(counts) == result["pairs"]
    for start, stop, count in zip(edges, edges[1:], counts, strict=False):
        assert ((longest >= start) & (longest < stop)).sum() == count


def test_an_empty_data_set_and_a_bad_argument(world, tmp_path, capsys):
    _, tokenizer, _ = world
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    result = data_stats(empty, tokenizer, rows=3)
    assert (result["pairs"], result["waste"], result["rows"]) == (0, [], [])
    assert "0 rows read" in capsys.readouterr().out
    with pytest.raises(ValueError, match="`rows` must be at least 0"):
        data_stats(empty, tokenizer, rows=-1)


TEXT = "hello the é😀 \N{REPLACEMENT CHARACTER} aa aaé\n"


def test_the_texts_of_tokens_are_what_each_adds_to_those_before(tmp_path):
    row = {"prompt": "say: é", "chosen": TEXT * 4, "rejected": "😀" + TEXT}
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "model"))
    (example,) = data_stats(path, tokenizer, rows=1, show=False)["rows"]
    pair = PairDataset.from_files(path, tokenizer)[0]
    prompt = pair["prompt_ids"]
    for side in ("chosen", "rejected"):
        ids = np.concatenate([prompt, pair[f"{side}_ids"]])
        pieces = [*example["prompt"], *example[side]["merged"], *example[side]["rest"]]
        assert len(pieces) == len(ids)
        for end in range(1, len(ids) + 1):
            # Bytes inside a character are no text yet.
            whole = tokenizer.decode(ids[:end]).rstrip("\N{REPLACEMENT CHARACTER}")
            assert "".join(pieces[:end]).rstrip("\N{REPLACEMENT CHARACTER}") == whole


@pytest.mark.parametrize("unit", ["hello the q ", "é😀", "\N{REPLACEMENT CHARACTER}", "aaaa"])
def test_twice_the_row_is_twice_the_work(tmp_path, monkeypatch, unit):
    tokenizer = Tokenizer.from_pretrained(write_folder(tmp_path / "model"))
    decode, decoded = Tokenizer.decode, []

    def counted(self, ids):
        decoded.append(len(ids))
        return decode(self, ids)

    monkeypatch.setattr(Tokenizer, "decode", counted)
    work = []
    for times in (200, 400):
        row = {"prompt": unit * times, "chosen": " yes" + unit * times, "rejected": " no"}
        path = tiny.write_jsonl(tmp_path / "rows.jsonl", [row])
        data_stats(path, tokenizer, rows=1, max_length=None, show=False)
        work.append(sum(decoded))
        decoded.clear()
    assert work[0] < work[1] < 2.2 * work[0]
