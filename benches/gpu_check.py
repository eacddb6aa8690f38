"""All that needs a GPU, in under ten minutes, the first things first; run again, it goes on.

| stage | what | needs beside Python, torch, CuPy, NumPy and our wheel |
| --- | --- | --- |
| smoke | every kernel in every form is launched, by dtype | |
| kernels, plans, streams | benches/gpu_shapes.py: against float64; two streams at a time | |
| fused | the head inside at M 512, 1k, 4k, 16k beside its bound and its prediction | |
| given | log-probs and gradients of given logits beside a copy | |
| peers | both beside those peers that can be had, and small batches | wheels of `make gpu-peers` |
| memcheck | the kernels once under compute-sanitizer | compute-sanitizer, or that wheel |
| racecheck, initcheck, synccheck, memcheck of plans and streams | with `--sanitizers` | the same |
| tests | every test that is marked `gpu`; what could not run is counted | pytest |

    python benches/gpu_check.py [--minutes 9.5] [--sanitizers] [--only fused given] [--out FOLDER]

The folder (dist/gpu_check) gets `state.json`, what has passed, and `rows.jsonl`, each row of a
bench as soon as it is measured: a second call skips what is there, as long as code, device and
torch are the same. A stage has a limit of its own, so that none takes the time of the next. A
comparison that fails names the first wrong element. The rows come into RESULTS.md on any machine:
`python benches/head --record-log dist/gpu_check/rows.jsonl`.

The package is the one that Python finds, else dist/*.whl; peers and compute-sanitizer are those
that Python finds, else dist/peers/*.whl: unpacked to a folder of its own, nothing is installed, and
nothing is compiled here but the kernels, by NVRTC. Exit status 0 only if everything has run and
passed, 3 if nothing failed but a stage did not run, or not to its end.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
ALL_RUN = "test_gpu"  # in files of this beginning a test that is skipped is a failure
MARKS = ("mark.gpu", "IMPLS", "KERNELS")  # how a test file says that some of its tests need a GPU
CUT = 3  # exit status of benches/head where time was missing, and of this where a stage did not run
LEAST = 10.0  # seconds without which no stage begins
PASSED, SPENT = "passed", "left out: the time is spent"
# Products are cuBLAS's, whose reads of padding initcheck reports: it runs on our kernels alone.
SANITIZED = (
    ("memcheck", "plans"),
    ("memcheck", "streams"),
    ("racecheck", "kernels"),
    ("initcheck", "kernels"),
    ("synccheck", "kernels"),
)


def unpacked(wheels: list[Path]) -> str | None:
    """A new folder with what the wheels hold; programs in it can be started."""
    if not wheels:
        return None
    folder = tempfile.mkdtemp(prefix="dpo_ext-")
    for path in wheels:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
    for program in Path(folder).glob("nvidia/*/*/*"):
        program.chmod(0o755)
    return folder


def is_installed(wheel: Path) -> bool:
    try:
        importlib.metadata.version(wheel.name.split("-")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def with_path(env: dict[str, str], folder: str | None) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [folder, env.get("PYTHONPATH")]))
    return env | ({"PYTHONPATH": path} if path else {})


def environment(dist: Path = ROOT / "dist") -> dict[str, str]:
    """Variables under which `import dpo_ext` works, and peers are found; what is not installed is
    unpacked from its wheel."""
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    peers = [path for path in sorted((dist / "peers").glob("*.whl")) if not is_installed(path)]
    env = with_path(env, unpacked(peers))
    probe = [sys.executable, "-c", "import dpo_ext"]
    if subprocess.run(probe, env=env, capture_output=True, check=False).returncode == 0:
        return env
    wheels = sorted(dist.glob("*.whl"))
    if not wheels:
        sys.exit("cannot import dpo_ext, and there is no dist/*.whl\nhint: run `make wheel` first")
    env = with_path(env, unpacked(wheels[-1:]))
    subprocess.run(probe, env=env, check=True)
    return env


Run = Callable[[str, list[str], dict[str, str], float], "int | None"]
"""Title, command, variables and seconds to the exit status; None where the seconds ran out."""


def run_process(title: str, command: list[str], env: dict[str, str], limit: float) -> int | None:
    print(f"\n== {title}, {limit:.0f} s at most: {' '.join(command)}", flush=True)
    child = subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True)
    try:
        return child.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)  # compute-sanitizer has children of its own
        child.wait()
        return None


def verdict(status: int | None) -> str:
    if status is None:
        return "FAILED: cut off, its time was not enough"
    if status == CUT:
        return "left out in part: the time is spent"
    return PASSED if status == 0 else f"FAILED with status {status}"


def find_sanitizer(env: dict[str, str]) -> str | None:
    """compute-sanitizer on the path, in a toolkit, or in one of NVIDIA's wheels."""
    folders = [*env.get("PYTHONPATH", "").split(os.pathsep), *sys.path]
    places = [Path("/usr/local").glob("cuda*/bin/compute-sanitizer")]
    places += [Path(path).glob("nvidia/*/bin/compute-sanitizer") for path in folders if path]
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


