"""The log-probs and heads inside `torch.compile(fullgraph=True)`: one graph, eager's numbers, no copy of the logits."""

import sys
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dpo_ext import TensorError
from dpo_ext.torch import (
    ScoreTable,
    linear_preference_loss,
    linear_sequence_logps,
    preference_loss,
    sequence_logps,
    token_scores,
)

pytestmark = pytest.mark.slow

H, V = 6, 11
REF = torch.tensor([[-4.0, -6.0], [-5.0, -3.0]])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def labels_of(pairs, T=5):
    labels = torch.randint(0, V, (2 * pairs, T), generator=torch.Generator().manual_seed(pairs))
    labels[:, 0] = -100
    labels[0, 2] = -100
    return labels


def given(inplace):
    """Logits to loss, with the scores of each token beside it."""

    def step(x, weight, labels, ref):
        table = ScoreTable.from_labels(labels)
        logits = torch.tanh(x) @ weight.T
        scores = token_scores(logits, table, stats=("entropy", "is_top1"), softcap=9.0)
        how = {"softcap": 9.0, "temperature": 0.7, "inplace_grad": inplace}
        logps = sequence_logps(logits * 1.0, table, **how)
        loss = preference_loss(logps, ref).loss
        return loss + 0.1 * scores.logps.sum(), scores.entropy, scores.is_top1, logps

    return step


def headed(plan, chunk_rows=8):
    def step(x, weight, labels, ref):
        table = ScoreTable.from_labels(labels)
        h = torch.tanh(x)
        if plan == "pairwise":
            out = linear_preference_loss(h, weight, table, ref, plan=plan, chunk_rows=chunk_rows)
            return out.loss, out.per_pair
        logps = linear_sequence_logps(
            h, weight, table, plan=plan, chunk_rows=chunk_rows, softcap=9.0
        )
        return preference_loss(logps, ref).loss, logps

    return step


STEPS = {
    "logits": given(False),
    "logits in place": given(True),
    **{plan: headed(plan) for plan in ("frozen", "recompute", "pairwise")},
}


def run(function, name, pairs=2, x=None):
    generator = torch.Generator().manual_seed(pairs)
    x = torch.randn(2 * pairs, 5, H, generator=generator) if x is None else x.detach().clone()
    weight = torch.randn(V, H, generator=generator)
    leaves = [x.requires_grad_()]
    if name != "frozen":
        leaves.append(weight.requires_grad_())
    out = function(x, weight, labels_of(pairs), REF.repeat(pairs, 1)[:pairs])
    grads = torch.autograd.grad(1.7 * out[0], leaves)
    return [part.detach() for part in (*out, *grads)]


EAGER = [("aot_eager", name) for name in STEPS]
INDUCTOR = [("inductor", name) for name in ("logits in place", "frozen", "recompute")]


@pytest.mark.fault("K11")
@pytest.mark.parametrize(("backend", "name"), [*EAGER, *INDUCTOR])
def test_one_graph_gives_what_eager_gives(backend, name):
    compiled = torch.compile(STEPS[name], fullgraph=True, backend=backend)
    for a, b in zip(run(compiled, name), run(STEPS[name], name), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["logits", "frozen", "recompute"])
def test_modules_that_are_loaded_later_need_no_other_graph(monkeypatch, name):
    """A graph that asks which modules are loaded is compiled anew, or fails, when they change."""
    import torch.distributed.tensor

    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(STEPS[name], fullgraph=True, backend=counter)
    first = run(compiled, name)
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", types.ModuleType("another"))
    for a, b in zip(run(compiled, name), first, strict=True):
        assert torch.equal(a, b)
    assert counter.frame_count == 1


