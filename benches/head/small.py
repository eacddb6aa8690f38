"""What a forward and backward call costs the host for few tokens, eager and as a CUDA graph.

Launches then cost more than bytes: what counts is how soon the host is free again, and how long
the device takes from the first kernel to the last.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from cases import Candidate, HeadCase
from peers import head_peers, reason
from report import Report
from rulers import Job, Spread, synchronize, take_turns
from torch import Tensor

from dpo_ext.torch import sequence_logps

BASELINE = "torch, float32 upcast"
BATCHES, CALLS = 20, 5  # few calls at a time, so that the queue of launches never fills


def host_ms(call: Callable[[], object], device: torch.device) -> Spread:
    """Milliseconds until a call returns, nothing waited for."""
    took = []
    for batch in range(BATCHES + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        if batch:
            took.append((time.perf_counter() - start) / CALLS * 1e3)
    synchronize(device)
    return Spread.of(took)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """The call as a CUDA graph, after a warm-up on another stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def small(case: HeadCase, report: Report) -> None:
    label = f"small batch, {case.label}"
    found = [*case.ours(), given(case)]
    found += [c for c in head_peers(case, lambda *_: None) if c.name == BASELINE]
    calls: dict[str, Callable[[], object]] = {}
    for candidate in found:
        case.verify(candidate)
        job = case.job(candidate)
        calls[candidate.name] = lambda job=job: job.backward(job.forward())
    host = {name: host_ms(call, case.device) for name, call in calls.items()}
    for name, call in [*calls.items()] if case.device.type == "cuda" else []:
        try:
            replay = captured(call)
        except RuntimeError as error:
            report.left_out(f"{label}: {name} as a CUDA graph", reason(error))
            continue
        calls[f"{name}, CUDA graph"] = replay
        host[f"{name}, CUDA graph"] = host_ms(replay, case.device)
    jobs = [Job(name, call) for name, call in calls.items()]
    times = take_turns(jobs, case.device, seconds=5.0)
    report.case("small", label, times, {}, host_ms={n: s._asdict() for n, s in host.items()})
    base = statistics.median(times[BASELINE].forward)
    for name in calls:
        device = Spread.of(times[name].forward)
        report.row(
            f"{label}: {name}, forward + backward",
            f"host {host[name].median:.3f} ms ({host[name].p10:.3f} to {host[name].p90:.3f})",
            f"first kernel to last {device.median:.3f} ms; {BASELINE} {base:.3f} ms",
            f"{base / device.median:.2f}x torch",
        )


def given(case: HeadCase) -> Candidate:
    """Ours on logits that torch has multiplied: the head as most models have it."""

    def run(x: Tensor, w: Tensor) -> Tensor:
        options = {"softcap": case.model.softcap, "inplace_grad": True}
        return sequence_logps(x @ w.t(), case.table, **options)

    g = case.per_token(case.upstream)
    rest = (True, run, case.oracle.sequences, case.upstream, g)
    return Candidate("ours, logits given", "sequences", *rest)
