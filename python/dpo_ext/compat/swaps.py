"""The table of `patch`: which attribute of which module of a peer is replaced by what."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

from dpo_ext.compat import (
    dpo,
    liger,
    llamafactory,
    open_instruct,
    openrlhf,
    torch,
    torchtune,
    trl,
    verl,
)


class Swap(NamedTuple):
    """One attribute, in the first of the modules that has it."""

    modules: tuple[str, ...]
    name: str
    """Of a function or class, or ``Class.method``."""
    replacements: tuple[Any, ...]
    """Of several the first is taken whose signature fits: generations of the peer."""


class Peer(NamedTuple):
    package: str
    """What is imported."""
    distribution: str
    """What is installed."""
    swaps: tuple[Swap, ...]


def _of(module: str, replacements: Any, *names: str) -> tuple[Swap, ...]:
    return tuple(Swap((module,), name, (getattr(replacements, name),)) for name in names)


_ONLINE = ("trl.experimental.online_dpo.online_dpo_trainer", "trl.trainer.online_dpo_trainer")
_HEADS = (
    trl.ChunkedLogProbFunction,
    trl.ChunkedLogProbFunction1_13,
    trl.ChunkedLogProbFunction1_5,
)
_TRL = (
    *_of(
        "trl.trainer.utils",
        trl,
        "selective_log_softmax",
        "entropy_from_logits",
        "selective_log_softmax_and_entropy",
    ),
    Swap(("trl.trainer.utils",), "_ChunkedLogProbFunction", _HEADS),
    Swap(_ONLINE, "OnlineDPOTrainer._forward", (trl.online_dpo_forward,)),
)
_TORCHTUNE = (
    *_of("torchtune.rlhf.sequence_processing", torchtune, "get_batch_log_probs"),
    *_of("torchtune.rlhf.loss.dpo", torchtune, "DPOLoss"),
)
_OPENRLHF = (
    *_of("openrlhf.models.utils", openrlhf, "log_probs_from_logits"),
    *_of("openrlhf.models.loss", openrlhf, "DPOLoss"),
)
_OPEN_INSTRUCT = (
    *_of("open_instruct.model_utils", open_instruct, "log_softmax_and_gather"),
    *_of("open_instruct.dpo_utils", open_instruct, "_get_batch_logps"),
    *_of("open_instruct.padding_free_collator", open_instruct, "get_batch_logps"),
)

PEERS = {
    "trl": Peer("trl", "trl", _TRL),
    "liger": Peer(
        "liger_kernel",
        "liger-kernel",
        _of("liger_kernel.chunked_loss", liger, *liger.__all__),
    ),
    "llamafactory": Peer(
        "llamafactory",
        "llamafactory",
        _of("llamafactory.train.trainer_utils", llamafactory, "get_batch_logps"),
    ),
    "openrlhf": Peer("openrlhf", "openrlhf", _OPENRLHF),
    "verl": Peer("verl", "verl", _of("verl.utils.torch_functional", verl, "logprobs_from_logits")),
    "torchtune": Peer("torchtune", "torchtune", _TORCHTUNE),
    "open_instruct": Peer("open_instruct", "open-instruct", _OPEN_INSTRUCT),
    "dpo": Peer("trainers", "", _of("trainers", dpo, "_get_batch_logps", "preference_loss")),
    "torch": Peer("torch", "torch", _of("torch.nn.functional", torch, "linear_cross_entropy")),
}
"""By the name that `patch` takes."""

_Signature = list[tuple[str, Any, Any]]


def misfit(theirs: Any, ours: Any) -> str | None:
    """Why a call of theirs might not be one of ours, or None: every parameter of theirs stands at
    the same place with the same name, kind and default, and what ours has beyond has a default.

    >>> misfit(lambda logits, index: 0, lambda logits, index, temperature=1.0: 0)
    >>> misfit(lambda logits, mask: 0, lambda logits, index: 0)
    'theirs takes (logits, mask), ours (logits, index)'
    """
    for one, other in zip(_calls(theirs), _calls(ours), strict=True):
        wanted, has = _parameters(one), _parameters(other)
        rest = has[len(wanted) :]
        # a default of another release is no misfit: it changes no call that says the argument
        same = all(a[:2] == b[:2] and (b[2] or not a[2]) for a, b in zip(wanted, has, strict=False))
        if len(has) < len(wanted) or not same or not all(optional for *_, optional in rest):
            return f"theirs takes ({_said(wanted)}), ours ({_said(has)})"
    return None


def _calls(value: Any) -> tuple[Any, ...]:
    """What is called of a function, a module of torch, or a function with a gradient."""
    if not isinstance(value, type):
        return (value,)
    if hasattr(value, "apply") and not hasattr(value, "named_parameters"):
        return (_without_context(value.forward) if hasattr(value, "forward") else value.apply,)
    return (value.__init__, value.forward)  # type: ignore[attr-defined, misc]


def _without_context(forward: Any) -> inspect.Signature:
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _parameters(value: Any) -> _Signature:
    signature = value if isinstance(value, inspect.Signature) else inspect.signature(value)
    return [(p.name, p.kind, p.default is not p.empty) for p in signature.parameters.values()]


def _said(parameters: _Signature) -> str:
    return ", ".join(name for name, *_ in parameters)
