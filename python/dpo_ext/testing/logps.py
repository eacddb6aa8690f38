"""`check_logps` and `check_layouts`: log-prob functions and collators against the definition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_ext.data.dataset import PairDataset
from dpo_ext.layout.batch import LAYOUTS
from dpo_ext.layout.table import ScoreTable
from dpo_ext.testing.search import Violation, hypothesis, literal, search
from dpo_ext.testing.strategies import logits, pairs, score_tables

TOKEN_SLACK = 4e-6  # nats a token in float32, against float64
CANARY = float("nan")


def check_logps(
    function: Callable[[Tensor, ScoreTable], Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    token_slack: float = TOKEN_SLACK,
    weighted: bool = True,
    examples: int = 80,
) -> None:
    """Hold a function that scores sequences to the definition in float64, forward and backward.

    The definition: the log-prob of a sequence is the weighted sum over its scored tokens of
    ``(z_y - max z) - log sum exp(z - max z)``, and its gradient by a row ``weight * (onehot -
    softmax)``.
    Drawn: flat, peaked, offset (3e4), +-1e4 and -inf logits, odd vocabularies, sequences without a
        token,
    targets of -100, weights of 0, rows in any order, NaN in the rows that nothing scores, a random
    upstream. Exactly 0 must be: a sequence without a token, the gradient of a row that nothing
    scores, every gradient for an upstream of 0. A row's gradient adds up to 0, and a second call
    has the bits of the first.

    Args:
        function: ``(logits (R, V), table: ScoreTable) -> (S,) or (S / 2, 2)`` log-probs,
            differentiable in the logits.
        dtype: of the logits; the definition reads the values as rounded to it.
        token_slack: allowed error a token, nats, beside a relative error of 2^-22 of the sum; half
            precision logits need no more, because their values are exact in float32.
        weighted: whether the tables have weights.
        examples: cases drawn.

    Raises:
        AssertionError: with the smallest case found.

    >>> from dpo_ext.torch import sequence_logps
    >>> check_logps(sequence_logps)

    >>> def shifted(logits, table):  # every row one too late
    ...     rows = (table.logit_rows + 1) % len(logits)
    ...     offsets = table.seq_offsets
    ...     moved = ScoreTable(logit_rows=rows, targets=table.targets, seq_offsets=offsets)
    ...     return sequence_logps(logits, moved)
    >>> check_logps(shifted, weighted=False)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
        ...
    AssertionError: the log-prob of sequence ... must be ...
    """
    hypothesis()
    import hypothesis.strategies as st

    def with_table(values: Tensor) -> Any:
        tables = score_tables(*values.shape, weighted=weighted)
        return st.tuples(st.just(values), tables, st.integers(0, 2**16))

    search(
        lambda case: _check_scores(function, *case, dtype=dtype, token_slack=token_slack),
        logits().flatmap(with_table),
        examples,
    )


def _check_scores(
    function: Callable[[Tensor, ScoreTable], Tensor],
    values: Tensor,
    table: ScoreTable,
    seed: int,
    *,
    dtype: torch.dtype,
    token_slack: float,
) -> None:
    values = values.to(dtype)
    used = table.logit_rows[table.targets != -100]
    if table.weights is not None:
        used = table.logit_rows[(table.targets != -100) & (table.weights != 0)]
    spare = torch.ones(len(values), dtype=torch.bool)
    spare[used] = False
    values = values.clone()
    values[spare] = CANARY  # a row that nothing scores is never read
    upstream = 2.0 ** torch.tensor(
        np.random.default_rng(seed).integers(-2, 3, len(table.seq_offsets) - 1)
    )

    def broken(what: str) -> Violation:
        lines = [
            what, "", "import torch", "from dpo_ext.torch import ScoreTable",
            "nan, inf = float('nan'), float('inf')",
            literal("logits", values), *_table_literal(table), "function(logits, table)",
        ]  # fmt: skip
        return Violation("\n".join(lines))

    leaf = values.clone().requires_grad_()
    scored = bool((table.targets != -100).any())
    try:
        got = function(leaf, table)
    except Exception as error:
        raise broken(f"the function raised {type(error).__name__}: {error}") from error
    if not isinstance(got, Tensor) or got.numel() != len(upstream):
        raise broken(f"the function must return {len(upstream)} log-probs")
    flat = got.reshape(-1)
    if not torch.equal(leaf.detach().nan_to_num(nan=7.5), values.nan_to_num(nan=7.5)):
        raise broken("the function changes the logits in place")
    want, gradient, tokens = _definition(values, table, upstream)
    for i, (ours, truth) in enumerate(zip(flat.tolist(), want.tolist(), strict=True)):
        slack = token_slack * max(int(tokens[i]), 1) + 2.0**-22 * abs(truth)
        if not (ours == truth or abs(ours - truth) <= slack):
            raise broken(f"the log-prob of sequence {i} must be {truth!r}, found {ours!r}")
        if not int(tokens[i]) and ours != 0:
            raise broken(f"sequence {i} has no scored token: it must be exactly 0, found {ours!r}")
    if not flat.requires_grad:
        if scored:
            raise broken("the log-probs have no gradient")
        return
    (grad,) = torch.autograd.grad(flat, leaf, upstream.to(flat.dtype))
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
    excess = (grad.double() - gradient).abs() - rounding * gradient.abs()
    outside = ~(excess <= 1e-5 * upstream.abs().max()) & gradient.isfinite()
    if outside.any():
        row, column = outside.nonzero()[0].tolist()
        raise broken(
            f"the gradient of row {row}, column {column} must be "
            f"{gradient[row, column].item():.9g}, found {grad[row, column].item():.9g} (upstream "
            f"{upstream.tolist()})"
        )
    for row in spare.nonzero()[:, 0].tolist():
        if grad[row].any() or grad[row].isnan().any():
            raise broken(f"the gradient of row {row} must be exactly 0: nothing scores it")
    if dtype not in (torch.bfloat16, torch.float16):
        drift = grad.double().sum(1).abs()
        moved = ~(drift <= 4e-6 * gradient.abs().sum(1) + 2e-6 * upstream.abs().max())
        moved &= gradient.isfinite().all(1)
        if moved.any():
            row = int(moved.nonzero()[0])
            raise broken(
                f"the gradient of row {row} must add up to 0 over the vocabulary, found "
                f"{drift[row].item():.3g}"
            )
    again = values.clone().requires_grad_()
    repeated = function(again, table).reshape(-1)
    if not torch.equal(repeated.detach().nan_to_num(7.5), flat.detach().nan_to_num(7.5)):
        raise broken("the same logits must give the same bits: the function is random")
    (nothing,) = torch.autograd.grad(repeated, again, torch.zeros_like(repeated))
    if nothing.isnan().any() or nothing.any():
        raise broken("an upstream gradient of 0 must give exactly 0")


def _definition(
    values: Tensor, table: ScoreTable, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs (S,), gradient (R, V) and scored tokens (S,), in float64, one token at a time."""
    z = values.double()
    offsets = table.seq_offsets.tolist()
    logps = torch.zeros(len(offsets) - 1, dtype=torch.float64)
    tokens = torch.zeros(len(offsets) - 1, dtype=torch.int64)
    gradient = torch.zeros_like(z)
    for sequence in range(len(logps)):
        for token in range(offsets[sequence], offsets[sequence + 1]):
            row, target = int(table.logit_rows[token]), int(table.targets[token])
            weight = 1.0 if table.weights is None else float(table.weights[token])
            if target == -100 or weight == 0:
                continue
            top = z[row].max()
            mass = torch.exp(z[row] - top)
            logps[sequence] += weight * ((z[row, target] - top) - torch.log(mass.sum()))
            tokens[sequence] += 1
            onehot = torch.zeros_like(mass)
            onehot[target] = 1
            gradient[row] += weight * upstream[sequence].double() * (onehot - mass / mass.sum())
    return logps, gradient, tokens


