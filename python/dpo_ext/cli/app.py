"""`app`: the commands."""

# No `from __future__ import annotations`: typer reads the annotations of the commands.

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import rich  # noqa: F401 - help and tables need it: fail here, with the hint, not in the middle
import typer

from dpo_ext.cli.options import Files, FilesOrNone, Json, TokenizerFolder, with_data_options
from dpo_ext.cli.streams import readable, result_to
from dpo_ext.data.options import Options
from dpo_ext.errors import DataError
from dpo_ext.store.folder import MANIFEST
from dpo_ext.store.manifest import read_manifest

app = typer.Typer(
    help="From a file of preferences to the gradient of its loss.",
    epilog="Exit codes: 0 fine; 1 a check failed; 2 wrong usage or input; 130 interrupted; "
    "141 the reader of the output went away.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="How fast is it here?", no_args_is_help=True)
app.add_typer(bench, name="bench")


def _examples(*lines: str) -> str:
    """The end of a command's help, a line each."""
    return "\n\n".join(["Examples:", *lines])


def _version(show: bool) -> None:
    if show:
        from dpo_ext.cli.versions import version_lines

        print("\n".join(version_lines()))
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_version,
            is_eager=True,
            help="Print versions and the kernels that run here, and leave.",
        ),
    ] = False,
) -> None:
    """From a file of preferences to the gradient of its loss."""


@app.command(epilog=_examples("dpo-ext demo", "dpo-ext demo --quick --data pairs.jsonl.gz"))
def demo(
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL of preferences, plain or gzip; without it a world is generated."),
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
        typer.Option("--show-samples", help="Put samples for prompts of --data into the report."),
    ] = False,
) -> None:
    """Train a policy by DPO from start to report, on two CPU cores in two minutes."""
    from dpo_ext.demo import run_demo

    metrics = run_demo(data, out, seed=seed, quick=quick, show_samples=show_samples)
    if not _print_summary(metrics, out):
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "dpo-ext prepare pairs.jsonl.gz --tokenizer model --out prepared --on-bad skip",
        "dpo-ext prepare shards/ --tokenizer model --out prepared --prompt-key question",
        "zcat pairs.jsonl.gz | dpo-ext prepare - --tokenizer model --out prepared",
    )
)
@with_data_options()
def prepare(
    files: Files,
    tokenizer: TokenizerFolder,
    out: Annotated[Path, typer.Option(help="Folder for the saved data set.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Replace a data set that stands in --out.")
    ] = False,
    cache_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder where encoded files are kept, and found by the next call.",
            show_default=False,
        ),
    ] = None,
    json: Json = None,
    *,
    options: Options,
) -> None:
    """Encode files into a saved data set, in bounded memory; PairDataset.load maps it."""
    from dpo_ext.data.prepare import prepare as prepare_files
    from dpo_ext.data.tokenizer import Tokenizer

    if not force:
        _refuse_to_replace(out)
    with readable(files) as given, result_to(json) as write:
        report = prepare_files(
            given.files,
            Tokenizer.from_pretrained(tokenizer),
            out,
            cache_dir=cache_dir,
            progress=True,
            allow_empty=False,
            **options,
        )
        print(given.said(str(report)))
        print(f"saved     {out}")
        write({"out": str(out), "report": report.to_dict()}, given.said)


def _refuse_to_replace(out: Path) -> None:
    """Asks for ``--force`` where a data set stands; what else may be there, `prepare` says."""
    try:
        manifest = read_manifest(out)
        saved = datetime.fromtimestamp((out / MANIFEST).stat().st_mtime)
    except (OSError, DataError):
        return
    raise DataError(
        f"{out}: holds a data set of {manifest['n']:,} pairs, saved {saved:%Y-%m-%d %H:%M}\n"
        "hint: --force replaces it"
    )


@app.command(
    epilog=_examples(
        "dpo-ext stats pairs.jsonl.gz --tokenizer model",
        "dpo-ext stats pairs.jsonl.gz --tokenizer model --rows 3",
        "dpo-ext stats pairs.jsonl.gz --tokenizer model --json - | jq .lengths",
    )
)
@with_data_options(on_bad="skip")
def stats(
    files: Files,
    tokenizer: TokenizerFolder,
    rows: Annotated[int, typer.Option(min=0, help="Pairs to spell out token by token.")] = 0,
    json: Json = None,
    *,
    options: Options,
) -> None:
    """Lengths, waste by layout, what was dropped and why, where prompts end, rows in colour."""
    from dpo_ext.cli.stats import data_stats, show_stats
    from dpo_ext.data.nothing import no_pairs
    from dpo_ext.data.tokenizer import Tokenizer
    from dpo_ext.report import Report

    with readable(files) as given, result_to(json) as write:
        result = data_stats(
            given.files,
            Tokenizer.from_pretrained(tokenizer),
            rows=rows,
            progress=True,
            show=False,
            **options,
        )
        if not result["pairs"]:
            raise no_pairs(given.files, Report.from_dict(result["report"]))
        show_stats(result, given.said)
        if not rows:
            print("--rows 3 spells three of them out, token by token")
        write(result, given.said)


@bench.command(
    "data",
    epilog=_examples(
        "dpo-ext bench data pairs.jsonl.gz --tokenizer model --out bench.html",
    ),
)
@with_data_options(on_bad="skip", max_length=0, threads=1)
def bench_data_command(
    files: Files,
    tokenizer: TokenizerFolder,
    out: Annotated[
        Path | None, typer.Option(help="Write the result as an HTML page.", show_default=False)
    ] = None,
    json: Json = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each stage.")] = 5,
    *,
    options: Options,
) -> None:
    """Pairs/s and tokens/s by stage, beside `tokenizers` and TRL in the same run."""
    from dpo_ext.bench import bench_data
    from dpo_ext.data.pretrained import folder_of

    with readable(files) as given, result_to(json) as write:
        folder = folder_of(tokenizer)
        result = bench_data(given.files, folder, out=out, repeats=repeats, **options)
        if out is not None and given.names:
            out.write_text(given.said(out.read_text(encoding="utf-8")), encoding="utf-8")
        write(result, given.said)


