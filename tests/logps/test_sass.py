"""How machine code is counted: on listings written by hand, and blocks an SM beside NVIDIA's own calculator."""

from __future__ import annotations

import itertools
import shutil
import subprocess

import pytest
import sass

LISTING = """
\t.section\t.text.fold,"ax",@progbits
.text.fold:
        /*0000*/                   LDG.E.CONSTANT R1, desc[UR4][R2.64] ;
        /*0010*/               @P0 EXIT ;
.L_x_0:
        /*0020*/                   MUFU.EX2 R4, R4 ;
        /*0030*/              @!P1 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E.U16 R5, desc[UR4][R2.64] ;
        /*0050*/                   BRA `(.L_x_2) ;
.L_x_1:
        /*0060*/               @P3 LDG.E.U16 R5, desc[UR4][R2.64+0x2] ;
        /*0070*/                   LDG.E.EF.128 R8, desc[UR4][R2.64] ;
        /*0080*/                   LDG.E.EF.128 R12, desc[UR4][R2.64+0x10] ;
.L_x_2:
        /*0090*/               @P2 BRA `(.L_x_3) ;
        /*00a0*/                   FSEL R1, R1, R2, P0 ;
.L_x_3:
        /*00b0*/                   STG.E.EF.128 desc[UR4][R2.64], R8 ;
        /*00c0*/                   NOP ;
        /*00d0*/                   ISETP.GE.AND P2, PT, R4, R5, PT ;
        /*00e0*/                   BRA.U !UP0, `(.L_x_0) ;
        /*00f0*/                   STL [R1], R2 ;
        /*0100*/                   EXIT ;
.L_x_4:
        /*0110*/                   BRA `(.L_x_4);
\t.section\t.text.other,"ax",@progbits
.text.other:
        /*0000*/                   EXIT ;
"""


def test_a_turn_of_a_loop_is_its_wide_way_and_no_instruction_more():
    fold, other = sass.parse(LISTING).values()
    assert (len(fold.instructions), fold.local) == (18, 1)
    # MUFU, BRA, the predicated load, two wide ones, BRA over FSEL, the store, ISETP, BRA.U; no NOP.
    assert fold.loops()[0] == (9, 1, 2, 1, 0)
    assert other.loops() == []
    hot = sass.hot_loop(fold, itemsize=2, bundle=16)
    assert (hot.columns, hot.instructions, hot.special) == (16, 9 / 16, 1 / 16)
    with pytest.raises(AssertionError, match="no loop loads 32 columns"):
        sass.hot_loop(fold, itemsize=2, bundle=32)


def test_a_narrow_load_on_the_wide_way_is_counted():
    always = LISTING.replace("@P3 LDG.E.U16", "    LDG.E.U16")
    assert sass.parse(always)["fold"].loops()[0].narrow == 1


def test_the_innermost_loop_is_taken():
    """Around the loop of the listing one that has a wide load of its own besides."""
    outer = LISTING.replace(
        "        /*00f0*/", "        /*00e8*/                   LDG.E.128 R4, [R2] ;\n"
        "        /*00ec*/               @P0 BRA `(.L_x_5) ;\n        /*00f0*/"
    ).replace("        /*0000*/                   LDG.E.CONSTANT", ".L_x_5:\n        /*0000*/                   LDG.E.CONSTANT")  # fmt: skip
    fold = sass.parse(outer)["fold"]
    assert [path.loads for path in fold.loops() if path.loads] == [2, 3]
    assert sass.hot_loop(fold, itemsize=2, bundle=16).columns == 16


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "blocks"),
    [
        ("sm_90", 64, 13_824, 4),  # 2048 registers a warp: 32 warps
        ("sm_90", 80, 13_824, 3),  # 2560: 24 warps, 6 in each quarter
        ("sm_90", 32, 0, 8),  # 64 warps, which is all there are
        ("sm_86", 32, 0, 6),  # 48 warps
        ("sm_86", 32, 50_000, 2),  # two times 49.8 KB, of 100
        ("sm_120", 72, 0, 3),
    ],
)
def test_blocks_an_sm_by_hand(arch, registers, shared, blocks):
    assert sass.blocks_of(arch, registers, shared, 256) == blocks


CALCULATOR = """
#include <cstdio>
#include <cuda_occupancy.h>
int main(int, char** word) {
    int n[8];
    while (std::scanf("%d %d %d %d %d %d %d", n, n + 1, n + 2, n + 3, n + 4, n + 5, n + 6) == 7) {
        cudaOccDeviceProp device;
        device.computeMajor = n[0], device.computeMinor = n[1];
        device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 32 * n[2];
        device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32, device.numSms = 1;
        device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = n[3];
        device.sharedMemPerBlockOptin = n[3] - 1024, device.reservedSharedMemPerBlock = 1024;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = 1024, kernel.numRegs = n[4], kernel.sharedSizeBytes = n[5];
        kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_DEFAULT;
        kernel.maxDynamicSharedSizeBytes = 0, kernel.numBlockBarriers = 1;
        cudaOccDeviceState state;
        cudaOccResult found;
        int wrong = cudaOccMaxActiveBlocksPerMultiprocessor(&found, &device, &kernel, &state, n[6], 0);
        std::printf("%d\\n", wrong ? -1 : found.activeBlocksPerMultiprocessor);
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_blocks_an_sm_are_those_of_nvidias_calculator(tmp_path):
    pathfinder = pytest.importorskip("cuda.pathfinder")
    include = pathfinder.find_nvidia_header_directory("cudart")
    source = tmp_path / "calculator.cc"
    source.write_text(CALCULATOR, encoding="utf-8")
    command = ["g++", "-w", f"-I{include}", str(source), "-o", str(tmp_path / "calculator")]
    subprocess.run(command, check=True)
    cases = list(
        itertools.product(
            sass.MULTIPROCESSORS, range(16, 129, 5), (0, 13_824, 24_000, 48_000), (128, 256, 512)
        )
    )
    lines = []
    for arch, registers, shared, threads in cases:
        number, (_, warps, memory) = int(arch.removeprefix("sm_")), sass.MULTIPROCESSORS[arch]
        lines.append(
            f"{number // 10} {number % 10} {warps} {memory} {registers} {shared} {threads}\n"
        )
    done = subprocess.run(
        [str(tmp_path / "calculator")], input="".join(lines), capture_output=True, text=True, check=True
    )  # fmt: skip
    expected = [int(line) for line in done.stdout.split()]
    found = [sass.blocks_of(*case) for case in cases]
    assert found == expected
