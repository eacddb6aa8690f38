"""`Unpaired`: single completions as token ids, each labelled desirable or not."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpo_ext.pairs import SHOWN, Examples, Ragged
from dpo_ext.report import Report


class Unpaired(Examples):
    """Single completions as token ids, each labelled desirable or not: all that a plan and a batch
    need.

    Attributes:
        prompt_ids, completion_ids: :class:`Ragged`; a completion does not repeat its prompt, and
            is whole where ``truncation`` is ``keep_start``: batches cut it to ``max_length``.
        labels: (n,) bool, True for desirable.
        report: :class:`Report`.
        ref_logps: (n,) float64 or None, log-probs of the completions under the reference.
        ref_kl_logps, kl_completions: (n,) float64 and int64, or None: log-probs under the reference
            of the completion of another example behind each prompt, and of which.
        max_length, truncation: how a sequence in a batch is cut: at its end, with ``keep_end`` the
            completion at its start.
        rows: (n,) int64, the 0-based number of each example's row among the rows read.
        columns: extra columns by name, as those of :class:`Pairs`.
        pad_id: what batches are padded with.
        vocab_size: every id is below it; None if unknown.
    """

    IDS = ("prompt_ids", "completion_ids")
    KNOWN = ("labels", "ref_logps")
    ALIKE = (*Examples.ALIKE, "max_length", "truncation")
    NOUN = "example"

    def __init__(
        self,
        prompt_ids: Ragged,
        completion_ids: Ragged,
        *,
        labels: NDArray[np.bool_],
        report: Report,
        pad_id: int,
        vocab_size: int | None,
        max_length: int | None = None,
        truncation: str = "keep_start",
        ref_logps: NDArray[np.float64] | None = None,
        ref_kl_logps: NDArray[np.float64] | None = None,
        kl_completions: NDArray[np.int64] | None = None,
        rows: NDArray[np.int64] | None = None,
        columns: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            prompt_ids,
            report=report,
            pad_id=pad_id,
            vocab_size=vocab_size,
            ref_logps=ref_logps,
            rows=rows,
            columns=columns,
        )
        self.completion_ids = completion_ids
        self.labels = labels
        self.max_length = max_length
        self.truncation = truncation
        self.ref_kl_logps = ref_kl_logps
        self.kl_completions = kl_completions

    def __getitem__(self, i: Any) -> Any:
        example = super().__getitem__(i)
        return example if isinstance(i, slice) else {**example, "label": bool(self.labels[i])}

    def scored(
        self, prompts: NDArray[np.int64], completions: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Ids of each of these completions that a batch keeps behind each of these prompts."""
        lengths = self.completion_ids.lengths[completions]
        if self.max_length is None:
            return lengths
        return np.minimum(lengths, (self.max_length - self.prompt_ids.lengths[prompts]).clip(0))

    @cached_property
    def tokens(self) -> NDArray[np.int64]:
        """(n,) int64: tokens of each example in a batch, prompt included."""
        every = np.arange(len(self))
        return self.prompt_ids.lengths + self.scored(every, every)

    @property
    def longest(self) -> NDArray[np.int64]:
        """The same as ``tokens``."""
        return self.tokens

    def _repr_html_(self) -> str:
        """What a notebook shows: how much there is, and the first examples."""
        from dpo_ext.pages.notebook import ids, table

        names = (*self.IDS, "label", *self.columns)
        rows = []
        for i, one in zip(range(SHOWN), self, strict=False):
            lists = (ids(one[name]) for name in self.IDS)
            rows.append((i, *lists, one["label"], *(one[name] for name in self.columns)))
        if len(self) > SHOWN:
            rows.append(("…", *[""] * len(names)))
        words = f"{len(self):,} examples, {int(self.labels.sum()):,} of them desirable"
        words += f", {int(self.tokens.sum()):,} tokens, padded with {self.pad_id}"
        return table(f"{type(self).__name__}: {words}", ("", *names), rows)
