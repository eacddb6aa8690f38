"""Where the log-probs of a reference come from, one interface for every trainer.

A step asks a :class:`Reference`: there is none, the pairs bring them as columns, or a model scores
the batch, be it a frozen one or the trained one with its adapter off. A store fills the columns,
once before training: `stored_logps`.

N pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from dpo_ext.errors import RefLogpsError, TensorError, describe
from dpo_ext.layout.batch import Batch, Layout
from dpo_ext.layout.plan import BatchPlan
from dpo_ext.pairs import Pairs
from dpo_ext.torch.agreement import as_it_was
from dpo_ext.torch.attention import assert_packing_safe
from dpo_ext.torch.audit import OF_OTHER_BATCHES, allowed
from dpo_ext.torch.loader import PairLoader
from dpo_ext.torch.scoring import attach_scoring

Answer = TypeVar("Answer")
Logps = NDArray[np.float64]
Score = Callable[[NDArray[np.int64]], Logps]
TOKENS = 16_384
"""Of a batch that is scored."""
AT_ONCE = 1 << 16
"""Pairs that are scored and put together: a run that is killed loses the last ones."""


@runtime_checkable
class Store(Protocol):
    """What `dpo_ext.reflogps.ReferenceStore` does, as far as it is needed here."""

    def missing(self, pairs: Any, *, index: Any = ..., token_weights: Any = ...) -> Any: ...

    def put(
        self, pairs: Any, values: Any, *, index: Any = ..., token_weights: Any = ...
    ) -> int: ...

    def get(self, pairs: Any, *, index: Any = ..., token_weights: Any = ...) -> Any: ...


# ---- at each step -------------------------------------------------------------------------------


class Reference(Protocol):
    """What a training step asks."""

    def logps(self, batch: Any) -> Tensor | None:
        """(N, 2) of a batch, chosen then rejected, without gradient."""


class NoReference:
    """Of a loss that needs none."""

    def logps(self, batch: Any) -> None:
        return None


class ColumnsReference:
    """The log-probs that the pairs bring: of the data, of a store, of a pass before training."""

    def logps(self, batch: Any) -> Tensor:
        if batch.ref_logps is None:
            raise TensorError(
                "the pairs have no reference log-probs\n"
                "hint: `fit` scores them before training; pairs.with_ref_logps(...) gives them"
            )
        found: Tensor = batch.ref_logps
        return found


class ModelReference:
    """A model that scores each batch: a frozen one, or the trained one with its adapter off.

    Args:
        model: that `attach_scoring` knows, or its wrapper.
        adapter: False for a PEFT model whose adapter is switched off meanwhile.

    Raises:
        TypeError: ``adapter=False``, and it is no PEFT model.
    """

    def __init__(self, model: nn.Module, *, adapter: bool = True) -> None:
        if not adapter:
            check_has_adapter(model)
        self.model, self.adapter = model, adapter

    def logps(self, batch: Any) -> Tensor:
        with as_reference(self.model, adapter=self.adapter):
            scores = self.model(**batch.model_inputs, score_table=batch.table)
        found: Tensor = scores.logps
        return found


def has_adapter(model: Any) -> bool:
    """Whether a model has an adapter that can be switched off."""
    return hasattr(model, "disable_adapter")


def check_has_adapter(model: Any) -> None:
    if not has_adapter(model):
        raise TypeError(f"an adapter to switch off needs a PEFT model, found {describe(model)}")


@contextmanager
def as_reference(model: Any, *, adapter: bool = True) -> Iterator[None]:
    """Inside, a model scores as the reference that it is, or that lies below its adapter.

    Without gradient, in evaluation mode, under the autocast that the caller has. Modes and random
    states come back, so that training goes on as if nothing had been scored.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    off = nullcontext() if adapter else model.disable_adapter()
    try:
        with torch.no_grad(), as_it_was(model, device), off:
            yield
    finally:
        torch.clear_autocast_cache()  # weights that were cast here have no gradient


# ---- before training ----------------------------------------------------------------------------