def _table_literal(table: ScoreTable) -> list[str]:
    weights = "None" if table.weights is None else str(table.weights.tolist())
    return [
        f"table = ScoreTable(logit_rows={table.logit_rows.tolist()}, "
        f"targets={table.targets.tolist()},",
        f"                   seq_offsets={table.seq_offsets.tolist()}, weights={weights})",
    ]


class PrefixModel:
    """A causal model whose logits at a position are a function of the tokens it may attend to.

    Any difference in what a position sees (a token too many, a pad, another segment) changes its
    logits by nats, so two layouts of the same pairs agree only if both are right. It reads
    ``input_ids`` (B, T) with ``attention_mask`` (B, T), or ``position_ids`` (B, T) that restart at
    each packed segment. float64.
    """

    def __init__(self, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(257, vocab_size, generator=generator, dtype=torch.float64) * 2

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Logits (B, T, V)."""
        rows = input_ids.tolist()
        seen = (
            [[1] * len(row) for row in rows] if attention_mask is None else attention_mask.tolist()
        )
        restarts = [[int(t == 0) for t in range(len(row))] for row in rows]
        if position_ids is not None:
            restarts = [[int(p == 0) for p in row] for row in position_ids.tolist()]
        states = []
        for ids, mask, restart in zip(rows, seen, restarts, strict=True):
            state, out = 0, []
            for token, visible, first in zip(ids, mask, restart, strict=True):
                if first and position_ids is not None:
                    state = 0
                if visible:
                    state = (state * 31 + token + 1) % 257
                out.append(state)
            states.append(out)
        return self.table[torch.tensor(states, dtype=torch.int64)]


def check_layouts(
    subject: Callable[[Sequence[Mapping[str, np.ndarray]]], Any] | nn.Module,
    *,
    model: Callable[..., Any] | None = None,
    layouts: Sequence[str] = tuple(LAYOUTS),
    vocab_size: int | None = None,
    pad_id: int = 0,
    max_tokens: int = 8,
    slack: float | None = None,
    examples: int = 60,
) -> None:
    """Hold a collator, or a model on our layouts, to the log-probs that each sequence has alone.

    Same as, for every pair and side: the sum over the completion's tokens of their log-prob after
    the prompt and the completion so far, from a model that sees nothing else.

    Args:
        subject: a Hugging Face model, in eval mode during the check, that is given ``padded``,
            ``packed`` and ``shared`` batches; or a collator. That is called with a list of rows
            ``{"prompt_ids", "chosen_ids", "rejected_ids"}`` and returns a batch with
            ``model_inputs`` (a mapping: ``input_ids`` (B, T) and ``attention_mask``, or
            ``position_ids`` that restart at each packed segment) and ``table``, or the tuple of
            the two.
        model: of a collator: called with ``**model_inputs``; returns logits (B, T, V) or an object
            with ``.logits``. By default a `PrefixModel`, for which one wrong token in sight changes
            the result by nats.
        layouts: of a model: which ones it is given.
        vocab_size, pad_id: ids drawn; the pad id appears as an ordinary token too. By default 97
            ids, or the model's.
        max_tokens: longest prompt and completion drawn.
        slack: allowed difference in nats a token; by default 1e-9, for a model 3e-4, what float32
            needs.
        examples: cases drawn.

    Raises:
        AssertionError: with the smallest batch found.

    >>> def collate(rows):
    ...     sides = [(r["prompt_ids"], r[k]) for k in ("chosen_ids", "rejected_ids") for r in rows]
    ...     T = max(len(p) + len(c) for p, c in sides)
    ...     ids = torch.zeros(len(sides), T, dtype=torch.int64)
    ...     mask, labels = ids.clone(), ids - 100
    ...     for i, (p, c) in enumerate(sides):
    ...         n = len(p) + len(c)
    ...         ids[i, :n] = torch.tensor([*p, *c])
    ...         mask[i, :n] = 1
    ...         labels[i, len(p):n] = torch.tensor(c)
    ...     return {"input_ids": ids, "attention_mask": mask}, ScoreTable.from_labels(labels)
    >>> check_layouts(collate)

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=23, hidden_size=8, intermediate_size=8,
    ...                      num_hidden_layers=1, num_attention_heads=2)
    >>> check_layouts(LlamaForCausalLM(config), examples=5)
    """
    hypothesis()
    import hypothesis.strategies as st

    def check(collate: Callable[..., Any], scorer: Callable[..., Any], V: int, most: float) -> None:
        rows = pairs(vocab_size=V, max_tokens=max_tokens, pad_id=pad_id)
        search(
            lambda batch: _check_batch(collate, scorer, batch, most),
            st.lists(rows, min_size=1, max_size=4),
            examples,
        )

    if not isinstance(subject, nn.Module):
        V = 97 if vocab_size is None else vocab_size
        scorer = PrefixModel(V) if model is None else model
        check(subject, scorer, V, 1e-9 if slack is None else slack)
        return
    if model is not None:
        raise ValueError("`model` belongs to a collator: `subject` is a model itself")
    config = getattr(subject, "config", None)
    V = min(97, getattr(config, "vocab_size", 97)) if vocab_size is None else vocab_size
    training = subject.training
    try:
        subject.eval()
        for layout in layouts:
            check(_Laid(layout, subject), subject, V, 3e-4 if slack is None else slack)
    finally:
        subject.train(training)


class _Laid:
    """Rows as a batch of one of our layouts, with the inputs of a model."""

    def __init__(self, layout: str, model: nn.Module) -> None:
        self._layout, self._model = layout, model

    def __call__(
        self, rows: Sequence[Mapping[str, np.ndarray]]
    ) -> tuple[dict[str, Any], ScoreTable]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        data = PairDataset.from_ids(*([row[name] for row in rows] for name in names))
        plan = data.plan(layout=self._layout, pairs_per_batch=len(rows), shuffle=False)
        batch = plan[0].to(next(self._model.parameters()).device)
        return batch.inputs_for(self._model), batch.table.to("cpu")

    def literal(self) -> list[str]:
        """The lines that make the batch from ``rows``."""
        return [
            "from dpo_ext import PairDataset",
            'names = ("prompt_ids", "chosen_ids", "rejected_ids")',
            "data = PairDataset.from_ids(*([row[name] for row in rows] for name in names))",
            f"data.plan(layout={self._layout!r}, pairs_per_batch=len(rows), shuffle=False)[0]",
        ]


def _logits(model: Callable[..., Any], **inputs: Any) -> Tensor:
    out = model(**inputs)
    return (out if isinstance(out, Tensor) else out.logits).detach()


def _check_batch(
    collate: Callable[..., Any],
    model: Callable[..., Any],
    batch: list[dict[str, np.ndarray]],
    slack: float,
) -> None:
    def broken(what: str) -> Violation:
        rows = [{k: v.tolist() for k, v in row.items()} for row in batch]
        lines = [
            what, "", "import numpy as np", f"rows = {rows!r}",
            "rows = [{k: np.array(v, dtype=np.int32) for k, v in row.items()} for row in rows]",
        ]  # fmt: skip
        lines += collate.literal() if isinstance(collate, _Laid) else ["collate(rows)"]
        return Violation("\n".join(lines))

    before = [{k: v.copy() for k, v in row.items()} for row in batch]
    try:
        made = collate(batch)
        inputs, table = made if isinstance(made, tuple) else (made.model_inputs, made.table)
        values = _logits(model, **inputs).double().cpu()
        got = _score(values.reshape(-1, values.shape[-1]), table)
    except Exception as error:
        raise broken(f"collating and scoring raised {type(error).__name__}: {error}") from error
    if any(
        not np.array_equal(row[k], was[k])
        for row, was in zip(batch, before, strict=True)
        for k in was
    ):
        raise broken("the collator changes its rows in place")
    if len(got) != 2 * len(batch):
        raise broken(f"the table must have {2 * len(batch)} sequences, found {len(got)}")
    for i, row in enumerate(batch):
        for j, side in enumerate(("chosen_ids", "rejected_ids")):
            want, tokens = _alone(model, row["prompt_ids"], row[side])
            if abs(got[2 * i + j].item() - want) > slack * max(1, tokens):
                raise broken(
                    f"pair {i}, {side.removesuffix('_ids')}: the log-prob alone is {want:.9g}, in "
                    f"this layout {got[2 * i + j].item():.9g}"
                )
            length = int(table.lengths.reshape(-1)[2 * i + j])
            if length != tokens:
                raise broken(
                    f"pair {i}, {side}: {tokens} tokens are scored, the table's length is {length}"
                )


def _score(values: Tensor, table: ScoreTable) -> Tensor:
    upstream = torch.ones(len(table.seq_offsets) - 1)
    return _definition(values, table, upstream)[0]


def _alone(
    model: Callable[..., Any], prompt: np.ndarray, completion: np.ndarray
) -> tuple[float, int]:
    """Log-prob of a completion after its prompt, and its scored tokens."""
    ids = torch.tensor([[*prompt.tolist(), *completion.tolist()]])
    there = ids
    if isinstance(model, nn.Module):
        there = ids.to(next(model.parameters()).device)
    values = _logits(model, input_ids=there, attention_mask=torch.ones_like(there))[0]
    values = values.double().cpu()
    start = max(len(prompt), 1)
    logps = torch.log_softmax(values, -1)
    picked = [logps[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])]
    return float(np.sum(picked)) if picked else 0.0, len(picked)
