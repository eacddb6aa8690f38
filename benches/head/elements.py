"""Which element is wrong: what a failed comparison says."""

from __future__ import annotations

from torch import Tensor


def first_wrong(found: Tensor, expected: Tensor, allowed: float) -> str:
    """Place and values of the first element that is further off than ``allowed``, or, where none
    is, of the one that is furthest off.

    >>> import torch
    >>> first_wrong(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 4.0]]), 0.5)
    'element [0, 1]: found 2.0, expected 4.0'
    """
    mine, theirs = found.detach().double(), expected.detach().double()
    same = (mine == theirs) | (mine.isnan() & theirs.isnan())
    off = (mine - theirs).abs().nan_to_num(float("inf")).masked_fill(same, 0.0)
    wrong = (off > allowed).flatten()
    at = int(wrong.int().argmax() if wrong.any() else off.flatten().argmax())
    place = []
    for size in reversed(found.shape):
        at, index = divmod(at, size)
        place.append(index)
    place.reverse()
    values = (tensor[tuple(place)].item() for tensor in (mine, theirs))
    return "element {}: found {}, expected {}".format(place, *values)
