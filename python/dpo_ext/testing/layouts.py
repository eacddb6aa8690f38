"""`check_layouts`: a way to lay pairs out gives every pair the log-probs that it has alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpo_ext.data.dataset import PairDataset
from dpo_ext.layout.batch import LAYOUTS, Layout
from dpo_ext.layout.table import ScoreTable
from dpo_ext.testing.corpus import row_cases
from dpo_ext.testing.logps import definition
from dpo_ext.testing.search import Refused, Violation, hypothesis, search
from dpo_ext.testing.strategies import pairs

LONGEST = 70  # tokens of a prompt or a completion in the fixed batches


class PrefixModel:
    """A causal model whose logits at a position are a function of all that it may attend to.

    The state of a position mixes, for every token in its sight, the token, how many are in sight
    before it, and its position id. Any difference (a token too many, a pad, another segment, a
    position that is off) changes the logits by nats, so two layouts of the same pairs agree only if
    both are right. It reads ``input_ids`` (B, T) with ``attention_mask``, (B, T) or (B, 1, T, T)
    (bool, or added to scores), or without one ``position_ids`` (B, T) that restart at each packed
    segment; beside a mask they do not cut, as in transformers.

    Returns:
        Logits (B, T, V) float64; in a row that sees nothing they mean nothing.

    >>> model = PrefixModel(vocab_size=11)
    >>> alone = model(torch.tensor([[5, 2, 7]]))
    >>> padded = model(torch.tensor([[0, 5, 2, 7]]), torch.tensor([[0, 1, 1, 1]]))
    >>> torch.equal(alone, padded[:, 1:])
    True
    >>> unmasked = model(torch.tensor([[0, 5, 2, 7]]))
    >>> bool((unmasked[:, 1:] - alone).abs().amax(-1).min() > 0.1)
    True
    """

    PRIMES = (257, 251)

    def __init__(self, vocab_size: int) -> None:
        generator = torch.Generator().manual_seed(1)
        rows = sum(self.PRIMES)
        self.table = torch.randn(rows, vocab_size, generator=generator, dtype=torch.float64) * 1.5

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Logits (B, T, V)."""
        ids = input_ids.long()
        B, T = ids.shape
        sees = torch.ones(T, T, dtype=torch.bool).tril().expand(B, T, T)
        if attention_mask is None:
            if position_ids is not None:
                segment = (position_ids == 0).cumsum(-1)
                sees = sees & (segment[..., :, None] == segment[..., None, :])
        elif attention_mask.dim() == 2:
            sees = sees & (attention_mask != 0)[:, None, :]
        else:
            added = attention_mask.is_floating_point()
            allowed = attention_mask > -1 if added else attention_mask != 0
            sees = sees & allowed.reshape(-1, T, T)
        rank = sees.long().cumsum(-1) - 1  # of a token in the sight of a position
        at = rank if position_ids is None else position_ids.long().reshape(-1, 1, T)
        parts = []
        for prime, base in zip(self.PRIMES, (31, 43), strict=True):
            power = torch.tensor([pow(base, k, prime) for k in range(T + 1)])
            place = 7 * at + at * at % prime
            mixed = power[rank.clamp(min=0)] * ((ids[:, None, :] + 1) * 3 + place)
            parts.append((mixed * sees).sum(-1) % prime)
        return self.table[parts[0]] + self.table[self.PRIMES[0] + parts[1]]


def check_layouts(
    subject: Callable[[Sequence[Mapping[str, np.ndarray]]], Any] | nn.Module,
    *,
    model: Callable[..., Any] | None = None,
    layouts: Sequence[Layout] = tuple(LAYOUTS),
    vocab_size: int | None = None,
    pad_id: int = 0,
    max_tokens: int = 8,
    slack: float | None = None,
    examples: int = 60,
) -> None:
    """Hold a collator, or a model on our layouts, to the log-probs that each sequence has alone.

    Same as, for every pair and side: the sum over the completion's tokens of their log-prob after
    the prompt and the completion so far, from a model that sees nothing else.

    Fixed batches come first: 1 to 5 pairs, nothing to pad, one row of 70 tokens beside one of 2,
    equal sides, pads as text, prompts that pairs share, an empty prompt (which may be refused with
    a ValueError; its first token is not scored).

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
            ids, or up to 97 of the model's.
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
            row_cases(V, pad_id, longest),
        )

    longest = max(max_tokens, LONGEST)
    if not isinstance(subject, nn.Module):
        V = 97 if vocab_size is None else vocab_size
        scorer = PrefixModel(V) if model is None else model
        check(subject, scorer, V, 1e-9 if slack is None else slack)
        return
    if model is not None:
        raise ValueError("`model` belongs to a collator: `subject` is a model itself")
    config = getattr(subject, "config", None)
    longest = min(longest, getattr(config, "max_position_embeddings", 2 * longest) // 2)
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

    def __init__(self, layout: Layout, model: nn.Module) -> None:
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
    given = list(batch)

    def check_rows() -> None:
        same = len(given) == len(batch) and all(a is b for a, b in zip(given, batch, strict=True))
        if not same or any(
            row.keys() != was.keys() or any(not np.array_equal(row[k], was[k]) for k in was)
            for row, was in zip(batch, before, strict=True)
        ):
            batch[:] = [dict(row) for row in before]
            raise broken("the collator changes its rows in place")

    try:
        made = collate(given)
        inputs, table = made if isinstance(made, tuple) else (made.model_inputs, made.table)
        values = _logits(model, **inputs).double().cpu()
        got = _score(values.reshape(-1, values.shape[-1]), table)
    except Exception as error:
        check_rows()
        if isinstance(error, ValueError) and any(not len(r["prompt_ids"]) for r in batch):
            raise Refused from error
        raise broken(f"collating and scoring raised {type(error).__name__}: {error}") from error
    check_rows()
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
    return definition(values, table, upstream)[0]


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
