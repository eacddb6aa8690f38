"""`make gpu-check` without a GPU: its order, its time, that it goes on where it stopped, and what a failure says."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from head_bench import importable, main_of_head, tiny

benches = pytest.fixture(scope="module", autouse=True)(importable)


class Device:
    """Stands in for the machine: a clock, and what each command takes and ends with."""

    def __init__(self, seconds=20.0, **ends):
        self.now, self.seconds, self.ends = 1000.0, seconds, ends
        self.ran = []

    def clock(self):
        return self.now

    def run(self, title, command, env, limit):
        name = title.split(", ")[-1]
        self.ran.append((title, command, env, limit))
        status = self.ends.get(name, 0)
        self.now += limit if status is None else min(self.seconds, limit)
        return status

    @property
    def titles(self):
        return [title for title, *_ in self.ran]


@pytest.fixture
def check_with(tmp_path, monkeypatch):
    """A whole check on a pretended machine; gives the check."""
    import gpu_check

    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda env: "compute-sanitizer")
    monkeypatch.setattr(gpu_check, "gpu_tests", lambda run, env, limit: ("passed: 3 tests", []))

    def check(device, seconds=570.0, fingerprint="one", **options):
        found = gpu_check.Check(tmp_path / "out", seconds, fingerprint, device.run, device.clock)
        options = {"sanitizers": False, "record": False} | options
        for stage in gpu_check.stages(found, {"PATH": ""}, **options):
            found.stage(stage)
        return found

    return check


ORDER = ["smoke", "kernels", "plans", "streams", "fused", "given", "peers", "memcheck", "tests"]


def test_the_first_things_come_first(check_with):
    device = Device()
    check = check_with(device)
    assert [name for name, _ in check.results] == ORDER
    assert device.titles == [
        *(f"shapes, {group}" for group in ORDER[:4]),
        *(f"benches/head, {part}" for part in ORDER[4:7]),
        "compute-sanitizer memcheck, kernels",
    ]
    assert check.status() == 0
    assert [text.split(",")[0] for _, text in check.results[:8]] == ["passed"] * 8
    fused = device.ran[4][1]
    assert fused[fused.index("--scored") + 1 :][:4] == ["512", "1024", "4096", "16384"]
    assert "--without-peers" in fused
    assert "--without-peers" not in device.ran[6][1]
    memcheck = device.ran[7]
    assert memcheck[1][1:4] == ["--tool", "memcheck", "--error-exitcode"]
    assert memcheck[2]["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_the_benches_take_what_they_are_told(check_with, tmp_path):
    device = Device()
    check_with(device, record=True)
    head = main_of_head()
    fused, given, peers = (head.parse(command[2:]) for _, command, *_ in device.ran[4:7])
    assert all(
        one.record and one.log == tmp_path / "out" / "rows.jsonl" for one in (fused, given, peers)
    )
    assert [one.only for one in (fused, given, peers)] == [
        ["fused"],
        ["given"],
        ["fused", "given", "small"],
    ]
    assert head.chosen(fused).scored == (512, 1024, 4096, 16_384)
    assert head.chosen(given).shares == (1.0,)
    assert head.chosen(peers).given_rows == (16_384,)
    assert (fused.without_peers, given.without_peers, peers.without_peers) == (True, True, False)


def test_whatever_hangs_it_ends_in_ten_minutes_and_each_stage_has_its_turn(check_with):
    hangs = dict.fromkeys([*ORDER, "memcheck"])
    device = Device(**hangs)
    began = device.now
    check = check_with(device)
    assert device.now - began <= 600
    assert len(device.ran) == 8
    assert check.status() == 1
    assert all("FAILED: cut off" in text for _, text in check.results[:8])
    assert check.results[-1] == ("tests", "left out: the time is spent")


def test_the_minutes_of_a_bench_end_before_its_limit(check_with):
    device = Device()
    check_with(device)
    for _, command, _, limit in device.ran[4:7]:
        minutes = float(command[command.index("--minutes") + 1])
        assert 0 < 60 * minutes <= limit - 20


def test_it_goes_on_where_it_stopped(check_with):
    first = Device(seconds=60.0, given=3, peers=1)
    check = check_with(first, seconds=330.0)
    texts = dict(check.results)
    assert texts["given"].startswith("left out in part: the time is spent")
    assert texts["tests"] == "left out: the time is spent"
    again = Device()
    check = check_with(again)
    assert [title for title in again.titles if "shapes" in title] == []
    assert dict(check.results)["smoke"].endswith(", before")
    assert again.titles[0] == "benches/head, given"
    assert check.status() == 0
    third = Device()
    assert check_with(third).status() == 0
    assert third.ran == []


def test_time_alone_missing_is_status_3(check_with):
    check = check_with(Device(seconds=60.0), seconds=200.0)
    assert check.status() == 3
    assert check_with(Device(streams=1), seconds=300.0, fingerprint="two").status() == 1


def test_other_code_or_another_device_begins_anew(check_with, monkeypatch, tmp_path):
    import gpu_check

    check_with(Device())
    rows = tmp_path / "out" / "rows.jsonl"
    rows.write_text('{"done": "a case"}\n')
    device = Device()
    check_with(device, fingerprint="two")
    assert len(device.ran) == 8
    assert not rows.exists()
    assert (tmp_path / "out" / "rows-one.jsonl").exists()
    one = gpu_check.fingerprint("H200", "2.13")
    assert one == gpu_check.fingerprint("H200", "2.13") != gpu_check.fingerprint("B200", "2.13")
    monkeypatch.setattr(gpu_check, "CODE", gpu_check.CODE[1:])
    assert gpu_check.fingerprint("H200", "2.13") != one


def test_the_rest_of_the_sanitizers_come_when_they_are_asked_for(check_with, monkeypatch):
    import gpu_check

    device = Device()
    check_with(device, seconds=3000.0, sanitizers=True)
    tools = [title for title in device.titles if "sanitizer" in title]
    assert len(tools) == 1 + len(gpu_check.SANITIZED)
    assert {title.split()[1].strip(",") for title in tools} == {
        "memcheck",
        "racecheck",
        "initcheck",
        "synccheck",
    }
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda env: None)
    check = check_with(Device(), fingerprint="two")
    assert dict(check.results)["memcheck"].startswith("did not run: compute-sanitizer is not found")
    assert check.status() == 3


@pytest.mark.slow
def test_a_program_that_hangs_is_ended_with_its_children(tmp_path):
    import gpu_check

    pid = tmp_path / "pid"
    child = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    command = [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]  # fmt: skip
    assert gpu_check.run_process("hangs", command, dict(os.environ), 5.0) is None
    process = Path(f"/proc/{pid.read_text()}/stat")
    ends = time.monotonic() + 20
    while process.exists() and process.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < ends, "a child of the program is alive"
    assert gpu_check.run_process("ends", [sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ), 60.0) == 3  # fmt: skip
    assert gpu_check.verdict(3) == "left out in part: the time is spent"


@pytest.mark.slow
def test_wheels_of_peers_are_unpacked_where_nothing_is_installed(tmp_path, monkeypatch):
    import gpu_check

    peers = tmp_path / "peers"
    peers.mkdir()
    for name in ("no_such_peer-1.0-py3-none-any.whl", "torch-9.9-py3-none-any.whl"):
        with zipfile.ZipFile(peers / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "X = 1\n")
            wheel.writestr("nvidia/cu13/bin/compute-sanitizer", "#!/bin/sh\n")
    monkeypatch.setenv("PYTHONPATH", "before")
    env = gpu_check.environment(tmp_path)
    first, *rest = env["PYTHONPATH"].split(os.pathsep)
    assert rest[-1] == "before"
    assert (Path(first) / "no_such_peer").is_dir()
    assert not (Path(first) / "torch").exists()
    monkeypatch.setattr(gpu_check.shutil, "which", lambda _: None)
    found = gpu_check.find_sanitizer(env)
    assert found
    assert os.access(found, os.X_OK)


def test_the_fetch_asks_for_wheels_of_the_other_machine(monkeypatch, capsys, tmp_path):
    import gpu_peers

    asked = []

    def pip(command, check):
        asked.append(command)
        return subprocess.CompletedProcess(command, int(command[-1].startswith("trl")))

    monkeypatch.setattr(gpu_peers.subprocess, "run", pip)
    monkeypatch.setattr(sys, "argv", ["gpu_peers.py", "--python", "3.13", "--to", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        gpu_peers.main()
    assert ended.value.code == 1
    assert "not fetched: trl==1.16.0" in capsys.readouterr().out
    assert len(asked) == len(gpu_peers.LIGHT)
    assert all({"--no-deps", "3.13", "manylinux_2_28_x86_64"} <= set(one) for one in asked)


@pytest.mark.slow
def test_real_processes_on_the_cpu_pass_and_are_not_run_again(tmp_path):
    import gpu_check

    began = []

    def on_cpu(title, command, env, limit):
        began.append(title)
        here = [word.replace("--quick", "--smoke") for word in command]
        return gpu_check.run_process(title, [*here, "--device", "cpu"], env, limit)

    env = gpu_check.environment(tmp_path)
    for _ in range(2):
        check = gpu_check.Check(tmp_path / "out", 570.0, "one", on_cpu)
        for stage in gpu_check.stages(check, env, sanitizers=False, record=False):
            if stage.name in ("plans", "given"):
                check.stage(stage)
        assert [text.split(",")[0] for _, text in check.results] == ["passed", "passed"]
    assert began == ["shapes, plans", "benches/head, given"]
    assert lines_of(check.rows, "done") == ["given logits, 64 rows, tiny, float32, ours alone"]
    assert len(lines_of(check.rows, "row")) == 4


# ---- rows as they come --------------------------------------------------


def small_run(monkeypatch, log, *options):
    head = main_of_head()
    size = head.SMOKE._replace(models=(head.TINY,), scored=(64, 128), shares=(1.0,))
    monkeypatch.setattr(head, "SMOKE", size)
    command = ["benches/head", "--device", "cpu", "--smoke", "--without-peers", "--log", str(log)]
    command += ["--json", str(log.with_suffix(".json")), *options]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        head.main()
    return ended.value.code


def lines_of(log, kind):
    return [
        line[kind]
        for line in map(json.loads, log.read_text(encoding="utf-8").splitlines())
        if kind in line
    ]


@pytest.mark.slow
def test_a_run_that_was_cut_goes_on_with_the_next_case(monkeypatch, tmp_path, capsys):
    log = tmp_path / "rows.jsonl"
    only = ("--only", "fused")
    assert small_run(monkeypatch, log, *only, "--scored", "1024", "--minutes", "0") == 3
    assert lines_of(log, "done") == lines_of(log, "row") == []
    assert small_run(monkeypatch, log, *only) == 0
    done = ["fused head, M 64, tiny, float32, ours alone", "fused head, M 128, tiny, float32, ours alone"]  # fmt: skip
    assert lines_of(log, "done") == done
    assert len(lines_of(log, "row")) == 6
    # the second case had begun when the machine went away: its rows are there, and half a line
    kept = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line]
    log.write_text("".join(line for line in kept if f'"done": "{done[1]}"' not in line) + '{"ro')
    assert small_run(monkeypatch, log, *only) == 0
    said = capsys.readouterr().out
    assert f"measured before: {done[0]}" in said
    assert f"measured before: {done[1]}" not in said
    assert lines_of(log, "done") == done
    assert len(lines_of(log, "row")) == 9
    # and all of it is rows of RESULTS.md
    head = main_of_head()
    text = head.report.block_of(log)
    assert text.count("GPU run at") == 3
    assert text.count("x its bound") == 9


@pytest.mark.slow
def test_what_was_wrong_is_measured_again(monkeypatch, tmp_path):
    import cases

    log = tmp_path / "rows.jsonl"
    honest = cases.linear_sequence_logps
    monkeypatch.setattr(cases, "linear_sequence_logps", lambda *a, **k: honest(*a, **k) + 1)
    assert small_run(monkeypatch, log, "--only", "fused") == 1
    assert len(lines_of(log, "wrong")) == 4
    assert lines_of(log, "done") == []
    assert "element [0, 0]: found" in "".join(lines_of(log, "left_out")[0])
    monkeypatch.setattr(cases, "linear_sequence_logps", honest)
    assert small_run(monkeypatch, log, "--only", "fused") == 0
    assert len(lines_of(log, "done")) == 2


# ---- what a failure says ------------------------------------------------


def test_the_first_wrong_element_is_named():
    from elements import first_wrong

    want = torch.arange(6.0).view(2, 3)
    got = want.clone()
    got[1, 0], got[1, 2] = 3.2, 9.0
    assert first_wrong(got, want, 0.1).startswith("element [1, 0]: found 3.2")
    assert first_wrong(got, want, 0.5) == "element [1, 2]: found 9.0, expected 5.0"
    assert first_wrong(got, want, 100.0) == "element [1, 2]: found 9.0, expected 5.0"
    got[0, 1], want[0, 0], got[0, 0] = math.nan, math.inf, math.inf
    assert first_wrong(got, want, 0.1) == "element [0, 1]: found nan, expected 1.0"


def test_a_wrong_gradient_names_its_element():
    from cases import WrongError

    case = tiny()
    honest = case.ours()[1]

    def run(x, w):
        y = honest.run(x, w)
        return y + 3.0 * (x[case.rows[0], 5] - x[case.rows[0], 5].detach())

    with pytest.raises(WrongError, match=r"dX, of rows .* are off by .*: element \[0, 5\]: found"):
        case.verify(honest._replace(run=run, plan=None))


class Off:
    """The operators, some of which are off by a hundredth in the first element of row 2, or in the first log-prob."""

    def __init__(self, *names):
        self.own, self.names = torch.ops.dpo_ext, names

    def __getattr__(self, name):
        def call(logits, *rest):
            out = getattr(self.own, name)(logits, *rest)
            if name == "token_stats" and len(out[0]):
                out[0][0] += 0.01
            elif name != "token_stats" and len(logits) > 2:
                (logits if out is None else out)[2, 0] += 0.01
            return out

        return call if name in self.names else getattr(self.own, name)


@pytest.mark.parametrize(
    ("operators", "said"),
    [
        (["logits_grad_"], r"in place: element \[2, 0\]: found .*, expected "),
        (["logits_grad_", "logits_grad"], r"gradient of row 2, off by .*: element \[0\]: found "),
        (["token_stats"], r"log-prob of token 0: found .*, expected 0.0"),
    ],
    ids=lambda found: " and ".join(found) if isinstance(found, list) else "",
)
def test_a_kernel_that_is_off_is_named_with_its_element(monkeypatch, operators, said):
    import gpu_shapes

    monkeypatch.setattr(gpu_shapes, "OPS", Off(*operators))
    with pytest.raises(AssertionError, match=said):
        gpu_shapes.Shapes("cpu").kernels()


def test_a_plan_that_is_off_is_named_with_its_element(monkeypatch):
    import gpu_shapes

    honest = gpu_shapes.linear_sequence_logps

    def wrong(x, *arguments, impl, **options):
        y = honest(x, *arguments, impl=impl, **options)
        return y if impl == "torch" else y + (x - x.detach())[5, 7]

    monkeypatch.setattr(gpu_shapes, "linear_sequence_logps", wrong)
    with pytest.raises(AssertionError, match=r"dX of frozen, .*: element \[5, 7\]: found "):
        gpu_shapes.Shapes("cpu").plans()


@pytest.mark.slow
def test_the_smoke_of_the_launches_runs_every_kernel_and_type(emulator):
    import gpu_shapes

    from dpo_ext.torch.logps import cuda as kernels

    emulator.processors = 2
    gpu_shapes.Shapes("cpu").smoke()
    launched = {name for name, _ in emulator.launched}
    assert {name.split("<")[0] for name in launched} == set(kernels.FILES)
    for kernel in set(kernels.FILES) - {"segment_sum"}:
        forms = {name for name in launched if name.startswith(kernel + "<")}
        for dtype in kernels.TYPES.values():
            assert len([form for form in forms if f"<{dtype}" in form]) == len(forms) / 3
    assert any(grid[1] > 1 for name, grid in emulator.launched if name.startswith("token_stats<"))
    assert any(grid[1] == 1 for name, grid in emulator.launched if name.startswith("token_stats<"))
