"""What is compared with an oracle is compared by one rule."""

from __future__ import annotations

import numpy as np


def as_float64(values) -> np.ndarray:
    """float64 NumPy array of a tensor or of anything NumPy takes."""
    if hasattr(values, "detach"):
        return values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def assert_no_worse(got, baseline_same_dtype, oracle, slack: float) -> None:
    """The largest error of `got` against `oracle` may exceed the same-dtype baseline's by `slack`.

    Where the oracle is not finite, `got` must be the same NaN or infinity. Where only the baseline
    is not finite, its error counts as nothing, so that a broken baseline excuses no error of ours.
    """
    got, base, truth = (as_float64(x) for x in (got, baseline_same_dtype, oracle))
    assert got.shape == truth.shape, f"shape {got.shape}, expected {truth.shape}"
    assert base.shape == truth.shape, f"baseline has shape {base.shape}, expected {truth.shape}"
    finite = np.isfinite(truth)
    np.testing.assert_array_equal(got[~finite], truth[~finite])
    if not finite.any():
        return
    with np.errstate(invalid="ignore"):
        ours = np.where(finite, np.abs(got - truth), 0.0)
        theirs = np.where(finite & np.isfinite(base), np.abs(base - truth), 0.0)
    assert not np.isnan(ours).any(), f"{int(np.isnan(ours).sum())} values are NaN and should not be"
    worst = np.unravel_index(int(ours.argmax()), ours.shape)
    assert ours[worst] <= theirs.max() + slack, (
        f"error {ours[worst]:.3e} at {tuple(int(i) for i in worst)}: got {got[worst]!r}, expected "
        f"{truth[worst]!r}; the baseline's largest error is {theirs.max():.3e}, slack {slack:.1e}"
    )
