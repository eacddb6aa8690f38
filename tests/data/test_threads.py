"""Every thread works on a row of its own, and the order of rows and errors does not depend on threads."""

import json
import threading
import time

import pytest
from byte_tokenizer import tokenizer

from dpo_ext import PairDataset
from dpo_ext.errors import DataError

CHAT = "{{ lacking_function(messages) }}"


def say(role, text):
    return [{"role": role, "content": text}]


def chat_rows(n):
    """Rows of 2 kB, as long as HH's."""
    return [
        {
            "prompt": say("user", f"question {i} " + "x" * 2000),
            "chosen": say("assistant", "a"),
            "rejected": say("assistant", "b"),
        }
        for i in range(n)
    ]


class Renderer:
    """In the place of transformers: counts the rows that are in work at once."""

    def __init__(self, seconds):
        self.seconds, self.now, self.most = seconds, 0, 0
        self.lock = threading.Lock()
        self.construct = self.note = None

    def __call__(self, template, variables, construct):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(self.seconds)
        with self.lock:
            self.now -= 1
        return "".join(m["content"] for m in json.loads(variables)["messages"])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3, 8, 32, 64])
def test_as_many_rows_are_in_work_at_once_as_there_are_threads(tmp_path, monkeypatch, threads):
    renderer = Renderer(0.004)
    monkeypatch.setattr("dpo_ext.data.tokenizer.Fallback", lambda: renderer)
    own = tokenizer(tmp_path / "model", template=CHAT)
    rows = chat_rows(60 * threads)
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    for make in (
        lambda: PairDataset.from_files(file, own, threads=threads, max_length=None),
        lambda: PairDataset.from_rows(rows, own, threads=threads, max_length=None),
        lambda: PairDataset.from_rows(iter(rows), own, threads=threads, max_length=None),
    ):
        renderer.most = 0
        pairs = make()
        assert renderer.most == threads
        assert pairs.rows.tolist() == list(range(len(rows)))


def text_rows(n):
    return [
        {"prompt": f"why {i}?", "chosen": " because" * (1 + i % 40), "rejected": " no", "k": i}
        for i in range(n)
    ]


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_the_first_bad_row_is_the_first_in_the_file_whatever_the_threads(tmp_path, threads):
    rows = text_rows(3000)
    for i in (700, 701, 1500, 2999):
        rows[i]["chosen"] = 5
    file = tmp_path / "rows.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)))
    own = tokenizer(tmp_path / "model")
    for _ in range(3):
        with pytest.raises(DataError) as caught:
            PairDataset.from_files(file, own, threads=threads)
        assert caught.value.line == 1401
        with pytest.raises(DataError) as caught:
            PairDataset.from_rows(rows, own, threads=threads)
        assert caught.value.line == 701
    skipped = PairDataset.from_files(file, own, threads=threads, on_bad="skip", columns=["k"])
    whole = PairDataset.from_rows(rows, own, threads=1, on_bad="skip", columns=["k"])
    assert skipped.report.first["wrong_type"].line == 1401
    assert skipped.report.read == whole.report.read == 3000
    assert skipped.report.warned["blank_line"] == 2999
    assert skipped.chosen_ids == whole.chosen_ids
    assert skipped.columns["k"].tolist() == whole.columns["k"].tolist()
    assert skipped.rows.tolist() == whole.rows.tolist()


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_an_extra_column_is_of_the_kind_of_its_first_row_whatever_the_threads(tmp_path, threads):
    rows = text_rows(2000)
    for row in rows[1000:]:
        row["k"] = "text"
    with pytest.raises(DataError, match="as in the rows before") as caught:
        PairDataset.from_rows(rows, tokenizer(tmp_path / "model"), threads=threads, columns=["k"])
    assert caught.value.line == 1001


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_a_file_that_breaks_off_is_an_error_behind_its_rows(tmp_path, threads):
    import gzip

    packed = gzip.compress("\n".join(map(json.dumps, text_rows(40_000))).encode())
    file = tmp_path / "rows.jsonl.gz"
    file.write_bytes(packed[: len(packed) * 3 // 4])
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(file, tokenizer(tmp_path / "model"), threads=threads)
    assert caught.value.reason == "bad_input"
    bad = text_rows(40_000)
    bad[17]["rejected"] = None
    packed = gzip.compress("\n".join(map(json.dumps, bad)).encode())
    file.write_bytes(packed[: len(packed) * 3 // 4])
    with pytest.raises(DataError) as caught:
        PairDataset.from_files(file, tokenizer(tmp_path / "model"), threads=threads)
    assert caught.value.line == 18


def test_a_bad_row_comes_before_what_the_rows_raise_later(tmp_path):
    def rows(bad):
        for i, row in enumerate(text_rows(500)):
            yield {**row, "chosen": 5} if i == bad else row
        raise KeyError("no more")

    for threads in (1, 4):
        with pytest.raises(KeyError, match="no more"):
            PairDataset.from_rows(rows(None), tokenizer(tmp_path / "model"), threads=threads)
        for bad in (0, 250, 499):
            with pytest.raises(DataError) as caught:
                PairDataset.from_rows(rows(bad), tokenizer(tmp_path / "model"), threads=threads)
            assert caught.value.line == bad + 1


@pytest.mark.slow
def test_a_short_call_is_not_kept_waiting_by_a_long_one(tmp_path, monkeypatch):
    renderer = Renderer(0.002)
    monkeypatch.setattr("dpo_ext.data.tokenizer.Fallback", lambda: renderer)
    slow = tokenizer(tmp_path / "slow", template=CHAT)
    own = tokenizer(tmp_path / "own")
    rows = chat_rows(2000)
    thread = threading.Thread(
        target=lambda: PairDataset.from_rows(rows, slow, threads=2, max_length=None)
    )
    thread.start()
    time.sleep(0.3)
    begun = time.monotonic()
    PairDataset.from_rows(text_rows(10), own, threads=2)
    waited = time.monotonic() - begun
    assert thread.is_alive()  # it takes 6 s
    assert waited < 3
    thread.join()
