"""The command line: codes, messages, and what is missing is named with its extra."""

from __future__ import annotations

import gzip
import json
import os
import platform
import re
import subprocess
import sys
from importlib import metadata

import pytest
import tiny
from places import ROOT

pytest.importorskip("typer")

from dpo_ext import DataError, DpoExtError, PairDataset, Report, __version__, cli
from dpo_ext.cli import versions
from dpo_ext.data.options import Boundary, OnBad, Options, SpecialTokensInText, Truncation
from dpo_ext.extras import install


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    return stopped.value.code


@pytest.fixture
def raising(monkeypatch):
    """Puts an error in the place of the app."""

    def put(error: Exception):
        def app(**_):
            raise error

        monkeypatch.setattr("dpo_ext.cli.app.app", app)

    return put


ROWS = [
    {"prompt": f"why {i}?", "chosen": " a" * (i % 7 + 1), "rejected": " the b"} for i in range(40)
]
BAD = {"prompt": "?", "chosen": " ", "rejected": "no"}


@pytest.fixture
def model(tmp_path):
    from byte_tokenizer import write_folder

    return write_folder(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    return tiny.write_jsonl(tmp_path / "pairs.jsonl", ROWS)


def child(*arguments, given=b"", **options):
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "dpo_ext", *map(str, arguments)],
        input=given,
        capture_output=True,
        check=False,
        **options,
    )


# Versions and help


def test_version_names_packages_kernels_and_instruction_sets(capsys):
    assert run("--version") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"dpo_ext {__version__}"
    found = dict(line.split(maxsplit=1) for line in lines[1:] if "kernels" not in line)
    assert found["NumPy"] == metadata.version("numpy")
    assert found["Python"].startswith(platform.python_version())
    for name in ("torch", "CuPy", "transformers", "TRL", "pyarrow"):
        assert found[name]
    assert [line[:13].strip() for line in lines[-2:]] == ["CPU kernels", "CUDA kernels"]


def test_version_says_what_is_not_installed(monkeypatch):
    def version(name):
        if name in ("torch", "cupy-cuda13x", "cupy-cuda12x", "cupy"):
            raise metadata.PackageNotFoundError(name)
        return "9.9"

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(versions, "cuda_devices", lambda: ["a GPU"])
    lines = versions.version_lines()
    assert "torch         not installed" in lines
    assert "CuPy          not installed" in lines
    assert "NumPy         9.9" in lines
    assert lines[-1] == "CUDA kernels  cannot run: torch and CuPy not installed; a GPU"


