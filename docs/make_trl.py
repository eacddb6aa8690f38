"""Writes the table of options into docs/trl.md from the tables of dpo_ext.trl.

python docs/make_trl.py            writes it
python docs/make_trl.py --check    says whether the page differs, and exits with 1
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import transformers

from dpo_ext.trl import BY_TRL, HONOURED, REFUSED

PAGE = Path(__file__).resolve().parent / "trl.md"
BEGIN, END = "<!-- from make_trl.py -->\n", "<!-- end -->\n"


def table() -> str:
    """Each option with who reads it and how, as Markdown."""
    inherited = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
    rows = [
        *((name, "dpo_ext", how) for name, how in HONOURED.items()),
        *((name, "TRL", how) for name, how in BY_TRL.items()),
        *(
            (name, "refused", f"must be `{allowed[0]!r}`; {hint}")
            for name, (allowed, hint) in REFUSED.items()
        ),
    ]
    # Those of TRL itself, then the few of transformers that are not left to it.
    rows.sort(key=lambda row: (row[0] in inherited, row[0]))
    lines = ["| option | read by | how |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {who} | {how} |" for name, who, how in rows]
    lines.append("| all others of `TrainingArguments` | transformers | its own loop runs |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    wanted = f"{before}{BEGIN}{table()}{END}{after}"
    if check and wanted != text:
        sys.stderr.write("docs/trl.md differs from the options\nhint: python docs/make_trl.py\n")
        return 1
    if not check:
        PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
