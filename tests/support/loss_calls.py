"""A call of every loss of a table, with numbers or with arrays as its parameters."""

from __future__ import annotations

import torch
from loss_cases import COUPLED, SCORED, arrays_of, batch_of, parameters_of

from dpo_ext.torch import list_loss, preference_loss, unpaired_loss

PAIRS = 5


def of_pairs(name, arrays, **options):
    """A call of `preference_loss`, with every option that may be a tensor as one."""
    logps, ref, lengths = batch_of(PAIRS)
    params = arrays_of(name, PAIRS) if arrays else parameters_of(name)
    if arrays and name not in COUPLED:
        options = {"weight": torch.ones(PAIRS), "num_pairs": torch.tensor(7.0), **options}
    return preference_loss, (logps, ref), {"loss": name, "lengths": lengths, **params, **options}


def of_single(name, arrays):
    logps, ref, _ = batch_of(PAIRS)
    labels = torch.tensor([1, 0, 0, 1, 1])
    params = {"kto": {"z": 0.5}, "bco": {"delta": 0.1}}.get(name, {})
    if arrays:
        params = {k: torch.full((PAIRS,), v) for k, v in params.items()}
        params.update(beta=torch.ones(PAIRS), weight=torch.ones(PAIRS))
        params.update(num_examples=torch.tensor(9))
    return unpaired_loss, (logps[:, 0], ref[:, 0], labels), {"loss": name, **params}


def of_lists(name, arrays):
    logps, ref = (torch.cat((t, t - 1), 1) for t in batch_of(PAIRS)[:2])
    params = {"scores": ref} if name in SCORED else {}
    if arrays:
        params.update(beta=torch.ones(PAIRS), counts=torch.tensor([4, 3, 2, 4, 3]))
        params.update(num_lists=torch.tensor(9), weight=torch.ones(PAIRS))
        if name in SCORED:
            params["alpha"] = torch.ones(PAIRS)
    return list_loss, (logps, ref), {"loss": name, **params}
