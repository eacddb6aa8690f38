"""Shared by all tests: what did not run is counted, what is compared is compared by one rule.

Works where hypothesis, transformers or torch are missing, as on a bare GPU machine.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

try:
    from hypothesis import HealthCheck, settings
except ImportError:
    settings = None

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
NO_DEVICE = "no device"
NO_SHARED = "no ../shared beside the repository"
# Faults of the kernels and their launch layer, and hazards of precision: the design's kernels.md 8 and 5.
FAULTS = [f"K{n}" for n in range(1, 19)]
HAZARDS = [f"H{n}" for n in range(1, 18)]

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
def library():
    """The CUDA kernels compiled for the host."""
    from cuda_host.emulator import Emulator

    return Emulator()


@pytest.fixture
def emulator(library, monkeypatch):
    """The emulator in the place of the device: `dpo_ext.torch.logps.cuda` takes CPU tensors."""
    library.install(monkeypatch)
    library.processors = 1
    library.launched.clear()
    return library


def as_float64(values) -> np.ndarray:
    """float64 NumPy array of a tensor or of anything NumPy takes."""
    if hasattr(values, "detach"):
        return values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def assert_no_worse(got, baseline_same_dtype, oracle, slack: float) -> None:
    """The largest error of `got` against `oracle` may exceed the same-dtype baseline's by `slack`.

    Where the oracle is not finite, `got` must be the same NaN or infinity. Where only the baseline
    is not finite, its error counts as nothing, so that a broken baseline excuses no error of ours.
    """
    got, base, truth = (as_float64(x) for x in (got, baseline_same_dtype, oracle))
    assert got.shape == truth.shape, f"shape {got.shape}, expected {truth.shape}"
    assert base.shape == truth.shape, f"baseline has shape {base.shape}, expected {truth.shape}"
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(got[~finite], truth[~finite])
    if not finite.any():
        return
    with np.errstate(invalid="ignore"):
        ours = np.where(finite, np.abs(got - truth), 0.0)
        theirs = np.where(finite & np.isfinite(base), np.abs(base - truth), 0.0)
    assert not np.isnan(ours).any(), f"{int(np.isnan(ours).sum())} values are NaN and should not be"
    worst = np.unravel_index(int(ours.argmax()), ours.shape)
    assert ours[worst] <= theirs.max() + slack, (
        f"error {ours[worst]:.3e} at {tuple(int(i) for i in worst)}: got {got[worst]!r}, expected "
        f"{truth[worst]!r}; the baseline's largest error is {theirs.max():.3e}, slack {slack:.1e}"
    )


def pytest_runtest_setup(item) -> None:
    if item.get_closest_marker("gpu") is not None and not cuda_device():
        pytest.skip(NO_DEVICE)


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
            if self.no_shared:
                terminal.write_line(f"tests without {NO_SHARED[3:]}: {len(self.no_shared)} skipped")
            terminal.write_line(self.line())
        return result


def pytest_itemcollected(item) -> None:
    """`-m K4` and `-m H15` select what is marked `fault("K4", "H15")`; another name is an error."""
    for mark in item.iter_markers("fault"):
        for name in mark.args:
            item.add_marker(name)


def pytest_configure(config) -> None:
    for name in FAULTS + HAZARDS:
        config.addinivalue_line("markers", f"{name}: a fault or hazard, see `fault`")
    config.pluginmanager.register(Tally(), "dpo_ext_tally")
