"""`dpo_ext.compat.patch`: what it swaps, says and undoes, on peers made here and on TRL."""

from __future__ import annotations

import pickle
import sys
import threading
import types

import pytest
import torch

from dpo_ext import PatchError, compat
from dpo_ext.compat import llamafactory as ours
from dpo_ext.compat import trl
from dpo_ext.compat.patching import patch
from dpo_ext.compat.swaps import PEERS, misfit


def get_batch_logps(logits, labels, label_pad_token_id=-100, ld_alpha=None):
    return "theirs"


THEIRS = (get_batch_logps,)  # in no module's attribute, where `patch` would find it


def module(name, monkeypatch, **names):
    made = types.ModuleType(name)
    made.__path__ = []
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, name, made)
    return made


@pytest.fixture
def peer(monkeypatch):
    """A LLaMA-Factory of three modules: the home, a trainer that imported the name, a stranger."""
    module("llamafactory", monkeypatch)
    module("llamafactory.train", monkeypatch)
    home = module("llamafactory.train.trainer_utils", monkeypatch, get_batch_logps=get_batch_logps)
    trainer = module("llamafactory.train.dpo", monkeypatch, logps=get_batch_logps, other=1)
    return home, trainer


HOME = "llamafactory.train.trainer_utils.get_batch_logps"


def test_it_swaps_every_module_that_holds_the_name_lists_them_and_undoes_it(peer):
    home, trainer = peer
    done = patch("llamafactory")
    assert done.swapped[0] == HOME
    assert "llamafactory.train.dpo.logps" in done.swapped
    assert done.left == ()
    assert home.get_batch_logps is trainer.logps is not THEIRS[0]
    value = home.get_batch_logps(torch.zeros(1, 2, 4), torch.tensor([[1, 2]]))
    torch.testing.assert_close(value[0], torch.tensor([-1.3863]), atol=1e-4, rtol=0)
    assert trainer.other == 1
    done.undo()
    assert home.get_batch_logps is trainer.logps is THEIRS[0]
    assert "undone" in repr(done)
    done.undo()


def test_this_very_module_is_one_of_them(peer):
    with patch("llamafactory") as done:
        assert f"{__name__}.get_batch_logps" in done.swapped
        assert get_batch_logps(torch.zeros(1, 2, 4), torch.tensor([[1, 2]])) != "theirs"
    assert get_batch_logps(None, None) == "theirs"


def test_a_context_undoes_it_after_an_error_too(peer):
    with pytest.raises(KeyError), patch("llamafactory"):
        raise KeyError
    assert peer[0].get_batch_logps is THEIRS[0]


def test_nested_patches_hold_until_the_last_is_undone(peer):
    home, trainer = peer
    with patch("llamafactory") as outer:
        held = home.get_batch_logps
        with patch("llamafactory") as inner:
            assert home.get_batch_logps is held
            assert set(inner.swapped) == set(outer.swapped)
        assert home.get_batch_logps is trainer.logps is held
    assert home.get_batch_logps is trainer.logps is THEIRS[0]


def test_patches_undone_in_another_order(peer):
    first, second = patch("llamafactory"), patch("llamafactory")
    first.undo()
    first.undo()
    assert peer[0].get_batch_logps is not THEIRS[0]
    second.undo()
    assert peer[0].get_batch_logps is THEIRS[0]


def test_a_module_imported_in_between_gets_theirs_back(peer, monkeypatch):
    with patch("llamafactory"):
        late = module("late", monkeypatch, mine=peer[0].get_batch_logps)
        other = patch("llamafactory")
        assert "late.mine" in other.swapped
        other.undo()
    assert late.mine is THEIRS[0]


def test_who_imported_ours_by_name_keeps_ours(peer, monkeypatch):
    mine = module("mine", monkeypatch, f=ours.get_batch_logps)
    with patch("llamafactory"):
        assert mine.f is ours.get_batch_logps
    assert mine.f is ours.get_batch_logps is not THEIRS[0]


def test_what_somebody_else_put_there_since_is_left_with_a_warning(peer):
    done = patch("llamafactory")
    peer[0].get_batch_logps = "another"
    with pytest.warns(RuntimeWarning, match="replaced by somebody else"):
        done.undo()
    assert peer[0].get_batch_logps == "another"
    assert peer[1].logps is THEIRS[0]


def test_the_replacement_is_pickled_under_the_name_of_the_peer(peer, monkeypatch):
    get_batch_logps.__module__, before = (
        "llamafactory.train.trainer_utils",
        get_batch_logps.__module__,
    )
    try:
        with patch("llamafactory"):
            again = pickle.loads(pickle.dumps(peer[0].get_batch_logps))
            assert again is peer[0].get_batch_logps
    finally:
        sys.modules[__name__].get_batch_logps.__module__ = before


def test_another_signature_is_no_silent_no_op(peer, monkeypatch):
    home = peer[0]
    monkeypatch.setattr(home, "get_batch_logps", lambda logits, mask: 0)
    with pytest.raises(PatchError, match=r"nothing of llamafactory .* can be replaced") as error:
        patch("llamafactory")
    assert "theirs takes (logits, mask)" in str(error.value)


