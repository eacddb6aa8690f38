"""The operators of the log-prob head on the CPU: values, bits, refusals, and their place in torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import reference
import torch
import warm
from compare import assert_no_worse

from dpo_ext import TensorError
from dpo_ext.torch.logps import ops

OPS = torch.ops.dpo_ext
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLAIN = (1.0, 0.0, 1.0)
TRANSFORMS = {"plain": PLAIN, "scaled": (0.7, 0.0, 1.3), "capped": (2.0, 5.0, 0.7)}
# Around a lane group of 64, a load of 8 and a block of 4096 columns; the vocabularies of GPT-2 and Llama 3.
SIZES = [1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 128, 129, 1000, 4095, 4097, 50_257, 128_256]
STATS = ("entropy", "mean_logit", "log_sum_sq")


def batch(dtype, columns, seed, tokens=4, spread=4.0):
    """tokens + 1 rows in another order than the table; token 1 is not scored and its row is NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = (torch.randn(tokens + 1, columns, generator=generator) * spread).to(dtype)
    rows = torch.randperm(tokens + 1, generator=generator)[:tokens]
    targets = torch.randint(0, columns, (tokens,), generator=generator, dtype=torch.int32)
    targets[0], targets[1] = columns - 1, -100
    values[rows[1]] = math.nan
    return values, rows, targets, torch.randn(tokens, generator=generator)


def keywords(transform):
    logit_scale, softcap, temperature = transform
    return {"logit_scale": logit_scale, "softcap": softcap or None, "temperature": temperature}


def forward_backward(logits, rows, targets, grad, transform=PLAIN, stats=True):
    scores = OPS.token_stats(logits, rows, targets, *transform, stats)
    return scores, OPS.logits_grad(logits, rows, targets, scores[1], scores[2], grad, *transform)


def same_bits(a, b) -> bool:
    return a.dtype == b.dtype and np.array_equal(as_bytes(a), as_bytes(b))


def as_bytes(tensor):
    return tensor.contiguous().view(torch.uint8).numpy()


