"""`Report`: what became of the rows of a data set."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Example:
    """Where something was seen first: ``line`` is 1-based; ``path`` is None for rows from
    memory.
    """

    path: str | None
    line: int | None
    field: str | None
    message: str


@dataclass(frozen=True)
class Report:
    """Counts of rows; ``read == kept + sum(dropped.values())`` always.

    Attributes:
        read: rows seen. Blank lines are no rows.
        kept: rows that gave a pair.
        dropped: rows by the one reason for which each was dropped; with ``on_bad="error"`` only
            ``too_long`` of ``truncation="drop"`` can be here.
        warned: kept rows by what is worth knowing about them:
            ``boundary_merge`` a token straddles the end of the prompt and went to the completion;
            ``truncated`` a side was cut; ``eos_cut`` EOS was cut away; ``empty_prompt`` the first
            token of both sides cannot be scored; ``special_token_in_text`` the contents spell a
            control token; ``bos_in_text`` the text brought its own BOS, so none was added;
            ``no_turn_boundary`` the prompt is implicit and does not end at the last turn of both
            sides, or the template renders it differently alone; ``blank_line`` counts lines, not
            rows.
        first: the first example of each reason and warning.
        notes: facts about the whole data set.
        bytes: bytes of text read from files.
    """

    read: int
    kept: int
    dropped: dict[str, int] = field(default_factory=dict)
    warned: dict[str, int] = field(default_factory=dict)
    first: dict[str, Example] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.read:,} rows read, {self.kept:,} kept, {self.read - self.kept:,} dropped"]
        for title, counts in (("dropped", self.dropped), ("warned", self.warned)):
            for name, count in sorted(counts.items(), key=lambda item: -item[1]):
                lines.append(f"  {title} {name}: {count:,}{self._place(name)}")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)

    def _place(self, name: str) -> str:
        example = self.first.get(name)
        if example is None or example.line is None:
            return ""
        place = (
            f"row {example.line}"
            if example.path is None
            else f"{example.path}, line {example.line}"
        )
        return f" (first: {place}{f', `{example.field}`' if example.field else ''})"