def test_a_version_without_the_name_is_named(peer, monkeypatch):
    monkeypatch.delattr(peer[0], "get_batch_logps")
    with pytest.raises(PatchError, match=f"{HOME}: not in this version"):
        patch("llamafactory")


def test_what_does_not_fit_is_listed_beside_what_does(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)  # TRL's own, where another test imported it
    for name in ("trl", "trl.trainer"):
        module(name, monkeypatch)
    theirs = {"selective_log_softmax": lambda logits, index: 0, "entropy_from_logits": lambda x: 0}
    module("trl.trainer.utils", monkeypatch, **theirs)
    with patch("trl") as done:
        assert done.swapped[0] == "trl.trainer.utils.selective_log_softmax"
        assert [name for name, _ in done.left] == ["trl.trainer.utils.entropy_from_logits"]


@pytest.mark.parametrize("name", ["TRL", "unsloth", ""])
def test_an_unknown_peer_lists_those_that_are_known(name):
    with pytest.raises(ValueError, match="`peer` must be one of trl, liger"):
        patch(name)


def test_a_peer_that_is_not_installed_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "verl", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs the module verl\nhint: pip install verl"):
        patch("verl")


def test_threads_patch_and_undo_without_losing_theirs(peer):
    def work():
        for _ in range(30):
            with patch("llamafactory"):
                assert peer[0].get_batch_logps is not THEIRS[0]

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert peer[0].get_batch_logps is peer[1].logps is THEIRS[0]


def test_every_name_of_the_table_is_one_of_the_module():
    for name, peer in PEERS.items():
        for swap in peer.swaps:
            for replacement in swap.replacements:
                assert replacement.__module__ == f"dpo_ext.compat.{name}"
    assert compat.__all__ == ["PEERS", "Patch", "patch"]


def test_generations_of_the_fused_head_are_told_apart_by_what_they_take():
    def head_of(*names):
        space = {}
        exec(f"def forward(ctx, {', '.join(names)}, cap=None, scale=1.0): pass", space)
        return type("F", (torch.autograd.Function,), {"forward": staticmethod(space["forward"])})

    old = head_of("last_hidden", "weight", "targets", "temperature", "chunk_size")
    assert misfit(old, trl.ChunkedLogProbFunction1_13) is not None
    renamed = trl.ChunkedLogProbFunction1_5.apply
    assert misfit(renamed, trl.ChunkedLogProbFunction1_5.apply) is None


def test_torch_is_patched_for_the_module_too():
    if not hasattr(torch.nn, "LinearCrossEntropyLoss"):
        with pytest.raises(PatchError, match="nothing of torch"):
            patch("torch")
        return
    theirs = torch.nn.functional.linear_cross_entropy
    loss = torch.nn.LinearCrossEntropyLoss(8, 4)
    x, t = torch.randn(3, 8), torch.tensor([0, 1, 3])
    before = loss(x, t)
    with patch("torch") as done:
        assert done.swapped[0] == "torch.nn.functional.linear_cross_entropy"
        after = loss(x, t)
        assert type(after.grad_fn) is not type(before.grad_fn)
    torch.testing.assert_close(before, after)
    assert torch.nn.functional.linear_cross_entropy is theirs


@pytest.mark.slow
def test_trl_is_patched_where_its_trainers_hold_the_names(monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    import trl.experimental.cpo.cpo_trainer as cpo
    import trl.experimental.orpo.orpo_trainer as orpo
    import trl.trainer.grpo_trainer as grpo
    import trl.trainer.utils as utils

    theirs = utils.selective_log_softmax
    assert cpo.selective_log_softmax is theirs
    with patch("trl") as done:
        assert not done.left
        assert {
            "trl.trainer.utils.selective_log_softmax",
            "trl.trainer.utils.entropy_from_logits",
            "trl.trainer.utils.selective_log_softmax_and_entropy",
            "trl.trainer.utils._ChunkedLogProbFunction",
            "trl.kernels.ChunkedLogProbFunction",
            "trl.experimental.online_dpo.online_dpo_trainer.OnlineDPOTrainer._forward",
            "trl.experimental.cpo.cpo_trainer.selective_log_softmax",
            "trl.experimental.orpo.orpo_trainer.selective_log_softmax",
        } <= set(done.swapped)
        assert cpo.selective_log_softmax is orpo.selective_log_softmax is not theirs
        labels = torch.tensor([[-100, 1, 2], [-100, 3, -100]])
        logits = torch.randn(2, 3, 5, requires_grad=True)
        got = cpo.CPOTrainer.get_batch_logps(logits, labels)
        (grad,) = torch.autograd.grad(got.sum(), logits)
    want = cpo.CPOTrainer.get_batch_logps(logits, labels)
    (wanted,) = torch.autograd.grad(want.sum(), logits)
    torch.testing.assert_close((got, grad), (want, wanted))
    assert cpo.selective_log_softmax is utils.selective_log_softmax is theirs
    assert grpo is not None
