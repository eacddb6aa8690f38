"""The command `dpo-ext`: `demo`, `doctor`, `verify`, `ref-logps`, `prepare`, `stats`, `bench data`,
`losses`.

Needs the extra `cli`.

Exit codes: 0 fine; 1 a check failed, where the message says which; 2 wrong usage or input, with a
message; 130 interrupted; 141 who reads the output went away, as a signal says it of other programs.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from errno import ENOSPC

from dpo_ext.errors import DpoExtError
from dpo_ext.extras import extra_of, install

__all__ = ["main"]

FINE, FAILED, WRONG, CLOSED = 0, 1, 2, 141
# Options as hints spell them in Python, with a value or alone.
OPTIONS = (
    "(on_bad|layout_of_rows|ignore_columns|images|prompt_key|chosen_key|rejected_key"
    "|max_length|chat_template|boundary|truncation|limits)"
)
SEVERAL = ("ignore_columns", "limits")
VALUE = re.compile(OPTIONS + r"=\(?\"([^\"]*)\",?\)?")
NAMED = re.compile(f"`{OPTIONS}=?`")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line, ``sys.argv`` by default, and exits the process."""
    try:
        _run(argv)
    except DpoExtError as error:
        # The base class itself is not the user's doing: a check of ours failed.
        _stop(error, str(error), FAILED if type(error) is DpoExtError else WRONG)
    except ValueError as error:
        # Which variables a template reads, only its tokenizer tells.
        if not str(error).startswith("`chat_template_kwargs`"):
            raise
        _stop(error, str(error), WRONG)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name)
        if extra is None:
            raise
        _stop(error, f"`{error.name}` is not installed\nhint: {install(extra)}", WRONG)
    except (
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        FileExistsError,
        NotADirectoryError,
    ) as error:
        place = f"{error.filename}: " if error.filename else ""
        _stop(error, f"{place}{(error.strerror or str(error)).lower()}", WRONG)
    except OSError as error:
        if error.errno != ENOSPC:
            raise
        _stop(error, "no space is left for the output", WRONG)


def _run(argv: Sequence[str] | None) -> None:
    from dpo_ext.cli.app import app

    try:
        try:
            app(args=None if argv is None else list(argv), prog_name="dpo-ext")
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _closed()
    except SystemExit as stop:
        # What typer makes of it is code 1, which here says that a check failed.
        if isinstance(stop.__context__, BrokenPipeError):
            _closed()
        raise


def _closed() -> None:
    """Ends without a word: nobody listens. What is still to be written goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(CLOSED)


def _stop(error: Exception, message: str, code: int) -> None:
    text = "\n".join([f"error: {message}", *getattr(error, "__notes__", [])])
    print(in_flags(text), file=sys.stderr)
    sys.exit(code)


def in_flags(text: str) -> str:
    """What an error tells callers of functions, told to those of the command; hints alone."""
    lines = text.split("\n")
    return "\n".join(_flags(line) if line.startswith("hint: ") else line for line in lines)


def _flags(hint: str) -> str:
    hint = VALUE.sub(lambda found: f"{_flag(found[1])} {found[2]}", hint)
    return NAMED.sub(lambda found: f"`{_flag(found[1])}`", hint)


def _flag(name: str) -> str:
    # Given once for each column or limit, so its name is that of one.
    return "--" + (name.removesuffix("s") if name in SEVERAL else name).replace("_", "-")
