"""What goes wrong around the kernels: memory that runs out, environments that lack something, cold starts, threads."""

import os
import subprocess
import sys
import threading

import pytest
import torch
import warm
from logps_cases import KERNELS, device_of, random_case
from torch.utils._python_dispatch import TorchDispatchMode

from dpo_ext.torch import linear_preference_loss, linear_sequence_logps, sequence_logps
from dpo_ext.torch.logps import cuda as kernels
from dpo_ext.torch.logps import ops

PLAIN = (1.0, 0.0, 1.0)


def child(code, *, timeout=120, **env):
    """Output of a Python process; a value of None takes the variable out of its environment."""
    merged = {
        k: v for k, v in {**os.environ, "OMP_NUM_THREADS": "1", **env}.items() if v is not None
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=merged,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def warm_child(code):
    done = warm.run(code)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- K13: the same bits -------------------------------------------------------------------------


@pytest.mark.fault("K13")
@pytest.mark.parametrize("impl", KERNELS)
def test_a_hundred_runs_give_the_same_bits_and_a_row_alone_has_them_too(impl):
    logits, table = random_case(1, V=5003, S=8, longest=6, dtype=torch.bfloat16, weights=True)
    z, table = (part.to(device_of(impl)) for part in (logits, table))
    before, first = torch.get_num_threads(), None
    try:
        for n in range(100):
            torch.set_num_threads(1 + n % 3)
            x = z.clone().requires_grad_()
            value = sequence_logps(x, table, impl=impl)
            value.sum().backward()
            first = first or (value.detach(), x.grad)
            assert torch.equal(value, first[0])
            assert torch.equal(x.grad, first[1])
    finally:
        torch.set_num_threads(before)
    scores = torch.ops.dpo_ext.token_stats(z, table.logit_rows, table.targets, *PLAIN, True)
    for i, row in enumerate(table.logit_rows.tolist()):
        zero = torch.zeros(1, dtype=torch.int64, device=z.device)
        alone = torch.ops.dpo_ext.token_stats(
            z[row : row + 1], zero, table.targets[i : i + 1], *PLAIN, True
        )
        for one, many in zip(alone, scores, strict=True):
            assert torch.equal(one, many[i : i + 1])


# ---- K14: out of memory -------------------------------------------------------------------------


class FailAt(TorchDispatchMode):
    """The n-th call that may allocate fails as the allocator of a device does."""

    def __init__(self, n):
        super().__init__()
        self.left = n
        self.failed = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view and not func._schema.is_mutable:
            if self.left == 0:
                self.failed = True
                raise torch.OutOfMemoryError("planted")
            self.left -= 1
        return func(*args, **(kwargs or {}))


def sweep(attempt, unchanged, expected):
    """Fails every allocation of `attempt` once; then nothing has changed, and a retry gives `expected`."""
    n = 0
    while True:
        with FailAt(n) as mode:
            try:
                got = attempt()
            except torch.OutOfMemoryError:
                got = None
        if not mode.failed:
            break
        assert got is None, f"allocation {n} failed, and nobody was told"
        unchanged()
        n += 1
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    return n


@pytest.mark.fault("K14")
def test_the_launch_layer_allocates_before_it_writes(emulator):
    logits, table = random_case(2, V=40, S=4, longest=5)
    parts = (table.logit_rows[:4].clone(), table.targets[:4].clone())
    grad = torch.randn(8)[::2]  # a copy is needed
    scores = kernels.token_stats(logits, *parts, *PLAIN, False)
    expected = ops._logits_grad_cuda(logits, *parts, *scores[1:3], grad, *PLAIN)
    z, version = logits.clone(), None

    def in_place():
        nonlocal version
        version = z._version
        ops._logits_grad_in_place_cuda(z, *parts, *scores[1:3], grad, *PLAIN)
        return (z,)

    def unchanged():
        assert torch.equal(z, logits)
        assert z._version == version
        assert not emulator.launched

    emulator.launched.clear()
    assert sweep(in_place, unchanged, (expected,)) == 2  # its table, and the copy of `grad`
    assert z._version == version + 1


@pytest.mark.fault("K14")
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_backward_pass_without_memory_leaves_the_logits_and_can_be_run_again(impl, inplace):
    logits, table = random_case(3, V=40, S=4, longest=5, weights=True)
    table = table.to(device_of(impl))
    leaf = logits.to(table.device).requires_grad_()
    z = leaf * 1
    g = torch.randn(table.n_groups, 2, device=z.device)
    plain = sequence_logps(leaf, table, impl=impl)
    expected = torch.autograd.grad(plain, leaf, g)
    value = sequence_logps(z, table, impl=impl, inplace_grad=inplace)

    def backward():
        return torch.autograd.grad(value, z, g, retain_graph=True)

    def unchanged():
        assert torch.equal(z, leaf)

    assert sweep(backward, unchanged, expected) >= 3
    assert torch.equal(z, expected[0]) is inplace


@pytest.mark.fault("K14")
@pytest.mark.parametrize("plan", ["frozen", "recompute", "pairwise"])
def test_a_head_without_memory_changes_nothing_and_can_be_run_again(plan):
    logits, table = random_case(4, V=6, S=4, longest=4)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(logits), 5, generator=generator).requires_grad_()
    weight = torch.randn(6, 5, generator=generator).requires_grad_(plan != "frozen")
    inputs = [p for p in (hidden, weight) if p.requires_grad]
    kept = [p.detach().clone() for p in inputs]

    def step():
        if plan == "pairwise":
            ref = torch.zeros(table.n_groups, 2)
            out = linear_preference_loss(hidden, weight, table, ref, plan=plan, chunk_rows=3).loss
        else:
            out = linear_sequence_logps(hidden, weight, table, plan=plan, chunk_rows=3).sum()
        return torch.autograd.grad(out, inputs)

    def unchanged():
        assert all(torch.equal(a, b) for a, b in zip(inputs, kept, strict=True))
        assert all(p.grad is None for p in inputs)

    assert sweep(step, unchanged, step()) > 10