def stored_logps(
    store: Store,
    pairs: Pairs,
    score: Score,
    *,
    token_weights: Mapping[str, Any] | None = None,
    at_once: int = AT_ONCE,
) -> Logps:
    """Reference log-probs of pairs: what a store has, and what it lacks, scored and put.

    Called on all ranks alike. The first rank alone reads and writes the store; the others need not
    see its folder.

    Args:
        store: a `dpo_ext.reflogps.ReferenceStore`.
        score: called on all ranks with indices of pairs, gives their log-probs, (n, 2), on the
            first rank at least.
        token_weights: those that ``score`` sums with, as of a plan.
        at_once: pairs that are scored before they are put.

    Returns:
        (N, 2) float64, on all ranks.

    Raises:
        RefLogpsError: as the store; the ranks have different pairs.
    """
    complete(store, pairs, score, token_weights=token_weights, at_once=at_once)
    return of_first_rank(lambda: store.get(pairs, token_weights=token_weights))


def complete(
    store: Store,
    pairs: Pairs,
    score: Score,
    *,
    token_weights: Mapping[str, Any] | None = None,
    at_once: int = AT_ONCE,
) -> int:
    """Scores the pairs that a store lacks and puts them, ``at_once`` pairs after another.

    Each part is durable before the next one is scored.

    Returns:
        The number of pairs that were scored.
    """
    check_same_pairs(pairs)
    lacking = of_first_rank(lambda: store.missing(pairs, token_weights=token_weights))
    scored = 0
    for start in range(0, len(lacking), at_once):
        some = lacking[start : start + at_once]
        if start:  # but for those that were in an earlier part, too

            def still(part: Any = some) -> Any:
                return store.missing(pairs, index=part, token_weights=token_weights)

            some = of_first_rank(still)
        if len(some):
            values = score(some)

            def put(part: Any = some, values: Any = values) -> int:
                return store.put(pairs, values, index=part, token_weights=token_weights)

            of_first_rank(put)
            scored += len(some)
    return scored


