"""The error where no row gives a pair: what became of all of them, and a guess at why."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dpo_ext import _core
from dpo_ext.data.delimited import shown
from dpo_ext.data.files import some
from dpo_ext.data.options import Limits
from dpo_ext.errors import DataError
from dpo_ext.report import Report

NAMES = "`prompt_key`, `chosen_key` and `rejected_key` give other names"
UNPAIRED_NAMES = (
    "`prompt_key`, `completion_key` and `label_key` give other names; of pairs, "
    "UnpairedDataset.from_pairs makes single completions"
)
ROWS = "rows are JSON objects, one a line or in one array"
# What most often stands behind each reason when it is that of most rows.
GUESSES = {
    "bad_utf8": f"{ROWS}, in UTF-8",
    "bad_json": ROWS,
    "not_an_object": ROWS,
    "missing_field": NAMES,
    "wrong_type": "the table of rows in docs/rows.md has the fields and what each holds",
    "bad_ids": "ids must be of this tokenizer",
    "limit": "`limits` sets another limit",
    "empty_completion": "the completions may stand under other names, or the prompt holds them",
    "identical_pair": "`chosen` and `rejected` may name one and the same field",
    "no_completion_tokens": "`max_length` may be too small for the prompts",
    "identical_after_truncation": "`max_length` may be too small for the prompts",
    "too_long": "`max_length` may be too small",
}
LIST = re.compile(rb'\s*\{\s*"([^"\\]{1,60})"\s*:\s*\[\s*\{')


def no_pairs(
    files: Sequence[str], report: Report, besides: str = "", *, unpaired: bool = False
) -> DataError:
    """The error where no row of files, or of memory, gave a pair; one line if there are none."""
    what = "an example" if unpaired else "a pair"
    said = f"no row of {some(files)} gives {what}" if files else f"no row gives {what}"
    path = files[0] if len(files) == 1 else None
    if report.read == 0:
        return DataError(f"{said}: there are no rows{besides}", path, reason="no_pairs")
    most = max(report.dropped, key=lambda name: report.dropped[name])
    guess = _guess(report, most)
    if unpaired and guess is not None:
        guess = guess.replace(NAMES, UNPAIRED_NAMES)
    first = report.first.get(most)
    # The guess says more of where to go on than the hint of one row.
    shown = f"\n{most}: {first.message.partition(chr(10))[0]}" if first and first.message else ""
    hint = f"\nhint: {guess}" if guess else ""
    return DataError(f"{said}{besides}\n{report}{shown}{hint}", path, reason="no_pairs")


def check_pairs(files: Sequence[str], report: Report, *, unpaired: bool = False) -> None:
    """Rows of which none is kept, or none has a prompt, are no data set.

    Raises:
        DataError: with the reason ``no_pairs``, or that of :func:`check_prompts`.
    """
    if report.read and not report.kept:
        raise no_pairs(files, report, unpaired=unpaired)
    check_prompts(files, report)


def check_prompts(files: Sequence[str], report: Report) -> None:
    """Empty prompts all along are no prompts, where another field may hold them.

    Raises:
        DataError: with the reason ``missing_prompt``.
    """
    first = report.first.get("empty_prompt")
    if first is None or not first.message or report.warned["empty_prompt"] < report.kept:
        return
    path = files[0] if len(files) == 1 else None
    raise DataError(
        f"every prompt of {some(files) if files else 'the rows'} is empty, and there is text in "
        f"{first.message}\nhint: `prompt_key` names the prompt's field; "
        'layout_of_rows="explicit" keeps empty prompts',
        path,
        field=first.field,
        reason="missing_prompt",
    )


def _guess(report: Report, reason: str) -> str | None:
    first = report.first.get(reason)
    head = b""
    if first is not None and first.path is not None and Path(first.path).is_file():
        try:
            head = _core.FileText(first.path, Limits()).head()
        except (DataError, OSError):
            head = b""  # Parquet, and what went away since
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    line = text.partition(b"\n")[0].decode("utf-8", "replace").strip()
    if reason == "missing_field" and report.read == 1 and (key := LIST.match(text)):
        return f"the rows seem to be the list `{key[1].decode(errors='replace')}`: write it alone"
    if reason not in ("bad_json", "not_an_object") or text[:1] in (b"{", b"["):
        return GUESSES.get(reason)
    for delimiter in (",", "\t", ";"):
        if line.count(delimiter):
            columns = shown(line.split(delimiter))
            return f"it may be CSV, with the columns {columns}: then {NAMES}, or the file .csv"
    if re.match(r"(- +)?[\w-]+:( |$)|---$", line):
        return f"it may be YAML: {ROWS}"
    return GUESSES[reason]
