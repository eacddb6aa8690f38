"""What the entry points of the log-probs accept, refuse and promise to autograd."""

import math

import numpy as np
import pytest
import reference
import torch
from logps_cases import (
    DTYPES,
    HOWS,
    IMPLS,
    LABELS,
    UPSTREAM,
    device_of,
    fields,
    logits_like,
    name_of,
    on,
    oracle,
    random_case,
)

from dpo_ext import KernelUnavailable, TensorError
from dpo_ext.torch import ScoreTable, TokenScores, sequence_logps, token_scores

# ---- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS, ids=name_of)
def test_the_twin_in_float64_is_the_oracle(how):
    for seed in range(20):
        logits, table = random_case(seed, V=9, dtype=torch.float64, weights=seed % 2 == 0)
        z = logits.clone().requires_grad_()
        g = torch.randn(table.n_groups, 2, dtype=torch.float64)
        value = sequence_logps(z, table, **how)
        assert value.dtype == torch.float64
        value.backward(g)
        true_value, true_grad = oracle(logits, table, g, **how)
        np.testing.assert_allclose(value.detach().numpy(), true_value, rtol=1e-13, atol=1e-13)
        np.testing.assert_allclose(z.grad.numpy(), true_grad, rtol=1e-13, atol=1e-13)


@pytest.mark.fault("K11", "H11")
@pytest.mark.parametrize("how", HOWS, ids=name_of)
def test_gradcheck_in_float64(how):
    logits, table = random_case(5, V=6, dtype=torch.float64, weights=True)
    assert torch.autograd.gradcheck(
        lambda z: sequence_logps(z, table, impl="torch", **how), logits.requires_grad_()
    )
    assert torch.autograd.gradgradcheck(
        lambda z: token_scores(z, table, impl="torch", **how).logps, logits
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_logits_are_flattened(impl):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    three = sequence_logps(z, table, impl=impl)
    assert three.shape == (2, 2)
    assert three.dtype == torch.float32
    assert torch.equal(three, sequence_logps(z.flatten(0, 1), table.compact(), impl=impl))
    log_p = torch.log_softmax(z, -1)
    assert three[0, 0].item() == pytest.approx(
        (log_p[0, [0, 1, 2], [3, 1, 2]]).sum().item(), abs=1e-5
    )
    assert three[1, 0].item() == pytest.approx(
        log_p[1, 1, 0].item() + log_p[1, 2, 4].item(), abs=1e-5
    )


@pytest.mark.fault("K4")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["sliced", "wide", "offset", "transposed", "expanded"])
def test_strides_are_honoured(impl, dtype, layout):
    (table,) = on(impl, ScoreTable.from_labels(LABELS))
    whole = torch.randn(6, 6, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    whole = whole.to(device_of(impl))
    view = {
        "sliced": whole[1:5, 1:5, :5],  # no common row stride
        "wide": whole[:4, :4].flatten(0, 1)[:, 3:8],
        "offset": whole.flatten()[1:81].view(4, 4, 5),  # 2-byte aligned in half precision
        "transposed": whole[:5, :4, :4].permute(2, 1, 0),  # the vocabulary is outermost in memory
        "expanded": whole[0, :1, :5].expand(16, 5),
    }[layout]
    one = view.detach().requires_grad_()
    two = view.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    results = []
    for z in (one, two):
        value = sequence_logps(z, table, impl=impl, softcap=4.0)
        value.backward(UPSTREAM.to(value.device))
        results.append((value.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.fault("K6", "H9")
@pytest.mark.parametrize("impl", IMPLS)
def test_extremes(impl):
    inf, nan = math.inf, math.nan
    rows = [
        ([1e4, -1e4, 0.0, 0.0], 0, 0.0),
        ([1e4, -1e4, 0.0, 0.0], 1, -2e4),
        ([-inf, 1.0, 1.0, -inf], 1, -math.log(2)),
        ([-inf, 1.0, 1.0, -inf], 0, -inf),
        ([-inf, -inf, -inf, 2.0], 3, 0.0),
        ([65504.0, 65504.0, 65504.0, 65504.0], 2, -math.log(4)),
        ([3e38, 0.0, 0.0, 0.0], 0, 0.0),
        ([-inf, -inf, -inf, -inf], 0, nan),
        ([nan, 1.0, 1.0, 1.0], 1, nan),
        ([1.0, 1.0, 1.0, nan], 3, nan),
        ([inf, 1.0, 1.0, 1.0], 1, nan),
    ]
    n = len(rows)
    table = ScoreTable(
        logit_rows=list(range(n)),
        targets=[target for _, target, _ in rows],
        seq_offsets=list(range(n + 1)),
        group_size=1,
    )
    z = torch.tensor([row for row, _, _ in rows]).to(device_of(impl)).requires_grad_()
    value = sequence_logps(z, table.to(z.device), impl=impl)
    expected = torch.tensor([[answer] for _, _, answer in rows])
    torch.testing.assert_close(value.cpu(), expected, rtol=1e-7, atol=1e-6, equal_nan=True)
    value.sum().backward()
    assert z.grad[:7].isfinite().all()  # -inf on the target has the gradient onehot - p
    assert z.grad[3].tolist() == pytest.approx([1.0, -0.5, -0.5, 0.0])
    assert z.grad[7:].isnan().any(-1).all()
    stats = token_scores(z, table.to(z.device), stats=("entropy", "log_sum_sq"), impl=impl)
    assert stats.entropy[:7].isfinite().all()
    assert stats.entropy[2].item() == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.fault("K1")
@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_outside_the_vocabulary_is_refused_on_the_host_and_nan_on_a_gpu(impl):
    z = logits_like().flatten(0, 1)
    for bad in (5, 10, 2**31 - 1):
        table = ScoreTable(logit_rows=[0, 1, 2], targets=[0, bad, 4], seq_offsets=[0, 1, 3])
        x, moved = on(impl, z, table)
        x = x.clone().requires_grad_()
        if impl != "cuda":
            said = f"`targets` must be below 5, the vocabulary of `logits`, found {bad} at token 1, row 1"
            with pytest.raises(TensorError, match=said):
                sequence_logps(x, moved, impl=impl)
            continue
        value = sequence_logps(x, moved, impl=impl)
        assert value[0, 0].isfinite()
        assert value[0, 1].isnan()
        value.sum().backward()
        assert x.grad[[0, 2]].isfinite().all()
        assert x.grad[1].isnan().all()
        assert not x.grad[3:].any()


@pytest.mark.fault("K3")
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 5), (0, 4, 5), (2, 0, 5)])
def test_nothing_to_score(impl, shape):
    z = torch.randn(shape).to(device_of(impl)).requires_grad_()
    for S in (0, 4):
        table = ScoreTable(logit_rows=[], targets=[], seq_offsets=[0] * (S + 1)).to(z.device)
        value = sequence_logps(z, table, impl=impl)
        assert value.tolist() == [[0.0, 0.0]] * (S // 2)
        value.sum().backward()
        assert not z.grad.any()
    ignored = ScoreTable(logit_rows=[7, 9], targets=[-100, -100], seq_offsets=[0, 1, 2]).to(
        z.device
    )
    assert sequence_logps(z, ignored, impl=impl).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_token_scores_give_what_is_asked_for(impl):
    z, table = on(impl, logits_like(), ScoreTable.from_labels(LABELS))
    plain = token_scores(z, table, impl=impl)
    assert isinstance(plain, TokenScores)
    assert plain[1:] == (None,) * 4
    some = token_scores(z, table, stats=("is_top1", "entropy"), impl=impl)
    assert some.mean_logit is None
    assert some.log_sum_sq is None
    assert some.is_top1.dtype == torch.bool
    assert torch.equal(some.logps, plain.logps)
    assert not some.entropy.requires_grad
    unscored = table.targets == -100
    assert not some.logps[unscored].any()
    assert not some.entropy[unscored].any()
    assert not some.is_top1[unscored].any()
    assert torch.equal(token_scores(z, table, stats="entropy", impl=impl).entropy, some.entropy)
    with pytest.raises(ValueError, match="`stats` must be among"):
        token_scores(z, table, stats=("entropy", "variance"), impl=impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_lowest_index_wins_a_tie(impl):
    z = torch.zeros(3, 40)
    z[:, [7, 21]] = 1.0
    table = ScoreTable(
        logit_rows=[0, 1, 2], targets=[7, 21, 0], seq_offsets=[0, 1, 2, 3], group_size=1
    )
    z, table = on(impl, z, table)
    assert token_scores(z, table, stats=["is_top1"], impl=impl).is_top1.tolist() == [
        True,
        False,
        False,
    ]


@pytest.mark.parametrize("impl", IMPLS)
def test_weights_do_not_act_on_tokens(impl):
    z = logits_like().flatten(0, 1)
    parts = {"logit_rows": [0, 1, 2], "targets": [0, 3, 4], "seq_offsets": [0, 1, 3]}
    z, plain, weighted = on(
        impl, z, ScoreTable(**parts), ScoreTable(**parts, weights=[0.0, 2.0, 0.5])
    )
    logps = token_scores(z, weighted, impl=impl).logps
    assert torch.equal(logps, token_scores(z, plain, impl=impl).logps)
    value = sequence_logps(z, weighted, impl=impl)
    assert value[0].tolist() == pytest.approx([0.0, (2 * logps[1] + 0.5 * logps[2]).item()])


@pytest.mark.fault("K7", "H13")
@pytest.mark.parametrize("impl", IMPLS)
def test_weight_zero_hides_nan_and_bad_targets(impl):
    z = logits_like().flatten(0, 1)
    z[1] = math.nan
    table = ScoreTable(
        logit_rows=[0, 1, 2, 3],
        targets=[0, 3, 99, 4],
        seq_offsets=[0, 2, 4],
        weights=[1.0, 0.0, 0.0, 1.0],
    )
    x, table = on(impl, z, table)
    x.requires_grad_()
    value = sequence_logps(x, table, impl=impl)
    assert value.isfinite().all()
    value.sum().backward()
    assert x.grad.isfinite().all()
    assert not x.grad[[1, 2]].any()


# ---- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "`temperature` must be finite and above 0, found 0.0"),
        ({"temperature": -1.0}, ValueError, "`temperature`"),
        ({"temperature": math.nan}, ValueError, "`temperature`"),
        ({"temperature": None}, TypeError, "`temperature` must be a number"),
        ({"softcap": 0.0}, ValueError, "`softcap`"),
        ({"softcap": math.inf}, ValueError, "`softcap`"),
        ({"softcap": torch.ones(2)}, TypeError, "`softcap`"),
        ({"logit_scale": 0}, ValueError, "`logit_scale`"),
        ({"logit_scale": "2"}, TypeError, "`logit_scale`"),
        ({"impl": "triton"}, ValueError, "`impl` must be one of auto, cuda, cpu, torch"),
    ],
)
def test_wrong_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        sequence_logps(logits_like(), ScoreTable.from_labels(LABELS), **options)
    with pytest.raises(error, match=message):
        token_scores(logits_like(), ScoreTable.from_labels(LABELS), **options)