@pytest.mark.slow
@pytest.mark.fault("K14")
@pytest.mark.skipif(sys.platform != "linux", reason="needs RLIMIT_AS")
def test_a_process_without_memory_gets_an_error_and_goes_on():
    """The gradient of 256 MB does not fit; in place it does; with the limit lifted it fits."""
    code = (
        "import resource, torch\n"
        "from dpo_ext.torch import ScoreTable, sequence_logps\n"
        "z = torch.zeros(64, 1_000_000).requires_grad_()\n"
        "t = ScoreTable(logit_rows=[3, 7], targets=[1, 2], seq_offsets=[0, 1, 2])\n"
        "sequence_logps(z[:4, :10] * 1, ScoreTable(logit_rows=[0, 1], targets=[1, 2],"
        " seq_offsets=[0, 1, 2])).sum().backward(); z.grad = None\n"
        "value = sequence_logps(z, t)\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "soft, hard = resource.getrlimit(resource.RLIMIT_AS)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20), hard))\n"
        "try:\n"
        "    value.sum().backward(retain_graph=True)\n"
        "except RuntimeError as error:\n"
        "    assert 'memory' in str(error), error\n"
        "else:\n"
        "    raise SystemExit('it fitted')\n"
        "assert not z.any() and z.grad is None\n"
        "with torch.no_grad():\n"
        "    s = torch.ops.dpo_ext.token_stats(z, t.logit_rows, t.targets, 1.0, 0.0, 1.0, False)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (soft, hard))\n"
        "value.sum().backward()\n"
        "assert z.grad[3, 1] > 0.99 and z.grad[3, 0] < 0 and not z.grad[4].any()\n"
    )
    warm_child(code)


# ---- K15: what is missing -----------------------------------------------------------------------

IMPORTS = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Hidden())
import dpo_ext
assert "torch" not in sys.modules and "cupy" not in sys.modules
import torch
from dpo_ext import KernelUnavailable
from dpo_ext.torch.logps import cuda as kernels
from dpo_ext.torch import ScoreTable, sequence_logps
labels = torch.tensor([[-100, 1], [-100, 3]])
z = torch.zeros(2, 2, 4).requires_grad_()
table = ScoreTable.from_labels(labels)
sequence_logps(z, table).sum().backward()
assert "cupy" not in sys.modules
for attempt in (lambda: sequence_logps(z, table, impl="cuda"), kernels.require):
    try:
        attempt()
    except KernelUnavailable as error:
        print(error)
