"""Everything that needs a GPU, on a machine with Python, torch, CuPy, NumPy, pytest and our wheel.

1. tests/: every test that is marked `gpu`, in test_gpu*.py and wherever a test runs on each
   implementation. What could not run is counted with its reason; in test_gpu*.py it is a failure.
2. benches/gpu_shapes.py: small shapes of every kernel and plan, and two streams; then under
   compute-sanitizer, where it is found: memcheck, racecheck, initcheck, synccheck.
3. benches/head: the rows of the GPU for RESULTS.md (`--record` appends them).

    python benches/gpu_check.py [--record] [--quick] [--json times.json]

The package is the one that Python finds, else dist/*.whl, unpacked to a folder of its own: nothing
is compiled here but the kernels, by NVRTC. Exit status 0 only if everything ran and passed.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
ALL_RUN = "test_gpu"  # in files of this beginning a test that is skipped is a failure
MARKS = ("mark.gpu", "IMPLS", "KERNELS")  # how a test file says that some of its tests need a GPU
# Products are cuBLAS's, whose reads of padding initcheck reports: it runs on our kernels alone.
SANITIZED = {
    "memcheck": ("kernels", "plans", "streams"),
    "racecheck": ("kernels",),
    "initcheck": ("kernels",),
    "synccheck": ("kernels",),
}


def environment() -> dict[str, str]:
    """Variables under which `import dpo_ext` works; unpacks the wheel where nothing else does."""
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    probe = [sys.executable, "-c", "import dpo_ext"]
    if subprocess.run(probe, env=env, capture_output=True, check=False).returncode == 0:
        return env
    wheels = sorted((ROOT / "dist").glob("*.whl"))
    if not wheels:
        sys.exit("cannot import dpo_ext, and there is no dist/*.whl\nhint: run `make wheel` first")
    folder = tempfile.mkdtemp(prefix="dpo_ext-")
    with zipfile.ZipFile(wheels[-1]) as wheel:
        wheel.extractall(folder)
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, env.get("PYTHONPATH")]))
    subprocess.run(probe, env=env, check=True)
    return env


def run(title: str, command: list[str], env: dict[str, str]) -> tuple[str, str]:
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    done = subprocess.run(command, env=env, cwd=ROOT, check=False)
    return title, "passed" if done.returncode == 0 else f"FAILED with status {done.returncode}"


def find_sanitizer() -> str | None:
    """compute-sanitizer on the path, in a toolkit, or in one of NVIDIA's wheels."""
    places = [Path("/usr/local").glob("cuda*/bin/compute-sanitizer")]
    places += [Path(path).glob("nvidia/*/bin/compute-sanitizer") for path in sys.path if path]
    found = shutil.which("compute-sanitizer")
    return found or next((str(match) for place in places for match in sorted(place)), None)


# ---- tests ------------------------------------------------------------


def gpu_files() -> list[Path]:
    """Test files of which some tests need a GPU, by their text."""
    return [
        path
        for path in sorted(TESTS.rglob("test_*.py"), key=lambda path: path.name)
        if any(mark in path.read_text(encoding="utf-8") for mark in MARKS)
        and path.stem not in ("test_conftest", "test_bench_head")  # they only write of the mark
    ]


