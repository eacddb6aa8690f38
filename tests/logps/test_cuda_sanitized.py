"""The kernels on the host under ASan and UBSan, and planted faults, each of which must be caught for its own reason."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest
from cuda_host.emulator import compile_cached

from dpo_ext.torch.logps import cuda as kernels

pytestmark = pytest.mark.slow

FLAGS = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
}

# name: (file, what is edited, what it becomes, what the run must say)
FAULTS = {
    "barrier before the block's merge": (
        "token_stats.cu",
        "__syncthreads();  // (1)",
        "// (1)",
        "WRONG",
    ),
    "barrier before the tiles' merge": (
        "token_stats.cu",
        "__syncwarp();  // (2)",
        "// (2)",
        "WRONG",
    ),
    "barrier in all warps but one": (
        "token_stats.cu",
        "__syncthreads();  // (1)",
        "if (warp) __syncthreads();  // (1)",
        "divergent barrier",
    ),
    "barrier of the segment sum": (
        "segment_sum.cu",
        "__syncthreads();  // (1)",
        "// (1)",
        "WRONG: segment sum|WRONG: far segment sum",
    ),
    "half a mask": ("token_stats.cu", "0xffffffffu, part.max", "0xffffu, part.max", "mask"),
    "an exit before the shuffles": (
        "segment_sum.cu",
        "if (me >= 32) return;",
        "if (me >= 16) return;",
        "not in its mask or exited",
    ),
    "one element too many": (
        "token_stats.cu",
        ": columns - W * group;",
        ": columns - W * group + 1;",
        "heap-buffer-overflow",
    ),
    "one zero too many": (
        "logits_grad.cu",
        "k < columns - WIDTH<T> * group; ++k)",
        "k <= columns - WIDTH<T> * group; ++k)",
        "heap-buffer-overflow|gap written|WRONG: gradient",
    ),
    "a wide load of any address": ("reduce.cuh", "% 16 == 0", "% 1 == 0", "misaligned address"),
    "phantom columns that count": (
        "token_stats.cu",
        "of_group[k] : -INFINITY",
        "of_group[k] : 0.f",
        "WRONG: log-prob",
    ),
    "the target counted twice": (
        "token_stats.cu",
        "if (k == at) y[k] = -INFINITY;",
        "",
        "WRONG: log-prob",
    ),
    "a masked row that is read": (
        "token_stats.cu",
        "if (target == IGNORE) return Place::not_scored;",
        "if (target == IGNORE) return Place::found;",
        "AddressSanitizer|WRONG: not scored",
    ),
    "a target that is not checked": (
        "token_stats.cu",
        "target >= 0 && target < columns",
        "target >= 0",
        "heap-buffer-overflow|WRONG: missing target",
    ),
    "a 32-bit offset of a row of logits": (
        "token_stats.cu",
        "r * stride",
        "(int)r * (int)stride",
        "SEGV|signed integer overflow|WRONG",
    ),
    "a 32-bit offset of a row of the gradient": (
        "logits_grad.cu",
        "r * out_stride",
        "(int)r * (int)out_stride",
        "SEGV|signed integer overflow|WRONG: far gradient",
    ),
    "a 32-bit place of a token": (
        "segment_sum.cu",
        "for (long long t = first + (long long)me;",
        "for (int t = first + me;",
        "signed integer overflow|SEGV",
    ),
    "the target of another thread": (
        "logits_grad.cu",
        "(of_target - groups.first) % THREADS == me",
        "(of_target - groups.first + 1) % THREADS == me",
        "WRONG: gradient|WRONG: in place",
    ),
    "the upper column of a pair twice": (
        "reduce.cuh",
        "pair & 0xffff0000u : pair << 16",
        "pair & 0xffff0000u : pair & 0xffff0000u",
        "WRONG: mean|WRONG: log-prob",
    ),
    "a target that is left in its batch": (
        "token_stats.cu",
        "< (unsigned)(N * THREADS)",
        "< (unsigned)THREADS",
        "WRONG: log-prob|WRONG: entropy",  # of a target that is unlikely, the entropy says it first
    ),
    "a tile left out": (
        "token_stats.cu",
        "for (int tile = 1; tile < tiles; ++tile) part = merge<STATS>(part, of_tile",
        "for (int tile = 2; tile < tiles; ++tile) part = merge<STATS>(part, of_tile",
        "WRONG",
    ),
}


def run(program):
    return subprocess.run(
        [program],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.fault("K1", "K2", "K4", "K5", "K7")
def test_kernels_are_clean_under_sanitizers():
    done = run(compile_cached("sanitized.cpp", kernels.CUDA_FOLDER, FLAGS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "launches agree with float64" in done.stdout


@pytest.mark.fault("K1", "K4", "K5", "K7")
@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, tmp_path):
    file, before, after, expected = FAULTS[name]
    folder = tmp_path / "cuda"
    shutil.copytree(kernels.CUDA_FOLDER, folder)
    text = (folder / file).read_text()
    assert before in text, "the edit changes nothing"
    (folder / file).write_text(text.replace(before, after))
    done = run(compile_cached("sanitized.cpp", folder, [*FLAGS, "-DQUICK", "-w"]))
    said = done.stdout + done.stderr
    assert done.returncode != 0, "not caught"
    assert any(word in said for word in expected.split("|")), (
        f"failed for another reason:\n{said[:2000]}"
    )
