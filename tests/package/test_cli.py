"""The command line: codes, messages, and what is missing is named with its extra."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("typer")

from dpo_ext import DataError, DpoExtError, __version__, cli
from dpo_ext.extras import install


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return stopped.value.code


def raising(error: Exception):
    """An app whose command ends in ``error``."""

    def app(**_):
        raise error

    return lambda: app


def test_version_and_help(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out.strip() == __version__
    assert run("--help") == 0
    out = capsys.readouterr().out
    for command in ("demo", "prepare", "stats", "bench", "losses"):
        assert command in out


@pytest.mark.parametrize(
    "arguments", [["unknown"], ["demo", "--seed", "-1"], ["demo", "--unknown"], ["bench", "data"]]
)
def test_wrong_usage_is_code_two(arguments, capsys):
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "extra"),
    [("typer", "cli"), ("rich", "cli"), ("transformers", "hf"), ("torch", "torch")],
)
def test_a_missing_package_is_named_with_its_extra(module, extra, monkeypatch, capsys):
    if extra == "cli":
        monkeypatch.setitem(sys.modules, module, None)
    else:
        monkeypatch.setattr(cli, "_app", raising(ModuleNotFoundError("no module", name=module)))
    assert run("losses") == 2
    message = capsys.readouterr().err
    assert message == f"error: `{module}` is not installed\nhint: {install(extra)}\n"


def test_a_missing_module_of_our_own_is_not_blamed_on_an_extra(monkeypatch):
    monkeypatch.setattr(cli, "_app", raising(ModuleNotFoundError("no module", name="dpo_ext.gone")))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["losses"])


def test_importing_the_command_line_loads_neither_typer_nor_torch():
    import subprocess

    code = "import sys, dpo_ext.cli; print(sorted({'typer', 'rich', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("row 3, `chosen`: is empty"), 2), (DpoExtError("a check failed"), 1)],
)
def test_errors_are_messages_without_a_traceback(error, code, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_app", raising(error))
    assert run("demo") == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_losses_prints_a_row_for_every_loss(capsys):
    pytest.importorskip("torch")
    from dpo_ext.torch.losses.catalogue import losses_table

    assert run("losses") == 0
    out = capsys.readouterr().out
    printed = {line.split("│")[1].strip() for line in out.splitlines() if line.startswith("│")}
    assert {entry.name for entry in losses_table()} <= printed
    assert "2305.18290, eq. 7" in out
    assert "beta=0.1" in out


@pytest.mark.parametrize("name", ["Boundary", "Truncation", "OnBad"])
def test_options_of_commands_are_those_of_a_data_set(name):
    from dpo_ext.data import options

    assert tuple(word.value for word in getattr(cli, name)) == getattr(options, name).__args__


def test_prepare_saves_what_from_files_reads(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from byte_tokenizer import write_folder

    from dpo_ext import PairDataset, Tokenizer

    rows = [{"q": f"why {i}?", "yes": " a" * (i + 1), "no": " b"} for i in range(50)] + [{"q": "?"}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, out = write_folder(tmp_path / "model"), tmp_path / "saved"
    keys = ["--prompt-key", "q", "--chosen-key", "yes", "--rejected-key", "no"]
    command = ["prepare", str(data), "--tokenizer", str(folder), "--out", str(out), *keys]
    assert run(*command) == 2
    assert "line 51" in capsys.readouterr().err
    assert not list(out.rglob("*.arrow"))
    assert not list(out.rglob("*.json"))
    cut = ["--max-length", "30", "--truncation", "keep_end", "--threads", "1"]
    assert run(*command, *cut, "--on-bad", "skip") == 0
    printed = capsys.readouterr().out
    assert "51 rows read, 50 kept, 1 dropped" in printed
    want = PairDataset.from_files(
        data,
        Tokenizer.from_pretrained(folder),
        max_length=30,
        truncation="keep_end",
        on_bad="skip",
        prompt_key="q",
        chosen_key="yes",
        rejected_key="no",
    )
    got = PairDataset.load(out)
    assert got.prompt_ids == want.prompt_ids
    assert got.chosen_ids == want.chosen_ids
    assert got.report == want.report
    assert got.report.warned["truncated"] > 0


def test_bench_data_measures_a_file_and_writes_what_was_asked_for(tmp_path, capsys):
    pytest.importorskip("tokenizers")
    source = pytest.importorskip("dpo_ext.demo.source")
    rows = [
        {"prompt": f"question {i}?\n", "chosen": f"yes {i}", "rejected": f"no {i}"}
        for i in range(200)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source.train_tokenizer([row["prompt"] for row in rows], 300, False, tmp_path / "tokenizer")
    out, numbers = tmp_path / "bench.html", tmp_path / "bench.json"
    options = [
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--out",
        str(out),
        "--json",
        str(numbers),
    ]
    assert run("bench", "data", str(data), *options) == 0
    found = json.loads(numbers.read_text())
    assert found["pairs"] == 200
    assert found["ids_equal"] is True
    assert found["stages"]
    assert "<html" in out.read_text()
    assert "pairs/s" in capsys.readouterr().out
    assert run("bench", "data", str(tmp_path / "absent.jsonl"), *options) == 2
    assert "no such file" in capsys.readouterr().err
