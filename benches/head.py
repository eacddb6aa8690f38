"""How close do the CUDA kernels of given logits come to the device's own copy, beside torch?

For each shape: verified against float64 on sampled rows, then timed with CUDA events, candidates
and rulers taking turns in each round. The ruler is `dst.copy_(src)` of 2 GB in the same run; bytes
are those that the job needs (forward reads the scored rows; the gradient reads them and writes
every row). `--record` appends a row a case to benches/RESULTS.md.

    python benches/head.py [--record] [--quick]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from dpo_ext.torch import ops

assert ops.DTYPES  # importing registers the operators
OPS = torch.ops.dpo_ext
PLAIN = (1.0, 0.0, 1.0)
VOCABULARIES = {"Llama-3": 128_256, "Qwen2.5": 151_936, "Gemma-2": 256_000}
ROWS = (1024, 4096, 16_384)
ROUNDS, WARM_UP = 30, 3


def smi(fields: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "nvidia-smi not available"


class Case:
    """One shape: logits of (rows, vocabulary), of which `share` are scored."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype, share: float) -> None:
        generator = torch.Generator(device="cuda").manual_seed(0)
        self.values = torch.empty(rows, vocabulary, dtype=dtype, device="cuda")
        for start in range(0, rows, 1024):  # float32 noise of one piece at a time
            piece = self.values[start : start + 1024]
            piece.copy_(torch.randn(piece.shape, generator=generator, device="cuda") * 3)
        self.logits = self.values.clone()
        self.rows = torch.arange(rows, device="cuda")
        self.targets = torch.randint(
            0, vocabulary, (rows,), generator=generator, dtype=torch.int32, device="cuda"
        )
        scored = torch.rand(rows, generator=generator, device="cuda") < share
        scored[0] = True
        self.targets[~scored] = -100
        self.grad = torch.randn(rows, generator=generator, device="cuda")
        self.scores = self.forward()
        self.scored = int(scored.sum())
        self.row_bytes = vocabulary * dtype.itemsize

    def forward(self) -> tuple[Tensor, ...]:
        return OPS.token_stats(self.values, self.rows, self.targets, *PLAIN, False)

    def forward_stats(self) -> tuple[Tensor, ...]:
        return OPS.token_stats(self.values, self.rows, self.targets, *PLAIN, True)

    def backward(self) -> Tensor:
        saved = (self.rows, self.targets, *self.scores[1:3], self.grad)
        return OPS.logits_grad(self.values, *saved, *PLAIN)

    def backward_in_place(self) -> None:
        # Over its own last result: the same bytes, and any finite values take the same time.
        saved = (self.rows, self.targets, *self.scores[1:3], self.grad)
        OPS.logits_grad_(self.logits, *saved, *PLAIN)

    def torch_float32(self) -> Tensor:
        """Forward and backward of the rows upcast, as most trainers write it."""
        leaf = self.values.detach().requires_grad_()
        chosen = self.targets.clamp(min=0).long()[:, None]
        logps = leaf.float().log_softmax(-1).gather(1, chosen)[:, 0]
        torch.where(self.targets >= 0, logps, 0.0).backward(self.grad)
        return leaf.grad

    def torch_same_dtype(self) -> Tensor:
        leaf = self.values.detach().requires_grad_()
        chosen = self.targets.clamp(min=0).long()[:, None]
        logps = leaf.log_softmax(-1).gather(1, chosen)[:, 0].float()
        torch.where(self.targets >= 0, logps, 0.0).backward(self.grad)
        return leaf.grad

    def verify(self) -> None:
        dz = self.backward()
        for r in (0, len(self.rows) // 2, len(self.rows) - 1):
            if self.targets[r] == -100:
                assert self.scores[0][r] == 0
                assert not dz[r].any()
                continue
            leaf = self.values[r].double().requires_grad_()
            logp = leaf.log_softmax(-1)[self.targets[r].long()]
            logp.backward(self.grad[r].double())
            assert abs(self.scores[0][r].item() - logp.item()) <= 4e-6
            torch.testing.assert_close(dz[r].double(), leaf.grad, rtol=2**-7, atol=1e-7)


def milliseconds(function: Callable) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_bytes(function: Callable) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(case: Case, copy: Callable, copy_bytes: int, label: str) -> list[str]:
    forward = case.scored * case.row_bytes
    backward = forward + len(case.rows) * case.row_bytes
    jobs = {
        "forward": (case.forward, forward),
        "forward + stats": (case.forward_stats, forward),
        "gradient": (case.backward, backward),
        "gradient in place": (case.backward_in_place, backward),
    }
    whole = {"torch float32 upcast": case.torch_float32, "torch same dtype": case.torch_same_dtype}
    needed = 5 * case.values.numel() * 4
    if torch.cuda.mem_get_info()[0] < needed:
        whole = {}
        print(f"{label}: torch needs {needed / 1e9:.0f} GB more and is left out")
    calls = {"copy": copy} | {name: job for name, (job, _) in jobs.items()} | whole
    peaks = {name: peak_bytes(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(ROUNDS + WARM_UP):
        for name, call in calls.items():
            took = milliseconds(call)
            if repeat >= WARM_UP:
                times[name].append(took)
    copy_rate = copy_bytes / statistics.median(times["copy"]) / 1e6
    lines = [f"{label}: copy {copy_rate:.0f} GB/s"]
    both = sum(statistics.median(times[n]) for n in ("forward", "gradient in place"))
    for name, took in times.items():
        if name == "copy":
            continue
        middle, deciles = statistics.median(took), statistics.quantiles(took, n=10)
        text = f"{name} {middle:.3f} ms ({deciles[0]:.3f} to {deciles[8]:.3f})"
        if name in jobs:
            rate = jobs[name][1] / middle / 1e6
            text += f", {rate:.0f} GB/s, {rate / copy_rate:.1%} of copy"
        else:
            text += f", {middle / both:.2f}x ours in place"
        lines.append(f"{text}, peak +{peaks[name] / 1e6:.0f} MB")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="one vocabulary, bfloat16")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device: this bench measures the kernels of a GPU")
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    destination = torch.empty_like(source)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    clocks = smi("clocks.sm,clocks.mem")
    where = f"{smi('name,driver_version,power.limit')}, torch {torch.__version__}"
    print(where)
    rows = []
    names = {"Llama-3": VOCABULARIES["Llama-3"]} if arguments.quick else VOCABULARIES
    dtypes = [torch.bfloat16] if arguments.quick else [torch.bfloat16, torch.float16, torch.float32]
    for model, vocabulary in names.items():
        for count in ROWS:
            for dtype in dtypes:
                for share in (1.0, 0.4):
                    # Logits, their copy, a gradient.
                    if torch.cuda.mem_get_info()[0] < 3.5 * count * vocabulary * dtype.itemsize:
                        print(f"{model}, {count} rows, {dtype}: not enough device memory")
                        continue
                    case = Case(count, vocabulary, dtype, share)
                    case.verify()
                    short = str(dtype).removeprefix("torch.")
                    label = f"{model} {count} x {vocabulary} {short}, {share:.0%} scored"
                    lines = measure(case, lambda: destination.copy_(source), 2 << 30, label)
                    print("\n  ".join(lines), flush=True)
                    command = "`python benches/head.py --record`"
                    cells = (str(date.today()), commit, where, "; ".join(lines), command)
                    rows.append(f"| {' | '.join(cells)} |\n")
                    del case
                    torch.cuda.empty_cache()
    print(f"clocks before: {clocks}; after: {smi('clocks.sm,clocks.mem')}")
    print("".join(rows))
    if arguments.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.writelines(rows)


if __name__ == "__main__":
    main()