@pytest.mark.slow
def test_version_loads_neither_torch_nor_cupy():
    code = (
        "import sys, dpo_ext.cli\n"
        "try: dpo_ext.cli.main(['--version'])\n"
        "finally: print(sorted({'torch', 'cupy', 'transformers', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("fpu sse2 avx avx2 fma avx512f avx512bw avx512dq avx512vl", "AVX-512 (avx512f "),
        ("fpu sse2 avx avx2 fma avx512f", "AVX2 (avx2 fma)"),
        ("fpu sse2 avx avx2", "SSE2: "),
        (None, "AVX-512 or AVX2 if the processor has it, else SSE2"),
    ],
)
def test_the_instruction_sets_are_those_of_the_processor(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    if flags is not None:
        cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert versions.cpu_kernels(cpuinfo).startswith(expected)
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert versions.cpu_kernels(cpuinfo).startswith("NEON")


def test_the_instruction_sets_are_those_that_the_kernels_in_rust_name():
    named = {
        tuple(re.findall(r'"x86_64\+([^"]+)"', targets))
        for path in (ROOT / "rust").rglob("*.rs")
        for targets in re.findall(r"multiversion\(targets\(([^)]*)\)", path.read_text("utf-8"))
    }
    assert named == {tuple("+".join(sets) for sets in versions.INSTRUCTION_SETS.values())}


def test_a_missing_driver_is_said():
    assert versions.cuda_devices("libno-such-driver.so") == (
        "no CUDA driver (libno-such-driver.so)"
    )


def test_help_lists_all_commands_and_exit_codes(capsys):
    assert run("--help") == 0
    out = capsys.readouterr().out
    for word in ("demo", "prepare", "stats", "bench", "losses", "--install-completion", "141"):
        assert word in out


@pytest.mark.parametrize(
    "command", [["demo"], ["prepare"], ["stats"], ["bench", "data"], ["losses"]], ids=" ".join
)
def test_help_of_a_command_has_examples(command, capsys):
    assert run(*command, "--help") == 0
    assert "dpo-ext " + " ".join(command) in capsys.readouterr().out.partition("Examples:")[2]


@pytest.mark.parametrize("command", [["prepare"], ["stats"], ["bench", "data"]], ids=" ".join)
def test_every_data_command_has_the_options_of_a_data_set(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert run(*command, "--help") == 0
    out = capsys.readouterr().out
    # given once for each
    apart = {"columns": "column", "ignore_columns": "ignore_column", "limits": "limit"}
    for name in Options.__annotations__:
        assert f"--{apart.get(name, name).replace('_', '-')}" in out, name
    assert ("--cache-dir" in out) == (command == ["prepare"])
    for literal in (Truncation, Boundary, OnBad, SpecialTokensInText):
        assert "|".join(literal.__args__) in out
    assert f"[default: {'error' if command == ['prepare'] else 'skip'}]" in out


@pytest.mark.slow
def test_a_shell_is_told_how_to_complete():
    env = {"_DPO_EXT_COMPLETE": "complete_bash", "COMP_WORDS": "dpo-ext lo", "COMP_CWORD": "1"}
    done = child(env={**os.environ, **env})
    assert done.stdout.split() == [b"losses"]


# Errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["unknown"],
        ["demo", "--seed", "-1"],
        ["demo", "--unknown"],
        ["bench", "data"],
        ["stats", "a.jsonl", "--tokenizer", "m", "--on-bad", "drop"],
        ["stats", "a.jsonl", "--tokenizer", "m", "--prompt-key", "a", "--chosen-key", "a"],
        ["stats", "a.jsonl", "--tokenizer", "m", "--limit", "max_rows=4"],
        ["stats", "a.jsonl", "--tokenizer", "m", "--limit", "max_keys=none"],
        ["stats", "a.jsonl", "--tokenizer", "m", "--limit", "max_keys=0"],
    ],
)
def test_wrong_usage_is_code_two(arguments, capsys):
    assert run(*arguments) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "extra"),
    [("typer", "cli"), ("rich", "cli"), ("transformers", "hf"), ("torch", "torch")],
)
def test_a_missing_package_is_named_with_its_extra(module, extra, raising, monkeypatch, capsys):
    if extra == "cli":
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(sys.modules, "dpo_ext.cli.app", raising=False)
    else:
        raising(ModuleNotFoundError("no module", name=module))
    assert run("losses") == 2
    message = capsys.readouterr().err
    assert message == f"error: `{module}` is not installed\nhint: {install(extra)}\n"


def test_a_missing_module_of_our_own_is_not_blamed_on_an_extra(raising):
    raising(ModuleNotFoundError("no module", name="dpo_ext.gone"))
    with pytest.raises(ModuleNotFoundError):
        cli.main(["losses"])


@pytest.mark.slow
def test_importing_the_command_line_loads_neither_typer_nor_torch():
    code = "import sys, dpo_ext.cli; print(sorted({'typer', 'rich', 'torch'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("error", "code"),
    [(DataError("row 3, `chosen`: is empty"), 2), (DpoExtError("a check failed"), 1)],
)
def test_errors_are_messages_without_a_traceback(error, code, raising, capsys):
    raising(error)
    assert run("demo") == code
    assert capsys.readouterr().err == f"error: {error}\n"


