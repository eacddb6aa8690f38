"""The score table: which row of the logits predicts which token of which sequence.

Letters: N pairs, S sequences, M tokens of the table, T columns of padded labels, V vocabulary.
The shift by one of labels against logits happens here (or in Rust, with the batch), nowhere else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_ext.errors import TensorError, describe
from dpo_ext.pairs import IGNORE_INDEX as IGNORE_INDEX

_NOT_A_TOKEN = -1  # what a label outside int32 becomes on a device: the kernels answer NaN
Shape = tuple[int, ...]
"""(rows, T) of the logits, or (R,) where only their number of rows is known."""
_FIELDS = {
    "logit_rows": torch.int64,
    "targets": torch.int32,
    "seq_offsets": torch.int32,
    "weights": torch.float32,
}


class ScoreTable:
    """Which rows of flat (R, V) logits are scored, with which target, for which sequence.

    A model sees a layout; the log-prob head sees rows and this table. Consecutive ``group_size``
    sequences belong to one prompt, for pairs chosen then rejected, so results are
    (S / group_size, group_size). A table from `from_labels` or of a batch also knows the ``shape``
    (rows, T) of the logits that it is for, and every scoring function refuses others, on a GPU too:
    the shape is on the host. No table knows V.

    Args:
        logit_rows: (M,) int64, row of the flattened (R, V) logits or (R, H) hidden states. No two
            scored tokens name the same row: their gradients would race.
        targets: (M,) int32, the token that the row must predict, >= 0; -100 = not scored, its row
            is never read.
        seq_offsets: (S+1,) int32; tokens of sequence s are ``seq_offsets[s]:seq_offsets[s+1]``.
        weights: (M,) float32 or None, static factor of each token's log-prob in its sequence's sum;
            exactly 0 selects nothing (not even NaN). None = 1.
        group_size: sequences of one prompt, 2 for pairs.
        shape: (rows, T) of the logits or hidden states (rows, T, ...) that the table is for, or
            (R,) for R rows of any arrangement. None, the default: any that have the rows.

    Tensors, NumPy arrays (taken without a copy) or, for small tables, lists of numbers.

    Raises:
        TensorError: a dtype, shape, device or value is not as above.
        ValueError: ``group_size`` < 1, or a ``shape`` of anything but one or two sizes.

    Numerics: integers only. Tensors on a GPU are checked on the host, which waits for the device
    once; tables from ``from_labels``, ``.to`` and batches do not.

    A table is not meant to be changed. Where torch tells of it (another tensor put in its place, or
    one written to by torch), shapes and dtypes are compared again by the next scoring call, and on
    the CPU values too. Nobody tells of what NumPy writes into an array that was taken without a
    copy, of inference tensors, of values on a GPU (a CUDA graph's static table may be filled anew,
    its ``seq_offsets`` with the same), and inside a compiled region.

    Two prompts, rows of three sequences out of four rows of logits, one token masked by weight:

    >>> ScoreTable(logit_rows=[0, 1, 2, 5, 8], targets=[7, 3, -100, 4, 9],
    ...            seq_offsets=[0, 2, 3, 4, 5], weights=[1.0, 0.0, 1.0, 1.0, 0.5])
    ScoreTable(n_groups=2, group_size=2, n_tokens=5, device=cpu)
      sequence 0 (group 0): row 0 -> 7, row 1 -> 3 (weight 0)
      sequence 1 (group 0): row 2 not scored
      sequence 2 (group 1): row 5 -> 4
      sequence 3 (group 1): row 8 -> 9 (weight 0.5)
    """

    __slots__ = (
        "compared",
        "frame",
        "group_size",
        "host_offsets",
        "logit_rows",
        "seq_offsets",
        "targets",
        "weights",
    )

    logit_rows: Tensor
    targets: Tensor
    seq_offsets: Tensor
    weights: Tensor | None
    group_size: int
    host_offsets: Tensor
    """``seq_offsets`` in the host's memory, so that cutting into chunks waits for no device."""
    frame: Tensor | None
    """(rows, T, 0) or (R, 0), no element, or None: its sizes are `shape`. A tensor, so that a
    compiled region takes them as it takes the sizes of the others."""
    compared: tuple[int, ...]
    """Which tensors were compared, and how often each had been written to; () = not known."""

    def __init__(
        self,
        *,
        logit_rows: Tensor | np.ndarray | Sequence[int],
        targets: Tensor | np.ndarray | Sequence[int],
        seq_offsets: Tensor | np.ndarray | Sequence[int],
        weights: Tensor | np.ndarray | Sequence[float] | None = None,
        group_size: int = 2,
        shape: Shape | None = None,
    ) -> None:
        given = {"logit_rows": logit_rows, "targets": targets, "seq_offsets": seq_offsets}
        tensors = {name: _tensor(name, value) for name, value in given.items()}
        if weights is not None:
            tensors["weights"] = _tensor("weights", weights)
        self.logit_rows, self.targets = tensors["logit_rows"], tensors["targets"]
        self.seq_offsets, self.weights = tensors["seq_offsets"], tensors.get("weights")
        self.group_size = group_size
        self.frame = None if shape is None else _frame(_sizes(shape), self.targets)
        _check_shapes(self)
        self.host_offsets = self.seq_offsets.cpu()
        _check_values(self)
        self.compared = _versions(self)

    @classmethod
    def unchecked(
        cls,
        logit_rows: Tensor,
        targets: Tensor,
        seq_offsets: Tensor,
        host_offsets: Tensor,
        *,
        weights: Tensor | None = None,
        group_size: int = 2,
        shape: Shape | None = None,
    ) -> ScoreTable:
        """A table from parts known to be right: nothing is compared and no device is waited for."""
        table = cls.__new__(cls)
        table.logit_rows, table.targets, table.weights = logit_rows, targets, weights
        table.seq_offsets, table.host_offsets = seq_offsets, host_offsets
        table.group_size = group_size
        table.frame = None if shape is None else _frame(shape, targets)
        table.compared = _versions(table)
        return table

    def _like(self, logit_rows: Tensor, targets: Tensor, weights: Tensor | None) -> ScoreTable:
        """The same sequences with other tokens, as many as before, for the same logits."""
        offsets, group_size = (self.seq_offsets, self.host_offsets), self.group_size
        table = ScoreTable.unchecked(
            logit_rows, targets, *offsets, weights=weights, group_size=group_size
        )
        table.frame = self.frame
        return table

    def __getstate__(self) -> dict[str, Any]:
        names = set(self.__slots__) - {"compared", "frame"}
        return {"shape": self.shape, **{name: getattr(self, name) for name in sorted(names)}}

    def __setstate__(self, state: Any) -> None:
        # Without a method of ours, earlier versions pickled (None, slots).
        parts: dict[str, Any] = dict(state[1] if isinstance(state, tuple) else state)
        shape = parts.pop("shape", None)
        for name, value in parts.items():
            setattr(self, name, value)
        self.frame = None if shape is None else _frame(shape, self.targets)
        self.compared = _versions(self)

    @classmethod
    def from_labels(
        cls,
        labels: Tensor,
        *,
        weights: Tensor | None = None,
        group_size: int = 2,
        shift: bool = True,
    ) -> ScoreTable:
        """The table of Hugging Face labels: aligned with the inputs, chosen rows first.

        Same as, for logits of shape (2N, T, V) flattened to (2N*T, V)::

            for pair in range(N):
                for row in (pair, N + pair):                    # chosen, then rejected
                    for t in range(T - 1):                      # position t predicts labels[t + 1]
                        add(logit_row=row * T + t, target=labels[row, t + 1],
                            weight=weights[row, t + 1])

        and with ``shift=False``, for an encoder-decoder, whose decoder reads its labels one place
        to the right, so that position t predicts ``labels[t]`` and T tokens a row are scored. Other
        groups take rows ``n, N + n, 2N + n, ...``, group n of N; one row is a group of its own, in
        the order of the rows.

        The table remembers ``labels.shape``: logits of another are refused by every scoring
        function. The size depends on the shape alone (M = 2N * (T-1), -100 kept), so nothing waits
        for the device and a CUDA graph can hold it. Drop the ignored tokens with `compact`.

        Args:
            labels: (2N, T) int64 or int32, -100 ignored; rows 0..N-1 chosen, N..2N-1 the rejected
                of the same pairs. In general (group_size * N, T).
            weights: (2N, T) bool or floating-point, beside ``labels``: the factor of the log-prob
                of ``labels[row, t]``, 0 and False select nothing. Those of ignored labels are not
                looked at. Kept as float32, without gradient.
            group_size: sequences of one prompt: 2 for pairs; 1 for single completions (KTO and the
                like, any number of rows), whose log-probs are (rows, 1).
            shift: False for labels that stand where they are predicted (T5, BART).

        Returns:
            ScoreTable on the device of ``labels``.

        Raises:
            TensorError: wrong dtype, shape or device, a number of rows that ``group_size`` does not
                divide; on the CPU also a label that is negative and not -100, or above int32, and a
                weight that is not finite. On a GPU these give a NaN log-prob.
            TypeError: ``labels`` or ``weights`` is no tensor, ``group_size`` no int, ``shift`` no
                bool.  ValueError: ``group_size`` < 1.

        Warns where every label on the CPU is -100: all log-probs are then 0 and no model learns
        from them. Labels on a GPU are not looked at, which would wait for it.

        >>> ScoreTable.from_labels(torch.tensor([[-100, 5, 6], [-100, 7, -100]]))
        ScoreTable(n_groups=1, group_size=2, n_tokens=4, device=cpu)
          sequence 0 (group 0): row 0 -> 5, row 1 -> 6
          sequence 1 (group 0): row 3 -> 7, row 4 not scored

        Three single completions, the last token of each at half its weight:

        >>> labels = torch.tensor([[-100, 5, 6], [-100, 7, 8], [-100, 9, -100]])
        >>> weights = torch.tensor([[1.0, 1.0, 0.5]]).expand(3, 3)
        >>> ScoreTable.from_labels(labels, weights=weights, group_size=1)
        ScoreTable(n_groups=3, group_size=1, n_tokens=6, device=cpu)
          sequence 0 (group 0): row 0 -> 5, row 1 -> 6 (weight 0.5)
          sequence 1 (group 1): row 3 -> 7, row 4 -> 8 (weight 0.5)
          sequence 2 (group 2): row 6 -> 9, row 7 not scored

        The decoder of a T5, one pair:

        >>> ScoreTable.from_labels(torch.tensor([[5, 1], [7, 1]]), shift=False)
        ScoreTable(n_groups=1, group_size=2, n_tokens=4, device=cpu)
          sequence 0 (group 0): row 0 -> 5, row 1 -> 1
          sequence 1 (group 0): row 2 -> 7, row 3 -> 1
        """
        if not isinstance(labels, Tensor):
            raise TypeError(f"`labels` must be a torch.Tensor, found {type(labels).__name__}")
        if not isinstance(shift, bool):
            raise TypeError(f"`shift` must be a bool, found {type(shift).__name__}")
        _check_group_size(group_size)
        if labels.dtype not in (torch.int64, torch.int32) or labels.dim() != 2:
            rows_of = {1: "rows", 2: "2N"}.get(group_size, f"{group_size}N")
            raise TensorError(
                f"`labels` must be int64 or int32 of shape ({rows_of}, T), found {describe(labels)}"
            )
        rows, T = labels.shape
        if rows % group_size:
            raise TensorError(_uneven(rows, group_size))
        device, N = labels.device, rows // group_size
        skip = 1 if shift else 0
        per_row = max(T - skip, 0)

        def interleaved(values: Tensor) -> Tensor:
            """(rows, T) with the first of all groups first -> (N, group_size, per_row)."""
            return values[:, skip:].reshape(group_size, N, per_row).transpose(0, 1)

        shifted = interleaved(labels)
        limit = torch.iinfo(torch.int32).max
        wrong = ((shifted < 0) & (shifted != IGNORE_INDEX)) | (shifted > limit)
        on_host = device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host:
            if bool(wrong.any()):
                raise TensorError(
                    f"`labels` must be -100 or in 0..{limit}, found {int(shifted[wrong][0])}"
                )
            if shifted.numel() and bool((shifted == IGNORE_INDEX).all()):
                where = "every label behind the first column" if shift else "every label"
                warnings.warn(
                    f"no token is scored: {where} is -100, so that all "
                    "log-probs are 0\nhint: look at what masks the prompt",
                    stacklevel=2,
                )
        factors = None
        if weights is not None:
            _check_label_weights(weights, labels)
            factors = interleaved(weights.detach()).to(torch.float32)
            factors = factors.masked_fill(shifted == IGNORE_INDEX, 0.0)
            if on_host and not bool(factors.isfinite().all()):
                group, member, t = (int(i) for i in (~factors.isfinite()).nonzero()[0])
                raise TensorError(
                    f"`weights` must be finite, found {float(factors[group, member, t])} at row "
                    f"{member * N + group}, column {t + skip}"
                )
            factors = factors.reshape(-1)
        targets = shifted.masked_fill(wrong, _NOT_A_TOKEN).to(torch.int32).reshape(-1)
        row = torch.arange(rows, device=device).reshape(group_size, N, 1).transpose(0, 1)
        logit_rows = (row * T + torch.arange(per_row, device=device)).reshape(-1)
        host_offsets = torch.arange(rows + 1, dtype=torch.int32) * per_row
        offsets = torch.arange(rows + 1, dtype=torch.int32, device=device) * per_row
        return cls.unchecked(
            logit_rows,
            targets,
            offsets,
            host_offsets,
            weights=factors,
            group_size=group_size,
            shape=(rows, T),
        )

    def compact(self) -> ScoreTable:
        """The table without the tokens that are not scored (-100); the results are the same.

        Waits for the device once, to learn how many tokens are left. What it saves: a linear head
        multiplies every row of its table, scored or not.

        >>> ScoreTable.from_labels(torch.tensor([[-100, 5, 6], [-100, 7, -100]])).compact()
        ScoreTable(n_groups=1, group_size=2, n_tokens=3, device=cpu)
          sequence 0 (group 0): row 0 -> 5, row 1 -> 6
          sequence 1 (group 0): row 3 -> 7
        """
        scored = self.targets != IGNORE_INDEX
        before = _scored_before(scored)
        offsets = before[self.seq_offsets.long()].to(torch.int32)
        host_offsets = offsets.cpu()  # the one wait
        M = int(host_offsets[-1])
        # the place of each kept token; what is dropped is written to one spare place behind
        place = torch.where(scored, before[:-1], M)

        def keep(values: Tensor) -> Tensor:
            return values.new_empty(M + 1).scatter_(0, place, values)[:M]

        table = ScoreTable.unchecked(
            keep(self.logit_rows),
            keep(self.targets),
            offsets,
            host_offsets,
            weights=None if self.weights is None else keep(self.weights),
            group_size=self.group_size,
        )
        table.frame = self.frame
        return table

    @property
    def shape(self) -> Shape | None:
        """(rows, T) of the logits or hidden states (rows, T, ...) that the table is for, (R,) for R
        rows of any arrangement, or None for a table that does not know. On the host.

        >>> ScoreTable.from_labels(torch.tensor([[-100, 5, 6], [-100, 7, -100]])).shape
        (2, 3)
        """
        return None if self.frame is None else tuple(self.frame.shape[:-1])

    @property
    def n_tokens(self) -> int:
        """M, tokens of the table, scored or not."""
        return self.targets.shape[0]

    @property
    def n_sequences(self) -> int:
        """S, sequences of the table."""
        return self.seq_offsets.shape[0] - 1

    @property
    def n_groups(self) -> int:
        """Prompts: S / group_size."""
        return self.n_sequences // self.group_size

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.targets.device

    @property
    def lengths(self) -> Tensor:
        """(n_groups, group_size) int64: scored tokens (target not -100) of each sequence.

        Weights do not count. Waits for no device.

        >>> ScoreTable.from_labels(torch.tensor([[-100, 5, 6], [-100, 7, -100]])).lengths
        tensor([[2, 1]])
        """
        before = _scored_before(self.targets != IGNORE_INDEX)
        return before[self.seq_offsets.long()].diff().reshape(-1, self.group_size)

    def to(
        self, device: torch.device | str | int | None, *, non_blocking: bool = False
    ) -> ScoreTable:
        """The table on another device; itself if it is there already."""
        if device is None:  # what hooks of offloading hand on, as tensors take it
            return self
        where = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        moved = self._map(lambda part: part.to(where, non_blocking=non_blocking))
        return self if moved.targets is self.targets else moved

    def pin_memory(self) -> ScoreTable:
        """The table in page-locked memory: ``to(device, non_blocking=True)`` does not wait."""
        return self._map(Tensor.pin_memory)

    def without_zero_weights(self) -> ScoreTable:
        """The table with tokens of weight 0 not scored (-100), so that their rows are not read."""
        # What does not fit together is left as it is, for the check that names it.
        if self.weights is None or self.weights.device != self.targets.device:
            return self
        targets = self.targets.masked_fill(self.weights == 0, IGNORE_INDEX)
        return self._like(self.logit_rows, targets, self.weights)

    def with_rows(
        self, logit_rows: Tensor, targets: Tensor, shape: Shape | None = None
    ) -> ScoreTable:
        """The same sequences with other rows (M,) int64 and targets (M,) int32, not compared, and
        the shape of what these are rows of.
        """
        table = self._like(logit_rows, targets, self.weights)
        table.frame = None if shape is None else _frame(shape, targets)
        return table

    def with_weights(self, weights: Tensor) -> ScoreTable:
        """The same tokens with other weights (M,) float32, not compared."""
        return self._like(self.logit_rows, self.targets, weights)

    def compare_again(self) -> None:
        """Compares what the caller changed since it was compared last; waits for no device.

        Raises:
            TensorError: a part is no longer as the class's ``Args`` say.
        """
        if torch.compiler.is_compiling():
            return
        now, before = _versions(self), self.compared
        if now == before:
            return
        changed = [
            name for i, name in enumerate(_FIELDS) if now[2 * i :][:2] != before[2 * i :][:2]
        ]
        if self.device.type == "cpu":
            # One that fails is compared the next time, whatever stands at those addresses then.
            self.compared = ()
        for name in changed:
            if (value := getattr(self, name)) is not None:
                setattr(self, name, _tensor(name, value))
        _check_shapes(self)
        if self.device.type == "cpu":
            if "seq_offsets" in changed:
                self.host_offsets = self.seq_offsets
            _check_values(self, rows=changed != ["weights"])
            self.compared = _versions(self)
        elif "seq_offsets" not in changed:  # else `check_host_offsets` must find it
            self.compared = _versions(self)

    def check_host_offsets(self) -> None:
        """TensorError where ``seq_offsets`` on a device was changed since ``host_offsets`` was
        read.
        """
        if torch.compiler.is_compiling() or not self.compared:
            return
        i = 2 * list(_FIELDS).index("seq_offsets")
        if _versions(self)[i : i + 2] != self.compared[i : i + 2]:
            raise TensorError(
                "`seq_offsets` was changed after the table was built, and its copy on the host was "
                "not\nhint: build another table"
            )

    def _map(self, move: Callable[[Tensor], Tensor]) -> ScoreTable:
        return ScoreTable.unchecked(
            move(self.logit_rows),
            move(self.targets),
            move(self.seq_offsets),
            self.host_offsets,
            weights=None if self.weights is None else move(self.weights),
            group_size=self.group_size,
            shape=self.shape,
        )

    def __repr__(self) -> str:
        head = (
            f"ScoreTable(n_groups={self.n_groups}, group_size={self.group_size}, "
            f"n_tokens={self.n_tokens}, device={self.device})"
        )
        if self.device.type != "cpu" or self.n_tokens > 32 or self.n_sequences > 16:
            return head
        lines = [head]
        weights = None if self.weights is None else self.weights.tolist()
        rows, targets = self.logit_rows.tolist(), self.targets.tolist()
        borders = self.host_offsets.tolist()
        for s in range(self.n_sequences):
            tokens = []
            for i in range(borders[s], borders[s + 1]):
                factor = "" if weights is None or weights[i] == 1 else f" (weight {weights[i]:g})"
                scored = targets[i] != IGNORE_INDEX
                tokens.append(
                    f"row {rows[i]} -> {targets[i]}{factor}"
                    if scored
                    else f"row {rows[i]} not scored"
                )
            lines.append(
                f"  sequence {s} (group {s // self.group_size}): {', '.join(tokens) or 'empty'}"
            )
        return "\n".join(lines)


