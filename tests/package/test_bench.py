"""`bench_data`: verified ids, sane numbers, a page without links."""

import json

import pytest
from byte_tokenizer import write_folder

from dpo_ext import DpoExtError, PairDataset, Tokenizer
from dpo_ext.bench import bench_data

pytestmark = pytest.mark.slow


@pytest.fixture
def world(tmp_path):
    rows = [{"prompt": f"hello {i}:", "chosen": " the a", "rejected": " the b"} for i in range(50)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n", encoding="utf-8")
    return path, write_folder(tmp_path / "model")


@pytest.mark.parametrize("threads", [1, 2, None])
def test_stages_are_timed_and_written(world, tmp_path, threads, capsys):
    pytest.importorskip("rich")
    path, folder = world
    out, result_file = tmp_path / "page.html", tmp_path / "result.json"
    result = bench_data(path, folder, threads=threads, repeats=2, out=out, json=result_file)
    tokenizer = Tokenizer.from_pretrained(folder)
    pairs = PairDataset.from_files(path, tokenizer, on_bad="skip")
    assert (result["pairs"], result["kept"]) == (51, 50)
    assert result["tokens"] == pairs.tokens.sum()
    assert result["bytes"] == path.stat().st_size
    assert result["engine"] == "bpe"
    assert result["fill"]["packed, 64 pairs"] == 1.0
    assert 0 < result["fill"]["padded, 64 pairs"] <= 1.0
    assert sum(result["lengths"]["counts"]) == 50
    for stage in result["stages"]:
        assert 0 < stage["fastest"] <= stage["seconds"] <= stage["slowest"]
        assert stage["pairs_per_s"] * stage["seconds"] == pytest.approx(50, abs=1.01)
    assert json.loads(result_file.read_text()) == json.loads(json.dumps(result))
    page = out.read_text(encoding="utf-8")
    assert all(stage["name"] in page for stage in result["stages"])
    assert "http" not in page
    assert " pairs</title>" in page
    assert "src=" not in page
    assert "file to ids" in capsys.readouterr().out


def test_ids_are_compared_with_the_peers_before_timing(world, monkeypatch):
    pytest.importorskip("tokenizers")
    path, folder = world
    assert bench_data(path, folder, repeats=1, show=False)["ids_equal"] is True

    def fewer_merges(self):
        data = json.loads(self._state["json"])
        data["model"]["merges"] = data["model"]["merges"][1:]
        return json.dumps(data)

    monkeypatch.setattr(Tokenizer, "to_json", fewer_merges)
    with pytest.raises(DpoExtError, match=r"text 0: .* ids, the peer"):
        bench_data(path, folder, repeats=1, show=False)


@pytest.mark.parametrize("kind", ["text", "implicit", "chat"])
def test_trl_runs_on_the_same_rows_and_gives_the_same_ids(tmp_path, kind):
    pytest.importorskip("trl")
    import tiny

    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = tiny.rows(40)
    if kind == "implicit":
        rows = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
    elif kind == "chat":
        rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "chosen": [{"role": "assistant", "content": row["chosen"]}],
                "rejected": [{"role": "assistant", "content": row["rejected"]}],
            }
            for row in rows
        ]
    # A row that we drop is not given to TRL, and does not shift those behind it.
    rows.insert(3, {**rows[3], "chosen": rows[3]["rejected"]})
    path = tiny.write_jsonl(tmp_path / "rows.jsonl.gz", rows)
    result = bench_data(path, tmp_path / "model", repeats=1, peer_pairs=30, show=False)
    trl = result["trl"]
    assert (trl["pairs"], trl["same"]) == (30, 30)
    peers = [stage["name"] for stage in result["stages"] if stage["peer"]]
    assert peers[-1] == "rows to padded batches, peer: TRL"
    assert trl["times"] > 1


def test_a_difference_from_trl_is_counted(tmp_path):
    pytest.importorskip("trl")
    import tiny

    tiny.tokenizer().save_pretrained(tmp_path / "model")
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(10))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    pairs = PairDataset.from_files(path, tokenizer)
    pairs.chosen_ids.values[0] += 1
    from dpo_ext.bench.peers import trl_times

    found = trl_times([str(path)], str(tmp_path / "model"), pairs, 10, 4)
    assert (found.pairs, found.same) == (10, 9)


def test_bad_arguments_and_empty_data(world, tmp_path):
    path, folder = world
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        bench_data(path, folder, repeats=0)
    with pytest.raises(ValueError, match="`peer_pairs` must be at least 1"):
        bench_data(path, folder, peer_pairs=0)
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    with pytest.raises(ValueError, match="no row of"):
        bench_data(empty, folder)
