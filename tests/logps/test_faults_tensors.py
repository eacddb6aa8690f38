"""Tensors that nobody expected: layouts, sizes, dtypes, devices; honoured, or refused before anything is written."""

import itertools
import math

import numpy as np
import pytest
import torch
from compare import assert_no_worse
from logps_cases import DTYPES, IMPLS, device_of, oracle, ordinary

from dpo_ext import KernelUnavailable, TensorError
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    linear_token_scores,
    preference_loss,
    sequence_logps,
    token_kl,
    token_scores,
)
from dpo_ext.torch.logps import cuda as kernels
from dpo_ext.torch.logps import ops

OPS = torch.ops.dpo_ext
PLAIN = (1.0, 0.0, 1.0)
EVERY_DTYPE = [
    *(torch.float32, torch.bfloat16, torch.float16, torch.float64),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool),
]
TABLE = ScoreTable(logit_rows=[5, 0, 3, 7], targets=[12, 0, -100, 6], seq_offsets=[0, 2, 2, 3, 4])
UPSTREAM = torch.tensor([[1.0, -0.5], [0.25, 2.0]])

# How (8, 13) or (2, 4, 13) logits may lie in memory: (48, 40) numbers, and what is taken of them.
LAYOUTS = {
    "contiguous": lambda w: w.flatten()[:104].view(8, 13),
    "three dimensions": lambda w: w.flatten()[:104].view(2, 4, 13),
    "2-byte aligned": lambda w: w.flatten()[1:105].view(8, 13),
    "7 elements off": lambda w: w.flatten()[7:111].view(2, 4, 13),
    "columns of wider rows": lambda w: w[:8, 3:16],
    "every other row": lambda w: w[1:17:2, :13],
    "rows of a longer sequence": lambda w: w.view(4, 12, 40)[:2, 2:6, 5:18],
    "no common row stride": lambda w: w.view(4, 12, 40)[1:3, :8:2, :13],
    "batch outermost in memory last": lambda w: w[:8, :13].view(4, 2, 13).transpose(0, 1),
    "vocabulary outermost in memory": lambda w: w[:13, :8].t(),
    "every other column": lambda w: w[:8, :26:2],
    "one row for all": lambda w: w[:1, :13].expand(8, 13),
}


@pytest.mark.fault("K4")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_twelve_layouts_forward_and_backward(impl, dtype, layout):
    assert len(LAYOUTS) == 12
    whole = torch.randn(48, 40, generator=torch.Generator().manual_seed(0)) * 3
    view = LAYOUTS[layout](whole.to(device_of(impl), dtype))
    dense = view.reshape(8, 13).clone()
    table, g = TABLE.to(view.device), UPSTREAM.to(view.device)
    results = []
    for z in (view.detach(), dense.view(view.shape)):
        z.requires_grad_()
        value = sequence_logps(z, table, impl=impl, softcap=9.0, temperature=0.7)
        results.append((value.detach(), torch.autograd.grad(value, z, g)[0]))
    assert results[0][1].shape == view.shape
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    value, grad = results[0][0].cpu(), results[0][1].reshape(8, 13).cpu()
    how = {"softcap": 9.0, "temperature": 0.7}
    true_value, true_grad = oracle(dense, TABLE, UPSTREAM, **how)
    base_value, base_grad = ordinary(dense.cpu(), TABLE, UPSTREAM, **how)
    assert_no_worse(value, base_value, true_value, slack=1e-5)
    rounding = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert_no_worse(grad, base_grad, true_grad, slack=2 * rounding)


