"""`bench_data`: verified ids, sane numbers, a page without links."""

import html
import json
import os
import platform
import re
from importlib.metadata import version

import pytest
from byte_tokenizer import write_folder

import dpo_ext
from dpo_ext import DataError, DpoExtError, PairDataset, Tokenizer
from dpo_ext.bench import bench_data
from dpo_ext.bench.machine import machine

pytestmark = pytest.mark.slow


@pytest.fixture
def world(tmp_path):
    rows = [{"prompt": f"hello {i}:", "chosen": " the a", "rejected": " the b"} for i in range(50)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n", encoding="utf-8")
    return path, write_folder(tmp_path / "model")


@pytest.fixture
def no_trl(monkeypatch):
    """Without the peer that takes most of the time."""
    monkeypatch.setattr("dpo_ext.bench.trl_times", lambda *_: None)


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
    assert not re.search(r"src=|href=|<script|url\(|@import|<link", page)
    assert "prefers-color-scheme:dark" in page
    assert "file to ids" in capsys.readouterr().out


def test_ids_are_compared_with_the_peers_before_timing(world, monkeypatch, no_trl):
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
    assert peers[-4:] == [
        "rows to padded batches, first pass, peer: TRL",
        "rows to ids, peer: TRL",
        "padded batches of 64, peer: TRL",
        "rows to padded batches, peer: TRL",
    ]
    rates = {stage["name"]: stage["pairs_per_s"] for stage in result["stages"]}
    first = rates["file to packed batches, first pass"]
    assert trl["times"] == first / rates["rows to padded batches, first pass, peer: TRL"] > 1


def test_a_first_pass_is_by_a_tokenizer_that_has_seen_no_text(world, no_trl, monkeypatch):
    path, folder = world
    loaded, read = [], []
    load, from_files = Tokenizer.from_pretrained, PairDataset.from_files.__func__

    def loading(*given, **options):
        loaded.append(load(*given, **options))
        return loaded[-1]

    def reading(cls, paths, tokenizer, **options):
        read.append(tokenizer)
        return from_files(cls, paths, tokenizer, **options)

    monkeypatch.setattr(Tokenizer, "from_pretrained", loading)
    monkeypatch.setattr(PairDataset, "from_files", classmethod(reading))
    stages = {s["name"] for s in bench_data(path, folder, repeats=3, show=False)["stages"]}
    for name in ("file to ids", "file to padded batches", "file to packed batches"):
        assert {name, f"{name}, first pass"} <= stages
    assert len(loaded) == 1 + 3
    for own in loaded[1:]:
        assert sum(tokenizer is own for tokenizer in read) == 1


def test_a_difference_from_trl_is_counted(tmp_path):
    pytest.importorskip("trl")
    import tiny

    tiny.tokenizer().save_pretrained(tmp_path / "model")
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(10))
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    pairs = PairDataset.from_files(path, tokenizer)
    pairs.chosen_ids.values[0] += 1
    from dpo_ext.bench.peers import trl_times

    found = trl_times([str(path)], tmp_path / "model", pairs, 10, 4, {})
    assert (found.pairs, found.same) == (10, 9)


def test_bad_arguments_and_empty_data(world, tmp_path):
    path, folder = world
    with pytest.raises(ValueError, match="`repeats` must be at least 1"):
        bench_data(path, folder, repeats=0)
    with pytest.raises(ValueError, match="`peer_pairs` must be at least 1"):
        bench_data(path, folder, peer_pairs=0)
    with pytest.raises(TypeError, match="unknown option `max_lenght`"):
        bench_data(path, folder, max_lenght=8)
    with pytest.raises(ValueError, match="unknown `truncation`"):
        bench_data(path, folder, truncation="middle")
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"")
    with pytest.raises(DataError) as found:
        bench_data(empty, folder)
    assert str(found.value) == f"no row of {empty} gives a pair: there are no rows"
    assert found.value.reason == "no_pairs"
    empty.write_text("{}\n")
    with pytest.raises(DataError, match="gives a pair\n1 rows read, 0 kept, 1 dropped"):
        bench_data(empty, folder)


