"""What a run of benches/head says: its header, its rows, the raw times, and where they go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import torch
from peers import version
from rulers import Spread, Times

RESULTS = Path(__file__).parent.parent / "RESULTS.md"
COLUMNS = (
    "| date | commit | device and versions | what | ours, median (p10 to p90) "
    "| ruler or peer | ratio | command |\n| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)
TARGET = 1.03  # head time over its bound


def ms(spread: Spread) -> str:
    return f"{spread.median:.3f} ms ({spread.p10:.3f} to {spread.p90:.3f})"


def peak(found: tuple[int, int] | None) -> str:
    if found is None:
        return "peak memory not counted"
    return f"peak +{found[0] / 1e9:.2f} GB forward, +{found[1] / 1e9:.2f} GB backward"


def smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "nvidia-smi not available"
    return done.stdout.strip().splitlines()[torch.cuda.current_device()]


def nvrtc_version() -> str:
    try:
        import cupy

        return ".".join(map(str, cupy.cuda.nvrtc.getVersion()))
    except Exception as error:  # whatever keeps CuPy from loading keeps its version unknown
        return f"not known ({type(error).__name__})"


def cupy_version() -> str:
    try:
        import cupy
    except Exception as error:
        return f"not importable ({type(error).__name__})"
    return cupy.__version__


def commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return done.stdout.strip() or os.environ.get("DPO_EXT_COMMIT", "not known")


class Report:
    """Collects rows and raw times; prints each row as it comes, so that a cut run keeps them."""

    def __init__(self, device: torch.device, command: list[str]) -> None:
        gpu = device.type == "cuda"
        self.facts: dict[str, Any] = {
            "date": str(date.today()),
            "commit": commit(),
            "command": " ".join(["python", *command]),
            "device": smi("name") if gpu else "cpu",
            "driver": smi("driver_version") if gpu else None,
            "power_limit": smi("power.limit") if gpu else None,
            "clocks_before": smi("clocks.sm,clocks.mem") if gpu else None,
            "cuda": torch.version.cuda,
            "torch": torch.__version__,
            "cupy": cupy_version(),
            "nvrtc": nvrtc_version(),
            "python": sys.version.split()[0],
            "peers": {name: version(name) for name in ("trl", "liger-kernel", "quack-kernels")},
        }
        self.gpu = gpu
        self.cases: list[dict[str, Any]] = []
        self.rows: list[tuple[str, str, str, str]] = []
        self.missing: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.wrong: list[str] = []
        """What of ours float64 contradicts."""
        self.bounds: list[tuple[str, float]] = []

    def header(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.facts.items())

    def where(self) -> str:
        facts = self.facts
        return (
            f"{facts['device']}, driver {facts['driver']}, {facts['power_limit']}, "
            f"torch {facts['torch']}, CUDA {facts['cuda']}, CuPy {facts['cupy']}, "
            f"NVRTC {facts['nvrtc']}, Python {facts['python']}"
        )

    def case(
        self, part: str, label: str, times: dict[str, Times], memory: dict, **facts: Any
    ) -> None:
        print(f"\n{label}", flush=True)
        raw = {name: took._asdict() for name, took in times.items()}
        self.cases.append({"part": part, "label": label, "ms": raw, "peak": memory, **facts})

    def row(self, what: str, ours: str, other: str, ratio: str) -> None:
        self.rows.append((what, ours, other, ratio))
        print(f"  {what}\n    {ours}\n    {other}\n    {ratio}", flush=True)

    def say(self, text: str) -> None:
        print(f"  {text}", flush=True)

    def bound(
        self, label: str, plan: str, own: float, bound: float, products: float, work: int
    ) -> None:
        self.bounds.append((f"{label}: {plan}", own / bound))
        found = {"plan": plan, "ms": own, "bound_ms": bound, "products_ms": products, "flops": work}
        self.cases[-1].setdefault("bounds", []).append(found)

    def left_out(self, what: str, why: str) -> None:
        self.missing.append((what, why))
        print(f"left out, {what}: {why}", flush=True)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        print(f"WARNING, {text}", flush=True)

    def finish(self, file: str, record: bool) -> None:
        """Last words, the JSON file, and with ``record`` a block of rows in RESULTS.md."""
        self.facts["clocks_after"] = smi("clocks.sm,clocks.mem") if self.gpu else None
        within = sum(ratio <= TARGET for _, ratio in self.bounds)
        print(f"\nclocks before {self.facts['clocks_before']}, after {self.facts['clocks_after']}")
        print(f"{within} of {len(self.bounds)} plans within {TARGET} x their bound")
        for what, ratio in self.bounds:
            if ratio > TARGET:
                print(f"  {ratio:.3f}x  {what}")
        print(f"{len(self.missing)} left out, {len(self.warnings)} warnings")
        for what in self.wrong:
            print(f"WRONG: {what}")
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "facts": self.facts,
            "cases": self.cases,
            "rows": self.rows,
            "left_out": self.missing,
            "warnings": self.warnings,
            "wrong": self.wrong,
        }
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        print(f"raw times: {path}")
        if record:
            with RESULTS.open("a", encoding="utf-8") as results:
                results.write(self.block())

    def block(self) -> str:
        """The run as RESULTS.md keeps it."""
        facts = self.facts
        first = (facts["date"], facts["commit"], self.where())
        lines = [
            f"| {' | '.join((*first, *row, '`' + facts['command'] + '`'))} |\n" for row in self.rows
        ]
        missing = "".join(f"- left out, {what}: {why}\n" for what, why in self.missing)
        warnings = "".join(f"- warning, {text}\n" for text in self.warnings)
        warnings += "".join(f"- WRONG, not timed: {what}\n" for what in self.wrong)
        clocks = f"clocks before {facts['clocks_before']}, after {facts['clocks_after']}"
        head = (
            f"\n{facts['date']}, GPU run at {facts['commit']}, {clocks}; peers {facts['peers']}:\n"
        )
        return f"{head}\n{missing}{warnings}\n{COLUMNS}{''.join(lines)}"
