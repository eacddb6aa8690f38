"""Fetches wheels of the peers of benches/head, and compute-sanitizer, for a machine without a net.

    python benches/gpu_peers.py [--python 3.12] [--all] [--to dist/peers]

The folder travels to the machine with the GPU beside dist/*.whl; benches/gpu_check.py unpacks from
it what is not installed there. torch, Triton, transformers and pandas are taken to be there. QuACK
and FlashInfer bring compilers of 90 and 100 MB, and come with `--all` alone. A wheel that cannot be
had is said, and the rest are fetched.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIGHT = (
    "trl==1.16.0", "datasets", "dill", "multiprocess", "xxhash",  # what `trl.trainer` imports
    "liger-kernel", "cut-cross-entropy", "nvidia-cuda-sanitizer-api",
)  # fmt: skip
HEAVY = (
    "quack-kernels", "nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base",
    "nvidia-cutlass-dsl-libs-cu13", "apache-tvm-ffi", "torch-c-dlpack-ext", "einops",
    "flashinfer-python",
)  # fmt: skip
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (28, 27, 25, 24, 17)] + ["manylinux2014_x86_64"]


def command(requirement: str, python: str, to: Path) -> list[str]:
    found = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    found += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    found += [word for platform in PLATFORMS for word in ("--platform", platform)]
    return [*found, "--dest", str(to), requirement]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="3.12", help="version on the machine with the GPU")
    parser.add_argument("--all", action="store_true", help="QuACK and FlashInfer too")
    parser.add_argument("--to", type=Path, default=ROOT / "dist" / "peers")
    arguments = parser.parse_args()
    missing = []
    for requirement in LIGHT + HEAVY * arguments.all:
        done = subprocess.run(command(requirement, arguments.python, arguments.to), check=False)
        missing += [requirement] * (done.returncode != 0)
    wheels = sorted(arguments.to.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 1e6:8.1f} MB  {wheel.name}")
    print(f"{sum(wheel.stat().st_size for wheel in wheels) / 1e6:8.1f} MB in {arguments.to}")
    for requirement in missing:
        print(f"not fetched: {requirement}")
    sys.exit(bool(missing))


if __name__ == "__main__":
    main()