def gpu_tests(run: Run, env: dict[str, str], limit: float) -> tuple[str, list[tuple[str, str]]]:
    """What became of all of them, and of each file."""
    if not importlib.util.find_spec("pytest"):
        return "did not run: pytest is not installed", []
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
        whole = verdict(run("tests on the device", command, env, limit))
        if not junit.exists():
            return f"{whole}; pytest left no report", results
        found = outcomes(junit)
    results += [(f"{name}.py", outcome.text(name)) for name, outcome in found.items()]
    total = sum(outcome.passed for outcome in found.values())
    not_run = sum(outcome.not_run.total() for outcome in found.values())
    if whole == PASSED and any("FAILED" in text for _, text in results):
        whole = "FAILED"
    return f"{whole}: {total} tests passed, {not_run} did not run", results


# ---- all of it --------------------------------------------------------


class Stage(NamedTuple):
    name: str
    most: float
    """Seconds that it may take, however much is left."""
    work: Callable[[float], str]
    """Seconds to a verdict."""


class Check:
    """The stages in order, what has become of them in ``out``, and until when there is time."""

    def __init__(
        self,
        out: Path,
        seconds: float,
        fingerprint: str,
        run: Run = run_process,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.out, self.run, self.clock = out, run, clock
        self.ends = clock() + seconds
        self.results: list[tuple[str, str]] = []
        self.details: list[tuple[str, str]] = []
        """Of the files of tests."""
        self.state = out / "state.json"
        self.rows = out / "rows.jsonl"
        self.passed: dict[str, str] = {}
        out.mkdir(parents=True, exist_ok=True)
        if self.state.exists():
            kept = json.loads(self.state.read_text(encoding="utf-8"))
            if kept["fingerprint"] == fingerprint:
                self.passed = kept["passed"]
            elif self.rows.exists():  # of other code: kept, but nothing of it is done
                self.rows.rename(out / f"rows-{kept['fingerprint'][:12]}.jsonl")
        self.fingerprint = fingerprint
        self.keep()

    def keep(self) -> None:
        content = {"fingerprint": self.fingerprint, "passed": self.passed}
        fresh = self.state.with_suffix(".new")
        fresh.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.state)

    def stage(self, stage: Stage) -> None:
        left = self.ends - self.clock()
        if stage.name in self.passed:
            self.results.append((stage.name, f"{self.passed[stage.name]}, before"))
        elif left < LEAST:
            self.results.append((stage.name, SPENT))
        else:
            began = self.clock()
            text = f"{stage.work(min(stage.most, left))}, {self.clock() - began:.0f} s"
            self.results.append((stage.name, text))
            if text.startswith(PASSED):
                self.passed[stage.name] = text
                self.keep()

    def status(self) -> int:
        if any("FAILED" in text for _, text in [*self.results, *self.details]):
            return 1
        return 0 if all(text.startswith(PASSED) for _, text in self.results) else CUT

    def summary(self) -> str:
        lines = [f"{name}: {text}" for name, text in [*self.details, *self.results]]
        return "\n".join(["", *lines, f"rows: {self.rows}"])