def test_a_bad_row_says_which_option_skips_it(tmp_path, data, model, capsys):
    with data.open("a") as file:
        file.write(json.dumps(BAD) + "\n")
    for command in (["prepare", "--out", str(tmp_path / "out")], ["stats", "--on-bad", "error"]):
        assert run(*command, str(data), "--tokenizer", str(model)) == 2
        err = capsys.readouterr().err
        assert "line 41, `chosen`" in err
        assert err.endswith("hint: --on-bad skip drops bad rows and counts them\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("hint", "flags"),
    [
        ('layout_of_rows="completions" keeps', "--layout-of-rows completions keeps"),
        ('ignore_columns=("prompt",) takes', "--ignore-column prompt takes"),
        ('images="ignore" keeps', "--images ignore keeps"),
        ("name it by `prompt_key`; or", "name it by `--prompt-key`; or"),
        ("`max_length` may be too small", "`--max-length` may be too small"),
        ("`limits` sets another limit", "`--limit` sets another limit"),
        ("the field `prompt` is empty", "the field `prompt` is empty"),
    ],
)
def test_hints_are_told_in_options_of_the_command(hint, flags, raising, capsys):
    raising(DataError(f"row 1: `prompt_key` is bad\nhint: {hint}"))
    assert run("demo") == 2
    assert capsys.readouterr().err == f"error: row 1: `prompt_key` is bad\nhint: {flags}\n"


def test_a_tokenizer_from_the_hub_says_how_to_get_it(data, capsys):
    assert run("stats", str(data), "--tokenizer", "Qwen/Qwen2.5-0.5B") == 2
    assert "hf download Qwen/Qwen2.5-0.5B" in capsys.readouterr().err


# Losses


def test_losses_are_a_row_each_in_eighty_columns(capsys):
    pytest.importorskip("torch")
    from dpo_ext.torch.losses.catalogue import losses_table

    assert run("losses") == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    table = lines[1 : lines.index("")]
    assert [line.split()[0] for line in table] == [entry.name for entry in losses_table()]
    dpo = next(line for line in table if line.startswith("dpo "))
    assert dpo.split() == ["dpo", "preference_loss", "2305.18290", "reference"]
    assert "losses NAME" in lines[-1]


def test_one_loss_is_shown_with_formula_parameters_and_paper(capsys):
    pytest.importorskip("torch")
    from dpo_ext.torch.losses.catalogue import losses_table

    entry = next(entry for entry in losses_table() if entry.name == "odpo")
    assert run("losses", "odpo") == 0
    out = capsys.readouterr().out
    for text in (entry.formula, entry.paper, entry.needs, 'preference_loss(..., loss="odpo")'):
        assert text in out
    assert "beta: > 0; 0.1 by default" in out
    assert "score_gap: > 0; must be given" in out


def test_losses_as_json_are_all_of_the_table(tmp_path, capsys):
    pytest.importorskip("torch")
    from dpo_ext.torch.losses.catalogue import losses_table

    assert run("losses", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert [loss["name"] for loss in found] == [entry.name for entry in losses_table()]
    assert run("losses", "simpo", "--json", str(tmp_path / "simpo.json")) == 0
    one = json.loads((tmp_path / "simpo.json").read_text())
    assert one == next(loss for loss in found if loss["name"] == "simpo")
    assert one["parameters"]["gamma"] == {"default": 0.5, "domain": "finite"}


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("simp", "did you mean `simpo`"),
        ("sigmoid", "it is `dpo` in trl"),
        ("zzzzzz", "`dpo-ext losses` lists them all"),
    ],
)
def test_an_unknown_loss_says_what_was_meant(name, hint, capsys):
    pytest.importorskip("torch")
    assert run("losses", name) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: unknown loss `{name}`\nhint: {hint}")


# Data


