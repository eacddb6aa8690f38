"""What the log-probs promise to autograd, the compiler, checkpointing, autocast and CUDA graphs."""

import numpy as np
import pytest
import torch
from logps_cases import (
    DTYPES,
    HOWS,
    IMPLS,
    KERNELS,
    LABELS,
    UPSTREAM,
    device_of,
    logits_like,
    name_of,
    on,
    oracle,
)
from torch.utils.checkpoint import checkpoint

from dpo_ext import TensorError
from dpo_ext.torch import ScoreTable, linear_sequence_logps, sequence_logps


@pytest.mark.fault("K12")
@pytest.mark.parametrize("impl", IMPLS)
def test_one_of_several_outputs_with_its_own_upstream(impl):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    x = z.clone().requires_grad_()
    value = sequence_logps(x, table, impl=impl)
    (3.0 * value[1, 0] ** 2).backward()
    g = torch.zeros(2, 2)
    g[1, 0] = 6.0 * value[1, 0].item()
    _, truth = oracle(z.flatten(0, 1), table, g)
    np.testing.assert_allclose(x.grad.flatten(0, 1).cpu().numpy(), truth, atol=3e-5)


@pytest.mark.fault("K11")
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("how", HOWS, ids=name_of)
def test_the_gradient_in_place_has_the_same_bits(impl, dtype, how):
    z, table, g = on(impl, logits_like(dtype), ScoreTable.from_labels(LABELS), UPSTREAM)
    grads = []
    for inplace in (False, True):
        x = z.clone().requires_grad_()
        logits = x * 1
        sequence_logps(logits, table, impl=impl, inplace_grad=inplace, **how).backward(g)
        grads.append(x.grad)
        assert torch.equal(logits, z) is not inplace
    assert torch.equal(grads[0], grads[1])
    assert not grads[1].flatten(0, 1)[3].any()


@pytest.mark.fault("K11")
@pytest.mark.parametrize("impl", KERNELS)
def test_in_place_twice_or_with_another_consumer_is_autograds_error(impl):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    x = z.clone().requires_grad_()
    value = sequence_logps(x * 1, table, impl=impl, inplace_grad=True)
    value.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()
    logits = x * 1
    saved = logits.exp().sum() + logits.pow(2).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (saved + sequence_logps(logits, table, impl=impl, inplace_grad=True).sum()).backward()


@pytest.mark.fault("K4", "K11")
@pytest.mark.parametrize("impl", KERNELS)
def test_in_place_refuses_what_it_would_corrupt(impl):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    leaf = z.clone().requires_grad_()
    with pytest.raises(TensorError, match="a leaf that needs a gradient"):
        sequence_logps(leaf, table, impl=impl, inplace_grad=True)
    whole = torch.randn(4, 6, 10, device=z.device)
    for view in (whole[:, 1:5, :5], whole[..., ::2][:, :4], whole[:1, :1, :5].expand(4, 4, 5)):
        with pytest.raises(TensorError, match="rows of one stride"):
            sequence_logps(view, table, impl=impl, inplace_grad=True)
    with pytest.raises(ValueError, match="needs the kernels"):
        sequence_logps(leaf * 1, table, impl="torch", inplace_grad=True)
    with pytest.raises(ValueError, match="needs the kernels"):
        sequence_logps(leaf.double(), table, inplace_grad=True)
    assert torch.equal(leaf, z)


@pytest.mark.fault("K11")
@pytest.mark.parametrize("impl", KERNELS)
def test_in_place_without_a_gradient_writes_nothing(impl):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    kept = z.clone()
    sequence_logps(z, table, impl=impl, inplace_grad=True)
    with torch.no_grad():
        sequence_logps(z.requires_grad_() * 1, table, impl=impl, inplace_grad=True)
    assert torch.equal(z, kept)


@pytest.mark.fault("K11")
@pytest.mark.parametrize("impl", KERNELS)
def test_a_second_derivative_is_refused(impl):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    x = z.clone().requires_grad_()
    for upstream in (1.0, 2.0 * x.sum()):  # constant, and itself with a graph
        value = sequence_logps(x, table, impl=impl).sum() * upstream
        (grad,) = torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once"):
            (x.sum() + grad.pow(2).sum()).backward()


