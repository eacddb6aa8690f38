"""Shared by all tests: fixtures, and the count of what did not run.

Works where hypothesis, transformers or torch are missing, as on a bare GPU machine.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import sampled
from faults import FAULTS, HAZARDS
from places import NO_SHARED, SHARED
from slowest import Clock

# Two workers with two threads each would wait for each other on two cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    settings = None

NO_DEVICE = "no device"

if settings is not None:
    common = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
    settings.register_profile("dev", max_examples=50, **common)
    settings.register_profile("ci", max_examples=300, derandomize=True, **common)
    asked = os.environ.get("DPO_EXT_EXAMPLES")
    if asked:
        settings.register_profile("deep", max_examples=int(asked), **common)
    settings.load_profile(
        "deep" if asked else "ci" if os.environ.get("CI", "").lower() == "true" else "dev"
    )


def cuda_device() -> bool:
    """Whether torch sees a CUDA device here."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of test material beside the repository; without it the test is skipped and counted."""
    if not SHARED.is_dir():
        pytest.skip(NO_SHARED)
    return SHARED


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A live transformers tokenizer, and ours made from it, for any template."""
    transformers = pytest.importorskip("transformers")
    from byte_tokenizer import tokenizer

    from dpo_ext import Tokenizer

    folder = tmp_path_factory.mktemp("live") / "model"
    tokenizer(folder, config={"bos_token": "<|bos|>"})
    theirs = transformers.AutoTokenizer.from_pretrained(folder)

    def make(template):
        theirs.chat_template = template
        return theirs, Tokenizer.from_pretrained(theirs)

    return make


@pytest.fixture(scope="session")
def reader_files(tmp_path_factory):
    """What a reader of README and docs is told to have: pairs.jsonl.gz, thumbs.jsonl and
    path/to/model.
    """
    import tiny

    folder = tmp_path_factory.mktemp("reader")
    tiny.write_jsonl(folder / "pairs.jsonl.gz", tiny.rows())
    sides = {"chosen": True, "rejected": False}
    thumbs = [
        {"prompt": row["prompt"], "completion": row[side], "label": label}
        for row in tiny.rows()
        for side, label in sides.items()
    ]
    tiny.write_jsonl(folder / "thumbs.jsonl", thumbs)
    tiny.tokenizer().save_pretrained(folder / "path/to/model")
    tiny.model().save_pretrained(folder / "path/to/model")
    return folder


@pytest.fixture
def reader_folder(reader_files, tmp_path, monkeypatch):
    """The working folder of a reader, with a copy of those files, off line."""
    shutil.copytree(reader_files, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def library():
    """The CUDA kernels compiled for the host."""
    from cuda_host.emulator import Emulator

    running.clear()  # what compiles here, once, is no process of the test that came first
    return Emulator()


@pytest.fixture
def emulator(library, monkeypatch):
    """The emulator in the place of the device: `dpo_ext.torch.logps.cuda` takes CPU tensors."""
    library.install(monkeypatch)
    library.processors = 1
    library.launched.clear()
    return library


def has_fake_cuda() -> bool:
    import torch

    return torch.__version__ >= "2.9" or torch.cuda.is_available()


def pytest_runtest_setup(item) -> None:
    running.append(item.nodeid)
    if item.get_closest_marker("gpu") is not None and not cuda_device():
        pytest.skip(NO_DEVICE)
    if item.get_closest_marker("fake_cuda") is not None and not has_fake_cuda():
        pytest.skip("torch 2.8 asks the driver for the device of a fake tensor")


def pytest_runtest_teardown() -> None:
    running.clear()


class Tally:
    """Counts the GPU tests that ran and those that did not, and what `../shared` was missing for."""

    def __init__(self) -> None:
        self.gpu: dict[str, str | None] = {}  # test -> None once it ran, else why not
        self.no_shared: set[str] = set()

    def pytest_runtest_logreport(self, report) -> None:
        reason = ""
        if report.skipped and isinstance(report.longrepr, tuple):
            reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason == NO_SHARED:
            self.no_shared.add(report.nodeid)
        if "gpu" not in report.keywords:
            return
        if report.skipped:
            self.gpu[report.nodeid] = reason or "skipped"
        elif report.when == "call" or report.failed:
            self.gpu[report.nodeid] = None

    def line(self) -> str:
        reasons = sorted({reason for reason in self.gpu.values() if reason is not None})
        ran = sum(reason is None for reason in self.gpu.values())
        why = f" ({'; '.join(reasons)})" if reasons else "" if self.gpu else " (none selected)"
        return f"gpu tests: {ran} of {len(self.gpu)} run{why}"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session):
        result = yield  # pytest's own summary, with its closing line, is written in here
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is not None and not session.config.option.collectonly:
            terminal.write_line(sampled.header())
            order = getattr(session.config.option, "randomly_seed", None)
            if order is not None:
                terminal.write_line(f"order: make flaky SEED={order}")
            if self.no_shared:
                terminal.write_line(f"tests without {NO_SHARED[3:]}: {len(self.no_shared)} skipped")
            terminal.write_line(self.line())
        return result


def pytest_itemcollected(item) -> None:
    """`-m K4` and `-m H15` select what is marked `fault("K4", "H15")`; another name is an error."""
    for mark in item.iter_markers("fault"):
        for name in mark.args:
            item.add_marker(name)


def pytest_addoption(parser) -> None:
    parser.addoption("--slowest", type=int, metavar="N", help="list the N tests of most CPU time")
    parser.addoption(
        "--fast",
        action="store_true",
        help="leave out what is marked slow; no test starts a process",
    )


WHOLE_FILE_SLOW = re.compile(r"^pytestmark = (\[[^\]]*)?pytest\.mark\.slow", re.MULTILINE)


def pytest_ignore_collect(collection_path, config) -> bool | None:
    """With --fast a file that is slow as a whole is not even imported."""
    if not config.option.fast or not collection_path.name.startswith("test_"):
        return None
    return bool(WHOLE_FILE_SLOW.search(collection_path.read_text(encoding="utf-8"))) or None


def pytest_collection_finish() -> None:
    """What is imported by now stays: no collection of garbage walks over it again."""
    gc.collect()
    gc.freeze()


def refuse_processes(event: str, arguments: tuple) -> None:
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn") and running:
        raise RuntimeError(f"{running[-1]} starts a process ({event}): mark it slow")


running: list[str] = []


def pytest_configure(config) -> None:
    if config.option.fast:
        config.option.markexpr = "not slow and not gpu"
        sys.addaudithook(refuse_processes)
    if config.option.slowest is not None:
        config.pluginmanager.register(Clock(config.option.slowest), "dpo_ext_clock")
    for name in FAULTS + HAZARDS:
        config.addinivalue_line("markers", f"{name}: a fault or hazard, see `fault`")
    config.pluginmanager.register(Tally(), "dpo_ext_tally")
