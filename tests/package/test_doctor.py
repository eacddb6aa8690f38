"""`dpo-ext doctor`: what works is tried, what does not is named with what to do, and the code says so."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("typer")

from dpo_ext import TensorError, _core, cli
from dpo_ext.cli import doctor
from dpo_ext.cli.doctor import Finding
from dpo_ext.torch import attention, probes

NO_GPU = not torch.cuda.is_available()


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", *arguments])
    return stopped.value.code or 0


@pytest.fixture
def only(monkeypatch):
    """Looks at some things alone."""

    def put(*looks) -> None:
        monkeypatch.setattr(doctor, "LOOKS", looks)

    return put


def finding(state: str, hint: str | None = "do this") -> Finding:
    return Finding("thing", "torch", state, "as it is", hint)


def test_a_machine_where_all_works_is_fine_and_the_json_has_every_finding(capsys, tmp_path):
    out = tmp_path / "found.json"
    assert run("--json", str(out)) == 0
    result = json.loads(out.read_text())
    states = {one["name"]: one["state"] for one in result["findings"]}
    assert result["works"]
    assert states["CPU kernels"] == states["packed: sdpa"] == states["packed: dpo_ext"] == "works"
    text = capsys.readouterr().out
    assert all(name in text for name in states)
    assert "fine: what is installed works" in text


@pytest.mark.parametrize(("state", "needs", "code"), [
    ("works", (), 0),
    ("note", (), 0),
    ("missing", (), 0),
    ("missing", ("cpu",), 0),
    ("missing", ("torch",), 1),
    ("note", ("torch",), 0),
    ("broken", (), 1),
    ("broken", ("cpu",), 1),
])  # fmt: skip
def test_what_is_broken_fails_and_what_is_missing_fails_if_asked_for(
    state, needs, code, only, capsys
):
    only(lambda: iter([finding(state)]))
    assert run(*(f"--need={name}" for name in needs)) == code
    text = capsys.readouterr().out
    assert ("does not work: thing\n  thing: do this" in text) == (code == 1)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_gpu_that_is_asked_for_and_not_there_is_a_failure(only, capsys):
    only(doctor._cuda)
    assert run("--need", "cuda") == 1
    assert "the CUDA kernels need an NVIDIA GPU and its driver" in capsys.readouterr().out


def test_a_need_that_there_is_not_is_wrong_usage(capsys):
    assert run("--need", "gpu") == 2
    assert "hint: there is cpu, cuda, packing, " in capsys.readouterr().err


@pytest.mark.parametrize("kernel", ["token_stats", "logits_grad"])
def test_a_kernel_that_is_off_is_found_and_named(kernel, monkeypatch, only, capsys):
    real = getattr(_core, kernel)

    def off(*arguments):
        out = real(*arguments)
        if kernel == "token_stats":
            return (out[0] + 1e-3, *out[1:])
        arguments[-2][...] = 0
        return out

    monkeypatch.setattr(_core, kernel, off)
    worst = probes.try_kernels("cpu")
    assert all(trial.error > 1 for trial in worst)
    only(doctor._cpu)
    assert run() == 1
    text = capsys.readouterr().out
    assert "BROKEN  CPU kernels" in text
    assert ("sums, V = " in text or "logps, V = " in text) == (kernel == "token_stats")


def test_the_kernels_here_are_within_what_is_allowed():
    assert [trial.dtype for trial in probes.try_kernels("cpu")] == [
        "float32",
        "bfloat16",
        "float16",
    ]
    assert all(trial.error <= 1 for trial in probes.try_kernels("cpu"))


def test_nan_is_the_largest_error():
    assert probes._off(torch.tensor([1.0, torch.nan]), torch.ones(2).double(), 1.0) == float("inf")


def test_an_attention_that_leaks_is_found(monkeypatch, only):
    def leaks(model, **_):
        raise TensorError("packed segments see each other in eval mode\nhint: pad")

    monkeypatch.setattr(attention, "assert_packing_safe", leaks)
    only(doctor._packing)
    assert run() == 1
    states = {one.name: one.state for one in doctor._packing()}
    assert states == {"packed: eager": "note", "packed: sdpa": "note", "packed: dpo_ext": "broken"}


def test_a_package_of_another_version_is_broken_and_one_that_is_not_there_is_missing(monkeypatch):
    monkeypatch.setattr(doctor, "_extras", lambda: ("trl",))
    monkeypatch.setattr(doctor, "_requirements", lambda _: iter([("trl", ">=1.16,<1.17")]))
    for version, state in (("1.17.0", "broken"), ("1.16.3", "works"), (None, "missing")):
        monkeypatch.setattr(doctor, "_version", lambda _, version=version: version)
        (found,) = doctor._optional()
        assert found.state == state
        assert state == "works" or "dpo_ext[trl]" in found.hint


@pytest.mark.parametrize(("text", "cores"), [
    ("200000 100000", 2.0), ("50000 100000", 0.5), ("max 100000", None), ("", None), ("x y", None),
])  # fmt: skip
def test_the_time_that_a_cgroup_allows(text, cores, tmp_path):
    (tmp_path / "cpu.max").write_text(text)
    assert doctor.cpu_quota(tmp_path) == cores


def test_the_first_version_of_cgroups_is_read(tmp_path):
    (tmp_path / "cpu").mkdir()
    (tmp_path / "memory").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("150000\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("1073741824\n")
    assert doctor.cpu_quota(tmp_path) == 1.5
    assert doctor.memory_limit(tmp_path) == 1 << 30
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert doctor.cpu_quota(tmp_path) is None
    assert doctor.memory_limit(tmp_path) is None


def test_threads_beyond_the_cgroup_are_noted(monkeypatch):
    monkeypatch.setattr(doctor, "cpu_quota", lambda: 1.0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    (found,) = doctor._threads()
    assert found.state == "note"
    assert "OMP_NUM_THREADS=1" in found.hint


def test_little_shared_memory_is_noted(monkeypatch):
    class Small:
        f_frsize, f_blocks = 4096, 16384

    monkeypatch.setattr(doctor.os, "statvfs", lambda _: Small)
    (found,) = doctor._memory()
    assert found.state == "note"
    assert "--shm-size" in found.hint


def test_a_package_that_breaks_when_it_is_imported_is_a_finding_and_the_rest_is_looked_at(
    only, capsys
):
    def cuda():
        raise ImportError("libfoo.so: cannot open\nmore")

    only(cuda, lambda: iter([finding("works")]))
    assert run() == 1
    text = capsys.readouterr().out
    assert "BROKEN  cuda" in text
    assert "ImportError: libfoo.so: cannot open" in text
    assert "ok      thing" in text
