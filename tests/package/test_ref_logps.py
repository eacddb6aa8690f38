"""`dpo-ext ref-logps`: a store that training reads, whatever is killed on the way, and columns in and out."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import sys

import numpy as np
import pytest
import warm
from places import ROOT

pytest.importorskip("typer")
pytest.importorskip("pyarrow")
pytest.importorskip("trl")

import pyarrow as pa
import pyarrow.parquet as pq
import trl_runs as runs
from transformers import AutoModelForCausalLM, LlamaConfig, MambaConfig

from dpo_ext import PairDataset, Tokenizer, cli
from dpo_ext.cli import ref_logps
from dpo_ext.pairs import IDS, REFERENCE
from dpo_ext.reflogps import ReferenceStore, fingerprint
from dpo_ext.torch import PairLoader, attach_scoring
from dpo_ext.torch.reference import PairScorer

SMALL = ("--pairs-per-shard", "7", "--tokens-per-batch", "600")
DATA = "text_explicit.jsonl"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"), pairs=40)


def main(*arguments) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["ref-logps", *map(str, arguments)])
    return stopped.value.code or 0


def run(own, store, *arguments, model=None, data=DATA) -> int:
    files = () if data is None else (own / data,)
    return main(model or own / "model", *files, "--store", store, *arguments)


def pairs_of(own, **options):
    tokenizer = Tokenizer.from_pretrained(own / "model")
    return PairDataset.from_files(str(own / DATA), tokenizer, **options)


def opened(own, store, **parts):
    return ReferenceStore(store, fingerprint=fingerprint(own / "model", **parts))


def by_hand(own, pairs):
    """Padded, one pair after another, in float64."""
    model = AutoModelForCausalLM.from_pretrained(own / "model").double().eval()
    values = np.empty((len(pairs), 2))
    attach_scoring(model)
    for batch in PairLoader(pairs.plan(layout="padded", pairs_per_batch=1, shuffle=False)):
        scores = model(**batch.model_inputs, score_table=batch.table)
        values[batch.pair_index] = scores.logps.detach()
    return values


@pytest.fixture(scope="module")
def values(own):
    return by_hand(own, pairs_of(own))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-6, atol=2e-4)
    return True


@pytest.mark.parametrize("layout", ["auto", "padded", "packed", "shared"])
def test_the_store_has_the_log_probs_of_the_model(layout, own, values, tmp_path, capsys):
    out = tmp_path / "said.json"
    assert run(own, tmp_path / "store", *SMALL, "--layout", layout, "--json", out) == 0
    store = opened(own, tmp_path / "store")
    assert close(store.get(pairs_of(own)), values)
    said = json.loads(out.read_text())
    layout = "packed" if layout == "auto" else layout
    assert [said[name] for name in ("scored", "layout", "ranks", "shards")] == [40, layout, 1, 6]
    assert said["fingerprint"]["soft"] == {"attention": "sdpa"}
    assert f"scored    40 pairs in {layout} rows" in capsys.readouterr().out


def test_what_is_there_is_not_scored_again_and_needs_no_model(own, tmp_path, capsys, monkeypatch):
    store, pairs = opened(own, tmp_path / "store"), pairs_of(own)
    made_up = np.tile([-1.0, -2.0], (len(pairs), 1))
    store.put(pairs, made_up)
    monkeypatch.setattr(ref_logps, "loaded", lambda *_: pytest.fail("the model was loaded"))
    assert run(own, tmp_path / "store") == 0
    assert "40 of 40 rows, of which 0 are missing" in capsys.readouterr().out
    assert np.array_equal(store.get(pairs), made_up)


def test_a_store_of_another_reference_is_refused(own, tmp_path, capsys):
    assert run(own, tmp_path / "store", "--fingerprint", "x") == 0
    assert run(own, tmp_path / "store") == 2
    assert "the stored log-probs are of another reference" in capsys.readouterr().err


def test_only_what_is_missing_is_scored(own, values, tmp_path, capsys):
    store, pairs = opened(own, tmp_path / "store"), pairs_of(own)
    store.put(pairs.select(range(0, 40, 2)), values[::2])
    assert run(own, tmp_path / "store", *SMALL) == 0
    assert "scored    20 pairs" in capsys.readouterr().out
    found = opened(own, tmp_path / "store").get(pairs)
    assert np.array_equal(found[::2], values[::2])
    assert close(found, values)


def test_a_model_that_reads_no_packed_rows_gets_padded_ones(own, tmp_path, capsys):
    folder = shutil.copytree(own / "model", tmp_path / "mamba")
    vocabulary = LlamaConfig.from_pretrained(folder).vocab_size
    config = MambaConfig(vocab_size=vocabulary, hidden_size=16, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    assert run(own, tmp_path / "store", model=folder) == 0
    text = capsys.readouterr().out
    assert "padded    rows, as packed ones are refused:" in text
    assert "scored    40 pairs in padded rows" in text
    assert run(own, tmp_path / "other", "--layout", "packed", model=folder) == 2


def test_a_dtype_is_part_of_the_reference(own, values, tmp_path):
    assert run(own, tmp_path / "store", "--dtype", "bfloat16") == 0
    found = opened(own, tmp_path / "store", dtype="bfloat16").get(pairs_of(own))
    assert 1e-3 < np.abs(found - values).max() < 3.0


@pytest.mark.parametrize("ending", ["out.parquet", "out.arrow", "folder"])
def test_columns_go_out_and_come_back_under_a_name(ending, own, values, tmp_path):
    export = tmp_path / ending
    assert run(own, tmp_path / "store", "--export", export) == 0
    kept, pairs = opened(own, tmp_path / "store").get(pairs_of(own)), pairs_of(own)
    if ending == "out.parquet":
        table = pq.read_table(export)
    elif ending == "out.arrow":
        table = pa.ipc.open_file(export).read_all()
    else:
        table = PairDataset.load(export).to_arrow()
    assert table.column_names == [*IDS, *REFERENCE]
    assert table["chosen_ids"].to_pylist() == pairs.chosen_ids.tolist()
    assert np.array_equal(np.stack([table[name] for name in REFERENCE], 1), kept)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    taken = ("--import", export, "--fingerprint", "theirs")
    assert run(own, tmp_path / "theirs", *taken, data=None) == 0
    assert np.array_equal(ReferenceStore(tmp_path / "theirs", "theirs").get(pairs), kept)


def test_imported_columns_are_completed_and_exported(own, values, tmp_path, capsys):
    pairs, wrong = pairs_of(own), values[:8] - 1.0
    pairs.select(range(8)).with_ref_logps(wrong).save(tmp_path / "some")
    taken = ("--import", tmp_path / "some", "--fingerprint", "theirs")
    assert run(own, tmp_path / "store", *taken, "--export", tmp_path / "all.parquet") == 0
    assert "imported  16 new log-probs of 16" in capsys.readouterr().out
    table = pq.read_table(tmp_path / "all.parquet")
    found = np.stack([table[name] for name in REFERENCE], 1)
    assert np.array_equal(found[:8], wrong)
    assert close(found[8:], values[8:])


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        (("--dtype", "float8"), DATA, "unknown dtype `float8`\nhint: there is auto"),
        (("--export", "out.csv"), DATA, "expected .parquet, .arrow, .ipc, or no ending"),
        (("--export", "no/such/out.arrow"), DATA, "no such folder"),
        ((), None, "no files of preferences"),
        (("--import", "x.parquet"), None, "hint: --fingerprint TEXT names it"),
        (("--import", DATA, "--fingerprint", "x"), None, "has no columns `ref_chosen_logps`"),
    ],
)
def test_wrong_usage_is_code_2_before_anything_is_written(
    arguments, data, message, own, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(own)
    assert run(own, tmp_path / "store", *arguments, data=data) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_a_saved_data_set_is_read_and_options_that_it_would_not_hear_are_refused(
    own, values, tmp_path, capsys
):
    pairs_of(own).save(tmp_path / "saved")
    assert run(own, tmp_path / "store", data=tmp_path / "saved") == 0
    assert close(opened(own, tmp_path / "store").get(pairs_of(own)), values)
    assert run(own, tmp_path / "store", "--max-length", "20", data=tmp_path / "saved") == 2
    assert "would go unheard" in capsys.readouterr().err


# Ranks, and what kills them


def one_rank(rank, ranks, port, own, store, die_at, *arguments):
    """The command as torchrun starts it; the first rank dies as it begins to put part ``die_at``."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    if ranks != "0":
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in variables.items()}
    parts, put = [], ReferenceStore.put

    def counted(*given, **options):
        if len(parts) == int(die_at):
            os.kill(os.getpid(), signal.SIGKILL)
        parts.append(1)
        return put(*given, **options)

    ReferenceStore.put = counted
    sys.argv = ["dpo-ext"]
    try:
        cli.main(["ref-logps", f"{own}/model", f"{own}/{DATA}", "--store", store, *arguments])
    except SystemExit as stopped:
        if stopped.code:
            raise