@pytest.mark.fault("K5", "H14")
@pytest.mark.parametrize("columns", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_agree_with_float64(dtype, columns):
    for seed, transform in enumerate(TRANSFORMS.values()):
        values, rows, targets, grad = batch(dtype, columns, seed)
        scores, dz = forward_backward(values, rows, targets, grad, transform)
        z = values.double().numpy()
        with np.errstate(invalid="ignore"):
            expected = reference.token_stats(
                z, rows.tolist(), targets.tolist(), **keywords(transform)
            )
            truth = reference.logits_grad(
                z, rows.tolist(), targets.tolist(), grad.tolist(), **keywords(transform)
            )
        assert np.abs(scores[0].numpy() - expected["logp"]).max() <= 4e-6
        for column, name in zip(scores[3:6], STATS, strict=True):
            np.testing.assert_allclose(column.numpy(), expected[name], rtol=2e-6, atol=1e-5)
        np.testing.assert_array_equal(scores[6].numpy(), expected["is_top1"])
        # Rounding to the dtype is the baseline; float32's own error is the slack.
        assert_no_worse(dz, torch.from_numpy(truth).to(dtype), truth, slack=4e-6)
        relative = {torch.float32: 5e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
        smallest = {torch.float32: 1e-12, torch.bfloat16: 1e-12, torch.float16: 2**-24}[dtype]
        error = np.abs(dz.double().numpy() - truth)
        assert (error <= relative * np.abs(truth) + smallest).all()


@pytest.mark.fault("K17")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_torch_in_the_same_dtype(dtype):
    values, rows, targets, grad = batch(dtype, 50_257, seed=5, tokens=8)
    targets[1] = 17
    values = torch.nan_to_num(values)
    scores, dz = forward_backward(values, rows, targets, grad)
    leaf = values.clone().requires_grad_()
    theirs = leaf[rows].float().log_softmax(-1).gather(1, targets.long()[:, None])[:, 0]
    theirs.backward(grad)
    z = values.double().numpy()
    table = (rows.tolist(), targets.tolist())
    assert_no_worse(scores[0], theirs, reference.token_stats(z, *table)["logp"], slack=1e-6)
    assert_no_worse(dz, leaf.grad, reference.logits_grad(z, *table, grad.tolist()), slack=1e-7)


@pytest.mark.fault("K7")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_scored_is_not_read_and_gets_zero(dtype):
    values, rows, targets, grad = batch(dtype, 5000, seed=2)
    unscored = [r for r in range(5) if r not in rows[targets != -100].tolist()]
    assert len(unscored) == 2
    results = []
    for poison in (0.0, math.nan, math.inf, -math.inf):
        values[unscored] = poison
        scores, dz = forward_backward(values, rows, targets, grad)
        in_place = values.clone()
        OPS.logits_grad_(in_place, rows, targets, scores[1], scores[2], grad, *PLAIN)
        assert same_bits(in_place, dz)
        assert not as_bytes(dz[unscored]).any()  # +0, not -0
        assert all(column[1] == 0 for column in scores)
        results.append([*scores, dz])
    for other in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.fault("K4", "K13", "H15")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_row_alone(dtype):
    """Any stride, offset, order, neighbours, number of threads: the same bits."""
    for columns in (9, 4099):
        values, rows, targets, grad = batch(dtype, columns, seed=columns, tokens=6)
        scores, dz = forward_backward(values, rows, targets, grad)
        for offset, gap in [(0, 1), (1, 0), (1, 7), (3, 8), (7, 13)]:
            flat = torch.full((offset + 7 * (columns + gap),), math.nan, dtype=dtype)
            placed = flat[offset:].as_strided((7, columns), (columns + gap, 1))
            placed.copy_(values)
            before = flat.clone()
            got, placed_dz = forward_backward(placed, rows, targets, grad)
            assert all(same_bits(a, b) for a, b in zip(scores, got, strict=True))
            assert same_bits(placed_dz, dz)
            OPS.logits_grad_(placed, rows, targets, scores[1], scores[2], grad, *PLAIN)
            assert same_bits(placed, dz)
            placed.copy_(values)
            assert same_bits(flat, before)  # the gaps between rows were left alone
        order = torch.tensor([3, 0, 5, 2, 1, 4])
        got, dz_permuted = forward_backward(values, rows[order], targets[order], grad[order])
        assert all(same_bits(a[order], b) for a, b in zip(scores, got, strict=True))
        assert same_bits(dz_permuted, dz)
        for i in range(6):
            alone, dz_alone = forward_backward(
                values[rows[i]][None], torch.tensor([0]), targets[i : i + 1], grad[i : i + 1]
            )
            assert all(same_bits(a[i : i + 1], b) for a, b in zip(scores, alone, strict=True))
            assert same_bits(dz_alone[0], dz[rows[i]])


@pytest.mark.fault("K13")
def test_bits_do_not_depend_on_threads():
    values, rows, targets, grad = batch(torch.bfloat16, 20_000, seed=9, tokens=40)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(forward_backward(values, rows, targets, grad))
    finally:
        torch.set_num_threads(before)
    for scores, dz in results[1:]:
        assert all(same_bits(a, b) for a, b in zip(results[0][0], scores, strict=True))
        assert same_bits(dz, results[0][1])


@pytest.mark.fault("H1", "H2", "H3")
@pytest.mark.parametrize("shift", [0.0, 40.0, 200.0])
@pytest.mark.parametrize("complement", [1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6])
def test_complement_of_a_peaked_row_keeps_its_digits(complement, shift):
    columns = 128_256
    values = torch.full((1, columns), shift)
    values[0, 77] = shift + math.log((columns - 1) * (1 - complement) / complement)
    rows, targets, grad = torch.tensor([0]), torch.tensor([77], dtype=torch.int32), torch.ones(1)
    scores, dz = forward_backward(values, rows, targets, grad)
    z = values.double().numpy()
    assert -2 * complement < scores[0].item() < 0
    # exp(-23) in float32 is right to 23 * 2^-24.
    np.testing.assert_allclose(scores[0], reference.token_stats(z, [0], [77])["logp"], rtol=4e-6)
    truth = reference.logits_grad(z, [0], [77], [1.0])
    np.testing.assert_allclose(dz[0, 77], truth[0, 77], rtol=4e-6)
    assert abs(dz.double().sum()) <= 2e-6 * complement + 1e-12


@pytest.mark.fault("K6", "H9", "H10")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_stay_in_their_row(dtype):
    inf, columns = math.inf, 5000
    values, rows, targets, grad = batch(dtype, columns, seed=1, tokens=12)
    clean, clean_dz = forward_backward(values, rows, targets, grad)
    edits = {  # head, body, tail, target, everything
        2: [(0, -inf)],
        3: [(4517, -inf), (4999, -inf)],
        4: [(int(targets[4]), -inf)],
        5: [(slice(None), -inf)],
        6: [(4700, math.nan)],
        7: [(int(targets[7]), math.nan)],
        8: [(3, inf)],
        9: [(int(targets[9]), inf)],
        10: [(slice(None), -inf), (int(targets[10]), 1.0)],
        11: [(slice(None), 60000.0 if dtype == torch.float16 else 1e30)],
    }
    for token, changes in edits.items():
        for where, value in changes:
            values[rows[token], where] = value
    scores, dz = forward_backward(values, rows, targets, grad)
    with np.errstate(invalid="ignore"):
        z = values.double().numpy()
        expected = reference.token_stats(z, rows.tolist(), targets.tolist())
        truth = reference.logits_grad(z, rows.tolist(), targets.tolist(), grad.tolist())
    for column, name in zip((scores[0], *scores[3:6]), ("logp", *STATS), strict=True):
        np.testing.assert_allclose(
            column.numpy(), expected[name], rtol=2e-6, atol=1e-5, err_msg=name
        )
    np.testing.assert_array_equal(scores[6].numpy(), expected["is_top1"])
    assert scores[0][4] == -inf
    assert scores[0][10] == 0
    np.testing.assert_array_equal(np.isnan(dz.double().numpy()), np.isnan(truth))
    np.testing.assert_allclose(dz.double().numpy(), truth, rtol=2**-8, atol=1e-5)
    assert all(same_bits(a[:2], b[:2]) for a, b in zip(scores, clean, strict=True))
    untouched = [r for r in range(13) if r not in [rows[t].item() for t in edits]]
    assert same_bits(dz[untouched], clean_dz[untouched])


def test_ties_go_to_the_lowest_index():
    values = torch.zeros(3, 9000)
    values[:, [4, 5000]] = 3.0
    targets = torch.tensor([4, 5000, 8], dtype=torch.int32)
    top = OPS.token_stats(values, torch.arange(3), targets, *PLAIN, True)[6]
    assert top.tolist() == [True, False, False]


@pytest.mark.fault("K1")
def test_what_does_not_exist_is_nan_and_not_read():
    values, rows, targets, grad = batch(torch.float32, 33, seed=0, tokens=10)
    targets[:] = torch.tensor([33, 38, -1, 2**31 - 1, -(2**31), -101, 0, 0, 0, 5])
    rows[6:9] = torch.tensor([len(values), 2**62, -1])
    scores, dz = forward_backward(values, rows, targets, grad)
    assert all(torch.isnan(column[:9]).all() for column in scores[:6])
    assert not scores[6][:9].any()
    assert torch.isfinite(scores[0][9])
    named = rows[:6].tolist()
    assert torch.isnan(dz[named]).all()
    others = [r for r in range(len(values)) if r not in named and r != rows[9]]
    assert (dz[others] == 0).all()
    assert torch.isfinite(dz[rows[9]]).all()


@pytest.mark.fault("H13")
def test_gradients_are_linear_and_zero_for_zero():
    values, rows, targets, grad = batch(torch.float32, 500, seed=3)
    scores, dz = forward_backward(values, rows, targets, grad)
    doubled = OPS.logits_grad(values, rows, targets, scores[1], scores[2], grad * 2, *PLAIN)
    assert same_bits(doubled, dz * 2)
    grad[2] = -0.0
    values[rows[2]] = math.nan  # a weight of 0 selects nothing, not 0 * NaN
    dz = OPS.logits_grad(values, rows, targets, scores[1], scores[2], grad, *PLAIN)
    assert not as_bytes(dz[rows[2]]).any()


@pytest.mark.fault("K1", "H8", "H13")
def test_segment_sums_are_float64_inside_and_select():
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(100_000, generator=generator) * -20
    weights = torch.rand(100_000, generator=generator)
    weights[::3] = 0
    offsets = torch.tensor([0, 100_000, 100_000, 5, 100_001, 3, -1], dtype=torch.int32)
    plain = OPS.segment_sum(values, None, offsets)
    exact = reference.segment_sum(values.numpy(), None, [0, 100_000])
    assert plain[0].item() == np.float32(exact[0])
    poisoned = values.clone()
    poisoned[::3] = math.nan
    weighted = OPS.segment_sum(poisoned, weights, offsets)
    exact = reference.segment_sum(values.numpy(), weights.numpy(), [0, 100_000])
    assert weighted[0].item() == np.float32(exact[0])
    assert plain[1] == weighted[1] == 0  # an empty sequence
    assert torch.isnan(plain[2:]).all()  # offsets that fall or leave the tokens


@pytest.mark.fault("K3")
def test_nothing_to_do_gives_empty_results():
    none = torch.empty(0, dtype=torch.int64)
    targets, floats = none.int(), none.float()
    for shape in ((0, 5), (3, 5), (3, 0), (0, 0)):
        scores = OPS.token_stats(torch.randn(shape), none, targets, *PLAIN, True)
        assert [tuple(c.shape) for c in scores] == [(0,)] * 7
        dz = OPS.logits_grad(torch.randn(shape), none, targets, floats, floats, floats, *PLAIN)
        assert tuple(dz.shape) == shape
        assert not dz.any()
    empty_rows = OPS.token_stats(torch.randn(2, 0), none + 0, targets, *PLAIN, False)
    assert tuple(empty_rows[3].shape) == (0,)
    assert OPS.segment_sum(floats, None, torch.zeros(1, dtype=torch.int32)).shape == (0,)


def change(**changes):
    """Arguments of logits_grad with some replaced."""
    values, rows, targets, grad = batch(torch.float32, 7, seed=0)
    named = {
        "logits": values,
        "logit_rows": rows,
        "targets": targets,
        "row_max": grad,
        "row_rest": grad,
        "grad": grad,
    }
    named |= {"logit_scale": 1.0, "softcap": 0.0, "temperature": 1.0}
    return {k: changes[k](v) if k in changes else v for k, v in named.items()}


WRONG = {
    "float64 logits": (
        {"logits": lambda t: t.double()},
        TensorError,
        'found float64\nhint: use impl="torch"',
    ),
    "integer logits": (
        {"logits": lambda t: t.nan_to_num().long()},
        TensorError,
        "`logits` must have one of",
    ),
    "3-D logits": (
        {"logits": lambda t: t[None]},
        TensorError,
        r"`logits` must have shape \(R, V\)",
    ),
    "transposed logits": (
        {"logits": lambda t: t.t().contiguous().t()},
        TensorError,
        "stride 1 along",
    ),
    "overlapping rows": (
        {"logits": lambda t: t[:1].expand(5, 7)},
        TensorError,
        "row stride of at least",
    ),
    "int32 rows": ({"logit_rows": lambda t: t.int()}, TensorError, "`logit_rows` must be int64"),
    "2-D rows": (
        {"logit_rows": lambda t: t[None]},
        TensorError,
        r"`logit_rows` must have shape \(M,\)",
    ),
    "int64 targets": (
        {"targets": lambda t: t.long()},
        TensorError,
        r"`targets` must be int32 of shape \(4,\)",
    ),
    "uint8 targets": ({"targets": lambda t: t.to(torch.uint8)}, TensorError, "found uint8"),
    "short targets": ({"targets": lambda t: t[:3]}, TensorError, r"found int32 of shape \(3,\)"),
    "meta targets": (
        {"targets": lambda t: t.to("meta")},
        TensorError,
        "`targets` must be on cpu, found meta",
    ),
    "float16 grad": ({"grad": lambda t: t.half()}, TensorError, "`grad` must be float32"),
    "long row_max": ({"row_max": lambda t: t.repeat(2)}, TensorError, "`row_max` must be"),
    "bool row_rest": ({"row_rest": lambda t: t > 0}, TensorError, "`row_rest` must be"),
    "temperature 0": (
        {"temperature": lambda _: 0.0},
        ValueError,
        "`temperature` must be finite and above 0",
    ),
    "nan scale": ({"logit_scale": lambda _: math.nan}, ValueError, "`logit_scale` must be"),
    "softcap below 0": (
        {"softcap": lambda _: -1.0},
        ValueError,
        "`softcap` must be finite and above 0, or 0",
    ),
}


@pytest.mark.fault("K8", "K9")
@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_before_anything_is_written(name):
    changes, error, message = WRONG[name]
    arguments = change(**changes)
    # With a tensor on another device the dispatcher picks the kernel; the first check there answers.
    device = {t.device.type for t in arguments.values() if isinstance(t, torch.Tensor)}
    call = ops._logits_grad_cpu if len(device) > 1 else OPS.logits_grad
    with pytest.raises(error, match=message):
        call(*arguments.values())
    before = arguments["logits"].clone()
    call = ops._logits_grad_in_place_cpu if len(device) > 1 else OPS.logits_grad_
    with pytest.raises(error, match=message):
        call(*arguments.values())
    torch.testing.assert_close(arguments["logits"], before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.fault("K8")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_rows_each_row_has_one_target(dtype):
    logits = (torch.randn(5, 40, generator=torch.Generator().manual_seed(3)) * 4).to(dtype)
    targets = torch.tensor([3, -100, 39, 0, 40], dtype=torch.int32)
    grad = torch.tensor([1.0, 1.0, 0.0, -2.0, 1.0])
    found = {}
    for rows in (None, torch.arange(5)):
        scores = OPS.token_stats(logits, rows, targets, 1.0, 0.0, 1.0, True)
        dz = OPS.logits_grad(logits, rows, targets, scores[1], scores[2], grad, 1.0, 0.0, 1.0)
        written = logits.clone()
        OPS.logits_grad_(written, rows, targets, scores[1], scores[2], grad, 1.0, 0.0, 1.0)
        found[rows is None] = [t.float().numpy() for t in (*scores, dz, written)]
    for ours, named in zip(found[True], found[False], strict=True):
        np.testing.assert_array_equal(ours, named)
    arguments = (logits, None, targets.clamp(max=39), 1.0, 0.0, 1.0, False)
    torch.library.opcheck(OPS.token_stats.default, arguments)
    for few in (targets[:4], targets[:, None]):
        with pytest.raises(TensorError, match=r"`targets` must be int32 of shape \(5,\), found"):
            OPS.token_stats(logits, None, few, 1.0, 0.0, 1.0, False)


def test_wrong_segments_are_refused():
    values, offsets = torch.zeros(4), torch.tensor([0, 4], dtype=torch.int32)
    for arguments, message in [
        ((values.double(), None, offsets), "`values` must be float32"),
        ((values[None], None, offsets), r"`values` must have shape \(M,\)"),
        ((values, values[:3], offsets), "`weights` must be"),
        ((values, values.bool(), offsets), "`weights` must be"),
        ((values, None, offsets.long()), "`seq_offsets` must be int32"),
        ((values, None, offsets[:0]), "`seq_offsets` must have shape"),
    ]:
        with pytest.raises(TensorError, match=message):
            OPS.segment_sum(*arguments)


@pytest.mark.fault("K11")
def test_a_write_in_place_is_seen_by_autograd():
    values, rows, targets, grad = batch(torch.float32, 50, seed=0)
    leaf = torch.nan_to_num(values).requires_grad_()
    logits = leaf * 2
    scores = OPS.token_stats(logits.detach(), rows, targets, *PLAIN, False)
    later = (logits * logits).sum()  # saves the logits
    version = logits._version
    OPS.logits_grad_(logits.detach(), rows, targets, scores[1], scores[2], grad, *PLAIN)
    assert logits._version == version + 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        later.backward()


@pytest.mark.fault("K11")
def test_inference_tensors_are_written_in_place():
    with torch.inference_mode():
        values, rows, targets, grad = batch(torch.float32, 50, seed=0)
        scores, dz = forward_backward(values, rows, targets, grad)
        OPS.logits_grad_(values, rows, targets, scores[1], scores[2], grad, *PLAIN)
        assert torch.equal(values, dz)


@pytest.mark.slow
@pytest.mark.fault("K11")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_operators_pass_opcheck(dtype):
    values, rows, targets, grad = batch(dtype, 40, seed=0)
    values = torch.nan_to_num(values)
    saved = OPS.token_stats(values, rows, targets, *PLAIN, False)[1:3]
    for stats in (False, True):
        torch.library.opcheck(OPS.token_stats, (values, rows, targets, 0.7, 5.0, 1.3, stats))
    torch.library.opcheck(OPS.logits_grad, (values, rows, targets, *saved, grad, *PLAIN))
    torch.library.opcheck(OPS.logits_grad_, (values.clone(), rows, targets, *saved, grad, *PLAIN))
    offsets = torch.tensor([0, 3, 4], dtype=torch.int32)
    torch.library.opcheck(OPS.segment_sum, (grad, None, offsets))
    torch.library.opcheck(OPS.segment_sum, (grad, grad.abs(), offsets))


@pytest.mark.fault("K11")
def test_operators_compile_without_a_graph_break():
    values, rows, targets, grad = batch(torch.float32, 40, seed=0)
    values = torch.nan_to_num(values)

    def run(z):
        scores, dz = forward_backward(z, rows, targets, grad)
        z = z * 1.0
        OPS.logits_grad_(z, rows, targets, scores[1], scores[2], grad, *PLAIN)
        return scores[0], dz, z

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(values)
    for got, expected in zip(compiled, run(values), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.slow
def test_a_child_of_a_fork_computes_the_same():
    code = (
        "import os, torch, dpo_ext.torch.logps.ops\n"
        "torch.set_num_threads(2)\n"
        "z = torch.arange(64_000.0).reshape(8, 8000).sin(); rows = torch.arange(8)\n"
        "run = lambda: torch.ops.dpo_ext.token_stats(z, rows, rows.int(), 1.0, 0.0, 1.0, False)[0]\n"
        "parent = run(); pid = os.fork()\n"
        "if pid == 0: os._exit(0 if torch.equal(run(), parent) else 7)\n"
        "assert os.waitpid(pid, 0)[1] == 0\n"
    )
    done = warm.run(code, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.fault("K4", "K11")
def test_operators_pass_opcheck_for_strided_and_misaligned_views():
    values, rows, targets, grad = batch(torch.bfloat16, 33, seed=0)
    memory = torch.zeros(1 + 5 * 40, dtype=torch.bfloat16)
    logits = memory[1:].view(5, 40)[:, 3:36]
    logits.copy_(torch.nan_to_num(values))
    apart = torch.stack([rows, rows], 1)[:, 0]  # a table of stride 2
    saved = OPS.token_stats(logits, apart, targets, *PLAIN, False)[1:3]
    spread = torch.stack([grad, grad], 1)[:, 1]
    torch.library.opcheck(OPS.token_stats, (logits, apart, targets, 0.7, 5.0, 1.3, True))
    torch.library.opcheck(OPS.logits_grad, (logits, apart, targets, *saved, spread, *PLAIN))
    torch.library.opcheck(OPS.logits_grad_, (logits, apart, targets, *saved, spread, *PLAIN))
    offsets = torch.tensor([0, 1, 3, 9, 4, 9], dtype=torch.int32)[::2]
    torch.library.opcheck(OPS.segment_sum, (spread, spread.abs(), offsets))