@pytest.mark.fault("K8", "K9")
@pytest.mark.parametrize("impl", ["torch", "cpu"])
def test_wrong_tensors_are_refused(impl):
    table = ScoreTable.from_labels(LABELS)
    full = ScoreTable(logit_rows=[15, 0], targets=[1, 1], seq_offsets=[0, 1, 2])
    with pytest.raises(TypeError, match=r"`logits` must be a torch\.Tensor"):
        sequence_logps([[0.0]], table, impl=impl)
    with pytest.raises(TypeError, match="`table` must be a ScoreTable"):
        sequence_logps(logits_like(), LABELS, impl=impl)
    with pytest.raises(TensorError, match="floating-point dtype, found int64"):
        sequence_logps(torch.zeros(16, 5, dtype=torch.int64), table, impl=impl)
    for shape in ((5,), (2, 2, 4, 5)):
        with pytest.raises(TensorError, match=r"`logits` must have shape \(R, V\) or \(B, T, V\)"):
            sequence_logps(torch.zeros(shape), table, impl=impl)
    with pytest.raises(
        TensorError, match="must be below 15, the rows of `logits`, found 15 at token"
    ):
        sequence_logps(torch.zeros(15, 5), full, impl=impl)
    with pytest.raises(TensorError, match=r"`table` must be on cpu, as `logits` is, found meta"):
        sequence_logps(logits_like(), table.to("meta"), impl=impl)


