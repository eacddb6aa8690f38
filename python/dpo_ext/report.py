"""`Report`: what became of the rows of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from os import fspath
from typing import Any

# Of the metadata of a schema: a report as JSON, `Report.to_dict`.
REPORT_KEY = b"dpo_ext.report"
TRLS = ("explicit", "implicit", "ids")
UNREAD = 32
NO_LINES = (".parquet", ".arrow", ".feather")


@dataclass(frozen=True)
class Example:
    """Where something was seen first: ``line`` is 1-based, the row where a file has no lines;
    ``path`` is None for rows from memory; ``row`` is the 1-based row of a table or an array.
    """

    path: str | None
    line: int | None
    field: str | None
    message: str
    row: int | None = None


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
            ``truncated`` a side was cut; ``eos_cut`` EOS was cut away; ``eos_as_text`` EOS, as TRL
            spells it, became other ids; ``empty_prompt`` the first token of both sides cannot be
            scored; ``special_token_in_text`` the row spells a control token; ``bos_in_text`` the
            text brought its own BOS, so none was added;
            ``no_turn_boundary`` the prompt is implicit and does not end at the last turn of both
            sides, or the template renders it differently alone; ``non_finite`` a field that nobody
            reads holds NaN or an infinity; ``blank_line`` counts lines, not rows;
            ``prompt_in_sides`` the prompt stood in the sides once more, and was cut there;
            ``messages_as_json_text`` a conversation was JSON in a string; ``arguments_as_text`` the
            template encodes arguments of a call, which are JSON already, once more;
            ``tools_dropped``, ``tool_calls_dropped``, ``reasoning_dropped`` the template does not
            print them; ``unread_system`` a field ``system`` that the layout has not; ``images`` a
            picture, a film or a sound was passed over.
        layouts: kept rows by how they say their prompt and sides.
        unread: names of fields with text, or of another layout, that were not read from kept rows,
            in alphabetical order (32 at most).
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
    layouts: dict[str, int] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values, for JSON."""
        return asdict(self)

    @classmethod
    def of(cls, raw: Mapping[str, Any], notes: Sequence[str]) -> Report:
        """The report of what an encoder counted, and ``notes`` on what encoded it."""
        kept, with_ref = raw["kept"], raw["with_ref"]
        notes = (*notes, *uncarried(with_ref, kept))
        first = {
            name: Example(None if path is None else fspath(path), *rest)
            for name, (path, *rest) in raw["first"].items()
        }
        counts = (raw["dropped"], raw["warned"])
        size, layouts, unread = raw["bytes"], raw["layouts"], tuple(raw["unread"])
        return cls(raw["read"], kept, *counts, first, notes, size, layouts, unread)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: they are not the values of a report.
        """
        names = ("dropped", "warned", "layouts")
        counts = {name: dict(values.get(name, {})) for name in names}
        numbers = [values.get(name) for name in ("read", "kept", "bytes")]
        found = [*numbers, *(number for count in counts.values() for number in count.values())]
        if not all(type(number) is int and number >= 0 for number in found):
            raise ValueError("expected whole numbers in a report")
        report = cls(
            values["read"],
            values["kept"],
            **counts,
            first={str(name): Example(**first) for name, first in values["first"].items()},
            notes=tuple(map(str, values["notes"])),
            bytes=values["bytes"],
            unread=tuple(map(str, values.get("unread", ()))),
        )
        if report.read != report.kept + sum(report.dropped.values()):
            raise ValueError("expected `read` to be the sum of `kept` and `dropped`")
        return report

    @classmethod
    def merged(cls, reports: Iterable[Report]) -> Report:
        """One report of several parts of the same rows, in their order: counts add up, the first
        example of each reason stays, notes are not repeated.
        """
        total = cls(0, 0)
        for report in reports:
            total = cls(
                total.read + report.read,
                total.kept + report.kept,
                _sum(total.dropped, report.dropped),
                _sum(total.warned, report.warned),
                {**report.first, **total.first},
                tuple(dict.fromkeys((*total.notes, *report.notes))),
                total.bytes + report.bytes,
                _sum(total.layouts, report.layouts),
                tuple(sorted({*total.unread, *report.unread})[:UNREAD]),
            )
        return total

    def __str__(self) -> str:
        lines = [f"{self.read:,} rows read, {self.kept:,} kept, {self.read - self.kept:,} dropped"]
        for name, count in self._foreign():
            lines.append(f"  layout {name}: {count:,}")
        for title, counts in (("dropped", self.dropped), ("warned", self.warned)):
            for name, count in sorted(counts.items(), key=lambda item: -item[1]):
                lines.append(f"  {title} {name}: {count:,}{self._place(name)}")
        if self.unread:
            lines.append(f"  not read: {', '.join(map(printable, self.unread))}")
        lines.extend(f"  note: {note}" for note in self.notes)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from dpo_ext.pages.notebook import table

        rows = [("read", f"{self.read:,}", ""), ("kept", f"{self.kept:,}", "")]
        rows.extend((f"layout {name}", f"{count:,}", "") for name, count in self._foreign())
        for title, counts in (("dropped", self.dropped), ("warned", self.warned)):
            for name, count in sorted(counts.items(), key=lambda item: -item[1]):
                rows.append((f"{title} {name}", f"{count:,}", self._place(name).strip(" ()")))
        if self.unread:
            rows.append(("not read", "", ", ".join(map(printable, self.unread))))
        rows.extend(("note", "", note) for note in self.notes)
        return table("Report", ("", "rows", ""), rows)

    def _foreign(self) -> list[tuple[str, int]]:
        """Layouts that are not TRL's own, which need no mention."""
        return [item for item in self.layouts.items() if item[0] not in TRLS]

    def _place(self, name: str) -> str:
        example = self.first.get(name)
        if example is None or example.line is None:
            return ""
        path = example.path
        # Older reports say only by the file's name that there were rows.
        has_rows = path is None or path.lower().endswith(NO_LINES)
        place = f"{'row' if has_rows else 'line'} {example.line}"
        if example.row is not None:
            place = f"row {example.row}"
        place = place if path is None else f"{path}, {place}"
        return f" (first: {place}{f', `{example.field}`' if example.field else ''})"


def printable(name: str) -> str:
    """A name of a field as it is, unless a terminal would act on it."""
    return name if name.isprintable() else repr(name)


def uncarried(with_ref: int, kept: int) -> list[str]:
    """A note where some pairs alone have reference log-probs, which are then dropped."""
    if with_ref in (0, kept):
        return []
    return [f"reference log-probs stand in {with_ref} of {kept} pairs and were not carried"]


def _sum(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in {**one, **other}}