torch.cuda.is_available = lambda: True
try:
    kernels.require()
except KernelUnavailable as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.fault("K15")
@pytest.mark.parametrize(
    ("hidden", "env", "hint"),
    [
        (["cupy", "cupy_backends"], {}, "hint: pip install cupy-cuda"),
        ([], {"CUPY_CACHE_DIR": "/dev/null/cache"}, "hint: set CUPY_CACHE_DIR"),
        ([], {"HOME": "/dev/null", "CUPY_CACHE_DIR": None}, "hint: set CUPY_CACHE_DIR"),
    ],
    ids=["no CuPy", "no cache folder", "no HOME"],
)
def test_a_stripped_environment_imports_computes_and_says_what_to_install(hidden, env, hint):
    if not hidden:
        pytest.importorskip("cupy", reason="CuPy is not installed")
    said = child(f"HIDDEN = {hidden!r}\n{IMPORTS}", CUDA_VISIBLE_DEVICES="", **env)
    assert said.count('hint: use impl="') == 2
    if not hidden and "update the driver" in said:
        pytest.skip("this CuPy creates its cache folder when it compiles")
    assert hint in said


# ---- K16: cold starts ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.fault("K16")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_eight_processes_that_start_cold_together_agree():
    """Nothing of ours has run before the fork: pool and detection of the CPU start in each child at once."""
    code = (
        "import os, sys, torch\n"
        "from dpo_ext.torch.logps import ops\n"
        "torch.set_num_threads(2)\n"
        "rows = torch.arange(64)\n"
        "z = torch.linspace(-9, 9, 64 * 5000).sin().mul(7).view(64, 5000)\n"
        "go, starter = os.pipe()\n"
        "children = []\n"
        "for _ in range(8):\n"
        "    out, end = os.pipe()\n"
        "    if os.fork() == 0:\n"
        "        os.close(starter); os.read(go, 1)\n"
        "        s = torch.ops.dpo_ext.token_stats(z, rows, rows.int(), 1.0, 0.0, 1.0, True)\n"
        "        d = torch.ops.dpo_ext.logits_grad(z, rows, rows.int(), s[1], s[2], s[0], 1.0, 0.0, 1.0)\n"
        "        import hashlib\n"
        "        digest = hashlib.sha256(b''.join(t.numpy().tobytes() for t in (*s, d))).digest()\n"
        "        os.write(end, digest); os._exit(0)\n"
        "    os.close(end); children.append(out)\n"
        "os.close(starter)\n"
        "results = {os.read(out, 32) for out in children}\n"
        "assert all(os.wait()[1] == 0 for _ in children)\n"
        "assert len(results) == 1 and len(results.pop()) == 32, results\n"
    )
    warm_child(code)


# ---- K10: streams -------------------------------------------------------------------------------


@pytest.mark.fault("K10")
def test_each_thread_launches_on_its_own_current_stream(monkeypatch):
    """Autograd runs backward on a thread of its own: what another thread's current stream is does not matter."""
    from contextlib import nullcontext
    from types import SimpleNamespace

    local, launched = threading.local(), {}
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=local.stream)
    )

    def run(grid, block, arguments, *, stream):
        launched.setdefault(local.number, []).append(stream.ptr)

    monkeypatch.setattr(kernels, "_on_device", lambda *_: run)
    values, offsets = torch.ones(3), torch.tensor([0, 3], dtype=torch.int32)

    def work(stream):
        local.number = stream  # a finished thread's own ident is given out again
        for n in range(50):
            local.stream = stream + n
            kernels.segment_sum(values, None, offsets)

    threads = [threading.Thread(target=work, args=(1000 * k,)) for k in range(1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(launched.values()) == [[1000 * k + n for n in range(50)] for k in range(1, 5)]