def missing_modules(path: Path, seen: frozenset[Path] = frozenset()) -> set[str]:
    """Modules that a test file imports at its head, itself or by a file of tests/support, and that
    are not installed."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        else:
            continue
        for name in (name.split(".")[0] for name in names):
            other = TESTS / "support" / f"{name}.py"
            if other.exists() and other not in seen:
                found |= missing_modules(other, seen | {path})
            elif not (other.exists() or (TESTS / name).is_dir() or name == "dpo_ext"):
                found |= set() if importlib.util.find_spec(name) else {name}
    return found


class Outcome(NamedTuple):
    """What became of the GPU tests of one file."""

    passed: int
    failed: int
    not_run: Counter[str]
    """Reason to number of tests."""

    def text(self, name: str) -> str:
        because = ", ".join(f"{n} x {reason}" for reason, n in sorted(self.not_run.items()))
        counted = f"{self.passed} passed, {self.failed} failed, {self.not_run.total()} did not run"
        counted += f" ({because})" if because else ""
        strict = name.startswith(ALL_RUN) and (self.not_run or not self.passed)
        return f"FAILED: {counted}" if self.failed or strict else counted


def outcomes(junit: Path) -> dict[str, Outcome]:
    """By file, from pytest's XML."""
    found: dict[str, Outcome] = {}
    for case in ElementTree.parse(junit).getroot().iter("testcase"):
        dotted = f"{case.get('classname')}.{case.get('name')}".split(".")
        name = next((part for part in dotted if part.startswith("test_")), "elsewhere")
        passed, failed, not_run = found.get(name, Outcome(0, 0, Counter()))
        skip = case.find("skipped")
        if skip is not None:
            reason = (skip.get("message") or "skipped").splitlines()[0]
            found[name] = Outcome(passed, failed, not_run + Counter([reason]))
        elif case.find("failure") is not None or case.find("error") is not None:
            found[name] = Outcome(passed, failed + 1, not_run)
        else:
            found[name] = Outcome(passed + 1, failed, not_run)
    return found


def gpu_tests(env: dict[str, str]) -> list[tuple[str, str]]:
    results, files = [], []
    for path in gpu_files():
        missing = missing_modules(path)
        if missing:
            text = f"did not run: {', '.join(sorted(missing))} not installed"
            strict = "FAILED: " if path.stem.startswith(ALL_RUN) else ""
            results.append((path.name, strict + text))
        else:
            files.append(str(path.relative_to(ROOT)))
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += [f"--junitxml={junit}", *files]
        title, whole = run("tests on the device", command, env)
        if not junit.exists():
            return [*results, (title, f"{whole}; FAILED: pytest left no report")]
        found = outcomes(junit)
    named = [(f"{name}.py", outcome.text(name)) for name, outcome in found.items()]
    total = sum(outcome.passed for outcome in found.values())
    not_run = sum(outcome.not_run.total() for outcome in found.values())
    summary = f"{whole}: {total} passed, {not_run} did not run, {len(results)} files left out"
    return [*results, *named, (title, summary)]


# ---- all of it --------------------------------------------------------


def shapes(env: dict[str, str]) -> list[tuple[str, str]]:
    def program(group: str) -> list[str]:
        return [sys.executable, "benches/gpu_shapes.py", group]

    results = [run(f"shapes, {g}", program(g), env) for g in ("kernels", "plans", "streams")]
    sanitizer = find_sanitizer()
    if sanitizer is None:
        return [*results, ("compute-sanitizer", "not found, did not run")]
    # Without torch's cache every buffer is an allocation of its own, with its own bounds.
    guarded = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, groups in SANITIZED.items():
        for group in groups:
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *program(group)]
            results.append(run(f"compute-sanitizer {tool}, {group}", command, guarded))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="one model, 8 minutes at most")
    parser.add_argument("--json", help="raw times of benches/head go here")
    parser.add_argument(
        "--only", nargs="+", choices=["tests", "shapes", "bench"], help="some of the three parts"
    )
    arguments = parser.parse_args()
    env = environment()
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was checked")
    python = sys.version.split()[0]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {python}")
    bench = [sys.executable, "benches/head"]
    bench += ["--record"] * arguments.record + ["--quick"] * arguments.quick
    bench += ["--json", arguments.json] if arguments.json else []
    parts = {
        "tests": lambda: gpu_tests(env),
        "shapes": lambda: shapes(env),
        "bench": lambda: [run("benches/head", bench, env)],
    }
    results = [r for part in arguments.only or parts for r in parts[part]()]
    print("\n".join(["", *(f"{title}: {result}" for title, result in results)]))
    sys.exit(any("FAILED" in result for _, result in results))


if __name__ == "__main__":
    main()
