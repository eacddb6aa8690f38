"""What a user's function of the log-probs looks like: how it is called, and its parameters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

from dpo_ext.torch.losses.row import Parameter, finite

OPTIONS = (
    "logps", "ref_logps", "loss", "lengths", "weight", "num_pairs", "compat", "loss_weights",
    "group",
)  # fmt: skip
"""What `preference_loss` takes itself, so that no parameter of a loss can have the name."""


def parameters_of(function: Callable[..., Any], lengths: bool = False) -> dict[str, Parameter]:
    """The parameters behind the log-probs: a number as default is the default, none must be given.

    A default that is no number stays the function's own: a parameter of a loss is a number.

    Raises:
        TypeError: one has the name of an option of `preference_loss`.
    """
    found: dict[str, Parameter] = {}
    tensors = 2 + lengths
    for name, parameter in _signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        if parameter.kind != parameter.KEYWORD_ONLY and tensors > 0:
            tensors -= 1
            continue
        needed = parameter.default is parameter.empty
        if not needed and not isinstance(parameter.default, int | float):
            continue
        if name in OPTIONS:
            hint = "\nhint: register_loss(..., lengths=True)" if name == "lengths" else ""
            raise TypeError(
                f"`{name}` of {_called(function)} is an option of preference_loss, not a "
                f"parameter{hint}"
            )
        found[name] = finite(None if needed else parameter.default)
    return found


def check_call(
    function: Callable[..., Any], tensors: tuple[str, ...], names: Iterable[str] = ()
) -> None:
    """Refuse a function that cannot be called with these tensors and these parameters.

    ``tensors`` are the names of what it is called with: ``("logps", "ref_logps")``, and
    ``"lengths"`` where it has them.

    Raises:
        TypeError: what it takes, and how a loss is called.
    """
    signature = _signature(function)
    takes = [p.name for p in signature.parameters.values() if p.kind <= p.POSITIONAL_OR_KEYWORD]
    if len(takes) > 1 and "chosen" in takes[0] and "rejected" in takes[1]:
        why = f"it takes the sides of a pair one by one ({', '.join(takes)})"
    else:
        try:
            signature.bind(*tensors, **dict.fromkeys(names))
            return
        except TypeError as error:
            why = str(error)
    call = ", ".join((*tensors, *(f"{name}=..." for name in names)))
    raise TypeError(
        f"{_called(function)} cannot be called as loss({call}): {why}\n"
        "hint: `logps` and `ref_logps` are (N, 2), chosen then rejected: "
        "`chosen, rejected = logps.unbind(1)`"
    )


def _signature(function: Callable[..., Any]) -> inspect.Signature:
    if not callable(function):
        raise TypeError(f"`function` must be callable, found {type(function).__name__}")
    try:
        return inspect.signature(function)
    except ValueError:  # a function in C that does not say what it takes
        return inspect.signature(lambda *tensors, **parameters: None)


def _called(function: Callable[..., Any]) -> str:
    return f"`{getattr(function, '__name__', type(function).__name__)}`"
