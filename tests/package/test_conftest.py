"""The rules that the other tests lean on: what did not run is counted, a worse result is refused."""

import ast
import shutil
import subprocess
import sys

import numpy as np
import pytest
from compare import assert_no_worse
from places import SUPPORT, TESTS

SUITE = """
import pytest
@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 2])
def test_on_the_gpu(n): pass
def test_shared(shared_dir): pass
def test_cpu(): pass
"""


TORCH = """
class cuda:
    is_available = staticmethod(lambda: False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [[], ["-q"], ["-p", "xdist", "-n", "2"]], ids=["plain", "quiet", "xdist"]
)
def test_what_did_not_run_is_counted_in_the_last_lines(tmp_path, extra):
    if "xdist" in extra:
        pytest.importorskip("xdist")
    tests = tmp_path / "repo" / "tests"
    tests.mkdir(parents=True)
    shutil.copy(TESTS / "conftest.py", tests)
    shutil.copytree(SUPPORT, tests / "support")
    # Which device there is does not matter here, and torch takes seconds to load.
    (tests.parent / "torch.py").write_text(TORCH, encoding="utf-8")
    (tests / "test_suite.py").write_text(SUITE, encoding="utf-8")
    (tests.parent / "pytest.ini").write_text(
        "[pytest]\nmarkers = gpu\npythonpath = tests/support\n", encoding="utf-8"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *extra, "tests"],
        cwd=tests.parent,
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "tests without ../shared beside the repository: 1 skipped",
        "gpu tests: 0 of 2 run (no device)",
    ]


def test_no_test_file_imports_another():
    """Nor conftest.py: what two files need lies in tests/support."""
    files = sorted(TESTS.rglob("test_*.py"))
    others = {"conftest", *(path.stem for path in files)}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in others, f"{path.name}, line {node.lineno}"
            elif isinstance(node, ast.Import):
                named = {alias.name for alias in node.names}
                assert not others & named, f"{path.name}, line {node.lineno}"


def test_no_worse_accepts_the_error_of_the_baseline_and_the_slack():
    truth = np.array([1.0, 2.0, np.nan, -np.inf])
    assert_no_worse(truth + np.array([0.3, 0, 0, 0]), truth + np.array([0, 0.2, 0, 0]), truth, 0.11)


@pytest.mark.parametrize(
    ("got", "baseline"),
    [
        ([1.4, 2.0, np.nan, -np.inf], [1.0, 2.2, 0, 0]),
        ([np.nan, 2.0, np.nan, -np.inf], [1.0, 2.2, 0, 0]),
        ([1.4, 2.0, np.nan, -np.inf], [np.inf, 2.0, 0, 0]),
        ([1.0, 2.0, 3.0, -np.inf], [1.0, 2.0, 3.0, 0]),
        ([1.0, 2.0, np.nan, np.inf], [1.0, 2.0, 3.0, 0]),
        ([1.0, 2.0, np.nan], [1.0, 2.0, np.nan]),
    ],
    ids=["error", "nan", "broken baseline", "nan lost", "sign of inf", "shape"],
)
def test_no_worse_refuses(got, baseline):
    truth = np.array([1.0, 2.0, np.nan, -np.inf])
    with pytest.raises(AssertionError):
        assert_no_worse(np.array(got), np.array(baseline), truth, 0.1)
