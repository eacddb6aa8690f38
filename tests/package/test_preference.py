"""The theory as functions: fits, divergences, the optimal policy, the reward loss."""

import json
import math
import re
from fractions import Fraction

import numpy as np
import places
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_ext import DataError, TensorError
from dpo_ext.preference import (
    bt_fit,
    bt_probability,
    implied_reward,
    kl_divergence,
    kl_from_samples,
    log_partition,
    optimal_policy,
    plackett_luce_fit,
    reward_loss,
)
from dpo_ext.testing import bradley_terry_world

WORLD = json.loads((places.GOLDEN / "golden_world.json").read_text())
NAN = torch.tensor([0.0, math.nan])
strengths = st.lists(st.integers(1, 1000), min_size=2, max_size=7)


EQUAL = pytest.mark.filterwarnings("ignore:`wins` is symmetric")


@EQUAL
@given(strengths)
def test_the_fit_of_expected_wins_returns_the_strengths(a):
    a = np.array(a, dtype=np.float64)
    wins = bt_probability(a[:, None], a[None, :])
    np.fill_diagonal(wins, 0)
    fit = bt_fit(wins)
    np.testing.assert_allclose(fit.strengths / fit.strengths[0], a / a[0], rtol=1e-9)
    assert math.isclose(fit.rewards.mean(), 0, abs_tol=1e-12)


def test_the_fit_is_a_maximum_and_counts_ties_as_halves():
    wins = np.array([[0, 5, 1], [2, 0, 3], [4, 1, 0]], dtype=float)
    ties = np.array([[0, 2, 0], [0, 0, 0], [1, 0, 0]], dtype=float)
    fit = bt_fit(wins, ties=ties)
    total = wins + (ties + ties.T) / 2
    np.testing.assert_allclose(bt_fit(total).strengths, fit.strengths, rtol=1e-12)

    def likelihood(theta):
        p = 1 / (1 + np.exp(theta[None, :] - theta[:, None]))
        return (total * np.log(p)).sum()

    best = likelihood(fit.rewards)
    assert math.isclose(best, fit.log_likelihood, rel_tol=1e-12)
    for k in range(3):
        for sign in (-1e-3, 1e-3):
            moved = fit.rewards.copy()
            moved[k] += sign
            assert likelihood(moved) < best


def test_zermelo_agrees():
    rng = np.random.default_rng(0)
    wins = rng.integers(1, 9, (6, 6)).astype(float)
    np.fill_diagonal(wins, 0)
    a = np.ones(6)
    for _ in range(5000):
        a = wins.sum(1) / ((wins + wins.T) / (a[:, None] + a[None, :])).sum(1)
        a /= np.exp(np.log(a).mean())
    np.testing.assert_allclose(bt_fit(wins).strengths, a, rtol=1e-9)


def test_counts_of_meetings_in_the_place_of_wins_are_warned_of():
    met = [[0, 4, 2], [4, 0, 3], [2, 3, 0]]
    with pytest.warns(UserWarning, match="`wins` is symmetric"):
        fit = bt_fit(met)
    np.testing.assert_allclose(fit.strengths, 1)


@EQUAL
@given(strengths)
def test_plackett_luce_on_pairs_is_bradley_terry(a):
    wins = bt_probability(np.array(a, float)[:, None], np.array(a, float)[None, :])
    pairs = [(i, j) for i in range(len(a)) for j in range(len(a)) if i != j]
    fit = plackett_luce_fit(pairs, weights=[wins[i, j] for i, j in pairs])
    np.fill_diagonal(wins, 0)
    np.testing.assert_allclose(fit.strengths, bt_fit(wins).strengths, rtol=1e-8)


