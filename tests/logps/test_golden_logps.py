"""Log-probs against numbers computed elsewhere with 50 digits (tests/golden/golden_logps.npz)."""

import numpy as np
import places
import pytest
import reference
import torch
from logps_cases import DTYPES, IMPLS, device_of

from dpo_ext.torch import ScoreTable, sequence_logps, token_scores

GOLDEN = places.GOLDEN / "golden_logps.npz"
ALL_STATS = ("entropy", "mean_logit", "log_sum_sq", "is_top1")
HALF = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-10}


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def padded(golden):
    """(logits (8, 12, 61), static table): sequences 0-3 chosen, 4-7 rejected of the same prompts."""
    labels = torch.tensor(golden["pad_labels"])
    return torch.tensor(golden["pad_logits"]), ScoreTable.from_labels(labels)


def in_table_order(values):
    """(8, 12) by position -> (M,) in the order of the interleaved static table of T - 1 tokens."""
    return np.stack([values[:4, :-1], values[4:, :-1]], axis=1).reshape(-1)


def interleaved(values):
    """(8,) chosen first -> (4, 2)."""
    return np.stack([values[:4], values[4:]], axis=1)


def score(impl, logits, table, **options):
    where = device_of(impl)
    return token_scores(logits.to(where), table.to(where), impl=impl, **options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)  # the logits are exact in each of them