@pytest.mark.fault("K2")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_more_than_2_to_the_31_elements_apart_on_the_cpu(dtype):
    """Memory of which a few pages are ever touched, forward and backward, in place and not."""
    far, V = 2**31 + 5, 37
    values = torch.randn(2, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = torch.empty(far + V, dtype=dtype).as_strided((2, V), (far, 1))
    logits.copy_(values)
    table = (torch.tensor([1, 0]), torch.tensor([V - 1, 3], dtype=torch.int32))
    grad = torch.tensor([2.0, 1.0])
    results = []
    for z in (values, logits):
        scores = OPS.token_stats(z, *table, *PLAIN, True)
        dz = OPS.logits_grad(z, *table, *scores[1:3], grad, *PLAIN)
        OPS.logits_grad_(z, *table, *scores[1:3], grad, *PLAIN)
        results.append((*scores, dz, z))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(results[0][-1], results[0][-2])


@pytest.mark.fault("K3")
@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_sequence_is_zero_and_more_rows_than_a_grid_is_high_are_scored(impl):
    z = torch.randn(70_000, 3).to(device_of(impl)).requires_grad_()
    table = ScoreTable(
        logit_rows=torch.arange(70_000),
        targets=torch.zeros(70_000, dtype=torch.int32),
        seq_offsets=torch.cat([torch.zeros(1), torch.arange(70_001)]).to(torch.int32),
        group_size=1,
    ).to(z.device)
    value = sequence_logps(z, table, impl=impl)
    assert value[0] == 0
    torch.testing.assert_close(value[1:, 0], z.log_softmax(-1)[:, 0], rtol=1e-6, atol=1e-6)
    value.sum().backward()
    expected = torch.zeros(3, device=z.device)
    expected[0] = 1
    torch.testing.assert_close(z.grad, expected - z.detach().softmax(-1), rtol=1e-5, atol=1e-6)


# ---- K8: dtypes ---------------------------------------------------------------------------------


@pytest.fixture
def core(monkeypatch):
    """Counts what reaches the kernels, on the CPU and through the launch layer."""
    reached = []

    class Spy:
        def __getattr__(self, name):
            reached.append(name)
            return getattr(real, name)

    real = ops._core
    monkeypatch.setattr(ops, "_core", Spy())
    monkeypatch.setattr(kernels, "launch", lambda kernel, *_: reached.append(kernel))
    monkeypatch.setattr(kernels, "processors", lambda device: 132)
    return reached


def refused_before_launch(reached, call):
    """Whether `call` raises TensorError; nothing may have been launched then."""
    reached.clear()
    try:
        call()
    except TensorError:
        assert not reached
        return True
    assert reached
    return False


@pytest.mark.fault("K8")
@pytest.mark.parametrize("forms", ["CPU", "CUDA"])
def test_every_product_of_dtypes_is_accepted_as_documented_or_refused(core, forms):
    """On a device the same checks stand before the launch: called here on CPU tensors."""
    on_cpu = forms == "CPU"
    stats = OPS.token_stats if on_cpu else ops._token_stats_cuda
    fresh = OPS.logits_grad if on_cpu else ops._logits_grad_cuda
    in_place = OPS.logits_grad_ if on_cpu else ops._logits_grad_in_place_cuda
    segments = OPS.segment_sum if on_cpu else ops._segment_sum_cuda
    z = {d: torch.zeros(3, 4).to(d) for d in EVERY_DTYPE}
    one = {d: torch.zeros(2).to(d) for d in EVERY_DTYPE}
    taken = set()
    for kinds in itertools.product(EVERY_DTYPE, repeat=3):
        logits, rows, targets = z[kinds[0]], one[kinds[1]], one[kinds[2]]
        if not refused_before_launch(core, lambda a=(logits, rows, targets): stats(*a, *PLAIN, 1)):
            taken.add(kinds)
    assert taken == {(d, torch.int64, torch.int32) for d in DTYPES}
    rows, targets = one[torch.int64], one[torch.int32]
    for call, logits_dtype in itertools.product((fresh, in_place), DTYPES):
        taken = set()
        for kinds in itertools.product(EVERY_DTYPE, repeat=3):
            saved = [one[k] for k in kinds]
            arguments = (z[logits_dtype], rows, targets, *saved, *PLAIN)
            if not refused_before_launch(core, lambda a=arguments, f=call: f(*a)):
                taken.add(kinds)
        assert taken == {(torch.float32,) * 3}
    offsets = {d: torch.tensor([0, 2]).to(d) for d in EVERY_DTYPE}
    taken = set()
    for a, b, c in itertools.product(EVERY_DTYPE, [*EVERY_DTYPE, None], EVERY_DTYPE):
        arguments = (one[a], None if b is None else one[b], offsets[c])
        if not refused_before_launch(core, lambda a=arguments: segments(*a)):
            taken.add((a, b, c))
    weights = (torch.float32, None)
    assert taken == {(torch.float32, w, torch.int32) for w in weights}


@pytest.mark.fault("K8")
def test_a_table_takes_its_four_dtypes_and_no_mask():
    right = {
        "logit_rows": torch.int64,
        "targets": torch.int32,
        "seq_offsets": torch.int32,
        "weights": torch.float32,
    }
    fields = {"logit_rows": [0, 1], "targets": [1, 0], "seq_offsets": [0, 1, 2], "weights": [1, 0]}
    for name, dtype in itertools.product(right, EVERY_DTYPE):
        parts = {n: torch.tensor(v).to(right[n]) for n, v in fields.items()}
        parts[name] = parts[name].to(dtype)
        if dtype == right[name]:
            ScoreTable(**parts)
            continue
        with pytest.raises(TensorError, match=f"`{name}` must be {str(right[name])[6:]}, found"):
            ScoreTable(**parts)
    for dtype in EVERY_DTYPE:
        labels = torch.tensor([[1, 2], [3, 4]]).to(dtype)
        if dtype in (torch.int64, torch.int32):
            ScoreTable.from_labels(labels)
            continue
        with pytest.raises(TensorError, match="`labels` must be int64 or int32"):
            ScoreTable.from_labels(labels)


@pytest.mark.fault("K8")
@pytest.mark.parametrize("impl", ["auto", "cpu", "torch"])
def test_entry_points_take_four_float_dtypes(impl):
    hidden, weight = torch.randn(8, 6), torch.randn(13, 6)
    for dtype in EVERY_DTYPE:
        h, w = hidden.to(dtype), weight.to(dtype)
        z = torch.randn(8, 13).to(dtype)
        calls = [
            lambda z=z: sequence_logps(z, TABLE, impl=impl),
            lambda z=z: token_scores(z, TABLE, impl=impl).logps,
            lambda h=h, w=w: linear_sequence_logps(h, w, TABLE, impl=impl),
            lambda h=h, w=w: linear_token_scores(h, w, TABLE, impl=impl).logps,
            lambda h=h, w=w: linear_preference_loss(h, w, TABLE, torch.zeros(2, 2), impl=impl).loss,
        ]
        for call in calls:
            if dtype in DTYPES or (dtype == torch.float64 and impl != "cpu"):
                assert call().isfinite().all()
                continue
            with pytest.raises(TensorError, match=r"`(logits|hidden)` must (be|have)"):
                call()


# ---- K9: devices --------------------------------------------------------------------------------


def entry_points(impl=None):
    """name -> (arguments that are tensors or tables, the call that takes them)."""
    how = {} if impl is None else {"impl": impl}
    z, h, w = torch.randn(8, 13), torch.randn(8, 6), torch.randn(13, 6)
    ref, bias = torch.zeros(2, 2), torch.zeros(13)
    trained = w.clone().requires_grad_()

    def pairwise(*a):
        return linear_preference_loss(*a[:4], bias=a[4], plan="pairwise", **how)

    return {
        "sequence_logps": ((z, TABLE), lambda *a: sequence_logps(*a, **how)),
        "token_scores": ((z, TABLE), lambda *a: token_scores(*a, **how)),
        "linear_sequence_logps": (
            (h, w, TABLE, bias),
            lambda *a: linear_sequence_logps(*a[:3], bias=a[3], **how),
        ),
        "linear_token_scores": ((h, w, TABLE), lambda *a: linear_token_scores(*a, **how)),
        "linear_preference_loss": (
            (h, w, TABLE, ref),
            lambda *a: linear_preference_loss(*a, **how),
        ),
        "pairwise": ((h, trained, TABLE, ref, bias), pairwise),
    }


@pytest.mark.fault("K9")
@pytest.mark.parametrize("name", [*entry_points(), "token_kl"])
def test_one_argument_on_another_device_is_refused(name):
    z = torch.randn(8, 13)
    points = entry_points() | {"token_kl": ((z, z * 2, TABLE), token_kl)}
    arguments, call = points[name]
    call(*arguments)
    for i in range(len(arguments)):
        moved = [a.to("meta") if i == k else a for k, a in enumerate(arguments)]
        with pytest.raises(TensorError, match=r"must be on|must hold values"):
            call(*moved)


@pytest.mark.fault("K9", "K15")
@pytest.mark.parametrize("name", entry_points("cuda"))
def test_a_cpu_tensor_for_the_cuda_kernels_is_refused(name, monkeypatch):
    arguments, call = entry_points("cuda")[name]
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match=r"no CUDA device: .*\nhint: use impl="):
            call(*arguments)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(TensorError, match="on a cuda device for impl="):
        call(*arguments)