def test_prepare_saves_what_from_files_reads(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    from byte_tokenizer import write_folder

    from dpo_ext import Tokenizer

    rows = [{"q": f"why {i}?", "yes": " a" * (i + 1), "no": " b"} for i in range(50)] + [{"q": "?"}]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder, out = write_folder(tmp_path / "model"), tmp_path / "saved"
    keys = ["--prompt-key", "q", "--chosen-key", "yes", "--rejected-key", "no"]
    command = ["prepare", str(data), "--tokenizer", str(folder), "--out", str(out), *keys]
    assert run(*command) == 2
    assert "line 51" in capsys.readouterr().err
    assert not out.exists()
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


@pytest.fixture
def prepared(data, model, tmp_path, capsys):
    """A saved data set, and the command that saves it there."""
    pytest.importorskip("pyarrow")
    out = tmp_path / "saved"
    command = ["prepare", str(data), "--tokenizer", str(model), "--out", str(out)]
    assert run(*command) == 0
    capsys.readouterr()
    return out, command


def test_prepare_replaces_a_data_set_only_when_it_is_told_to(prepared, capsys):
    out, command = prepared
    before = (out / "manifest.json").read_bytes()
    assert run(*command, "--max-length", "8") == 2
    err = capsys.readouterr().err
    assert re.search(
        r"saved: holds a data set of 40 pairs, saved 2\d{3}-\d\d-\d\d \d\d:\d\d\n", err
    )
    assert "hint: --force replaces it" in err
    assert (out / "manifest.json").read_bytes() == before
    assert run(*command, "--max-length", "8", "--force") == 0
    assert PairDataset.load(out).longest.max() <= 8


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "there are no rows"),
        (b"a,b,c\n1,2,3\n", "it may be CSV, with the columns 'a', 'b', 'c'"),
        (b'[{"question": "a", "good": "b", "bad": "c"}]\n', "give other names"),
        (bytes(range(128, 256)), "rows are JSON objects"),
        (b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "identical_pair: 1"),
    ],
    ids=["empty", "CSV", "array", "binary", "no pair"],
)
def test_prepare_keeps_the_old_data_when_no_pair_is_kept(prepared, tmp_path, content, says, capsys):
    out, command = prepared
    command[1] = str(tmp_path / "other")
    (tmp_path / "other").write_bytes(content)
    assert run(*command, "--force", "--on-bad", "skip") == 2
    err = capsys.readouterr().err
    assert says in err
    assert f"`{out}` is left as it was" in err
    assert len(PairDataset.load(out)) == 40
    command[-1] = str(tmp_path / "new")
    assert run(*command, "--on-bad", "skip") == 2
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("command", ["prepare", "stats"])
def test_an_empty_file_is_one_line_and_code_two(tmp_path, model, command, capsys):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    out = ["--out", str(tmp_path / "out")] if command == "prepare" else []
    arguments = [command, str(tmp_path / "empty.jsonl"), "--tokenizer", str(model), *out]
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "there are no rows" in captured.err


def test_stats_of_data_without_a_pair_says_why(tmp_path, model, capsys):
    path = tiny.write_jsonl(tmp_path / "bad.jsonl", [BAD] * 3)
    assert run("stats", str(path), "--tokenizer", str(model)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "dropped empty_completion: 3" in captured.err


def test_prepare_tells_its_report_as_json(prepared, tmp_path, capsys):
    out, command = prepared
    assert run(*command, "--force", "--json", "-") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["out"] == str(out)
    assert Report.from_dict(found["report"]) == PairDataset.load(out).report
    assert "40 rows read" in captured.err


def test_a_json_file_that_cannot_be_written_is_said_before_the_work(prepared, tmp_path, capsys):
    out, command = prepared
    before = (out / "manifest.json").read_bytes()
    assert run(*command, "--force", "--max-length", "8", "--json", str(tmp_path / "no" / "x")) == 2
    assert "no such folder" in capsys.readouterr().err
    assert run(*command, "--force", "--max-length", "8", "--json", str(tmp_path)) == 2
    assert "is a directory" in capsys.readouterr().err
    assert (out / "manifest.json").read_bytes() == before


def zstd(text):
    pytest.importorskip("pyarrow")
    import pyarrow as pa

    return pa.Codec("zstd").compress(text, asbytes=True)


@pytest.mark.slow
@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd], ids=["plain", "gzip", "zstd"])
def test_standard_input_is_a_file_like_any_other(data, model, pack, tmp_path):
    rows = data.read_bytes() + json.dumps(BAD).encode() + b"\n"
    options = ["--tokenizer", model, "--json", "-"]
    done = child("stats", "-", *options, given=pack(rows))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    data.write_bytes(rows)
    want = json.loads(child("stats", data, *options).stdout)
    assert found["report"]["first"]["empty_completion"].pop("path") == "standard input"
    assert want["report"]["first"]["empty_completion"].pop("path") == str(data)
    assert found == want
    assert b"standard input, line 41" in done.stderr
    failed = child("stats", "-", "--tokenizer", model, "--on-bad", "error", given=pack(rows))
    assert failed.returncode == 2
    assert failed.stderr.startswith(b"error: standard input, line 41, `chosen`")
    assert failed.stdout == b""


