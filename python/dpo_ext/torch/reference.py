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
from dpo_ext.layout.fill import SIDES, token_places
from dpo_ext.layout.plan import BatchPlan
from dpo_ext.pairs import Pairs, Ragged
from dpo_ext.torch.agreement import as_it_was
from dpo_ext.torch.attention import assert_packing_safe
from dpo_ext.torch.audit import OF_OTHER_BATCHES, allowed
from dpo_ext.torch.loader import PairLoader
from dpo_ext.torch.scoring import attach_scoring

Answer = TypeVar("Answer")
Logps = NDArray[np.float64]
TokenLogps = Mapping[str, Ragged]
"""``{"chosen": lists, "rejected": lists}``, a number for each token of each completion."""
Score = Callable[[NDArray[np.int64]], Logps]
ScoreTokens = Callable[[NDArray[np.int64]], tuple[Logps, TokenLogps]]
TOKENS = 16_384
"""Of a batch that is scored."""
AT_ONCE = 1 << 16
"""Pairs that are scored and put together: a run that is killed loses the last ones."""


@runtime_checkable
class Store(Protocol):
    """What `dpo_ext.reflogps.ReferenceStore` does, as far as it is needed here."""

    def missing(
        self, pairs: Any, *, index: Any = ..., token_weights: Any = ..., tokens: bool = ...
    ) -> Any: ...

    def put(
        self,
        pairs: Any,
        values: Any,
        *,
        index: Any = ...,
        token_weights: Any = ...,
        token_logps: Any = ...,
    ) -> int: ...

    def get(self, pairs: Any, *, index: Any = ..., token_weights: Any = ...) -> Any: ...

    def get_tokens(self, pairs: Any, *, index: Any = ..., token_weights: Any = ...) -> Any: ...


# ---- at each step -------------------------------------------------------------------------------


class Reference(Protocol):
    """What a training step asks."""

    def logps(self, batch: Any) -> Tensor | None:
        """(N, 2) of a batch, chosen then rejected, without gradient."""

    def token_logps(self, batch: Any) -> Tensor | None:
        """(M,) float32 of the tokens of ``batch.table``, in its order and without its weights; 0
        where none is scored. Without gradient.
        """


class NoReference:
    """Of a loss that needs none."""

    def logps(self, batch: Any) -> None:
        return None

    def token_logps(self, batch: Any) -> None:
        return None


class ColumnsReference:
    """The log-probs that the pairs bring: of the data, of a store, of a pass before training.

    Args:
        token_logps: those of the tokens of all pairs, as `ReferenceStore.get_tokens` or
            `PairScorer.tokens` gives them; only for `ColumnsReference.token_logps`.
    """

    def __init__(self, token_logps: Mapping[str, Ragged] | None = None) -> None:
        self._token_logps = token_logps

    def token_logps(self, batch: Any) -> Tensor:
        lists = self._token_logps
        if lists is None:
            raise TensorError(
                "there are no reference log-probs of tokens\n"
                "hint: ColumnsReference(store.get_tokens(pairs)) has them"
            )
        table = batch.table
        found = torch.zeros(table.n_tokens)
        for side, (where, source) in _places(table, batch.pair_index, lists).items():
            found[where] = torch.from_numpy(lists[side].values[source])
        return found.to(table.device, non_blocking=True)

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
        found: Tensor = self._scores(batch).logps
        return found

    def token_logps(self, batch: Any) -> Tensor:
        found: Tensor = self._scores(batch, score_stats="logps").tokens.logps
        return found

    def _scores(self, batch: Any, **asked: Any) -> Any:
        with as_reference(self.model, adapter=self.adapter):
            return self.model(**batch.model_inputs, score_table=batch.table, **asked)


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


def stored_token_logps(
    store: Store,
    pairs: Pairs,
    score: ScoreTokens,
    *,
    token_weights: Mapping[str, Any] | None = None,
    at_once: int = AT_ONCE,
) -> TokenLogps:
    """As `stored_logps`, of the tokens: what a store has, and what it lacks, scored and put.

    Args:
        score: gives both, as `PairScorer.tokens` does.
    """
    complete(store, pairs, score, token_weights=token_weights, at_once=at_once, tokens=True)
    return of_first_rank(lambda: store.get_tokens(pairs, token_weights=token_weights))