@pytest.mark.fault("K9")
@pytest.mark.fake_cuda
def test_meta_and_fake_tensors_have_shapes_or_are_refused():
    from torch._subclasses.fake_tensor import FakeTensorMode

    meta = sequence_logps(torch.empty(8, 13, device="meta"), TABLE.to("meta"))
    assert (meta.shape, meta.is_meta) == ((2, 2), True)
    with pytest.raises(TensorError, match="must hold values, found a tensor on the meta device"):
        linear_sequence_logps(
            torch.empty(8, 6, device="meta"), torch.empty(13, 6, device="meta"), TABLE.to("meta")
        )
    with FakeTensorMode(allow_non_fake_inputs=True):
        labels = torch.empty(4, 4, dtype=torch.int64, device="cuda")
        hidden = torch.empty(4, 4, 6, dtype=torch.bfloat16, device="cuda")
        weight = torch.empty(13, 6, dtype=torch.bfloat16, device="cuda")
        table = ScoreTable.from_labels(labels)
        for w in (weight, weight.clone().requires_grad_()):
            value = linear_sequence_logps(hidden, w, table)
            assert (value.shape, value.device.type) == ((2, 2), "cuda")


@pytest.mark.fault("K9")
@pytest.mark.filterwarnings("ignore::FutureWarning:torch.*", "ignore::UserWarning:torch.*")
def test_dtensors_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for placement, (name, (arguments, call)) in itertools.product(
            (Shard(0), Replicate()), entry_points().items()
        ):
            for i in (0, 1) if "l" in name[:2] or name == "pairwise" else (0,):
                parts = list(arguments)
                parts[i] = distribute_tensor(arguments[i].detach(), mesh, [placement])
                with pytest.raises(TensorError, match="plain tensor, found a DTensor\nhint"):
                    call(*parts)
        whole = -torch.ones(2, 2)
        spread = distribute_tensor(whole, mesh, [Replicate()])
        counts = distribute_tensor(torch.ones(2, 2, dtype=torch.int64), mesh, [Replicate()])
        head = (torch.ones(4, 3), torch.ones(5, 3))
        table = ScoreTable(
            logit_rows=[0, 1, 2, 3], targets=[0, 1, 2, 3], seq_offsets=[0, 1, 2, 3, 4]
        )
        for call in (
            lambda: preference_loss(spread, whole),
            lambda: preference_loss(whole, spread),
            lambda: preference_loss(whole, lengths=counts, loss="simpo"),
            lambda: linear_preference_loss(*head, table, spread),
            lambda: token_kl(spread, whole, table),
            lambda: token_kl(whole, spread, table),
        ):
            with pytest.raises(TensorError, match=r"plain tensor, found a DTensor\nhint: use `"):
                call()
    finally:
        dist.destroy_process_group()


