"""No loss waits for the device: forward, backward and metrics, with numbers and with arrays as parameters."""

import pytest
import torch
from loss_calls import PAIRS, of_lists, of_pairs, of_single
from loss_cases import BUILT_IN, LISTS, SINGLE, batch_of
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dpo_ext.torch import (
    ScoreTable,
    kto_z,
    ld_table,
    numbers,
    preference_loss,
    tdpo_kls,
    token_scores,
    wpo_averages,
)
from dpo_ext.torch.losses import checks, lists, pairs, single

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "aten.equal", "item")


class Waits(TorchDispatchMode):
    """Counts the operators that wait for a device; a boolean index is a `nonzero`."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        boolean = "aten.index" in str(function) and any(
            isinstance(t, torch.Tensor) and t.dtype in (torch.bool, torch.uint8)
            for t in tree_iter(args[1:2])
        )
        devices = [t.device.type for t in tree_iter(args) if isinstance(t, torch.Tensor)]
        to_host = "cuda" in devices and any(
            t.device.type == "cpu" for t in tree_iter(out) if isinstance(t, torch.Tensor)
        )
        if boolean or to_host or any(name in str(function) for name in WAITING):
            self.found.append(str(function))
        return out


CALLS = [
    *((of_pairs, name, arrays) for name in BUILT_IN for arrays in (False, True)),
    *((of_single, name, arrays) for name in SINGLE for arrays in (False, True)),
    *((of_lists, name, arrays) for name in LISTS for arrays in (False, True)),
]
MORE = [
    {"loss": ["dpo", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0], "delta": 0.0},
    {"loss": "ipo", "compat": "trl-0.28"},
    {"loss": ["sigmoid", "sft"], "compat": "trl-1.16"},
]
IDS = [f"{name}-{'arrays' if arrays else 'numbers'}" for _, name, arrays in CALLS]


@pytest.fixture
def as_on_cuda(monkeypatch):
    """The checks of values that cost nothing on a CPU are left out, as for a CUDA tensor."""
    for module in (checks, lists, numbers, pairs, single):
        monkeypatch.setattr(module, "host_values", lambda tensor: False)


def run(function, tensors, options):
    """Forward, metrics and rewards, backward."""
    leaf = tensors[0].detach().requires_grad_()
    out = function(leaf, *tensors[1:], **options)
    if function is preference_loss:
        made = [out.per_pair, out.chosen_rewards, out.rejected_rewards, *out.metrics.values()]
    else:
        made = [out.per_example, out.rewards]
    out.loss.backward()
    return [out.loss, *made, leaf.grad]


@pytest.mark.parametrize(("make", "name", "arrays"), CALLS, ids=IDS)
def test_nothing_waits_forward_or_backward(make, name, arrays, as_on_cuda):
    call = make(name, arrays)
    with Waits() as waits:
        run(*call)
    assert waits.found == []


@pytest.mark.parametrize("options", MORE, ids=str)
def test_lists_and_names_of_code_bases_do_not_wait_either(options, as_on_cuda):
    logps, ref, lengths = batch_of(PAIRS)
    with Waits() as waits:
        run(preference_loss, (logps, ref), {"lengths": lengths, **options})
    assert waits.found == []


@pytest.mark.fake_cuda
@pytest.mark.slow
@pytest.mark.parametrize(("make", "name", "arrays"), CALLS, ids=IDS)
def test_on_cuda_no_value_is_looked_at(make, name, arrays):
    """Fake CUDA tensors have no values: looking at one raises."""
    function, tensors, options = make(name, arrays)

    def fake(value):
        if not isinstance(value, torch.Tensor):
            return value
        return torch.empty(value.shape, dtype=value.dtype, device="cuda")

    with FakeTensorMode(), Waits() as waits:
        logps = fake(tensors[0]).requires_grad_()
        options = {k: fake(v) for k, v in options.items()}
        out = function(logps, *map(fake, tensors[1:]), **options)
        made = [out.loss]
        if function is preference_loss:
            made += [out.per_pair, out.chosen_rewards, *out.metrics.values()]
        assert {t.device.type for t in made} == {"cuda"}
    assert waits.found == []


def scored(device):
    """A table of a padded batch and the scores of its tokens."""
    labels = torch.tensor([[-100, 1, 2], [-100, -100, 3]], device=device)
    table = ScoreTable.from_labels(labels)
    return table, token_scores(torch.zeros(6, 5, device=device), table, stats=("log_sum_sq",))


def statistics(table, scores):
    """What WPO, TDPO, LD-DPO and KTO take from tokens and from mismatched pairs."""
    return [
        ld_table(table, 0.5).weights,
        *wpo_averages(scores, table),
        *tdpo_kls(torch.zeros_like(scores.logps), table),
        kto_z(torch.zeros_like(scores.logps), torch.zeros_like(scores.logps)),
    ]


def test_token_statistics_do_not_wait():
    table, scores = scored("cpu")
    with Waits() as waits:
        statistics(table, scores)
    assert waits.found == []


BAD = {
    "item": lambda c, f: (c - f)[:, 0] * (c.detach().sum().item() > 0),
    "bool": lambda c, f: (c - f)[:, 0] if (c > f).any() else (f - c)[:, 0],
    "boolean index": lambda c, f: (c - f)[(c < 1).all(1)][:, 0],
    "nonzero": lambda c, f: (c - f)[torch.nonzero(c[:, 0] < 1)[:, 0], 0],
    "equal": lambda c, f: (c - f)[:, 0] if not torch.equal(c, f) else c[:, 0],
}


@pytest.mark.parametrize("name", BAD)
def test_a_loss_that_waits_is_caught(name, as_on_cuda):
    logps, ref, _ = batch_of(PAIRS)
    with Waits() as waits:
        run(preference_loss, (logps, ref), {"loss": BAD[name]})
    assert waits.found


@pytest.mark.fake_cuda
def test_a_copy_to_the_host_is_caught():
    with FakeTensorMode(), Waits() as waits:
        torch.empty(3, device="cuda").cpu()
    assert waits.found


@pytest.fixture
def no_synchronization():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("make", "name", "arrays"), CALLS, ids=IDS)
def test_on_a_device_nothing_waits(make, name, arrays, no_synchronization):
    function, tensors, options = make(name, arrays)
    torch.cuda.set_sync_debug_mode("default")  # the copies to the device wait

    def moved(value):
        return value.cuda() if isinstance(value, torch.Tensor) else value

    on_device = tuple(map(moved, tensors))
    options = {k: moved(v) for k, v in options.items()}
    torch.cuda.set_sync_debug_mode("error")
    got = run(function, on_device, options)
    torch.cuda.set_sync_debug_mode("default")
    want = run(*make(name, arrays))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_on_a_device_token_statistics_do_not_wait(no_synchronization):
    torch.cuda.set_sync_debug_mode("default")
    want, on_device = statistics(*scored("cpu")), scored("cuda")
    torch.cuda.set_sync_debug_mode("error")
    got = statistics(*on_device)
    torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.cpu(), b)
