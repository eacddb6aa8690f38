"""Search for a counterexample with Hypothesis, and tell it in a form that a person can paste."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dpo_ext.extras import need


class Violation(AssertionError):  # noqa: N818 - a finding, not a fault
    """A property does not hold for one case."""


def hypothesis() -> Any:
    """The module Hypothesis.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
    return need("hypothesis", "dpo_ext.testing")


SHRINKS = 100  # evaluations after the first counterexample; the rest shortens little


def search(check: Callable[[Any], None], strategy: Any, examples: int) -> None:
    """Run a check on drawn cases.

    Raises:
        AssertionError: with the shortest message of a `Violation` that was found.
    """
    hyp = hypothesis()
    settings = hyp.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(hyp.HealthCheck),
    )
    found: list[Violation] = []
    runs_after = 0

    @settings
    @hyp.given(strategy)
    def run(case: Any) -> None:
        nonlocal runs_after
        if found:
            runs_after += 1
            if runs_after > SHRINKS:
                return
        try:
            check(case)
        except Violation as violation:
            found.append(violation)
            raise

    try:
        run()
    except (Violation, hyp.errors.Flaky):  # Flaky: the budget ran out before the last replay
        best = min(found, key=lambda violation: len(str(violation)))
        raise AssertionError(str(best)) from best.__cause__


def literal(name: str, value: Any) -> str:
    """``name = ...``, ready to paste."""
    if isinstance(value, Tensor):
        dtype = "" if value.dtype in (torch.float32, torch.int64) else f", dtype={value.dtype}"
        return f"{name} = torch.tensor({value.detach().tolist()}{dtype})"
    return f"{name} = {value!r}"


def violation(what: str, call: str, **values: Any) -> Violation:
    """A `Violation` whose message ends in lines that reproduce it."""
    lines = [what, "", "import torch", *(literal(k, v) for k, v in values.items()), call]
    return Violation("\n".join(lines))