def _scored_before(scored: Tensor) -> Tensor:
    """(M+1,) int64: scored tokens before each position."""
    return torch.nn.functional.pad(scored.cumsum(0), (1, 0))


def _tensor(name: str, value: Any) -> Tensor:
    dtype = _FIELDS[name]
    if isinstance(value, np.ndarray):
        if str(value.dtype) != describe(dtype):
            raise TensorError(f"`{name}` must be {describe(dtype)}, found {describe(value)}")
        return torch.from_numpy(value if value.flags.writeable else value.copy()).contiguous()
    if isinstance(value, Tensor):
        if value.dtype != dtype:
            raise TensorError(f"`{name}` must be {describe(dtype)}, found {describe(value)}")
        return value.detach().contiguous()
    try:
        return torch.tensor(list(value), dtype=dtype)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"`{name}` must be a tensor, an array or numbers: {error}") from None


def _check_shapes(table: ScoreTable) -> None:
    M = table.targets.shape[0] if table.targets.dim() == 1 else -1
    for name in ("targets", "logit_rows", "weights"):
        value = getattr(table, name)
        if value is None:
            continue
        if value.dim() != 1 or value.shape[0] != M:
            shape = f"({M},), as `targets` has" if name != "targets" else "(M,)"
            raise TensorError(f"`{name}` must have shape {shape}, found {describe(value)}")
    offsets = table.seq_offsets
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise TensorError(f"`seq_offsets` must have shape (S+1,), found {describe(offsets)}")
    for name in ("logit_rows", "seq_offsets", "weights"):
        value = getattr(table, name)
        if value is not None and value.device != table.device:
            raise TensorError(
                f"`{name}` must be on {table.device}, as `targets` is, found {value.device}"
            )
    _check_group_size(table.group_size)
    if table.n_sequences % table.group_size:
        raise TensorError(
            f"`group_size` must divide the number of sequences, found {table.group_size} "
            f"and {table.n_sequences} sequences"
        )