def start(ranks, own, store, *arguments, die_at=1000):
    """With so many ranks, 0 for a process alone; the code and what it said."""
    given = ("test_ref_logps", "one_rank", max(ranks, 1), ranks, warm.free_port(), own, store)
    done = warm.run(warm.RANKS, *given, die_at, *SMALL, *arguments, timeout=240)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def uninterrupted(own, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "store"
    assert start(0, own, folder)[0] == 0
    return opened(own, folder).get(pairs_of(own))


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (2, 2), (0, 2)])
def test_a_run_that_was_killed_goes_on_with_other_ranks_and_ends_with_the_same_store(
    first, then, own, uninterrupted, tmp_path
):
    folder, pairs = tmp_path / "store", pairs_of(own)
    code, _ = start(first, own, folder, die_at=3)
    assert code != 0
    assert len(opened(own, folder).missing(pairs)) == 40 - 3 * 7
    code, said = start(then, own, folder)
    assert code == 0, said
    assert f"scored    19 pairs in packed rows, on {then} ranks" in said
    assert said.count("scored ") == 1
    store = opened(own, folder)
    assert np.array_equal(store.get(pairs), uninterrupted)  # here also bit by bit
    assert store.stats.rows == 80


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2])
def test_tokens_are_stored_beside_the_sums_and_those_that_lack_them_are_scored(
    ranks, own, uninterrupted, tmp_path
):
    folder, pairs = tmp_path / "store", pairs_of(own)
    assert start(0, own, folder)[0] == 0
    assert len(opened(own, folder).missing(pairs, tokens=True)) == 40
    code, said = start(ranks, own, folder, "--token-logps")
    assert code == 0, said
    assert "scored    40 pairs" in said
    store = opened(own, folder)
    assert np.array_equal(store.get(pairs), uninterrupted)
    model = AutoModelForCausalLM.from_pretrained(own / "model")
    _, expected = PairScorer(model).tokens(pairs)
    found = store.get_tokens(pairs)
    for side, lists in expected.items():
        np.testing.assert_allclose(found[side].values, lists.values, rtol=1e-5, atol=1e-5)
        assert found[side].lengths.tolist() == lists.lengths.tolist()
        assert (found[side].values < 0).all()


