"""`examples/scale/encode_ray.py`: its map function alone, and with Ray (`make test-ray`) the whole job."""

import pickle
import runpy

import byte_tokenizer
import pytest
import tiny
from places import ROOT

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.arrow import report_of

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

JOB = ROOT / "examples" / "scale" / "encode_ray.py"
IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    byte_tokenizer.tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model):
    return Tokenizer.from_pretrained(model)


@pytest.fixture(scope="module")
def job():
    return runpy.run_path(str(JOB))


@pytest.fixture(scope="module")
def ray():
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


ROWS = [*tiny.rows(70), {"prompt": "no sides", "chosen": None, "rejected": None}, *tiny.rows(9, 1)]


def test_the_map_function_gives_shards_that_are_the_rows(job, tokenizer, tmp_path):
    expected = PairDataset.from_rows(ROWS, tokenizer, max_length=60, on_bad="skip")
    again = pickle.loads(pickle.dumps(tokenizer))  # as a worker has it
    tables = [
        job["encode"](pa.Table.from_pylist(ROWS[i : i + 32]), again, 60) for i in range(0, 80, 32)
    ]
    for i, table in enumerate(tables):
        parquet.write_table(table, tmp_path / f"{i}.parquet")
    pairs = PairDataset.load(tmp_path)
    assert all(getattr(pairs, name) == getattr(expected, name) for name in IDS)
    assert pairs.report.read == 80
    assert pairs.report.dropped == report_of(*tables).dropped == expected.report.dropped


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.filterwarnings("ignore")
def test_the_job_makes_a_folder_that_every_rank_maps(
    job, ray, model, tokenizer, tmp_path, kind, capsys
):
    rows = tmp_path / "rows"
    rows.mkdir()
    for i in range(4):
        part = ROWS[20 * i : 20 * i + 20]
        if kind == "parquet":
            parquet.write_table(pa.Table.from_pylist(part), rows / f"{i}.parquet")
        else:
            tiny.write_jsonl(rows / f"{i}.jsonl", part)
    out = tmp_path / "encoded"
    words = [model, rows, "--out", out, "--max-length", 60, "--batch-rows", 16]
    job["main"](list(map(str, words)))
    pairs = PairDataset.load(out)
    expected = PairDataset.from_rows(ROWS, tokenizer, max_length=60, on_bad="skip")
    assert "79 pairs" in capsys.readouterr().out
    assert all(getattr(pairs, name) == getattr(expected, name) for name in IDS)
    assert (pairs.pad_id, pairs.vocab_size) == (expected.pad_id, expected.vocab_size)
    assert ray.is_initialized()