def _check_group_size(group_size: int) -> None:
    if isinstance(group_size, bool) or not isinstance(group_size, int):
        raise TypeError(f"`group_size` must be an int, found {type(group_size).__name__}")
    if group_size < 1:
        raise ValueError(f"`group_size` must be at least 1, found {group_size}")


def _uneven(rows: int, group_size: int) -> str:
    if group_size == 2:
        return (
            f"`labels` must have an even number of rows, chosen first, found {rows}\n"
            "hint: from_labels(labels, group_size=1) scores single completions"
        )
    return f"`labels` must have a number of rows that {group_size} divides, found {rows}"


def _check_label_weights(weights: Tensor, labels: Tensor) -> None:
    if not isinstance(weights, Tensor):
        raise TypeError(f"`weights` must be a torch.Tensor, found {type(weights).__name__}")
    if weights.dtype != torch.bool and not weights.is_floating_point():
        raise TensorError(
            f"`weights` must be bool or floating-point, found {describe(weights)}\n"
            "hint: a mask of 0 and 1 is weights.bool()"
        )
    if weights.shape != labels.shape:
        raise TensorError(
            f"`weights` must have shape {tuple(labels.shape)}, as `labels` has, "
            f"found {tuple(weights.shape)}"
        )
    if weights.device != labels.device:
        raise TensorError(
            f"`weights` must be on {labels.device}, as `labels` is, found {weights.device}"
        )


