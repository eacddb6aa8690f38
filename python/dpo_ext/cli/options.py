"""The options that commands share: `with_data_options` gives a command those of a data set."""

# No `from __future__ import annotations`: typer reads the annotations of what is put together here.

import json
from collections.abc import Callable
from dataclasses import fields
from datetime import datetime
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_ext.data.options import (
    Boundary,
    EmptyThink,
    Images,
    LayoutOfRows,
    Limits,
    OnBad,
    OnUseless,
    Options,
    SpecialTokensInText,
    TrainOn,
    Truncation,
    settings,
)

PANEL = "Options of the data set"

_FILES = typer.Argument(
    help="Files of preferences (JSONL, a JSON array or CSV, plain, gzip or zstd; Parquet; "
    "Arrow), folders of them, "
    "globs, or - for standard input.",
    show_default=False,
)
Files = Annotated[list[str], _FILES]
FilesOrNone = Annotated[list[str] | None, _FILES]
TokenizerFolder = Annotated[
    Path,
    typer.Option("--tokenizer", help="Folder with tokenizer.json.", show_default=False),
]
Json = Annotated[
    str | None,
    typer.Option(
        "--json", help="Write the result as JSON to this file; - is standard output, and all else "
        "goes to standard error.", metavar="FILE", show_default=False,
    ),
]  # fmt: skip


def data_options(
    max_length: Annotated[
        int,
        typer.Option(
            min=0,
            help="Longest side in tokens with its prompt; 0 for no bound.",
            rich_help_panel=PANEL,
        ),
    ] = 1024,
    truncation: Annotated[
        Truncation, typer.Option(help="What happens beyond --max-length.", rich_help_panel=PANEL)
    ] = "keep_start",
    boundary: Annotated[
        Boundary, typer.Option(help="Where the prompt's ids end.", rich_help_panel=PANEL)
    ] = "joint",
    on_bad: Annotated[
        OnBad,
        typer.Option(
            help="Stop at the first bad row, or drop and count it.", rich_help_panel=PANEL
        ),
    ] = "error",
    special_tokens_in_text: Annotated[
        SpecialTokensInText,
        typer.Option(
            help="Text that spells a control token is the token, stays text, or is a bad row.",
            rich_help_panel=PANEL,
        ),
    ] = "special",
    prompt_key: Annotated[
        str | None,
        typer.Option(help="Name of the prompt's field.", rich_help_panel=PANEL),
    ] = None,
    chosen_key: Annotated[
        str | None,
        typer.Option(help="Name of the chosen side's field.", rich_help_panel=PANEL),
    ] = None,
    rejected_key: Annotated[
        str | None,
        typer.Option(help="Name of the rejected side's field.", rich_help_panel=PANEL),
    ] = None,
    column: Annotated[
        list[str] | None,
        typer.Option(
            help="A further field to carry; may be given several times.", rich_help_panel=PANEL
        ),
    ] = None,
    ignore_column: Annotated[
        list[str] | None,
        typer.Option(
            help="A field that is not read, though a layout has it; may be given several times.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    layout_of_rows: Annotated[
        LayoutOfRows | None,
        typer.Option(
            help="How every row says its prompt and sides; by default found for each.",
            rich_help_panel=PANEL,
        ),
    ] = None,
    images: Annotated[
        Images,
        typer.Option(
            help="A row with a picture is bad, or read as if it had none.", rich_help_panel=PANEL
        ),
    ] = "error",
    keep_nulls: Annotated[
        bool,
        typer.Option(
            "--keep-nulls", help="Keep keys of Arrow structs that are null.", rich_help_panel=PANEL
        ),
    ] = False,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            help="Variables of the chat template for all rows, as JSON.", rich_help_panel=PANEL
        ),
    ] = None,
    on_useless: Annotated[
        OnUseless,
        typer.Option(
            help="What becomes of pairs with a blank side, or the same one twice.",
            rich_help_panel=PANEL,
        ),
    ] = "drop",
    empty_think: Annotated[
        EmptyThink,
        typer.Option(
            help="Where a block of thoughts belongs in which there is none.",
            rich_help_panel=PANEL,
        ),
    ] = "completion",
    train_on: Annotated[
        TrainOn,
        typer.Option(
            help="Score all tokens of a completion, or those of the assistant's last turn, or of "
            "all its turns.",
            rich_help_panel=PANEL,
        ),
    ] = "completion",
    now: Annotated[
        datetime | None,
        typer.Option(help="The time that chat templates see.", rich_help_panel=PANEL),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            help="A limit of the library by its name, such as max_row_tokens=4096; may be given "
            "several times.",
            metavar="NAME=NUMBER",
            rich_help_panel=PANEL,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads; by default all.", rich_help_panel=PANEL),
    ] = None,
) -> Options:
    """What `PairDataset.from_files` takes, from what the command line gives."""
    options: Options = {
        "max_length": max_length or None,
        "truncation": truncation,
        "boundary": boundary,
        "on_bad": on_bad,
        "special_tokens_in_text": special_tokens_in_text,
        "prompt_key": prompt_key,
        "chosen_key": chosen_key,
        "rejected_key": rejected_key,
        "columns": tuple(column or ()),
        "ignore_columns": tuple(ignore_column or ()),
        "layout_of_rows": layout_of_rows,
        "images": images,
        "keep_nulls": keep_nulls,
        "on_useless": on_useless,
        "empty_think": empty_think,
        "train_on": train_on,
        "now": now,
        "threads": threads,
    }
    try:
        if chat_template_kwargs is not None:
            options["chat_template_kwargs"] = json.loads(chat_template_kwargs)
        if limit:
            options["limits"] = Limits(**dict(map(_limit, limit)))
        settings(options)
    except (ValueError, TypeError) as error:
        raise typer.BadParameter(str(error)) from error
    return options


def _limit(given: str) -> tuple[str, int]:
    """A limit and its number."""
    name, _, number = given.partition("=")
    known = [field.name for field in fields(Limits)]
    if name not in known:
        raise ValueError(f"unknown limit `{name}`: there is {', '.join(known)}")
    if not number.isdecimal():
        raise ValueError(f"`{name}` must be a whole number, found {number!r}")
    return name, int(number)


def with_data_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the options of a data set: it gets them as ``options``.

    Args:
        defaults: of options of :func:`data_options` for which this command has its own.
    """
    shared = {
        name: parameter.replace(default=defaults.get(name, parameter.default))
        for name, parameter in signature(data_options).parameters.items()
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in signature(command).parameters.values() if p.name != "options"]

        def run(**given: Any) -> None:
            options = data_options(**{name: given.pop(name) for name in shared})
            command(**given, options=options)

        parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in (*own, *shared.values())]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate
