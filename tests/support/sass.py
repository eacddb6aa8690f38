"""Machine code as NVIDIA's disassembler prints it: what a thread does for each column, and how many blocks an SM holds.

No GPU is needed: NVRTC makes a cubin for any architecture, `nvdisasm` reads it.
"""

from __future__ import annotations

import functools
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

NO_NVDISASM = "nvdisasm is neither in a wheel (nvidia-cuda-nvdisasm, triton) nor on the path"


@functools.cache
def find_nvdisasm() -> str | None:
    """The disassembler of its own wheel, of triton's, or of a toolkit."""
    inside = ("nvidia/*/bin/nvdisasm", "triton/backends/nvidia/bin/nvdisasm")
    for pattern in inside:
        for folder in sys.path:
            for path in sorted(Path(folder).glob(pattern)) if folder else ():
                return str(path)
    return shutil.which("nvdisasm")


def disassemble(cubin: bytes, folder: Path) -> dict[str, Kernel]:
    """Every kernel of a cubin by its mangled name."""
    tool = find_nvdisasm()
    assert tool is not None, NO_NVDISASM
    file = folder / "kernels.cubin"
    file.write_bytes(cubin)
    done = subprocess.run([tool, "-c", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return parse(done.stdout)


# ---- instructions -----------------------------------------------------

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
LEAVES = ("EXIT", "RET")
LOADS_16 = re.compile(r"(LDG|LDGSTS)\.\S*\b128\b")
STORES_16 = re.compile(r"STG\.\S*\b128\b")
LOCAL = re.compile(r"(LDL|STL)\b")


class Instruction(NamedTuple):
    text: str
    """Opcode with its modifiers."""
    predicate: str | None
    target: str | None
    """Label that a branch goes to."""
    falls: bool
    """Whether the next instruction may follow."""


class Turn(NamedTuple):
    """What one turn of a loop executes."""

    instructions: int
    special: int
    """Of those, exponentials, reciprocals and their like, which a quarter of an SM takes 4 of in a clock."""
    loads: int
    """Of 16 bytes, from global memory."""
    stores: int
    narrow: int
    """Loads and stores of global memory that are narrower; those behind a predicate, which an aligned row switches off, count as
    instructions alone."""


class Kernel:
    """The instructions of one kernel and where its labels point."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        self.instructions, self.labels = instructions, labels

    def successors(self, at: int) -> list[int]:
        one = self.instructions[at]
        found = [at + 1] if one.falls and at + 1 < len(self.instructions) else []
        if one.target in self.labels:
            found.append(self.labels[one.target])
        return found

    @property
    def local(self) -> int:
        """Loads and stores of local memory: spills, and arrays that no register holds."""
        return sum(bool(LOCAL.match(one.text)) for one in self.instructions)

    def loops(self) -> list[Turn]:
        """One turn of each innermost loop, on the path that its wide loads and stores are on.

        A turn is the way from where a backward branch leads to that branch. Of all ways the one with
        the most accesses of 16 bytes is taken, then the one with the fewest instructions: an aligned
        row, and no target among these columns.
        """
        found = []
        for at, one in enumerate(self.instructions):
            head = self.labels.get(one.target or "", math.inf)
            if one.text.startswith("BRA") and head <= at:
                found.append(self._turn(int(head), at))
        return [path for path in found if path is not None]

    def _turn(self, head: int, last: int) -> Turn | None:
        best: dict[int, Turn | None] = {}
        stack = [(head, False)]
        while stack:
            at, done = stack.pop()
            if at == last:
                best[at] = _add(self.instructions[at], Turn(0, 0, 0, 0, 0))
                continue
            inside = [to for to in self.successors(at) if head < to <= last]
            if not done:
                if at in best:
                    continue
                best[at] = None  # being visited: a way back to it is another loop's
                stack.append((at, True))
                stack += [(to, False) for to in inside if to not in best]
                continue
            ways = [way for to in inside if (way := best.get(to)) is not None]
            if ways:
                fastest = max(ways, key=lambda w: (w.loads + w.stores, -w.instructions))
                best[at] = _add(self.instructions[at], fastest)
        return best[head]


def _add(one: Instruction, rest: Turn) -> Turn:
    load, store = bool(LOADS_16.match(one.text)), bool(STORES_16.match(one.text))
    narrow = one.text.startswith(("LDG", "STG")) and not (load or store or one.predicate)
    counts = (one.text != "NOP", one.text.startswith("MUFU"), load, store, narrow)
    return Turn(*(have + more for have, more in zip(rest, counts, strict=True)))


def parse(text: str) -> dict[str, Kernel]:
    """Kernels of nvdisasm's text, each a section `.text.NAME`."""
    found = {}
    for section in re.split(r"^\t\.section\t\.text\.", text, flags=re.MULTILINE)[1:]:
        name = section.split(",")[0]
        instructions: list[Instruction] = []
        labels: dict[str, int] = {}
        for line in section.splitlines():
            label = _LABEL.match(line)
            if label:
                labels[label.group(1)] = len(instructions)
            match = _INSTRUCTION.match(line)
            if match:
                predicate, opcode, operands = match.groups()
                target = _TARGET.search(operands) if opcode.startswith(("BRA", "UBRA")) else None
                # Conditional by a predicate before it, or by one among its operands.
                always = not predicate and not re.match(r"!?U?P\w+\s*,", operands)
                leaves = target is not None or opcode.startswith(LEAVES)
                instructions.append(
                    Instruction(
                        opcode, predicate, target and target.group(1), not (leaves and always)
                    )
                )
        found[name] = Kernel(instructions, labels)
    return found


class Hot(NamedTuple):
    """The main loop of a kernel that streams over columns; of a thread, for each of its columns."""

    instructions: float
    special: float
    columns: int
    """Of one turn."""
    turn: Turn


def hot_loop(kernel: Kernel, itemsize: int, bundle: int) -> Hot:
    """The loop that reads the most of a row at a time: whole bundles of columns, 16 bytes a load."""
    loads = bundle * itemsize // 16
    loops = [turn for turn in kernel.loops() if turn.loads and turn.loads % loads == 0]
    assert loops, f"no loop loads {bundle} columns by 16 bytes at a time"
    turn = min(loops, key=lambda turn: (turn.instructions / turn.loads, turn.narrow))
    columns = turn.loads * 16 // itemsize
    return Hot(turn.instructions / columns, turn.special / columns, columns, turn)


# ---- occupancy --------------------------------------------------------


class Multiprocessor(NamedTuple):
    """What one holds: blocks, warps, bytes of shared memory (CUDA programming guide, compute
    capabilities)."""

    blocks: int
    warps: int
    shared: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(32, 64, 164 << 10),
    "sm_86": Multiprocessor(16, 48, 100 << 10),
    "sm_89": Multiprocessor(24, 48, 100 << 10),
    "sm_90": Multiprocessor(32, 64, 228 << 10),
    "sm_100": Multiprocessor(32, 64, 228 << 10),
    "sm_120": Multiprocessor(24, 48, 100 << 10),
}
REGISTERS_OF_SM, PARTITIONS, UNIT = 65_536, 4, 256  # registers go to a warp in units of 256
RESERVED_SHARED, SHARED_UNIT = 1024, 128  # bytes a block, of shared memory


def blocks_of(arch: str, registers: int, shared: int, threads: int) -> int:
    """Blocks that a multiprocessor holds at a time."""
    most, warps = MULTIPROCESSORS[arch], -(-threads // 32)
    of_warp = -(-registers * 32 // UNIT) * UNIT
    held = PARTITIONS * (REGISTERS_OF_SM // PARTITIONS // of_warp)  # warps
    taken = -(-(shared + RESERVED_SHARED) // SHARED_UNIT) * SHARED_UNIT
    return min(most.blocks, most.warps // warps, held // warps, most.shared // taken)
