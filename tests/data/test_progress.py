"""How far encoding is: a line in a terminal and a notebook, one every ten seconds in a log."""

from __future__ import annotations

import io
import sys

import pytest

from dpo_ext.data.progress import Bar


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


class OutStream(io.StringIO):
    """What stands for standard output in a notebook."""

    __module__ = "ipykernel.iostream"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"x" * 1000)
    return str(path)


def watched(files, clock, seconds, step=1.0):
    """A run that reads 1,000 bytes and 500 rows evenly in so many seconds."""
    with Bar(True, files, clock) as tell:
        start = clock.now
        while clock.now - start < seconds:
            clock.now += step
            share = min(1.0, (clock.now - start) / seconds)
            tell(int(1000 * share), int(500 * share))


def test_a_log_gets_a_line_every_ten_seconds_with_rate_and_time_left(file, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    watched([file], Clock(), 100)
    lines = log.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0] == "encoding pairs, 10%, 50 rows, 5 rows/s, 1:30 left"
    assert lines[4] == "encoding pairs, 50%, 250 rows, 5 rows/s, 0:50 left"
    assert lines[-1] == "encoding pairs, 100%, 500 rows, 5 rows/s, in 1:40"


def test_a_log_of_a_short_run_has_nothing(file, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    watched([file], Clock(), 9)
    assert log.getvalue() == ""


def test_a_terminal_has_one_line_that_is_written_anew(file, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    watched([file], Clock(), 4)
    text = terminal.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    lines = text.strip("\r\n").split("\r")
    assert len(lines) == 5
    assert lines[1].split("  ") == [
        "encoding pairs",
        "[##########..........] 50%",
        "250 rows",
        "125 rows/s",
        "0:02 left",
    ]
    assert "in 0:04" in lines[-1]
    shown = [len(line.rstrip()) for line in lines]
    assert all(len(line) >= before for line, before in zip(lines[1:], shown, strict=False)), (
        "what the line before was longer by is wiped out"
    )


def test_a_line_is_no_wider_than_the_terminal(file, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "30")
    watched([file], Clock(), 4)
    assert max(map(len, terminal.getvalue().strip("\r\n").split("\r"))) == 29


def test_a_terminal_is_not_written_to_with_every_call(file, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    watched([file], Clock(), 1, step=0.01)
    assert terminal.getvalue().count("\r") <= 6


def test_a_notebook_has_its_line_on_standard_output(file, monkeypatch):
    notebook, log = OutStream(), io.StringIO()
    monkeypatch.setattr(sys, "stdout", notebook)
    monkeypatch.setattr(sys, "stderr", log)
    watched([file], Clock(), 4)
    assert "\r" in notebook.getvalue()
    assert "125 rows/s" in notebook.getvalue()
    assert log.getvalue() == ""


def test_without_files_there_are_rows_and_no_end(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    watched([], Clock(), 10)
    assert log.getvalue().splitlines()[0] == "encoding pairs, 500 rows, 50 rows/s"


def test_a_run_that_fails_ends_its_line_and_claims_no_end(file, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    clock = Clock()

    def broken():
        with Bar(True, [file], clock) as tell:
            clock.now += 1
            tell(100, 50)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken()
    text = terminal.getvalue()
    assert text.endswith("\n")
    assert "100%" not in text
    assert " in " not in text


def test_a_process_without_streams_is_told_nothing(file, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with Bar(True, [file]) as tell:
        assert tell is None