@pytest.mark.fault("K9")
def test_a_launch_enters_the_device_of_its_tensors(monkeypatch):
    """The kernel that CuPy caches is that of the current device, whatever the tensor's."""
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    def lookup(kernel, template, index):
        assert entered[-1] == torch.device("cuda", index)
        return lambda *_, stream: launched.append((index, stream.ptr))

    launched = []
    stream = type("Stream", (), {})
    monkeypatch.setattr(torch.cuda, "device", Guard)
    monkeypatch.setattr(kernels, "_on_device", lookup)
    monkeypatch.setattr(
        torch.cuda,
        "current_stream",
        lambda d: setattr(stream, "cuda_stream", 70 + d.index) or stream,
    )
    for index in (1, 0, 1):
        kernels.launch("segment_sum", (), (1, 1), (0, 0, 0, 0, 0), torch.device("cuda", index))
    assert launched == [(1, 71), (0, 70), (1, 71)]
    assert entered[-1] is None


@pytest.mark.fault("K6")
def test_a_nan_or_an_overflow_reaches_its_sequence_alone():
    z = torch.randn(8, 13, dtype=torch.float16)
    z[0] = torch.tensor(70_000.0).half()  # overflows to inf
    value = sequence_logps(z, TABLE)
    assert value.isnan().tolist() == [[True, False], [False, False]]
    assert math.isfinite(np.nansum(value.numpy()))