def _sizes(shape: Any) -> Shape:
    sizes = tuple(shape) if isinstance(shape, (tuple, list)) else (shape,)
    for size in sizes:
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"`shape` must be (rows, T) or (R,) of ints, found {shape!r}")
    if len(sizes) not in (1, 2) or min(sizes) < 0:
        raise ValueError(f"`shape` must be (rows, T) or (R,), found {shape!r}")
    return sizes


def _frame(shape: Shape, like: Tensor) -> Tensor:
    """No elements, of these sizes, beside ``like``."""
    frame = like.new_empty((*shape, 0))
    if not torch.compiler.is_compiling():
        # What `torch._dynamo.maybe_mark_dynamic` does, without its import of a second: sizes that
        # the caller marked dynamic are compared with these, which must not be constants then.
        frame._dynamo_weak_dynamic_indices = set(range(len(shape)))  # type: ignore[attr-defined] # noqa: SLF001
    return frame


def _versions(table: ScoreTable) -> tuple[int, ...]:
    """Which tensors a table has, and how often each was written to; nothing inside a graph."""
    if torch.compiler.is_compiling():
        return ()
    found: list[int] = []
    for name in _FIELDS:
        part: Tensor | None = getattr(table, name)
        found.append(id(part))
        if part is None or part.is_inference():
            found.append(0)
        else:
            found.append(part._version)  # noqa: SLF001 - torch has no public name for it
    return tuple(found)