@pytest.mark.fault("K11")
@pytest.mark.parametrize("name", ["logits", "logits in place", "frozen", "recompute"])
def test_another_batch_size_needs_at_most_one_other_graph(name):
    """The second size makes the sizes symbols; every later one of as many chunks runs in that graph."""
    step = STEPS[name] if name.startswith("logits") else headed(name, chunk_rows=1000)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for pairs in (2, 3, 4, 7):
        got = run(compiled, name, pairs)
        for a, b in zip(got, run(step, name, pairs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert counter.frame_count <= 2


@pytest.mark.fault("K11")
def test_compiled_in_place_gradients_need_no_second_buffer_of_logits():
    """What functionalisation copies, inductor's re-inplacing takes out again: one buffer, the logits' own."""
    from torch._inductor.utils import run_and_get_code

    labels = labels_of(2, T=33)
    x = torch.randn(4, 33, 8, requires_grad=True)
    weight = torch.randn(512, 8, requires_grad=True)

    def step(x, weight, inplace):
        table = ScoreTable.from_labels(labels)
        return sequence_logps(x @ weight.T, table, inplace_grad=inplace)

    compiled = torch.compile(step, fullgraph=True)
    for inplace in (True, False):

        def train(inplace=inplace):
            compiled(x, weight, inplace).sum().backward()

        _, (forward, backward) = run_and_get_code(train)
        assert forward.count("empty_strided_cpu((132, 512)") == 1
        assert backward.count("empty_strided_cpu((132, 512)") == 0
        # out of place the operator allocates its result; in place there is none
        assert ("dpo_ext.logits_grad_.default(" in backward) is inplace
        assert ("dpo_ext.logits_grad.default(" in backward) is not inplace


SIZES = ((2, 5), (3, 5), (2, 7), (4, 9), (5, 6), (7, 13))


def scored(z, table):
    return sequence_logps(z * 1.0, table)


def sized(pairs, T):
    return torch.randn(2 * pairs, T, V), ScoreTable.from_labels(labels_of(pairs, T))


@pytest.mark.parametrize("marked", [False, True])
def test_the_shape_of_a_table_needs_no_graph_that_its_tensors_do_not(marked):
    """Batch and length change one after the other: three graphs, and one if both are marked."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(scored, fullgraph=True, backend=counter)
    for size in SIZES:
        z, table = sized(*size)
        if marked:
            for tensor in (z, table.targets, table.logit_rows, table.seq_offsets):
                torch._dynamo.mark_dynamic(tensor, 0)
            torch._dynamo.mark_dynamic(z, 1)
        torch.testing.assert_close(compiled(z, table), scored(z, table))
    assert counter.frame_count == (1 if marked else 3)


@pytest.mark.parametrize("seen", [1, len(SIZES)])
def test_a_compiled_region_refuses_another_shape(seen):
    """Static graphs and dynamic ones; a whole graph cannot raise our error, but raises one."""
    whole = torch.compile(scored, fullgraph=True, backend="eager")
    parts = torch.compile(scored, backend="eager")
    for size in SIZES[:seen]:
        whole(*sized(*size)), parts(*sized(*size))
    z, table = sized(2, 5)
    for wrong in (torch.cat((z, z), 1), z[:, :-1], torch.cat((z, z)), z.mT.contiguous().mT[:, 1:]):
        with pytest.raises(TensorError, match="`logits` must have shape"):
            parts(wrong, table)
        with pytest.raises((TensorError, torch._dynamo.exc.Unsupported)):
            whole(wrong, table)


def test_weights_and_single_rows_are_one_graph():
    def step(z, labels, weights):
        return sequence_logps(z, ScoreTable.from_labels(labels, weights=weights, group_size=1))

    z, labels, weights = torch.randn(3, 5, V), labels_of(2)[:3], torch.rand(3, 5)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(z, labels, weights), step(z, labels, weights))


def table_of(lengths, seed=0):
    M = sum(lengths)
    targets = torch.randint(
        0, V, (M,), dtype=torch.int32, generator=torch.Generator().manual_seed(seed)
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return ScoreTable(logit_rows=torch.arange(M), targets=targets, seq_offsets=offsets)


def fused(x, weight, table, ref, **how):
    return linear_preference_loss(x, weight, table, ref, plan="pairwise", **how).loss


DYNAMIC = {
    "logits": lambda x, w, table, ref: preference_loss(sequence_logps(x @ w.T, table), ref).loss,
    "recompute": lambda x, w, table, ref: (
        preference_loss(linear_sequence_logps(x, w, table), ref).loss
    ),
    "pairwise": fused,
    "pairwise, two pairs a chunk": lambda *parts: fused(*parts, chunk_pairs=2),
}


@pytest.mark.parametrize("step", DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_shapes_trace_into_one_graph(step):
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for pairs, length in ((3, 2), (3, 4), (4, 3)):
        table, ref = table_of([length] * (2 * pairs), length), torch.full((pairs, 2), -5.0)
        results = []
        for function in (compiled, step):
            generator = torch.Generator().manual_seed(length)
            x = torch.randn(40, H, generator=generator).requires_grad_()
            w = torch.randn(V, H, generator=generator).requires_grad_()
            loss = function(x, w, table, ref)
            results.append((loss.detach(), *torch.autograd.grad(3.0 * loss, (x, w))))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_chunks_of_unequal_pairs_are_nan_in_a_graph_and_not_wrong():
    step = DYNAMIC["pairwise, two pairs a chunk"]
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    x, w = torch.randn(20, H), torch.randn(V, H, requires_grad=True)
    table, ref = table_of([1, 2, 3, 2, 1, 3]), torch.full((3, 2), -5.0)
    assert compiled(x, w, table, ref).isnan()
    assert step(x, w, table, ref).isfinite()