@app.command(epilog=_examples("dpo-ext losses", "dpo-ext losses simpo", "dpo-ext losses --json -"))
def losses(
    name: Annotated[
        str | None, typer.Argument(help="A loss; without it all are listed.", show_default=False)
    ] = None,
    json: Json = None,
) -> None:
    """List the losses, or show one: formula, paper, parameters, what it needs."""
    from dpo_ext.cli.losses import show_losses

    with result_to(json) as write:
        write(show_losses(name))


@app.command(
    epilog=_examples(
        "dpo-ext doctor", "dpo-ext doctor --need cuda --need trl", "dpo-ext doctor --json -"
    )
)
def doctor(
    need: Annotated[
        list[str] | None,
        typer.Option(
            help="What must work: an extra (torch, trl, ...), cpu, cuda or packing; may be given "
            "more than once. Without it only what is installed must.",
            show_default=False,
        ),
    ] = None,
    json: Json = None,
) -> None:
    """What works here: kernels beside float64, threads, packages, GPU, packed rows."""
    from dpo_ext.cli.doctor import examine

    with result_to(json) as write:
        result = examine(need or ())
        write(result)
    if not result["works"]:
        raise typer.Exit(1)


@app.command(
    epilog=_examples(
        "dpo-ext verify path/to/model pairs.jsonl.gz",
        "dpo-ext verify path/to/model pairs.jsonl.gz --dtype bfloat16 --pairs 32 --json -",
    )
)
@with_data_options(on_bad="skip")
def verify(
    model: Annotated[
        Path, typer.Argument(help="Folder of a causal language model.", show_default=False)
    ],
    files: Files,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder with tokenizer.json; by default the model's.", show_default=False
        ),
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs to compare, the first.")] = 8,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    json: Json = None,
    *,
    options: Options,
) -> None:
    """Your model on your rows: ids beside TRL's, log-probs beside the model's own logits in
    float64, packed and shared rows beside padded ones, the loss of the first step.
    """
    from dpo_ext.cli.verify import verify_model

    with readable(files) as given, result_to(json) as write:
        result = verify_model(
            model,
            given.files,
            tokenizer or model,
            pairs=pairs,
            dtype=dtype,
            device=device,
            **options,
        )
        write(result, given.said)
    if not result["same"]:
        raise typer.Exit(1)


@app.command(
    "ref-logps",
    epilog=_examples(
        "dpo-ext ref-logps path/to/model pairs.jsonl.gz --store reference",
        "torchrun --nproc-per-node 8 -m dpo_ext ref-logps path/to/model pairs/ --store reference",
        "dpo-ext ref-logps path/to/model pairs.jsonl.gz --store reference --export scored.parquet",
        "dpo-ext ref-logps path/to/model --store theirs --import scored.parquet "
        "--fingerprint 'their 8B, bfloat16'",
    ),
)
@with_data_options(on_bad="skip")
def ref_logps(
    model: Annotated[
        Path, typer.Argument(help="Folder of a causal language model.", show_default=False)
    ],
    store: Annotated[
        Path, typer.Option(help="Folder of the store; made if it is not there.", show_default=False)
    ],
    files: FilesOrNone = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Folder with tokenizer.json; by default the model's.", show_default=False
        ),
    ] = None,
    layout: Annotated[
        Literal["auto", "padded", "packed", "shared"],
        typer.Option(help="Of the rows; auto packs them if the model keeps packed pairs apart."),
    ] = "auto",
    tokens_per_batch: Annotated[int, typer.Option(min=1, help="Of a batch, with padding.")] = 16384,
    pairs_per_shard: Annotated[
        int, typer.Option(min=1, help="Pairs that are written together; a kill loses the last.")
    ] = 4096,
    token_logps: Annotated[
        bool, typer.Option("--token-logps", help="Store those of each token beside the sums.")
    ] = False,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: auto, float32, bfloat16 or float16.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:1.")] = "auto",
    fingerprint: Annotated[
        str | None,
        typer.Option(
            help="A name of the reference, in place of what its files say.", show_default=False
        ),
    ] = None,
    import_: Annotated[
        str | None,
        typer.Option(
            "--import",
            help="A file with the columns ref_chosen_logps and ref_rejected_logps, which go into "
            "the store; read with the options below, as when they were computed.",
            show_default=False,
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(
            help="Write ids and both columns: .parquet, .arrow, or a folder.", show_default=False
        ),
    ] = None,
    json: Json = None,
    *,
    options: Options,
) -> None:
    """Log-probs of the pairs under a reference, into a store that training reads: those that are
    missing. Start it again after a kill, on any number of processes, and it goes on.
    """
    from dpo_ext.cli.ref_logps import fill_store

    with (
        readable([*(files or ()), *([import_] if import_ else ())]) as given,
        result_to(json) as write,
    ):
        paths = given.files[: len(files or ())]
        result = fill_store(
            model,
            paths,
            store,
            tokenizer or model,
            layout=layout,
            tokens_per_batch=tokens_per_batch,
            pairs_per_shard=pairs_per_shard,
            dtype=dtype,
            device=device,
            tokens=token_logps,
            name=fingerprint,
            columns_of=given.files[-1] if import_ else None,
            export=export,
            **options,
        )
        if result is not None:
            write(result, given.said)


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