def _check_values(table: ScoreTable, *, rows: bool = True) -> None:
    """Values on the host; without ``rows`` the weights alone."""
    if rows:
        _check_rows(table)
    if table.weights is not None:
        weights = table.weights.cpu().numpy()
        wrong = np.flatnonzero(~np.isfinite(weights))
        if wrong.size:
            i = int(wrong[0])
            raise TensorError(f"`weights` must be finite, found {weights[i]} at token {i}")


def _check_rows(table: ScoreTable) -> None:
    offsets, M = table.host_offsets.numpy(), table.n_tokens
    if offsets[0] != 0 or offsets[-1] != M:
        raise TensorError(
            f"`seq_offsets` must go from 0 to {M}, the number of targets, "
            f"found {offsets[0]} to {offsets[-1]}"
        )
    falls = np.flatnonzero(np.diff(offsets) < 0)
    if falls.size:
        s = int(falls[0])
        raise TensorError(
            f"`seq_offsets` must not fall, found {offsets[s]} then {offsets[s + 1]} at sequence {s}"
        )
    targets = table.targets.cpu().numpy()
    wrong = np.flatnonzero((targets < 0) & (targets != IGNORE_INDEX))
    if wrong.size:
        i = int(wrong[0])
        raise TensorError(f"`targets` must be a token id or -100, found {targets[i]} at token {i}")
    rows, scored = table.logit_rows.cpu().numpy(), np.flatnonzero(targets != IGNORE_INDEX)
    wrong = scored[rows[scored] < 0]
    if wrong.size:
        i = int(wrong[0])
        raise TensorError(f"`logit_rows` must not be negative, found {rows[i]} at token {i}")
    order = scored[np.argsort(rows[scored], kind="stable")]
    twice = np.flatnonzero(np.diff(rows[order]) == 0)
    if twice.size:
        i, j = sorted((int(order[twice[0]]), int(order[twice[0] + 1])))
        raise TensorError(
            f"`logit_rows` must name a row once, found row {rows[i]} scored by tokens {i} and {j}\n"
            "hint: copy the row, so that each token has one of its own"
        )
    R = None if table.shape is None else math.prod(table.shape)
    beyond = scored[rows[scored] >= R] if R is not None else scored[:0]
    if beyond.size:
        i = int(beyond[0])
        raise TensorError(
            f"`logit_rows` must be below {R}, the rows of `shape` {table.shape}, "
            f"found {rows[i]} at token {i}"
        )