@pytest.mark.slow
def test_pipes_of_the_shell_are_read_and_leave_nothing_behind(data, model, tmp_path):
    (tmp_path / "tmp").mkdir()
    reader, writer = os.pipe()
    os.write(writer, data.read_bytes())
    os.close(writer)
    pipe = f"/dev/fd/{reader}"
    done = child(
        "prepare", pipe, "--tokenizer", model, "--out", tmp_path / "out",
        pass_fds=[reader], env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
    )  # fmt: skip
    os.close(reader)
    assert done.returncode == 0, done.stderr
    assert len(PairDataset.load(tmp_path / "out")) == 40
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.slow
def test_a_reader_that_goes_away_is_no_error(data, model):
    for arguments in (["--version"], ["stats", data, "--tokenizer", model]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "dpo_ext", *map(str, arguments)],
            stdout=writer,
            stderr=subprocess.PIPE,
            check=False,
        )
        os.close(writer)
        assert (done.returncode, done.stderr) == (141, b"")


def test_a_folder_of_shards_is_prepared(tmp_path, model, capsys):
    pytest.importorskip("pyarrow")
    (tmp_path / "shards").mkdir()
    tiny.write_jsonl(tmp_path / "shards" / "0.jsonl", ROWS[:10])
    tiny.write_jsonl(tmp_path / "shards" / "1.jsonl.gz", ROWS[10:])
    (tmp_path / "shards" / "README.md").write_text("shards\n")
    out = tmp_path / "out"
    assert run("prepare", f"{tmp_path}/shards/", "--tokenizer", str(model), "--out", str(out)) == 0
    assert "not read are README.md" in capsys.readouterr().out
    assert len(PairDataset.load(out)) == 40


def test_options_reach_the_data_set(tmp_path, model, capsys):
    rows = [{"q": r["prompt"], "y": r["chosen"], "n": r["rejected"], "m": 0.5} for r in ROWS]
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    keys = ["--prompt-key", "q", "--chosen-key", "y", "--rejected-key", "n"]
    cut = ["--max-length", "14", "--truncation", "drop", "--column", "m"]
    base = [str(path), "--tokenizer", str(model / "tokenizer.json"), *keys, *cut]
    assert run("stats", *base, "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"]["dropped"]["too_long"] > 0
    assert found["lengths"]["longer side"]["q100"] <= 14
    pytest.importorskip("pyarrow")
    assert run("prepare", *base, "--out", str(tmp_path / "out")) == 0
    pairs = PairDataset.load(tmp_path / "out")
    assert len(pairs) == found["pairs"]
    assert pairs.columns["m"].tolist() == [0.5] * len(pairs)
    cache = ["--force", "--out", str(tmp_path / "out"), "--cache-dir", str(tmp_path / "cache")]
    assert run("prepare", *base, *cache) == 0
    assert tiny.same_pairs(PairDataset.load(tmp_path / "out"), pairs)
    assert len(list((tmp_path / "cache").glob("*/*.arrow"))) == 1
    capsys.readouterr()
    limits = ["--limit", "max_line_bytes=8", "--limit", "max_depth=3"]
    assert run("stats", *base, "--on-bad", "error", *limits) == 2
    assert "more than 8 bytes" in capsys.readouterr().err


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
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert run("bench", "data", str(tmp_path / "empty.jsonl"), *options) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert run("bench", "data", "--json", "-", str(data), *options[:2], "--repeats", "1") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["pairs"] == 200
    assert "pairs/s" in captured.err
    assert run("bench", "data", str(tmp_path / "absent.jsonl"), *options) == 2
    assert "no such file" in capsys.readouterr().err


def test_a_variable_that_no_template_reads_is_wrong_usage(tmp_path, capsys):
    from byte_tokenizer import write_folder

    write_folder(tmp_path / "m")
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}')
    options = ["--tokenizer", str(tmp_path / "m"), "--chat-template-kwargs", '{"stile": 1}']
    assert run("stats", str(rows), *options) == 2
    assert "no chat template reads `stile`" in capsys.readouterr().err
    options[-1] = "{"
    assert run("stats", str(rows), *options) == 2