def test_plackett_luce_on_every_ranking_of_three_returns_the_strengths():
    a = np.array([1.0, 3.0, 0.5, 2.0])
    rankings, weights = [], []
    for i in range(4):
        for j in range(4):
            for k in range(4):
                if len({i, j, k}) == 3:
                    rest = a[[i, j, k]]
                    rankings.append((i, j, k))
                    weights.append(rest[0] / rest.sum() * rest[1] / rest[1:].sum())
    fit = plackett_luce_fit(rankings, weights=weights)
    np.testing.assert_allclose(fit.strengths / fit.strengths[0], a, rtol=1e-9)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: bt_fit([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]]), DataError, "do not connect the items: {0, 1}, {2, 3}"),
        (lambda: bt_fit([[0, 1], [0, 0]], names=["x", "y"]), DataError, "no item of {y} ever beat one of {x}"),
        (lambda: bt_fit([[0, 1, 2]]), DataError, "`wins` must be of shape (K, K), found (1, 3)"),
        (lambda: bt_fit([[0, -1], [1, 0]]), DataError, "`wins` must be finite and >= 0"),
        (lambda: bt_fit([[1, 1], [1, 0]]), DataError, "0 on the diagonal"),
        (lambda: bt_fit([[0, 1], [1, 0]], ties=[[0, 1, 1]] * 3), DataError, "`ties`"),
        (lambda: plackett_luce_fit([[0, 0]]), DataError, "distinct"),
        (lambda: plackett_luce_fit([[0, 1], [1, 0]], items=3), DataError, "{0, 1}, {2}"),
        (lambda: plackett_luce_fit([[0, 5]], items=3), DataError, "items below 3"),
        (lambda: plackett_luce_fit([[0, 1], [1, 0]], weights=[1.0]), DataError, "`weights` must be 2 numbers"),
        (lambda: optimal_policy([0.5, 0.6], [0, 0], 1.0), ValueError, "sum to 1"),
        (lambda: optimal_policy([0.5, 0.5], [0, 0], 0.0), ValueError, "`beta` must be > 0"),
        (lambda: optimal_policy([0.5, 0.5], [0], 1.0), ValueError, "one shape"),
        (lambda: kl_from_samples(0.0, 0.0, estimator="k2"), ValueError, "'k1' or 'k3'"),
        (lambda: kl_divergence(torch.zeros(2), torch.zeros(3)), TensorError, "one shape and dtype"),
        (lambda: reward_loss(torch.zeros(2), torch.zeros(3)), TensorError, "one shape (N,)"),
        (lambda: reward_loss(torch.zeros(2), torch.zeros(2), margin=torch.zeros(3, 2)), TensorError, "`margin` must be"),
        (lambda: reward_loss(torch.zeros(2), torch.zeros(2), weight=torch.zeros(3)), TensorError, "`weight` must be"),
        (lambda: reward_loss(torch.zeros(2), torch.zeros(2), center=-1.0), ValueError, "`center`"),
        (lambda: reward_loss(torch.zeros(2), torch.zeros(2), center="a"), TypeError, "`center` must be a number"),
        (lambda: reward_loss(np.zeros(2), torch.zeros(2)), TypeError, "`chosen` must be a torch tensor"),
        (lambda: reward_loss(torch.zeros(2).bfloat16(), torch.zeros(2).bfloat16()), TensorError, "`chosen` must be float32 or float64"),
        (lambda: reward_loss(NAN, torch.zeros(2)), TensorError, "pair 1: `chosen` must not be NaN"),
        (lambda: reward_loss(torch.zeros(2), NAN), TensorError, "pair 1: `rejected` must not be NaN"),
        (lambda: reward_loss(torch.zeros(2), torch.zeros(2), margin=NAN), TensorError, "pair 1: `margin` must not be NaN"),
        (lambda: reward_loss(torch.zeros(2), torch.zeros(2), margin="far"), TypeError, "`margin` must be one number or 2"),
        (lambda: reward_loss(torch.zeros(2), torch.zeros(2), weight=[1.0, -1.0]), TensorError, "pair 1: `weight` must be >= 0"),
        (lambda: bt_probability(-1.0, 1.0), ValueError, "`strength_i` must be > 0"),
        (lambda: bt_probability(1.0, np.array([1.0, 0.0])), ValueError, "`strength_j` must be > 0"),
        (lambda: bt_fit([["a"]]), DataError, "`wins` must be an array of numbers"),
        (lambda: bt_fit([[0, 1], [1, 0]], names=["x"]), DataError, "`names` must have 2 entries"),
        (lambda: plackett_luce_fit([[0.5, 1]]), DataError, "integers"),
        (lambda: plackett_luce_fit([]), DataError, "`rankings` must be lists of at least two"),
        (lambda: plackett_luce_fit([[0, 1], [1, 0]], weights=[math.inf, 1.0]), DataError, "> 0 and finite"),
        (lambda: kl_divergence(np.zeros(2), torch.zeros(2)), TypeError, "`logits` must be a torch tensor"),
        (lambda: kl_divergence(torch.zeros(2).long(), torch.zeros(2).long()), TensorError, "`logits` must be floating-point"),
        (lambda: kl_divergence(torch.zeros(3, 0), torch.zeros(3, 0)), TensorError, "shape (..., V)"),
        (lambda: kl_divergence(torch.zeros(2), torch.zeros(2, device="meta")), TensorError, "`other_logits` must be on cpu"),
        (lambda: kl_from_samples([0.0, 1.0], [0.0]), ValueError, "`other_logps` must have the shape"),
        (lambda: implied_reward(-1.0, -2.0, -0.5), ValueError, "`beta` must be > 0"),
        (lambda: optimal_policy([0.5, 0.5], [math.nan, 0], 1.0), ValueError, "`rewards` must be finite"),
        (lambda: optimal_policy([0.5, 0.5], [math.inf, 0], 1.0), ValueError, "`rewards` must be finite"),
        (lambda: optimal_policy([1.0, 0.0], [-math.inf, 0], 1.0), ValueError, "`rewards` must leave something"),
        (lambda: optimal_policy([0.5, 0.5], [0, 0], "a"), TypeError, "`beta` must be a number"),
    ],
)  # fmt: skip
def test_bad_input_is_a_typed_error(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()


@pytest.mark.parametrize("key", WORLD["integer_bt_world"]["optima"])
def test_the_optimal_policy_and_both_divergences_are_the_golden_ones(key):
    golden = WORLD["integer_bt_world"]["optima"][key]
    beta = float(Fraction(key.removeprefix("beta=")))
    ref = np.array([8, 4, 2, 2]) / 16
    reward = np.log([1, 2, 4, 8])
    policy = optimal_policy(ref, reward, beta)
    np.testing.assert_allclose(policy, [float(Fraction(p)) for p in golden["pi_star"]], rtol=1e-14)
    np.testing.assert_allclose(policy, bradley_terry_world().optimum(beta), rtol=1e-14)
    log_p, log_q = torch.tensor(policy).log(), torch.tensor(ref).log()
    assert math.isclose(kl_divergence(log_p, log_q).item(), golden["kl_star_ref"], rel_tol=1e-12)
    assert math.isclose(kl_divergence(log_q, log_p).item(), golden["kl_ref_star"], rel_tol=1e-12)
    best = policy @ reward - beta * golden["kl_star_ref"]
    assert math.isclose(best, beta * log_partition(ref, reward, beta), rel_tol=1e-12)
    z = log_partition(ref, reward, beta)
    back = implied_reward(np.log(policy), np.log(ref), beta, log_partition=z)
    np.testing.assert_allclose(back, reward, atol=1e-12)


def test_the_real_reward_world():
    world = WORLD["real_reward_world"]
    ref = np.array(world["pi_ref_weights"])
    ref = ref / ref.sum(1, keepdims=True)
    np.testing.assert_allclose(
        optimal_policy(ref, world["reward"], world["beta"]), world["pi_star"], rtol=1e-13
    )
    np.testing.assert_allclose(
        log_partition(ref, world["reward"], world["beta"]), world["logZ"], rtol=1e-13
    )


@given(st.lists(st.integers(-200, 200), min_size=4, max_size=12))
def test_a_divergence_is_not_negative_and_0_only_for_equals(numbers):
    half = len(numbers) // 2
    p, q = (
        torch.tensor(numbers[k * half : (k + 1) * half], dtype=torch.float64) / 16 for k in range(2)
    )
    assert kl_divergence(p, q) >= -1e-12
    assert kl_divergence(p, p + 3).abs() <= 1e-12
    exact = (torch.softmax(p, 0) * (torch.log_softmax(p, 0) - torch.log_softmax(q, 0))).sum()
    assert torch.allclose(kl_divergence(p, q), exact)
    # every outcome with its probability: both estimators have the right mean
    terms = kl_from_samples(torch.log_softmax(p, 0), torch.log_softmax(q, 0))
    assert (terms >= 0).all()
    assert torch.allclose((torch.softmax(p, 0) * terms).sum(), exact, atol=1e-9)


def test_columns_that_cannot_be_taken():
    inf = math.inf
    p, q = torch.tensor([0.0, -inf, 0.0]), torch.tensor([0.0, 0.0, -inf])
    assert math.isclose(kl_divergence(p, torch.zeros(3)).item(), math.log(1.5), rel_tol=1e-6)
    assert kl_divergence(p, q) == inf
    leaf = torch.tensor([0.5, -inf, 0.0], requires_grad=True)
    kl_divergence(leaf, torch.zeros(3)).backward()
    assert leaf.grad.isfinite().all()


def test_the_divergences_differentiate_both_ways():
    p, q = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(kl_divergence, (p, q))


def test_the_reward_loss_is_the_likelihood_with_margin_centring_and_weights():
    chosen, rejected = torch.tensor([1.0, -50.0, 3.0]), torch.tensor([0.5, 50.0, 3.0])
    margin, weight = torch.tensor([0.1, 0.0, 1.0]), torch.tensor([1.0, 2.0, 0.0])
    lead = (chosen - rejected - margin).double()
    rows = torch.log1p(torch.exp(-lead)) + 0.01 * (chosen + rejected).double() ** 2
    want = (rows * weight).sum() / 3
    got = reward_loss(chosen, rejected, margin=margin, center=0.01, weight=weight)
    assert math.isclose(got.item(), want.item(), rel_tol=1e-6)
    assert math.isclose(
        reward_loss(chosen[:1], rejected[:1], margin=0.5).item(), math.log(2), rel_tol=1e-6
    )


def test_a_reward_model_trained_on_the_world_finds_its_strengths():
    world = bradley_terry_world()
    winners, losers = (torch.tensor(side) for side in zip(*world.preferences(), strict=True))
    reward = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [reward], max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-12
    )

    def closure():
        optimizer.zero_grad()
        loss = reward_loss(reward[winners], reward[losers], center=1e-9)
        loss.backward()
        return loss

    optimizer.step(closure)
    ratios = (reward - reward[0]).exp().tolist()
    np.testing.assert_allclose(ratios, world.strengths, rtol=1e-4)