def stages(check: Check, env: dict[str, str], sanitizers: bool, record: bool) -> list[Stage]:
    """Each with its limit: those that always run have ten minutes together, tests the rest."""
    python = sys.executable

    def shapes(group: str) -> Callable[[float], str]:
        command = [python, "benches/gpu_shapes.py", group]
        return lambda limit: verdict(check.run(f"shapes, {group}", command, env, limit))

    def bench(name: str, *options: str) -> Callable[[float], str]:
        def work(limit: float) -> str:
            # A case that has begun is measured to its end: what is left is its time for that.
            minutes = f"{max(limit - 25, LEAST) / 60:.2f}"
            command = [python, "benches/head", "--quick", "--log", str(check.rows), *options]
            command += ["--json", str(check.out / f"{name}.json"), "--minutes", minutes]
            command += ["--record"] * record
            return verdict(check.run(f"benches/head, {name}", command, env, limit))

        return work

    def sanitized(tool: str, group: str) -> Callable[[float], str]:
        def work(limit: float) -> str:
            sanitizer = find_sanitizer(env)
            if sanitizer is None:
                return "did not run: compute-sanitizer is not found"
            command = [sanitizer, "--tool", tool, "--error-exitcode", "1", python]
            command += ["benches/gpu_shapes.py", group]
            # Without torch's cache every buffer is an allocation of its own, with its own bounds.
            guarded = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            return verdict(check.run(f"compute-sanitizer {tool}, {group}", command, guarded, limit))

        return work

    def tests(limit: float) -> str:
        text, check.details = gpu_tests(check.run, env, limit)
        return text

    alone = ("--without-peers", "--shares", "1", "--seconds", "4")
    scored = ("--scored", "512", "1024", "4096", "16384")
    beside = ("--scored", "4096", "16384", "--given-rows", "16384", "--shares", "1")
    found = [
        Stage("smoke", 50, shapes("smoke")),
        Stage("kernels", 50, shapes("kernels")),
        Stage("plans", 40, shapes("plans")),
        Stage("streams", 30, shapes("streams")),
        Stage("fused", 110, bench("fused", "--only", "fused", *scored, *alone)),
        Stage("given", 50, bench("given", "--only", "given", *alone)),
        Stage("peers", 120, bench("peers", "--only", "fused", "given", "small", *beside)),
        Stage("memcheck", 120, sanitized("memcheck", "kernels")),
    ]
    if sanitizers:
        found += [Stage(f"{t}, {group}", 180, sanitized(t, group)) for t, group in SANITIZED]
    return [*found, Stage("tests", float("inf"), tests)]


GROUPS = {
    "shapes": ("smoke", "kernels", "plans", "streams", "memcheck"),
    "bench": ("fused", "given", "peers"),
}
CODE = ("cuda/*.cu*", "python/dpo_ext/torch/**/*.py", "benches/head/*.py", "benches/gpu_*.py")


def fingerprint(device: str, torch_version: str) -> str:
    """Of what is checked and where: results of other code or another device do not count."""
    digest = hashlib.sha256(f"{device} {torch_version}".encode())
    for path in sorted(path for pattern in CODE for path in ROOT.glob(pattern)):
        digest.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.5, help="of all stages together")
    parser.add_argument("--sanitizers", action="store_true", help="all of them, not memcheck alone")
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--out", type=Path, default=ROOT / "dist" / "gpu_check")
    only = "stages by name; `shapes` and `bench` are several"
    parser.add_argument("--only", nargs="+", metavar="STAGE", help=only)
    arguments = parser.parse_args()
    env = environment()
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was checked")
    device, python = torch.cuda.get_device_name(), sys.version.split()[0]
    print(f"{device}, torch {torch.__version__}, Python {python}")
    out = arguments.out.resolve()
    check = Check(out, 60 * arguments.minutes, fingerprint(device, torch.__version__))
    planned = stages(check, env, arguments.sanitizers, arguments.record)
    names = [stage.name for stage in planned]
    chosen = {n for word in arguments.only or names for n in GROUPS.get(word, (word,))}
    if not chosen <= {*names}:
        parser.error(f"--only: the stages are {names} and {[*GROUPS]}, found {arguments.only}")
    for stage in planned:
        if stage.name in chosen:
            check.stage(stage)
    print(check.summary())
    sys.exit(check.status())


if __name__ == "__main__":
    main()