def complete(
    store: Store,
    pairs: Pairs,
    score: Score | ScoreTokens,
    *,
    token_weights: Mapping[str, Any] | None = None,
    at_once: int = AT_ONCE,
    tokens: bool = False,
) -> int:
    """Scores the pairs that a store lacks and puts them, ``at_once`` pairs after another.

    Each part is durable before the next one is scored. With ``tokens`` also those of which it lacks
    the log-probs of tokens: ``score`` gives both.

    Returns:
        The number of pairs that were scored.
    """
    check_same_pairs(pairs)
    how: dict[str, Any] = {"token_weights": token_weights}
    lacking = of_first_rank(lambda: store.missing(pairs, tokens=tokens, **how))
    scored = 0
    for start in range(0, len(lacking), at_once):
        some = lacking[start : start + at_once]
        if start:  # but for those that were in an earlier part, too

            def still(part: Any = some) -> Any:
                return store.missing(pairs, index=part, tokens=tokens, **how)

            some = of_first_rank(still)
        if len(some):
            values: Any = score(some)
            own = {}
            if tokens:
                values, own["token_logps"] = values

            def put(part: Any = some, values: Any = values, own: Any = own) -> int:
                return store.put(pairs, values, index=part, **how, **own)

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
        return self._scored(pairs, None)

    def tokens(self, pairs: Pairs) -> tuple[Logps, TokenLogps]:
        """The same, and ``{"chosen": lists, "rejected": lists}``, float32: the log-prob of each
        token of each completion; 0 for one that is not scored. Weights of tokens are in the sums
        alone.
        """
        lists = {
            side: Ragged(
                np.zeros(int(np.ptp(ids.offsets)), np.float32), ids.offsets - ids.offsets[0]
            )
            for side, ids in zip(SIDES, (pairs.chosen_ids, pairs.rejected_ids), strict=True)
        }
        return self._scored(pairs, lists), lists

    def _scored(self, pairs: Pairs, lists: TokenLogps | None) -> Logps:
        """(N, 2), and the log-probs of tokens into ``lists``."""
        if not self._is_compared:
            self._compare(pairs[:1])
        rank, ranks = place()
        # Padded to the longest of a batch: like lengths go together.
        order = np.arange(len(pairs))
        if self.layout == "padded":
            order = np.argsort(pairs.longest, kind="stable")
        found = self._own(pairs, order, rank, ranks, self.tell, lists)
        if ranks > 1:
            # each is a number on one rank and 0 on the others
            dist.all_reduce(found)
            for side in lists.values() if lists is not None else ():
                told = torch.from_numpy(side.values).to(self.device)
                dist.all_reduce(told)
                side.values[:] = told.cpu().numpy()
        return found.cpu().numpy()

    def _own(
        self,
        pairs: Pairs,
        order: NDArray[np.int64],
        rank: int,
        ranks: int,
        tell: Callable[[int], Any],
        lists: TokenLogps | None = None,
    ) -> Tensor:
        """(N, 2): what is scored on this rank, and 0 elsewhere."""
        found = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.device)
        asked = {} if lists is None else {"score_stats": "logps"}
        plan = self._plan(pairs.select(order) if self.layout == "padded" else pairs)
        with as_reference(self.model, adapter=self.adapter):
            for batch in PairLoader(_Share(plan, rank, ranks), self.device):
                scores = self.model(**self._inputs(batch), score_table=batch.table, **asked)
                index = order[batch.pair_index.cpu().numpy()]
                found[torch.from_numpy(index).to(self.device)] = scores.logps.to(found.dtype)
                if lists is not None:
                    of_tokens = scores.tokens.logps.float().cpu().numpy()
                    for side, (where, source) in _places(batch.table, index, lists).items():
                        lists[side].values[source] = of_tokens[where]
                tell(len(index))
        return found

    def _compare(self, pair: Pairs) -> None:
        """That the model of each rank has the log-probs of the first one's, of one pair."""
        own = self._own(pair, np.arange(1), 0, 1, lambda pairs: None)
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


def _places(
    table: Any, index: Any, lists: TokenLogps
) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Of either side: where its tokens stand in the table, and in the values of the lists."""
    own = np.asarray(index.cpu() if isinstance(index, Tensor) else index)
    places = token_places(table.host_offsets.numpy(), own, [lists[side].offsets for side in SIDES])
    return dict(zip(SIDES, places, strict=True))


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