def test_nan_logits_do_not_become_a_divergence_of_0():
    p, q = torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert kl_divergence(p, q).isnan().tolist() == [True, False]
    assert kl_divergence(q, p).isnan().tolist() == [True, False]
    half = kl_divergence(p[1].bfloat16(), q[0].bfloat16())
    assert half.dtype == torch.float32
    assert math.isclose(half.item(), kl_divergence(p[1], q[0]).item(), rel_tol=1e-6)


def test_a_lopsided_fit_is_exact():
    fit = bt_fit([[0, 1e9], [1, 0]])
    assert math.isclose(fit.strengths[0] / fit.strengths[1], 1e9, rel_tol=1e-9)


def test_only_ties_are_equal_strengths_and_a_disconnected_graph_names_its_parts():
    assert bt_fit(np.zeros((2, 2)), ties=[[0, 3], [0, 0]]).strengths.tolist() == [1.0, 1.0]
    wins = np.zeros((5, 5))
    wins[0, 1] = wins[1, 0] = wins[2, 4] = wins[4, 2] = 1
    with pytest.raises(DataError) as error:
        bt_fit(wins, names=["a", "b", "c", "d", "e"])
    assert "{a, b}, {c, e}, {d}" in str(error.value)
    assert error.value.reason == "disconnected"


def test_samples_of_a_policy_estimate_the_divergence():
    rng = np.random.default_rng(0)
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.3, 0.5])
    drawn = rng.choice(3, size=200_000, p=p)
    exact = float((p * np.log(p / q)).sum())
    for estimator in ("k1", "k3"):
        terms = kl_from_samples(np.log(p)[drawn], np.log(q)[drawn], estimator=estimator)
        assert abs(terms.mean() - exact) <= 5 * terms.std() / math.sqrt(len(terms))
    tensors = kl_from_samples(torch.tensor(np.log(p)), torch.tensor(np.log(q)))
    np.testing.assert_allclose(tensors, kl_from_samples(np.log(p), np.log(q)), rtol=1e-12)


def test_a_reward_pair_of_weight_0_is_not_read():
    out = reward_loss(NAN, torch.zeros(2), weight=[1.0, 0.0])
    assert math.isclose(out.item(), math.log(2) / 2, rel_tol=1e-6)