class PairScorer:
    """Scores pairs by a model as their reference, in batches, each on one rank.

    Every rank has the whole model, and the batches do not depend on the number of ranks.

    Args:
        model: is given to `attach_scoring`; on its device.
        layout: ``"auto"``: packed rows where `assert_packing_safe` allows them, else padded ones.
        tokens_per_batch: slots of a batch; a pair that is longer is one by itself.
        adapter: False switches the adapter of a PEFT model off.
        tell: called with the number of pairs of each batch of this rank.

    Attributes:
        layout: that is used.
        reason: why rows are padded, where ``"auto"`` would have packed them; or None.

    Raises:
        TensorError: a layout that was asked for, and that the model does not keep apart.
    """

    def __init__(
        self,
        model: Any,
        *,
        layout: Layout | Literal["auto"] = "auto",
        tokens_per_batch: int = TOKENS,
        adapter: bool = True,
        tell: Callable[[int], Any] = lambda pairs: None,
    ) -> None:
        if not adapter:
            check_has_adapter(model)
        self.model, self.adapter, self.tell = attach_scoring(model), adapter, tell
        self.tokens_per_batch = tokens_per_batch
        self.device = next(model.parameters()).device
        self.reason: str | None = None
        self._is_compared = place()[1] == 1
        self.layout: Layout = "packed" if layout == "auto" else layout
        if self.layout == "padded":
            return
        try:
            assert_packing_safe(model, layout=self.layout, inputs=self._inputs)
        except Exception as error:  # it leaks; or it cannot run, for whatever reason of its own
            if layout != "auto":
                raise
            self.layout = "padded"
            self.reason = str(error).strip().partition("\n")[0] or type(error).__name__

    def __call__(self, pairs: Pairs) -> Logps:
        """(N, 2) float64, on every rank.

        Raises:
            RefLogpsError: at the first call: a rank has another model than the first one.
        """
        if not self._is_compared:
            self._compare(pairs[:1])
        rank, ranks = place()
        # Padded to the longest of a batch: like lengths go together.
        order = np.argsort(pairs.longest, kind="stable") if self.layout == "padded" else None
        in_order = pairs if order is None else pairs.select(order)
        found = self._own(in_order, rank, ranks, self.tell)
        if ranks > 1:
            dist.all_reduce(found)  # each is a number on one rank and 0 on the others
        values = found.cpu().numpy()
        if order is None:
            return values
        back = np.empty_like(values)
        back[order] = values
        return back

    def _own(self, pairs: Pairs, rank: int, ranks: int, tell: Callable[[int], Any]) -> Tensor:
        """(N, 2): what is scored on this rank, and 0 elsewhere."""
        found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.device)
        with as_reference(self.model, adapter=self.adapter):
            for batch in PairLoader(_Share(self._plan(pairs), rank, ranks), self.device):
                logps = self.model(**self._inputs(batch), score_table=batch.table).logps
                found[batch.pair_index] = logps.to(found.dtype)
                tell(logps.shape[0])
        return found

    def _compare(self, pair: Pairs) -> None:
        """That the model of each rank has the log-probs of the first one's, of one pair."""
        own = self._own(pair, 0, 1, lambda pairs: None)
        first = own.clone()
        dist.broadcast(first, src=0)
        lengths = torch.tensor([[len(pair.chosen_ids[0]), len(pair.rejected_ids[0])]])
        dtype = next(self.model.parameters()).dtype
        budget = OF_OTHER_BATCHES * allowed(first, lengths.to(first.device), dtype)
        told: list[Any] = [None] * place()[1]
        dist.all_gather_object(told, bool(((own - first).abs() <= budget).all()))
        if not all(told):
            raise RefLogpsError(
                f"rank {told.index(False)} has another model than rank 0: its log-probs of one "
                "pair differ\nhint: give all ranks the same folder, dtype and kind of device"
            )
        self._is_compared = True

    def _plan(self, pairs: Pairs) -> BatchPlan:
        room = 2 * int(pairs.longest.max(initial=0))
        return BatchPlan(
            pairs,
            layout=self.layout,
            tokens_per_batch=max(1, room, self.tokens_per_batch),
            shuffle=False,
        )

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        return batch.inputs_for(self.model)


class _Share(Sequence[Batch]):
    """Every so many-th batch of a plan, none twice."""

    def __init__(self, plan: BatchPlan, rank: int, ranks: int) -> None:
        self._plan, self._mine = plan, range(rank, len(plan), ranks)

    def __len__(self) -> int:
        return len(self._mine)

    def __getitem__(self, i: Any) -> Any:
        return self._plan[self._mine[i]]


# ---- ranks --------------------------------------------------------------------------------------


def place() -> tuple[int, int]:
    """This rank, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def of_first_rank(make: Callable[[], Answer]) -> Answer:
    """``make()`` of the first rank, told to all; an error of it is raised by all."""
    rank, ranks = place()
    if ranks == 1:
        return make()
    told: list[Any] = [None]
    if rank == 0:
        try:
            told = [(make(), None)]
        except Exception as error:
            told = [(None, error)]
    dist.broadcast_object_list(told, src=0)
    answer, failed = told[0]
    if failed is not None:
        raise failed
    found: Answer = answer
    return found


def check_same_pairs(pairs: Pairs) -> None:
    """That all ranks have the same pairs, in the same order: an index is then the same pair.

    Raises:
        RefLogpsError: they have not.
    """
    _, ranks = place()
    if ranks == 1:
        return
    made = hashlib.blake2b(digest_size=16)
    for name in pairs.IDS:
        whole = getattr(pairs, name).contiguous()
        for array in (whole.values, whole.offsets):
            made.update(np.ascontiguousarray(array).data)
    told: list[Any] = [None] * ranks
    dist.all_gather_object(told, (len(pairs), made.hexdigest()))
    for other, (n, digest) in enumerate(told):
        if digest != told[0][1]:
            raise RefLogpsError(
                f"rank {other} has other pairs than rank 0: {n:,}, and {told[0][0]:,} there\n"
                "hint: give all ranks the same files, tokenizer and options"
            )
