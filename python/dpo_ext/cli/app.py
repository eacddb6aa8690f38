"""The command `dpo-ext`: `demo`, `prepare`, `stats`, `bench data`, `losses`. Needs the extra `cli`.

Exit codes: 0 fine; 1 a check failed, where the message says which; 2 wrong usage or input, with a
message.
"""

# No `from __future__ import annotations`: typer reads the annotations of functions defined inside
# `_app`.

import sys
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from dpo_ext import __version__
from dpo_ext.errors import DpoExtError
from dpo_ext.extras import extra_of, install


class Boundary(Enum):
    """The option `boundary` of a data set, for typer; a test compares the words."""

    joint = "joint"
    separate = "separate"
    trl = "trl"


class Truncation(Enum):
    """The option `truncation`."""

    keep_start = "keep_start"
    keep_end = "keep_end"
    keep_completions = "keep_completions"
    drop = "drop"
    error = "error"


class OnBad(Enum):
    """The option `on_bad`."""

    error = "error"
    skip = "skip"


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line, ``sys.argv`` by default, and exits the process."""
    try:
        _app()(args=None if argv is None else list(argv), prog_name="dpo-ext")
    except DpoExtError as error:
        # The base class itself is not the user's doing: a check of ours failed.
        _stop(str(error), 1 if type(error) is DpoExtError else 2)
    except ModuleNotFoundError as error:
        extra = extra_of(error.name)
        if extra is None:
            raise
        _stop(f"`{error.name}` is not installed\nhint: {install(extra)}", 2)
    except (
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        FileExistsError,
        NotADirectoryError,
    ) as error:
        _stop(f"{error.filename}: {(error.strerror or str(error)).lower()}", 2)


def _stop(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _app() -> Any:
    import rich  # noqa: F401 - typer's help and our output need it: fail here, with the hint, not in the middle
    import typer

    app = typer.Typer(
        help="From a file of preferences to the gradient of its loss.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    bench = typer.Typer(help="How fast is it here?", no_args_is_help=True)
    app.add_typer(bench, name="bench")

    @app.callback(invoke_without_command=True)
    def version(
        show: Annotated[
            bool, typer.Option("--version", help="Print the version and leave.")
        ] = False,
    ) -> None:
        if show:
            print(__version__)
            raise typer.Exit

    @app.command()
    def demo(
        data: Annotated[
            Path | None,
            typer.Option(
                help="JSONL of preferences, plain or gzip; without it a world is generated."
            ),
        ] = None,
        out: Annotated[Path, typer.Option(help="Folder for report.html and metrics.json.")] = Path(
            "demo_out"
        ),
        seed: Annotated[
            int, typer.Option(min=0, help="Draws the world, the weights and the answers.")
        ] = 0,
        quick: Annotated[
            bool, typer.Option("--quick", help="Twenty seconds instead of two minutes.")
        ] = False,
        show_samples: Annotated[
            bool,
            typer.Option(
                "--show-samples", help="Put samples for prompts of --data into the report."
            ),
        ] = False,
    ) -> None:
        """Train a policy by DPO from start to report, on two CPU cores in two minutes."""
        from dpo_ext.demo import run_demo

        metrics = run_demo(data, out, seed=seed, quick=quick, show_samples=show_samples)
        if not _print_summary(metrics, out):
            raise typer.Exit(1)

    @app.command()
    def prepare(
        files: Annotated[list[str], typer.Argument(help="Files of preferences, or globs.")],
        tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
        out: Annotated[Path, typer.Option(help="Folder for the saved data set.")],
        max_length: Annotated[
            int, typer.Option(min=0, help="Longest side in tokens with its prompt; 0 for no bound.")
        ] = 1024,
        truncation: Annotated[
            Truncation, typer.Option(help="What happens beyond --max-length.")
        ] = Truncation.keep_start,
        boundary: Annotated[
            Boundary, typer.Option(help="Where the prompt's ids end.")
        ] = Boundary.joint,
        on_bad: Annotated[
            OnBad, typer.Option(help="Stop at the first bad row, or drop and count it.")
        ] = OnBad.error,
        prompt_key: Annotated[str | None, typer.Option(help="Name of the prompt's field.")] = None,
        chosen_key: Annotated[str | None, typer.Option(help="Name of the chosen side.")] = None,
        rejected_key: Annotated[str | None, typer.Option(help="Name of the other side.")] = None,
        threads: Annotated[int | None, typer.Option(min=1, help="Threads; by default all.")] = None,
    ) -> None:
        """Encode files into a saved data set, in bounded memory; PairDataset.load maps it."""
        from dpo_ext.data.encode import prepare as prepare_files
        from dpo_ext.data.tokenizer import Tokenizer

        report = prepare_files(
            files,
            Tokenizer.from_pretrained(tokenizer),
            out,
            max_length=max_length or None,
            truncation=truncation.value,
            boundary=boundary.value,
            on_bad=on_bad.value,
            prompt_key=prompt_key,
            chosen_key=chosen_key,
            rejected_key=rejected_key,
            threads=threads,
            progress=True,
        )
        print(report)
        print(f"saved     {out}")

    @app.command()
    def stats(
        files: Annotated[list[str], typer.Argument(help="Files of preferences, or globs.")],
        tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
        max_length: Annotated[
            int, typer.Option(min=0, help="Longest side in tokens with its prompt; 0 for no bound.")
        ] = 1024,
        boundary: Annotated[
            Boundary, typer.Option(help="Where the prompt's ids end.")
        ] = Boundary.joint,
        rows: Annotated[int, typer.Option(min=0, help="Pairs to spell out token by token.")] = 3,
        json: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    ) -> None:
        """Lengths, waste by layout, what was dropped and why, where prompts end, rows in colour."""
        from dpo_ext.cli.stats import data_stats
        from dpo_ext.data.tokenizer import Tokenizer

        data_stats(
            files,
            Tokenizer.from_pretrained(tokenizer),
            max_length=max_length or None,
            boundary=boundary.value,
            rows=rows,
            progress=True,
            json=json,
        )

    @bench.command("data")
    def bench_data_command(
        files: Annotated[list[str], typer.Argument(help="Files of preferences, or globs.")],
        tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
        out: Annotated[Path | None, typer.Option(help="Write the result as an HTML page.")] = None,
        json: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
        threads: Annotated[int, typer.Option(min=1, help="Threads of every engine.")] = 1,
        repeats: Annotated[int, typer.Option(min=1, help="Runs of each stage.")] = 5,
    ) -> None:
        """Pairs/s and tokens/s by stage, beside `tokenizers` and TRL in the same run."""
        from dpo_ext.bench import bench_data

        bench_data(files, tokenizer, out=out, json=json, threads=threads, repeats=repeats)

    @app.command()
    def losses() -> None:
        """Print the loss table: name, formula, paper, parameters, what each loss needs."""
        _print_losses()

    return app


def _print_summary(metrics: dict[str, Any], out: Path) -> bool:
    """The result in a few lines; False if a target that this run should reach was missed."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    zero, held = metrics["step_zero"], metrics["heldout"]
    console.print(
        f"step 0     loss {zero['loss']:.7f} (log 2), gradient off float64 by "
        f"{zero['gradient_error']:.1e}"
    )
    reached = True
    if metrics["known_reward"]:
        for check in metrics["checks"]:
            mark = "[green]reached[/]" if check["passed"] else "[red]missed[/]"
            if metrics["quick"]:
                mark = "not expected of --quick" if not check["passed"] else mark
            console.print(
                f"{check['value']:.3f}      {check['name']} (target {check['target']:g}: {mark})"
            )
        reached = metrics["quick"] or all(check["passed"] for check in metrics["checks"])
    else:
        console.print(
            f"{held['drawn_accuracy']:.3f}      accuracy on {metrics['heldout_pairs']} held-out "
            "pairs"
        )
    console.print(f"report     {out / 'report.html'}   ({sum(metrics['seconds'].values()):.0f} s)")
    return reached


def _print_losses() -> None:
    from rich.console import Console
    from rich.table import Table

    from dpo_ext.torch.losses.catalogue import losses_table

    entries = losses_table()
    columns = ("loss", "called by", "formula", "paper", "parameters", "needs")
    table = Table(*columns, title=f"{len(entries)} losses")
    for entry in entries:
        table.add_row(
            entry.name, entry.function, entry.formula, entry.paper, entry.parameters, entry.needs
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    console.print(table)
    console.print(
        "c, r: summed log-probs of chosen and rejected; D = (c - cr) - (r - rr); sp: softplus; "
        "s: sigmoid"
    )


if __name__ == "__main__":
    main()
