"""The losses for people: `losses_table`, for ``dpo-ext losses`` and the pages of docs/losses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dpo_ext.torch.losses.lists import LISTWISE, list_loss
from dpo_ext.torch.losses.pairs import preference_loss
from dpo_ext.torch.losses.registry import LOSSES
from dpo_ext.torch.losses.row import NEEDS, SHAPE, LossRow
from dpo_ext.torch.losses.single import UNPAIRED, unpaired_loss


@dataclass(frozen=True, slots=True)
class ParameterEntry:
    """A parameter: its default (None: it must be given), its domain, and whether each pair may have
    a value of its own.
    """

    name: str
    default: float | None
    domain: str
    per_pair: bool


@dataclass(frozen=True, slots=True)
class LossEntry:
    """One line of the listing.

    Attributes:
        name, formula, paper: as the table has them.
        function: the call that takes it.
        parameters: with their defaults, on one line; ``domains`` has them one by one.
        needs: what must be given beside the log-probs, in words.
        shape: what is known of its shape, in words.
        domains: the parameters, one by one.
        registered: it came by `register_loss`.
    """

    name: str
    function: str
    formula: str
    paper: str
    parameters: str
    needs: str
    shape: str
    domains: tuple[ParameterEntry, ...]
    registered: bool


def losses_table() -> list[LossEntry]:
    """Every loss: of pairs (registered ones too), of single completions, of lists.

    >>> entry = losses_table()[0]
    >>> entry.name, entry.function, entry.parameters, entry.needs
    ('dpo', 'preference_loss', 'beta=0.1, margin=0, label_smoothing=0', 'reference')
    >>> entry.shape
    'only the margin, falls in chosen, rises in rejected, convex'
    >>> entry.domains[0]
    ParameterEntry(name='beta', default=0.1, domain='> 0', per_pair=True)
    """
    tables: tuple[tuple[str, Mapping[str, LossRow]], ...] = (
        (preference_loss.__name__, LOSSES),
        (unpaired_loss.__name__, UNPAIRED),
        (list_loss.__name__, LISTWISE),
    )
    return [_entry(row, function) for function, rows in tables for row in rows.values()]


def _entry(row: LossRow, function: str) -> LossEntry:
    parameters = (
        f"{name}={'required' if p.default is None else format(p.default, 'g')}"
        for name, p in row.parameters.items()
    )
    return LossEntry(
        name=row.name,
        function=function,
        formula=row.text,
        paper=row.paper,
        parameters=", ".join(parameters),
        needs=_words(row, NEEDS),
        shape=_words(row, SHAPE),
        domains=tuple(
            ParameterEntry(name, p.default, p.domain, p.per_pair)
            for name, p in row.parameters.items()
        ),
        registered=row.autograd,
    )


def _words(row: LossRow, known: Mapping[str, str]) -> str:
    return ", ".join(words for flag, words in known.items() if getattr(row, flag))
