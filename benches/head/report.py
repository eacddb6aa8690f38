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
PEERS = ("trl", "liger-kernel", "quack-kernels", "cut-cross-entropy", "flashinfer-python")
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
    """Collects rows and raw times; prints each row as it comes, so that a cut run keeps them.

    With ``log`` each row is also a line of JSON in that file as soon as it is there, and a case
    that the file calls done need not be measured again.
    """

    def __init__(self, device: torch.device, command: list[str], log: Path | None = None) -> None:
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
            "peers": {name: version(name) for name in PEERS},
        }
        self.gpu = gpu
        self.cases: list[dict[str, Any]] = []
        self.rows: list[tuple[str, str, str, str]] = []
        self.missing: list[tuple[str, str]] = []
        self.warnings: list[str] = []
        self.wrong: list[str] = []
        """What of ours float64 contradicts."""
        self.bounds: list[tuple[str, float]] = []
        self.log = log
        self.finished = {line["done"] for line in lines(log) if "done" in line}
        self._append(facts=self.facts)

    def _append(self, **line: Any) -> None:
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def done(self, case: str) -> None:
        """All rows of a case are there."""
        self._append(done=case)

    def say_wrong(self, what: str) -> None:
        self.wrong.append(what)
        self._append(wrong=what)

    def header(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in self.facts.items())

    def case(
        self, part: str, label: str, times: dict[str, Times], memory: dict, **facts: Any
    ) -> None:
        print(f"\n{label}", flush=True)
        raw = {name: took._asdict() for name, took in times.items()}
        self.cases.append({"part": part, "label": label, "ms": raw, "peak": memory, **facts})

    def row(self, what: str, ours: str, other: str, ratio: str) -> None:
        self.rows.append((what, ours, other, ratio))
        self._append(row=self.rows[-1])
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
        self._append(left_out=self.missing[-1])
        print(f"left out, {what}: {why}", flush=True)

    def warn(self, text: str) -> None:
        self.warnings.append(text)
        self._append(warning=text)
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
        return block(self.facts, self.rows, self.missing, self.warnings, self.wrong)


def lines(log: Path | None) -> list[dict[str, Any]]:
    """What a log holds; a last line that was cut off while it was written is taken away."""
    if log is None or not log.exists():
        return []
    whole = log.read_text(encoding="utf-8")
    end = whole.rfind("\n") + 1
    if end < len(whole):
        log.write_text(whole[:end], encoding="utf-8")
    return [json.loads(line) for line in whole[:end].splitlines()]


def block_of(log: Path) -> str:
    """The rows of a log as RESULTS.md keeps them, a block for each run that wrote some."""
    runs: list[dict[str, Any]] = []
    for line in lines(log):
        if "facts" in line:
            runs.append({"facts": line["facts"]})
        for kind in ("row", "left_out", "warning", "wrong"):
            if kind in line:
                runs[-1].setdefault(kind, []).append(line[kind])
    return "".join(
        block(*(run.get(key, []) for key in ("facts", "row", "left_out", "warning", "wrong")))
        for run in runs
        if len(run) > 1
    )


def where(facts: dict[str, Any]) -> str:
    return (
        f"{facts['device']}, driver {facts['driver']}, {facts['power_limit']}, "
        f"torch {facts['torch']}, CUDA {facts['cuda']}, CuPy {facts['cupy']}, "
        f"NVRTC {facts['nvrtc']}, Python {facts['python']}"
    )


def block(facts: Any, rows: list, missing: list, warnings: list, wrong: list) -> str:
    first = (facts["date"], facts["commit"], where(facts))
    table = [f"| {' | '.join((*first, *row, '`' + facts['command'] + '`'))} |\n" for row in rows]
    said = "".join(f"- left out, {what}: {why}\n" for what, why in missing)
    said += "".join(f"- warning, {text}\n" for text in warnings)
    said += "".join(f"- WRONG, not timed: {what}\n" for what in wrong)
    clocks = f"clocks before {facts['clocks_before']}, after {facts.get('clocks_after')}"
    head = f"\n{facts['date']}, GPU run at {facts['commit']}, {clocks}; peers {facts['peers']}:\n"
    return f"{head}\n{said}\n{COLUMNS}{''.join(table)}"