@pytest.mark.parametrize("option", ["out", "json"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_timed(
    world, tmp_path, option, monkeypatch
):
    path, folder = world

    def fail(*_):
        raise AssertionError("the tokenizer was loaded")

    monkeypatch.setattr(Tokenizer, "from_pretrained", fail)
    absent = tmp_path / "absent"
    with pytest.raises(FileNotFoundError) as found:
        bench_data(path, folder, **{option: absent / "x.html"})
    assert (found.value.filename, found.value.strerror) == (str(absent), "no such folder")
    with pytest.raises(NotADirectoryError) as found:
        bench_data(path, folder, **{option: path / "x.html"})
    assert found.value.filename == str(path)
    with pytest.raises(IsADirectoryError):
        bench_data(path, folder, **{option: tmp_path})
    closed = tmp_path / "closed"
    closed.mkdir(0o500)
    if os.access(closed, os.W_OK):
        return  # root writes everywhere
    with pytest.raises(PermissionError):
        bench_data(path, folder, **{option: closed / "x.html"})


def test_options_are_those_of_a_data_set(tmp_path, no_trl):
    folder = write_folder(tmp_path / "model")
    path = tmp_path / "rows.jsonl"
    rows = [{"question": f"hello {i}:", "chosen": " the a", "rejected": " the b"} for i in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "{}\n")
    whole = bench_data(path, folder, repeats=1, show=False, prompt_key="question")
    options = {"prompt_key": "question", "max_length": 4, "truncation": "keep_end"}
    cut = bench_data(path, folder, repeats=1, show=False, **options)
    expected = PairDataset.from_files(
        path, Tokenizer.from_pretrained(folder), on_bad="skip", **options
    )
    assert cut["tokens"] == expected.tokens.sum() < whole["tokens"]
    assert cut["report"]["warned"]["truncated"] == 9
    assert cut["options"] == {"on_bad": "skip", "threads": 1, **options}
    with pytest.raises(DataError, match="line 10"):
        bench_data(path, folder, show=False, on_bad="error", prompt_key="question")


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end", "keep_completions"])
def test_trl_sees_the_names_of_the_fields_and_is_left_out_where_it_cannot_cut(tmp_path, truncation):
    pytest.importorskip("trl")
    import tiny

    tiny.tokenizer().save_pretrained(tmp_path / "model")
    rows = [{**row, "question": row["prompt"], "prompt": "no"} for row in tiny.rows(12)]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    longest = PairDataset.from_files(path, tokenizer, prompt_key="question").longest.max()
    result = bench_data(
        path, tmp_path / "model", repeats=1, show=False,
        prompt_key="question", max_length=int(longest) - 1, truncation=truncation,
    )  # fmt: skip
    assert result["report"]["warned"]["truncated"] > 0
    if truncation == "keep_completions":
        assert result["trl"] is None
    else:
        assert (result["trl"]["pairs"], result["trl"]["same"]) == (12, 12)


def text_of(page):
    return html.unescape(re.sub(r"<[^>]*>", " ", page.partition("</style>")[2]))


def test_page_names_what_was_measured_and_on_what(world, tmp_path, no_trl):
    path, folder = world
    out = tmp_path / "page.html"
    result = bench_data(path, folder, repeats=1, show=False, out=out)
    shown = text_of(out.read_text(encoding="utf-8"))
    on = result["machine"]
    for word in (
        "rows.jsonl", "model", on["cpu"], f"{on['cores']} cores", result["date"],
        f"dpo_ext {dpo_ext.__version__}", f"Python {platform.python_version()}",
        *(f"{name} {v}" for name, v in on["versions"].items() if v is not None),
        "max_length None", "dropped: missing field", "51", "50",
    ):  # fmt: skip
        assert word in shown, word
    assert str(tmp_path) not in shown  # a page can be sent on
    assert "{" not in shown  # no raw JSON


def test_page_draws_its_headline_as_bars_and_its_stages_on_a_named_logarithmic_axis(
    world, tmp_path, no_trl
):
    path, folder = world
    out = tmp_path / "page.html"
    result = bench_data(path, folder, repeats=1, show=False, out=out)
    page = out.read_text(encoding="utf-8")
    glance, rest = page.split('id="glance"')[1].split('id="stages"')
    widths = [float(w) for w in re.findall(r'class="fill policy" style="width:([0-9.]+)%', glance)]
    rates = {s["name"]: s["pairs_per_s"] for s in result["stages"]}
    packed, padded = (rates[f"file to {name} batches, first pass"] for name in ("packed", "padded"))
    expected = packed / padded
    assert widths[1] / widths[0] == pytest.approx(expected, rel=0.01)
    stages = rest.split("</section>")[0]
    assert "logarithmic scale" in stages
    ticks = re.findall(r'<span style="left:[0-9.]+%">([^<]*)</span>', stages)
    assert len(ticks) >= 2
    counts = re.findall(r'class="count"[^>]*>([0-9,]+)<', rest)
    assert sum(int(c.replace(",", "")) for c in counts) == 50


def test_machine_is_read_from_the_system(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(
        "processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: sse4_2 avx2 other\n\n"
        "processor\t: 1\nmodel name\t: B\n"
    )
    found = machine(cpuinfo)
    assert found["cpu"] == "A CPU: fast"
    assert found["instructions"] == ["sse4_2", "avx2"]
    assert found["versions"]["numpy"] == version("numpy")
    absent = machine(tmp_path / "absent")
    assert absent["cpu"]
    assert absent["instructions"] == []
    assert absent["cores"] >= 1
