"""`torch.compile(fullgraph=True)` of every loss: one graph, the same numbers forward and backward."""

import pytest
import torch
from loss_calls import of_lists, of_pairs, of_single
from loss_cases import BUILT_IN, COUPLED, LISTS, SINGLE, batch_of

from dpo_ext.torch import preference_loss

pytestmark = pytest.mark.slow

CALLS = [
    *((of_pairs, name) for name in BUILT_IN),
    *((of_single, name) for name in SINGLE),
    *((of_lists, name) for name in LISTS),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def outputs(function):
    """A function of tensors that returns tensors: the loss, and all that is made beside it."""

    def call(*tensors, **options):
        out = function(*tensors, **options)
        if function is not preference_loss:
            return out.loss, out.per_example, out.rewards
        return out.loss, out.per_pair, out.chosen_rewards, out.rejected_rewards, out.metrics

    return call


def agree(compiled, plain, tensors, options):
    leaves = [tensors[0].detach().clone().requires_grad_() for _ in range(2)]
    got, want = (
        call(leaf, *tensors[1:], **options)
        for call, leaf in zip((compiled, plain), leaves, strict=True)
    )
    for loss, *_ in (got, want):
        (3.0 * loss).backward()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("make", "name"), CALLS, ids=lambda x: x if isinstance(x, str) else "")
def test_every_loss_traces_into_one_graph(make, name):
    """With arrays as parameters, `weight` and a tensor as `num_pairs` where the loss takes them."""
    function, tensors, options = make(name, True)
    plain = outputs(function)
    agree(torch.compile(plain, fullgraph=True, backend="eager"), plain, tensors, options)


OPTIONS = [
    {}, {"label_smoothing": 0.1, "margin": 0.2}, {"loss": "fdpo_alpha"}, {"loss": "aot_unpaired"},
    {"loss": ["dpo", "sft"], "loss_weights": [1.0, 0.1]}, {"loss": "ipo", "compat": "trl-0.28"},
    {"weight": torch.tensor([1.0, 0.0, 2.0, 1.0, 1.0]), "num_pairs": 5}, {"loss": "orpo"},
    {"loss": "tdpo1", "kw": 0.5, "kl": torch.tensor([0.1, 0.2, 0.3, 0.0, 1.0])},
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_backward_is_compiled_too(options):
    logps, ref, lengths = batch_of(5)
    plain = outputs(preference_loss)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    agree(compiled, plain, (logps, ref), {"lengths": lengths, **options})


@pytest.mark.parametrize("name", ["dpo", "simpo", "exo_pair"])
def test_one_graph_of_inductor_serves_every_batch_size(name):
    plain = outputs(preference_loss)
    compiled = torch.compile(plain, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for pairs in (5, 6, 9, 64):
            logps, ref, lengths = batch_of(pairs, seed=pairs)
            smooth = {"label_smoothing": torch.full((pairs,), 0.25)} if name != "simpo" else {}
            options = {
                "loss": name, "lengths": lengths, "beta": torch.linspace(0.1, 0.5, pairs),
                "weight": torch.ones(pairs), "num_pairs": torch.tensor(float(pairs)), **smooth,
            }  # fmt: skip
            agree(compiled, plain, (logps, ref), options)


def test_a_loss_that_looks_at_a_value_is_no_single_graph():
    """So the tests above would see a graph break."""

    def looks(logps, ref_logps):
        return (logps - ref_logps)[:, 0] * (1.0 if logps.sum() > 0 else 2.0)

    logps, ref, _ = batch_of(5)

    def call(logps):
        return preference_loss(logps, ref, loss=looks).loss

    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"[Dd]ata.dependent"):
        torch.compile(call, fullgraph=True, backend="eager")(logps)


def test_none_is_left_out():
    assert len(CALLS) == len(BUILT_IN) + 3 + 4
    assert set(COUPLED) <= {name for _, name in CALLS}
