"""Search for a counterexample, fixed cases first, and tell it in a form that a person can paste."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from dpo_ext.extras import need


class Violation(AssertionError):  # noqa: N818 - a finding, not a fault
    """A property does not hold for one case."""


class Refused(Exception):  # noqa: N818 - no fault either
    """The function refuses a case with a ValueError, and may: nothing is held against it."""


def hypothesis() -> Any:
    """The module Hypothesis.

    Raises:
        ModuleNotFoundError: it is not installed; names the extra.
    """
    return need("hypothesis", "dpo_ext.testing")


SHRINKS = 100  # evaluations after the first counterexample; the rest shortens little


def search(
    check: Callable[[Any], None], strategy: Any, examples: int, corpus: Iterable[Any] = ()
) -> None:
    """Run a check on a corpus of fixed cases, in its order, then on drawn ones.

    The drawn cases are the same on every machine, whatever numbers the tested file holds.

    Raises:
        AssertionError: of the corpus the first `Violation`; of the drawn cases the one with the
            shortest message.
    """
    for case in corpus:
        try:
            check(case)
        except Refused:
            continue
        except Violation as violation:
            raise AssertionError(str(violation)) from violation.__cause__
    search_drawn(check, strategy, examples)


def search_drawn(check: Callable[[Any], None], strategy: Any, examples: int) -> None:
    """Run a check on cases that Hypothesis draws, and shorten the first that fails.

    Raises:
        AssertionError: the `Violation` with the shortest message.
    """
    hyp = hypothesis()
    settings = hyp.settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=True,
        print_blob=False,
        report_multiple_bugs=False,
        phases=(hyp.Phase.generate, hyp.Phase.shrink),
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
        except Refused:
            return
        except Violation as violation:
            found.append(violation)
            raise

    try:
        with no_constants_of_the_caller():
            run()
    except (Violation, hyp.errors.Flaky):  # Flaky: the budget ran out before the last replay
        best = min(found, key=lambda violation: len(str(violation)))
        raise AssertionError(str(best)) from best.__cause__


@contextlib.contextmanager
def no_constants_of_the_caller() -> Iterator[None]:
    """Hypothesis draws none of the literals that it collects from the modules of the caller.

    It has no setting for that. A literal of 96 in a test file would move every later draw, so that
    a check passes in one file and fails in the next.
    """
    try:
        from hypothesis.internal.conjecture import providers
    except ImportError:  # before 6.100 there was none
        yield
        return
    names = ("_get_local_constants", "CONSTANTS_CACHE")
    if not all(hasattr(providers, name) for name in names):  # before 6.131 nothing was collected
        yield
        return
    own: Any = providers
    kept = {name: getattr(own, name) for name in names}
    empty = type(own.GLOBAL_CONSTANTS)()
    setattr(own, names[0], lambda: empty)
    own.CONSTANTS_CACHE = type(own.CONSTANTS_CACHE)(1024)  # entries hold the literals
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(own, name, value)


def version_of(t: Tensor) -> int:
    """How often a tensor was written to in place."""
    return t._version  # noqa: SLF001 - torch has no public name for it


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
