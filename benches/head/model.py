"""What each row of benches/head should take on a device: a prediction, made without one.

A kernel takes the longest of three times: its bytes at the rate of a copy, its instructions at the
rate at which schedulers issue, its exponentials and reciprocals at the rate of the special function
units; stretched by the last wave, which takes as long as a full one; and each wave waits once for
its first loads and its merges. A product takes its flops at a share of the peak, or its bytes. A
plan is the sum of its steps (`rulers.steps`), its other bytes, and a gap a launch.

Instructions and blocks an SM are those of `CEILINGS` in tests/logps/test_nvrtc.py, measured in the
machine code; grids and templates are those that the launch layer asks for when it is recorded on
tensors without memory. Time of the host, heat and the power limit are left out, and so are pipes
that take less than an instruction a clock (an A100 has 64 lanes of float32, not 128).

    python benches/head --predict [H200] [--model Llama] [--scored 512]
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rulers import Step, Steps, bound_ms, flops, logit_bytes, other_bytes

from dpo_ext.torch.logps import cuda as kernels

TABLE = Path(__file__).parents[2] / "tests" / "logps" / "test_nvrtc.py"
LANES, SPECIAL_LANES = 128, 16  # of an SM: threads that issue, and special functions, in a clock
ISSUE = 0.9  # of all issue slots, what code without stalls of its own fills
BLOCK_US = 2.5  # of a wave: until the first loads are there, and merges behind the last
LAUNCH_US = 2.0  # between two kernels of one stream


class Device(NamedTuple):
    """Facts of data sheets, but for `copy_gbps` and `share`, which are planning figures."""

    name: str
    """As it stands in what the driver calls the device."""
    arch: str
    sms: int
    ghz: float
    """Of the SMs under load."""
    copy_gbps: float
    """Bytes read and written by a copy of 2 GB, over time."""
    tflops: float
    """Peak of dense bfloat16 products that are added in float32."""
    share: float
    """Of that peak, what large products of cuBLAS reach."""


DEVICES = (
    Device("H200", "sm_90", 132, 1.80, 4300, 989, 0.80),
    Device("A100", "sm_80", 108, 1.41, 1800, 312, 0.80),
    Device("B200", "sm_100", 148, 1.85, 7400, 2250, 0.72),
    Device("4090", "sm_89", 128, 2.52, 930, 165, 0.90),
)


def device_called(name: str) -> Device | None:
    """The facts of the device that the driver calls ``name``, if they are known."""
    return next((device for device in DEVICES if device.name in name), None)


# ---- kernels ----------------------------------------------------------


class Code(NamedTuple):
    """What the machine code of a kernel takes: of a thread, for each of its columns."""

    instructions: float
    special: float
    blocks: int
    """That an SM holds at a time."""


@functools.cache
def code() -> dict[tuple[str, str], Code]:
    """By kernel and architecture, of the kernels that stream over columns."""
    tree = ast.parse(TABLE.read_text(encoding="utf-8"))
    (text,) = (
        node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "CEILINGS"
    )
    head, *rows = ([cell.strip() for cell in line.split("|")] for line in text.split("\n")[1:-1])
    found = {}
    for name, *cells in rows:
        for arch, cell in zip(head[1:], cells, strict=True):
            instructions, special, _, blocks, _ = cell.split()
            if instructions != "-":
                found[name, arch] = Code(float(instructions), float(special), int(blocks))
    return found


class Launch(NamedTuple):
    kernel: str
    """As NVRTC names the instantiation."""
    blocks: int


@contextmanager
def recorded(device: Device) -> Iterator[list[Launch]]:
    """What the launch layer asks for inside; nothing is launched."""
    found: list[Launch] = []

    def launch(kernel: str, template: tuple[str, ...], grid: tuple[int, int], *_: Any) -> None:
        found.append(Launch(kernels.name_expression(kernel, template), grid[0] * grid[1]))

    own = kernels.launch, kernels.processors
    kernels.launch, kernels.processors = launch, lambda _: device.sms
    try:
        yield found
    finally:
        kernels.launch, kernels.processors = own


class Logits(NamedTuple):
    """Rows of logits, of which some are scored."""

    rows: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None
    scored: int | None = None
    """All of them where it is None."""

    @property
    def read(self) -> int:
        return self.rows if self.scored is None else self.scored

    def fold(self, device: Device, stats: bool = False) -> list[Launch]:
        z, table, how = self._arguments()
        with recorded(device) as found:
            kernels.token_stats(z, *table, *how, stats)
        return found

    def gradient(self, device: Device) -> list[Launch]:
        z, table, how = self._arguments()
        kept = torch.empty(self.rows, device="meta")
        with recorded(device) as found:
            kernels.logits_grad(z, *table, kept, kept, kept, *how, z)
        return found

    def _arguments(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], tuple[float, ...]]:
        z = torch.empty(self.rows, self.vocabulary, dtype=self.dtype, device="meta")
        rows = torch.empty(self.rows, dtype=torch.int64, device="meta")
        return z, (rows, rows.int()), (1.0, self.softcap or 0.0, 1.0)


def efficiency(blocks: int, slots: int) -> float:
    """Share of the slots of all waves that have a block.

    >>> round(efficiency(400, 396), 3), efficiency(792, 396), efficiency(198, 396)
    (0.505, 1.0, 0.5)
    """
    return blocks / (-(-blocks // slots) * slots)


def column_rate(device: Device, of: Code, bytes_per_column: float) -> float:
    """Columns a second of a full device: the least of what three parts of it can do."""
    clock = device.sms * device.ghz * 1e9
    return min(
        device.copy_gbps * 1e9 / bytes_per_column,
        clock * LANES * ISSUE / of.instructions,
        clock * SPECIAL_LANES / of.special if of.special else math.inf,
    )


def kernel_ms(
    device: Device, launches: Sequence[Launch], columns: int, moved: float, share: float = 1.0
) -> float:
    """Time of the launches of one call, ``columns`` of logits in all, ``moved`` bytes.

    ``share`` is that of the blocks which have something to do: the others leave at once. Kernels
    that do not stream over columns count as a gap alone.
    """
    total = 0.0
    streams = 0
    for kernel, blocks in launches:
        total += LAUNCH_US / 1e3
        of = code().get((kernel, device.arch))
        if of is None:
            continue
        streams += 1
        busy = max(1, round(blocks * share))
        slots = device.sms * of.blocks
        rate = column_rate(device, of, moved / columns)
        total += columns / rate / efficiency(busy, slots) * 1e3
        total += -(-busy // slots) * BLOCK_US / 1e3
    if streams != 1:
        raise LookupError(f"expected one kernel of {TABLE.name}'s table, found {list(launches)}")
    return total


def fold_ms(device: Device, of: Logits, stats: bool = False) -> float:
    """Log-probs, with ``stats`` the statistics too: scored rows are read."""
    columns = of.read * of.vocabulary
    launches = of.fold(device, stats)
    return kernel_ms(device, launches, columns, columns * of.dtype.itemsize, of.read / of.rows)


def gradient_ms(device: Device, of: Logits) -> float:
    """Scored rows are read and every row is written, in place or not."""
    columns, size = of.read * of.vocabulary, of.dtype.itemsize
    scored = kernel_ms(device, of.gradient(device), columns, 2 * columns * size, of.read / of.rows)
    zeros = (of.rows - of.read) * of.vocabulary * size
    return scored + zeros / device.copy_gbps / 1e6


# ---- products and plans -----------------------------------------------


class Projection(NamedTuple):
    """A head, and what of it is computed."""

    hidden: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    softcap: float | None = None


def product_ms(device: Device, step: Step, of: Projection, first: bool = True) -> float:
    """``x W^T``, ``dz W`` or ``dz^T x``, which adds to a float32 (V, H) unless it is the first."""
    rows, size = step.rows.stop - step.rows.start, of.dtype.itemsize
    logits, states, weight = rows * of.vocabulary, rows * of.hidden, of.vocabulary * of.hidden
    moved = (logits + states + weight) * size
    if step.kind == "dx":
        moved += states * (4 - size)
    if step.kind == "dw":
        moved += weight * (4 * (1 if first else 2) - size)
    work = flops([step], of.hidden, of.vocabulary)
    return max(work / (device.tflops * device.share) / 1e9, moved / device.copy_gbps / 1e6)


class Prediction(NamedTuple):
    """Milliseconds."""

    total: float
    products: float
    bound: float
    """Products and elementwise bytes at the rate of a copy, as for a measured plan."""


def plan_ms(
    device: Device, plan: str, planned: Steps, of: Projection, tokens: int, rows: int
) -> Prediction:
    """A plan, forward and backward: ``tokens`` of ``rows`` hidden states are scored."""
    size = of.dtype.itemsize
    every = [*planned.forward, *planned.backward]
    products = elementwise = 0.0
    first = True
    for step in every:
        count = step.rows.stop - step.rows.start
        logits = Logits(count, of.vocabulary, of.dtype, of.softcap)
        if step.kind == "fold":
            elementwise += fold_ms(device, logits)
        elif step.kind == "dz":
            elementwise += gradient_ms(device, logits)
        else:
            products += product_ms(device, step, of, first)
            elementwise += LAUNCH_US / 1e3
            first = first and step.kind != "dw"
    other = other_bytes(plan, tokens, rows, of.hidden, of.vocabulary, size)
    floor = bound_ms(products, logit_bytes(every, of.vocabulary, size), device.copy_gbps)
    return Prediction(products + elementwise + other / device.copy_gbps / 1e6, products, floor)


def beside(measured_ms: float, predicted_ms: float | None) -> str:
    """What a row says of its prediction."""
    if predicted_ms is None:
        return "no prediction for this device"
    return f"predicted {predicted_ms:.3f} ms, measured / predicted {measured_ms / predicted_ms:.2f}"


GIVEN: dict[str, Callable[[Device, Logits], float]] = {
    "forward": fold_ms,
    "forward + stats": functools.partial(fold_ms, stats=True),
    "gradient": gradient_ms,
    "gradient in place": gradient_ms,
}


def given_bytes(name: str, of: Logits) -> int:
    """That an operator of `GIVEN` moves, as benches/head counts them."""
    row = of.vocabulary * of.dtype.itemsize
    return of.read * row + (of.rows * row if "gradient" in name else 0)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