def test_tokens(golden, padded, impl, dtype):
    logits, table = padded
    got = score(impl, logits.to(dtype), table, stats=ALL_STATS)
    for ours, theirs in (
        ("logps", "logp"),
        ("entropy", "entropy"),
        ("mean_logit", "mean_logits"),
        ("log_sum_sq", "logsumsq"),
        ("is_top1", "top1"),
    ):
        expected = in_table_order(golden[f"pad_tok_{theirs}"])
        np.testing.assert_allclose(getattr(got, ours).double().cpu(), expected, atol=4e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_reference_logits_too(golden, padded, impl):
    logits = torch.tensor(golden["pad_ref_logits"])
    got = score(impl, logits, padded[1]).logps.double().cpu()
    np.testing.assert_allclose(got, in_table_order(golden["pad_tok_ref_logp"]), atol=4e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("name", "how"), [("logp_T07", {"temperature": 0.7}), ("logp_softcap30", {"softcap": 30.0})]
)
def test_temperature_and_softcap(golden, padded, impl, name, how):
    got = score(impl, *padded, **how).logps.double().cpu()
    np.testing.assert_allclose(got, in_table_order(golden[f"pad_tok_{name}"]), atol=4e-6, rtol=0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sequences_and_gradient(golden, padded, impl, dtype):
    logits, table = padded
    z = logits.to(device_of(impl), dtype).clone().requires_grad_()
    value = sequence_logps(z, table.to(z.device), impl=impl)
    expected = interleaved(golden["seq_logp"])
    np.testing.assert_allclose(value.detach().cpu(), expected, rtol=1e-6, atol=2e-5)
    value.backward(torch.tensor(interleaved(golden["upstream"]), dtype=torch.float32).to(z.device))
    grad, truth = z.grad.double().cpu().numpy(), golden["pad_dlogits"]
    largest = np.abs(golden["upstream"]).max()
    np.testing.assert_allclose(grad, truth, rtol=HALF[dtype], atol=HALF[dtype] * 1e-3 * largest)
    assert not grad[truth == 0].any()
    assert table.lengths.tolist() == interleaved(golden["seq_count"]).tolist()
    average = value.detach().cpu() / table.lengths
    np.testing.assert_allclose(average, interleaved(golden["seq_avg"]), rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_weight_of_wpo(golden, padded, impl):
    """log w = sum over tokens of logp - log sum p^2 over the length: both statistics, one sum."""
    logits, table = padded
    got = score(impl, logits, table, stats=["log_sum_sq"])
    per_token = (got.logps - got.log_sum_sq).double().cpu().reshape(4, 2, -1).sum(-1)
    expected = interleaved(golden["seq_wpo_logweight"])
    lengths = table.lengths.double()
    np.testing.assert_allclose(per_token / lengths, expected, rtol=0, atol=4e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_packed_rows_give_the_bits_of_padded_rows(golden, padded, impl):
    borders, labels = golden["pack_cu_seqlens"], golden["pack_labels"]
    order = [0, 4, 1, 5, 2, 6, 3, 7]  # the segments are chosen 0-3, then rejected 0-3
    rows = [
        [t for t in range(borders[s], borders[s + 1] - 1) if labels[t + 1] != -100] for s in order
    ]
    table = ScoreTable(
        logit_rows=[int(t) for r in rows for t in r],
        targets=[int(labels[t + 1]) for r in rows for t in r],
        seq_offsets=np.cumsum([0] + [len(r) for r in rows]).astype(np.int32),
    )
    where = device_of(impl)
    packed = torch.tensor(golden["pack_logits"]).to(where).requires_grad_()
    value = sequence_logps(packed, table.to(where), impl=impl)
    logits, static = padded
    z = logits.to(where).clone().requires_grad_()
    other = sequence_logps(z, static.to(where), impl=impl)
    assert torch.equal(value, other)
    upstream = torch.tensor(interleaved(golden["upstream"]), dtype=torch.float32).to(where)
    value.backward(upstream)
    other.backward(upstream)
    real = torch.tensor(golden["pad_attention"]).bool().to(where)
    assert torch.equal(packed.grad, z.grad[real])


@pytest.mark.parametrize("impl", IMPLS)
def test_extremes(golden, impl):
    n = len(golden["ext_target"])
    table = ScoreTable(
        logit_rows=torch.arange(n),
        targets=torch.tensor(golden["ext_target"]),
        seq_offsets=torch.arange(n + 1, dtype=torch.int32),
        group_size=1,
    )
    z = torch.tensor(golden["ext_logits"]).to(device_of(impl)).requires_grad_()
    got = token_scores(z, table.to(z.device), stats=ALL_STATS, impl=impl)
    got.logps.sum().backward()
    for ours, theirs in (("logps", "logp"), ("entropy", "entropy"), ("log_sum_sq", "logsumsq")):
        value = getattr(got, ours).detach().double().cpu()
        np.testing.assert_allclose(value, golden[f"ext_{theirs}"], rtol=1e-7, atol=4e-6)
    np.testing.assert_allclose(z.grad.double().cpu(), golden["ext_grad"], atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("i", range(4))
def test_large_vocabularies(golden, impl, i):
    V = int(golden["big_V"][i])
    v = np.arange(V, dtype=np.uint64)
    hashed = (v * np.uint64(2654435761) + np.uint64(i * 40503 * 65537)) % np.uint64(2**32)
    z = ((hashed >> np.uint64(24)).astype(np.float32) / 16 - 8)[None]
    table = ScoreTable(
        logit_rows=[0], targets=[(i * 7919 + 13) % V], seq_offsets=[0, 1], group_size=1
    )
    got = score(impl, torch.tensor(z), table, stats=ALL_STATS)
    assert got.logps.item() == pytest.approx(golden["big_logp"][i], abs=4e-6)
    assert got.entropy.item() == pytest.approx(golden["big_entropy"][i], abs=2e-5)
    assert got.log_sum_sq.item() == pytest.approx(golden["big_logsumsq"][i], abs=2e-5)


def test_the_oracle_gives_the_golden_numbers(golden, padded):
    logits, table = padded
    f = {name: getattr(table, name).numpy() for name in ("logit_rows", "targets", "seq_offsets")}
    z = logits.double().numpy().reshape(-1, 61)
    got = reference.token_stats(z, f["logit_rows"], f["targets"])
    for ours, theirs in (("logp", "logp"), ("entropy", "entropy"), ("mean_logit", "mean_logits")):
        expected = in_table_order(golden[f"pad_tok_{theirs}"])
        np.testing.assert_allclose(got[ours], expected, atol=1e-13)
    got = reference.token_stats(z, f["logit_rows"], f["targets"], softcap=30.0)["logp"]
    np.testing.assert_allclose(got, in_table_order(golden["pad_tok_logp_softcap30"]), atol=1e-13)
    g = reference.token_upstream(interleaved(golden["upstream"]), None, f["seq_offsets"])
    grad = reference.logits_grad(z, f["logit_rows"], f["targets"], g)
    np.testing.assert_allclose(grad, golden["pad_dlogits"].reshape(-1, 61), atol=1e-13)
