"""What does a call cost the host where there is next to nothing to compute?

Eight tokens of a vocabulary of 64, two pairs of two tokens a side, and 64 pairs for the loss: what
is timed is Python, the dispatcher and autograd. Verifies values and gradients against the lines of
torch that a call replaces, then times both in the same process, taking turns. Times are the
process's own, which other processes do not stop. `--record` appends a row a call to RESULTS.md.

    python benches/calls.py [--record]
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    preference_loss,
    sequence_logps,
)

TOKENS, VOCABULARY, HIDDEN, PAIRS, BETA = 8, 64, 64, 64, 0.1
REPEATS, WARM_UP, CALLS = 100, 5, 20
FIVE, HAND = "five lines of torch", "by hand"
Call = Callable[[], Tensor]


class Case(NamedTuple):
    """A call of ours, the torch that it replaces, and what gets a gradient."""

    name: str
    ours: Call
    torch: Call
    peer: str
    leaves: tuple[Tensor, ...]


def five_lines(logits: Tensor, table: ScoreTable) -> Tensor:
    logps = logits.float().log_softmax(-1)
    logps = logps.gather(1, table.targets.long()[:, None])
    logps = logps.squeeze(1)
    sums = logps.view(table.n_sequences, -1).sum(1)
    return sums.view(-1, 2)


def by_hand(logps: Tensor, ref_logps: Tensor) -> Tensor:
    chosen, rejected = logps[:, 0] - ref_logps[:, 0], logps[:, 1] - ref_logps[:, 1]
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def trl_metrics(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """The six of TRL 1.16, each read at once as its trainer does, with its loss."""
    (chosen, rejected), (ref_chosen, ref_rejected) = logps.unbind(1), ref_logps.unbind(1)
    up, down = chosen - ref_chosen, rejected - ref_rejected
    up_rewards, down_rewards = BETA * up.detach(), BETA * down.detach()
    above = (up_rewards > down_rewards).float()
    margins = up_rewards - down_rewards
    for values in (up_rewards, down_rewards, above, margins, chosen, rejected):
        values.mean().item()
    return -logsigmoid(BETA * (up - down)).mean()


def metrics(logps: Tensor, ref_logps: Tensor) -> Tensor:
    out = preference_loss(logps, ref_logps, beta=BETA)
    for value in out.metrics.values():
        value.item()
    return out.loss


def cases() -> list[Case]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    table = ScoreTable(
        logit_rows=torch.arange(TOKENS),
        targets=torch.randint(VOCABULARY, (TOKENS,), generator=generator, dtype=torch.int32),
        seq_offsets=torch.arange(0, TOKENS + 1, TOKENS // 4, dtype=torch.int32),
    )
    found = []
    ref, size = draw(2, 2), f"{TOKENS} x {VOCABULARY}"
    for dtype in (torch.float32, torch.bfloat16):
        z = draw(TOKENS, VOCABULARY).to(dtype).requires_grad_()
        x = draw(TOKENS, HIDDEN).to(dtype).requires_grad_()
        w = (draw(VOCABULARY, HIDDEN) / 8).to(dtype).requires_grad_()
        kind = str(dtype).removeprefix("torch.")
        found += [
            Case(
                f"sequence_logps, {size} {kind}",
                lambda z=z: sequence_logps(z, table),
                lambda z=z: five_lines(z, table),
                FIVE,
                (z,),
            ),
            Case(
                f"linear_sequence_logps, {size} {kind}",
                lambda x=x, w=w: linear_sequence_logps(x, w, table),
                lambda x=x, w=w: five_lines(x @ w.t(), table),
                FIVE,
                (x, w),
            ),
            Case(
                f"linear_preference_loss, {size} {kind}",
                lambda x=x, w=w: linear_preference_loss(x, w, table, ref, beta=BETA).loss,
                lambda x=x, w=w: by_hand(five_lines(x @ w.t(), table), ref),
                f"{FIVE} and the loss {HAND}",
                (x, w),
            ),
        ]
    many_ref = draw(PAIRS, 2) * 10 - 200
    many = (many_ref + draw(PAIRS, 2)).requires_grad_()
    found += [
        Case(
            f"preference_loss of {PAIRS} pairs, float32",
            lambda: preference_loss(many, many_ref, beta=BETA).loss,
            lambda: by_hand(many, many_ref),
            HAND,
            (many,),
        ),
        Case(
            f"preference_loss of {PAIRS} pairs with metrics, float32",
            lambda: metrics(many, many_ref),
            lambda: trl_metrics(many, many_ref),
            "TRL's lines with its metrics",
            (many,),
        ),
    ]
    return found


def step(call: Call, leaves: tuple[Tensor, ...]) -> None:
    call().sum().backward()
    for leaf in leaves:
        leaf.grad = None


def gradients(call: Call, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    value = call()
    return [value.detach(), *torch.autograd.grad(value.sum(), leaves)]


def verify(case: Case) -> None:
    """Value and gradients, to a few roundings of their dtype."""
    pairs = zip(gradients(case.ours, case.leaves), gradients(case.torch, case.leaves), strict=True)
    for ours, theirs in pairs:
        allowed = 0.05 if case.leaves[0].dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=allowed, atol=allowed)


def measure(ours: Callable[[], object], theirs: Callable[[], object]) -> list[list[float]]:
    """Microseconds of both, sorted, with the ratio of each turn as third."""
    turns: list[list[float]] = []
    gc.disable()
    for repeat in range(REPEATS + WARM_UP):
        took = []
        for call in (ours, theirs):
            start = time.process_time()
            for _ in range(CALLS):
                call()
            took.append((time.process_time() - start) / CALLS * 1e6)
        if repeat >= WARM_UP:
            turns.append([*took, took[0] / took[1]])
    gc.enable()
    return [sorted(column) for column in zip(*turns, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in cases():
        verify(case)
        forward = measure(torch.no_grad()(case.ours), torch.no_grad()(case.torch))
        both = measure(
            lambda case=case: step(case.ours, case.leaves),
            lambda case=case: step(case.torch, case.leaves),
        )
        for what, columns in (("forward, no grad", forward), ("forward + backward", both)):
            ours, theirs, ratio = (statistics.median(column) for column in columns)
            low, high = columns[0][REPEATS // 10], columns[0][-REPEATS // 10]
            name = f"{case.name}, {what}"
            print(f"{name:<74}{ours:8.1f} us {theirs:8.1f} us {ratio:6.2f}x")
            rows.append(
                (name, f"{ours:.1f} us ({low:.1f} to {high:.1f})", case.peer, theirs, ratio)
            )
    if arguments.record:
        record(rows)


def record(rows: list[tuple]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    machine = (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs"
    )
    where = f"{machine}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
        for name, ours, peer, theirs, ratio in rows:
            file.write(
                f"| {date.today()} | {commit} | {where} | host time of a small call: {name}, one "
                f"thread | {ours} | {peer} {theirs:.1f} us "
                f"| {ratio:.2f}x the time | `python benches/calls.py --record` |\n"
            )


if __name__ == "__main__":
    main()