@pytest.mark.fault("K9", "K15")
def test_an_implementation_that_cannot_serve_says_so():
    table = ScoreTable.from_labels(LABELS)
    with pytest.raises(TensorError, match='for impl="cpu", found float64'):
        sequence_logps(logits_like(torch.float64), table, impl="cpu")
    with pytest.raises(TensorError, match='must be on a cpu device for impl="cpu", found meta'):
        sequence_logps(logits_like().to("meta"), table.to("meta"), impl="cpu")
    if not torch.cuda.is_available():
        with pytest.raises(KernelUnavailable, match="no CUDA device"):
            sequence_logps(logits_like(), table, impl="cuda")


@pytest.mark.gpu
def test_auto_chooses_by_device():
    z, table = logits_like(), ScoreTable.from_labels(LABELS)
    on_gpu = sequence_logps(z.cuda(), table.to("cuda"))
    assert torch.equal(on_gpu, sequence_logps(z.cuda(), table.to("cuda"), impl="cuda"))
    with pytest.raises(TensorError, match='must be on a cuda device for impl="cuda", found cpu'):
        sequence_logps(z, table, impl="cuda")


def test_auto_is_the_cpu_kernel_or_for_float64_the_twin():
    logits, table = random_case(0, V=1000, S=8, longest=6)
    auto = sequence_logps(logits, table)
    assert torch.equal(auto, sequence_logps(logits, table, impl="cpu"))
    assert not torch.equal(auto, sequence_logps(logits, table, impl="torch"))  # other last bits
    assert sequence_logps(logits.double(), table).dtype == torch.float64


def test_the_oracle_itself_against_torch_in_float64():
    logits, table = random_case(1, V=6, dtype=torch.float64)
    f = fields(table)
    stats = reference.token_stats(logits.numpy(), f["logit_rows"], f["targets"], temperature=0.5)
    scored = f["targets"] != -100
    rows, targets = f["logit_rows"][scored], f["targets"][scored]
    log_p = torch.log_softmax(logits / 0.5, -1)[rows]
    picked = log_p.gather(1, torch.tensor(targets).long()[:, None])[:, 0]
    np.testing.assert_allclose(stats["logp"][scored], picked, atol=1e-13)
    np.testing.assert_allclose(stats["entropy"][scored], -(log_p.exp() * log_p).sum(-1), atol=1e-13)
    np.testing.assert_allclose(stats["log_sum_sq"][scored], (2 * log_p).logsumexp(-1), atol=1e-13)
    np.testing.assert_allclose(
        stats["mean_logit"][scored], (logits / 0.5).mean(-1)[rows], atol=1e-13
    )
