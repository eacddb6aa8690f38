"""`table`: what a notebook shows of an object.

It has no style and no script of its own, so that it follows the notebook's theme, and nothing of
the data is markup.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

LONGEST = 120


def table(title: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A title and a table of plain cells; a long cell is cut, with its length behind it.

    >>> table("1 < 2", ["name"], [["a&b"]]).partition("<tbody>")[2]
    '<tr><td>a&amp;b</td></tr></tbody></table>'
    """
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_cut(str(cell)))}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    return (
        f"<p>{escape(title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )


def ids(values: Sequence[int], count: int = 8) -> str:
    """The first ids of a list, and how many there are if that is more.

    >>> ids([5, 6, 7], 2), ids([5, 6], 2)
    ('5 6 … (3 ids)', '5 6')
    """
    shown = " ".join(str(int(value)) for value in values[:count])
    return f"{shown} … ({len(values):,} ids)" if len(values) > count else shown


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(text):,} characters)"