@pytest.mark.fault("K11")
@pytest.mark.parametrize("impl", KERNELS)
@pytest.mark.parametrize("inplace", [False, True])
def test_hooks_on_saved_tensors_and_on_gradients_are_honoured(impl, inplace):
    """What is unpacked from elsewhere takes the gradient in place; the logits stay, and a hook may change it."""
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    plain = z.clone().requires_grad_()
    sequence_logps(plain, table, impl=impl).sum().backward()
    x = z.clone().requires_grad_()
    logits = x * 1
    logits.register_hook(lambda grad: 2.0 * grad)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t.clone()):
        value = sequence_logps(logits, table, impl=impl, inplace_grad=inplace)
    value.sum().backward()
    assert torch.equal(x.grad, 2.0 * plain.grad)
    assert torch.equal(logits, z)


@pytest.mark.fault("K11")
@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_and_inference_mode_and_frozen_logits(impl):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    expected = sequence_logps(z, table, impl=impl)
    assert not expected.requires_grad
    x = z.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(sequence_logps(x, table, impl=impl), expected)
    with torch.inference_mode():
        assert torch.equal(sequence_logps(x * 1, table, impl=impl), expected)


@pytest.mark.fault("K11")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(impl, reentrant):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    grads = []
    for wrap in (False, True):
        x = z.clone().requires_grad_()

        def score(x):
            return sequence_logps(x * 2, table, impl=impl)

        value = checkpoint(score, x, use_reentrant=reentrant) if wrap else score(x)
        value.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.fault("K11")
@pytest.mark.parametrize("impl", IMPLS)
def test_autocast_changes_nothing(impl):
    for dtype in DTYPES:
        z, table = on(impl, logits_like(dtype), ScoreTable.from_labels(LABELS))
        expected = sequence_logps(z, table, impl=impl)
        with torch.autocast(device_of(impl), dtype=torch.bfloat16):
            value = sequence_logps(z, table, impl=impl)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)


@pytest.mark.fault("K11")
@pytest.mark.parametrize(
    ("impl", "inplace"),
    [
        ("torch", False),
        ("cpu", False),
        ("cpu", True),
        pytest.param("cuda", False, marks=pytest.mark.gpu),
        pytest.param("cuda", True, marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(impl, inplace, backend):
    torch._dynamo.reset()
    z, labels, g = on(impl, logits_like(), LABELS, UPSTREAM)
    weight = torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).to(z.device)

    def score(x, w):
        table = ScoreTable.from_labels(labels)
        options = {"softcap": 9.0, "temperature": 0.7, "inplace_grad": inplace, "impl": impl}
        return sequence_logps(x @ w, table, **options)

    results = []
    for function in (score, torch.compile(score, fullgraph=True, backend=backend)):
        x, w = z.clone().requires_grad_(), weight.clone().requires_grad_()
        value = function(x, w)
        value.backward(g)
        results.append((value.detach(), x.grad, w.grad))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


@pytest.mark.fault("K9")
@pytest.mark.fake_cuda
def test_fake_tensors_have_the_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        z = torch.empty(4, 4, 5, device="cuda", dtype=torch.bfloat16)
        value = sequence_logps(
            z, ScoreTable.from_labels(torch.empty(4, 4, dtype=torch.int64, device="cuda"))
        )
        assert (value.shape, value.dtype, value.device.type) == ((2, 2), torch.float32, "cuda")


# ---- on a GPU: nothing waits for the device -----------------------------------------------------


def training_steps(labels):
    """Loss of logits and of a head in both plans, as functions of tensors on the device."""
    generator = torch.Generator().manual_seed(0)
    hidden, upstream = torch.randn(4, 4, 6, generator=generator).cuda(), UPSTREAM.cuda()
    weight = torch.randn(5, 6, generator=generator).cuda()

    def given(plan):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(plan != "frozen")
        table = ScoreTable.from_labels(labels)
        if plan == "logits":
            value = sequence_logps(x @ w.T, table, impl="cuda", inplace_grad=True)
        else:
            value = linear_sequence_logps(x, w, table, plan=plan, chunk_rows=5, impl="cuda")
        (grad,) = torch.autograd.grad((value * upstream).sum(), x)
        return value.detach(), grad

    return given


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["logits", "frozen", "recompute"])
def test_a_training_step_never_waits_for_the_device(plan):
    step = training_steps(LABELS.cuda())
    expected = step(plan)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step(plan)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("plan", ["logits", "frozen", "recompute"])
def test_a_training_step_can_be_captured_in_a_graph(plan):
    step = training_steps(LABELS.cuda())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step(plan)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(plan)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
