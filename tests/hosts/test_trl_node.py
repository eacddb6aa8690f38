"""Rows are encoded once a node and mapped by each of its processes: two of them under gloo."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import trl_runs as runs
import warm
from datasets import Dataset

from dpo_ext import DataError, PairDataset
from dpo_ext.trl import DPOTrainer, node

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
IMPORTS = (*warm.TORCH, "trl", "dpo_ext.trl", "transformers.models.llama.modeling_llama")
slow = pytest.mark.slow


def is_mapped(values: np.ndarray) -> bool:
    base = values
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return isinstance(base, mmap.mmap)


def pairs_of(n: int) -> PairDataset:
    return PairDataset.from_ids([[1, 2]] * n, [[3]] * n, [[4, 5]] * n)


def test_a_small_data_set_stays_in_memory_and_a_large_one_is_mapped(monkeypatch):
    made = pairs_of(4)
    assert node.once_a_node(lambda: made, "key") is made
    monkeypatch.setattr(node, "SMALL", int(made.tokens.sum()) - 1)
    found = node.once_a_node(lambda: made, "key")
    for name in IDS:
        assert is_mapped(getattr(found, name).values)
        expected = getattr(made, name)
        assert np.array_equal(getattr(found, name).values, expected.values)


def test_nothing_stays_in_the_folder_for_temporary_files(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(node, "SMALL", 0)
    node.once_a_node(lambda: pairs_of(4), "key")
    assert list(tmp_path.iterdir()) == []


def as_a_rank(rank: int, port: str, out: str) -> list[int]:
    """One of two processes of a node; the rows that it encodes are counted."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TMPDIR": out}
    tempfile.tempdir = None
    counted: list[int] = []
    real = PairDataset.from_rows.__func__

    def counting(cls, rows, *arguments, **options):
        counted.append(len(rows))
        return real(cls, rows, *arguments, **options)

    PairDataset.from_rows = classmethod(counting)
    return counted


def prepared(material: Path, data: Dataset) -> Dataset:
    trainer = runs.build(DPOTrainer, material, data, {}, per_device_train_batch_size=2)
    return trainer.train_dataset


def encode(rank: int, material: str, out: str, port: str) -> None:
    counted = as_a_rank(rank, port, out)
    data = runs.load(Path(material), "text_explicit")
    found = prepared(Path(material), data)
    ids = {name: list(found[name]) for name in IDS}
    (Path(out) / f"rank{rank}.json").write_text(json.dumps({"counted": counted, "ids": ids}))


def encode_bad_rows(rank: int, material: str, out: str, port: str) -> None:
    as_a_rank(rank, port, out)
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": None}] * 4)
    with pytest.raises(DataError, match="`train`: no row gives a pair"):
        prepared(Path(material), data)
    (Path(out) / f"rank{rank}.json").write_text("{}")


def encode_each_its_own(rank: int, material: str, out: str, port: str) -> None:
    counted = as_a_rank(rank, port, out)
    rows = list(runs.load(Path(material), "text_explicit"))
    found = prepared(Path(material), Dataset.from_list(rows if rank == 0 else rows[::-1]))
    ids = {name: list(found[name]) for name in IDS}
    (Path(out) / f"rank{rank}.json").write_text(json.dumps({"counted": counted, "ids": ids}))


def two_ranks(function, material, out):
    port = str(warm.free_port())
    warm.ranks(__name__, function, str(material), str(out), port, imports=IMPORTS)
    found = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(path.name for path in out.iterdir()) == ["rank0.json", "rank1.json"]
    return found


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"))


@slow
def test_two_processes_of_a_node_encode_once_and_have_the_same_ids(own, tmp_path):
    rank0, rank1 = two_ranks("encode", own, tmp_path)
    assert (rank0["counted"], rank1["counted"]) == ([24], [])
    alone = prepared(own, runs.load(own, "text_explicit"))
    for name in IDS:
        assert rank0["ids"][name] == rank1["ids"][name] == list(alone[name])


@slow
def test_both_processes_raise_where_no_row_can_be_used(own, tmp_path):
    two_ranks("encode_bad_rows", own, tmp_path)


@slow
def test_a_process_with_other_data_encodes_its_own(own, tmp_path):
    rank0, rank1 = two_ranks("encode_each_its_own", own, tmp_path)
    assert (rank0["counted"], rank1["counted"]) == ([24], [24])
    assert rank1["ids"]["chosen_ids"] == rank0["ids"]["chosen_ids"][::-1]
