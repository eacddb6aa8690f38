"""Everything that needs a GPU, on a machine with Python, torch, CuPy, NumPy, pytest and our wheel.

1. tests/test_gpu.py: every kernel x dtype against float64; a test that is skipped is a failure.
2. compute-sanitizer, where it is found: memcheck, racecheck, initcheck, synccheck, small shapes.
3. benches/head.py: the rows of the GPU for RESULTS.md (`--record` appends them).

    python benches/gpu_check.py [--record] [--quick]

The package is the one that Python finds, else dist/*.whl, unpacked to a folder of its own. Exit
status 0 only if everything ran and passed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


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


def shapes() -> None:
    """60 small shapes for the sanitizer: dtypes x transforms x odd, split, strided."""
    import torch

    from dpo_ext.torch import ops

    assert ops.DTYPES
    operators = torch.ops.dpo_ext
    launches = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for softcap in (0.0, 5.0):
            for columns, offset, gap in (
                (1, 0, 0), (7, 1, 0), (8, 0, 0), (33, 1, 3), (129, 5, 0), (1000, 0, 8),
                (8193, 1, 0), (32_768, 0, 0), (40_003, 3, 5), (70_000, 0, 0),
            ):  # fmt: skip
                stride = columns + gap
                flat = torch.randn(offset + 3 * stride + columns, device="cuda").to(dtype)
                logits = flat.as_strided((4, columns), (stride, 1), offset)
                rows = torch.tensor([2, 0, 1, 9], device="cuda")
                targets = torch.tensor([columns - 1, -100, columns, 0], device="cuda").int()
                how = (1.0, softcap, 1.0)
                scores = operators.token_stats(logits, rows, targets, *how, True)
                grad = torch.ones(4, device="cuda")
                saved = (rows, targets, *scores[1:3], grad)
                fresh = operators.logits_grad(logits, *saved, *how)
                operators.logits_grad_(logits, *saved, *how)
                assert torch.equal(logits.nan_to_num(7.0), fresh.nan_to_num(7.0))
                offsets = torch.tensor([0, 0, 2, 4, 5], device="cuda").int()
                sums = operators.segment_sum(scores[0], None, offsets)
                assert sums[0] == 0
                launches += 1
    torch.cuda.synchronize()
    print(f"{launches} shapes")


def gpu_tests(env: dict[str, str]) -> tuple[str, str]:
    title = "tests/test_gpu.py"
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py", "-p", "no:cacheprovider"]
    print(f"\n== {title}: {' '.join(command)}", flush=True)
    done = subprocess.run(command, env=env, cwd=ROOT, check=False, capture_output=True, text=True)
    print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    if done.returncode != 0:
        return title, f"FAILED with status {done.returncode}"
    if "skipped" in done.stdout:
        return title, "FAILED: some did not run"
    return title, "passed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="one vocabulary, bfloat16")
    parser.add_argument("--shapes", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shapes:
        shapes()
        return
    env = environment()
    import torch

    if not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing was checked")
    python = sys.version.split()[0]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Python {python}")
    results = [gpu_tests(env)]
    sanitizer = find_sanitizer()
    program = [sys.executable, str(Path(__file__)), "--shapes"]
    for tool in TOOLS if sanitizer else ():
        # Without torch's cache every buffer is an allocation of its own, with its own bounds.
        guarded = env | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *program]
        results.append(run(f"compute-sanitizer {tool}", command, guarded))
    if not sanitizer:
        results.append(("compute-sanitizer", "not found, did not run"))
    bench = [sys.executable, "benches/head.py"]
    bench += [flag for flag in ("--record", "--quick") if flag in sys.argv]
    results.append(run("benches/head.py", bench, env))
    print("\n".join(["", *(f"{title}: {result}" for title, result in results)]))
    sys.exit(any(result.startswith("FAILED") for _, result in results))


if __name__ == "__main__":
    main()
