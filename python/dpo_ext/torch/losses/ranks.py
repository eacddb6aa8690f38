"""Whose pairs a loss sees when a step is spread over ranks, and what each rank adds.

A loss that couples the batch is another number on each part of a batch, and no weighting of the
parts mends that: either the pairs of all ranks are gathered, or the caller says that each rank's
pairs are a batch of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

LOCAL = "local"


class Gathered(NamedTuple):
    """The pairs of all ranks of a group, and which of them are this rank's.

    ``logps, ref_logps`` (N_all, 2) and ``lengths`` (N_all, 2) without a graph; ``mine`` the slice
    of this rank.
    """

    logps: Tensor
    ref_logps: Tensor | None
    lengths: Tensor | None
    mine: slice


def world_size() -> int:
    """Ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def check_group(group: Any) -> Any:
    """The process group to gather over, or None for the rank's own pairs.

    Raises:
        TypeError: neither a process group nor ``"local"``.
        ValueError: this rank is not in it.
    """
    if group is None or (isinstance(group, str) and group == LOCAL):
        return None
    found = repr(group) if isinstance(group, str) else type(group).__name__
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("`group` must hold this rank")
        raise TypeError(f'`group` must be a process group or "local", found {found}')
    return group if dist.get_world_size(group) > 1 else None


def check_parts(name: str, what: str, group: Any) -> None:
    """Refuse what is a number of the whole batch where ranks may hold parts of it.

    Raises:
        ValueError: there are several ranks and no ``group`` says whose pairs are one batch.
    """
    if group is None and world_size() > 1:
        raise ValueError(
            f"{name} {what}, and there are {world_size()} ranks: `group` must say whose pairs are "
            "one batch\n"
            'hint: group=torch.distributed.group.WORLD if each rank has pairs of its own, "local" '
            "if all have the same or each is to be a batch by itself"
        )


def count_pairs(pairs: int, like: Tensor, group: Any) -> Tensor:
    """Pairs of all ranks of the group, at least 1: a scalar in the dtype of the log-probs; nothing
    waits.
    """
    count = torch.full((), float(pairs), dtype=like.dtype, device=like.device)
    dist.all_reduce(count, group=group)
    return count.clamp(min=1)


def gather_pairs(
    logps: Tensor, ref_logps: Tensor | None, lengths: Tensor | None, group: Any
) -> Gathered:
    """The pairs of all ranks of the group, in the order of the ranks; their number waits for the
    device once.
    """
    parts = [t for t in (logps.detach(), ref_logps, lengths) if t is not None]
    mine = torch.cat([t.to(logps.dtype) for t in parts], 1)
    ranks = dist.get_world_size(group)
    own_size = torch.tensor([len(mine)], device=mine.device)
    sizes = [torch.empty_like(own_size) for _ in range(ranks)]
    dist.all_gather(sizes, own_size, group=group)
    counts = torch.cat(sizes).tolist()
    padded = mine.new_zeros(max(counts), mine.shape[1])
    padded[: len(mine)] = mine
    pieces = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(pieces, padded, group=group)
    whole = torch.cat([piece[:n] for piece, n in zip(pieces, counts, strict=True)])
    columns = iter(whole.split(2, 1))
    start = sum(counts[: dist.get_rank(group)])
    return Gathered(
        next(columns),
        None if ref_logps is None else next(columns),
        None if lengths is None else next(columns),
        slice(start, start + len(mine)),
    )


def sum_over(values: Tensor, group: Any) -> Tensor:
    """Element by element the sum of the values of all ranks of the group, or this rank's own;
    changes them in place.
    """
    checked = check_group(group)
    if checked is not None:
        dist.all_reduce(values, group=checked)
    return values


def mean_over(values: Tensor, group: Any) -> Tensor:
    """Mean of the values of all ranks of the group, float64, 0 for none; without a graph."""
    values = values.detach().double().reshape(-1)
    total = torch.stack((values.sum(), torch.full_like(values.sum(), float(len(values)))))
    if group is not None:
        dist.all_reduce(total, group=group)
    return total[0] / total[1].clamp(min=1)


def check_constants(name: str, params: Mapping[str, Any]) -> None:
    """Refuse parameters that differ from pair to pair: they are not gathered."""
    for key, value in params.items():
        if isinstance(value, Tensor):
            raise ValueError(
                f"`{key}` must be one number where `group` gathers the pairs of loss {name!r}, "
                "found an array"
            )
