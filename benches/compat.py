"""What do the functions of other code bases cost, and ours in their place?

Verifies values and gradients against each other first, then times both in the same process, taking
turns. The peers' own functions come out of unpacked wheels (`DPO_EXT_PEERS`, see
tests/support/wheels.py). `--record` appends the rows to benches/RESULTS.md.

    DPO_EXT_PEERS=folder python benches/compat.py [--record] [--vocabulary 50257] [--threads 1]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
import wheels  # noqa: E402

from dpo_ext.compat import liger, llamafactory, trl  # noqa: E402

REPEATS = 9
PAIRS, LENGTH, PROMPT, HIDDEN = 2, 48, 24, 256


class Rival(NamedTuple):
    name: str
    theirs: Callable[..., Any]
    ours: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    trained: int
    """How many of the inputs, from the first on, get a gradient."""


def newest(name: str) -> wheels.Wheel:
    found = wheels.wheels(name)
    if not found:
        sys.exit(f"{wheels.NO_PEERS}: {name}")
    return found[-1]


def rivals(V: int) -> list[Rival]:
    generator = torch.Generator().manual_seed(0)
    rows = 2 * PAIRS
    logits = torch.randn(rows, LENGTH, V, generator=generator) * 4
    ids = torch.randint(0, V, (rows, LENGTH), generator=generator)
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    x, ref_x = torch.randn(2, rows, LENGTH, HIDDEN, generator=generator)
    w, ref_w = torch.randn(2, V, HIDDEN, generator=generator) / HIDDEN**0.5
    trl_wheel, factory, fused = newest("trl"), newest("llamafactory"), newest("liger_kernel")
    theirs = wheels.trl_functions(trl_wheel)
    batch = wheels.llamafactory_functions(factory)["get_batch_logps"]
    dpo = wheels.liger_modules(fused)["LigerFusedLinearDPOLoss"](compiled=False)
    head = liger.LigerFusedLinearDPOLoss()
    shape = f"{rows} x {LENGTH} x {V} float32"
    found = [
        Rival(
            f"selective_log_softmax, {shape}, {trl_wheel}",
            theirs["selective_log_softmax"],
            trl.selective_log_softmax,
            (logits, ids),
            1,
        ),
        Rival(
            f"entropy_from_logits, {shape}, {trl_wheel}",
            theirs["entropy_from_logits"],
            trl.entropy_from_logits,
            (logits,),
            1,
        ),
        Rival(
            f"get_batch_logps, half of it scored, {shape}, {factory}",
            batch,
            llamafactory.get_batch_logps,
            (logits, labels),
            1,
        ),
    ]

    def fused_loss(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda weight, hidden, target, reference, ref_weight: call(
            weight, hidden, target, None, reference, ref_weight
        )[0]

    fused_name = f"LigerFusedLinearDPOLoss, H {HIDDEN}, half of it scored, {shape}, {fused}, eager"
    inputs = (w, x, labels, ref_x, ref_w)
    found.append(Rival(fused_name, fused_loss(dpo), fused_loss(head), inputs, 2))
    return found


def step(call: Callable[..., Any], rival: Rival) -> tuple[float, Tensor, list[Tensor]]:
    """Seconds of a forward and backward pass, the first value, and the gradients."""
    given = [t.detach().requires_grad_(i < rival.trained) for i, t in enumerate(rival.inputs)]
    start = time.perf_counter()
    out = call(*given)
    value = out[0] if isinstance(out, tuple) else out
    value.sum().backward()
    took = time.perf_counter() - start
    return took, value.detach(), [t.grad for t in given[: rival.trained]]


def compare(rival: Rival) -> tuple[list[float], list[float]]:
    _, a, grads = step(rival.theirs, rival)
    _, b, ours = step(rival.ours, rival)
    torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-5)
    for one, other in zip(grads, ours, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=2e-4)
    del a, b, grads, ours, one, other
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(REPEATS):
        for call, into in zip((rival.ours, rival.theirs), times, strict=True):
            into.append(step(call, rival)[0])
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    device = f"{platform.machine()}, torch {torch.__version__}, Python {platform.python_version()}"
    command = f"python benches/compat.py --record --vocabulary {args.vocabulary}"
    lines = []
    for rival in rivals(args.vocabulary):
        ours, theirs = compare(rival)
        a, b = statistics.median(ours), statistics.median(theirs)
        spread = f"{min(ours) * 1e3:.0f} to {max(ours) * 1e3:.0f}"
        lines.append(
            f"| {date.today()} | {commit} | {device} | compat {rival.name}, forward + backward, "
            f"{args.threads} thread(s) | {a * 1e3:.1f} ms ({spread}) | theirs {b * 1e3:.1f} ms "
            f"({min(theirs) * 1e3:.0f} to {max(theirs) * 1e3:.0f}) | {b / a:.2f}x faster "
            f"| `{command}` |"
        )
        print(lines[-1], flush=True)
    if args.record:
        with (ROOT / "benches" / "RESULTS.md").open("a", encoding="utf-8") as file:
            file.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