def other_data(rank, ranks, port, own, store):
    data = f"{own}/{DATA}" if rank == 0 else f"{own}/other.jsonl"
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    cli.main(["ref-logps", f"{own}/model", data, "--store", store])


def other_model(rank, ranks, port, own, store):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": ranks}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    model = f"{own}/model" if rank == 0 else f"{own}/other"
    options = ("--tokenizer", f"{own}/model", "--store", store)
    cli.main(["ref-logps", model, f"{own}/{DATA}", *options])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("other_data", "rank 1 has other pairs than rank 0: 40, and 40 there"),
        ("other_model", "rank 1 has another model than rank 0"),
    ],
)
def test_ranks_with_other_data_or_another_model_are_refused(function, message, own, tmp_path):
    lines = (own / DATA).read_text().splitlines()
    (own / "other.jsonl").write_text("\n".join([*lines[1:], lines[0]]))
    model = AutoModelForCausalLM.from_pretrained(own / "model")
    model.lm_head.weight.data *= 1.05
    model.save_pretrained(own / "other")
    given = ("test_ref_logps", function, 2, 2, warm.free_port(), own, tmp_path / "store")
    done = warm.run(warm.RANKS, *given, timeout=240)
    assert done.returncode != 0
    assert message in done.stderr
    assert len(opened(own, tmp_path / "store").missing(pairs_of(own))) == 40


# Ray Data


def test_the_class_for_ray_adds_the_columns_to_a_batch(own, values):
    path = ROOT / "examples" / "scale" / "ref_logps_ray.py"
    made = runpy.run_path(str(path), run_name="ref_logps_ray")
    table = pairs_of(own).to_arrow()
    batch = {name: table[name].to_numpy() for name in IDS}  # as Ray gives ids: arrays of arrays
    batch["row"] = np.arange(40)
    out = made["RefLogps"](str(own / "model"), tokens_per_batch=600)(batch)
    assert [*out] == [*IDS, "row", *REFERENCE]
    assert close(np.stack([out[name] for name in REFERENCE], 1), values)
