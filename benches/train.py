"""What does a step of DPO training cost, beside stock TRL 1.16?

A Llama with random weights on rows of Anthropic's HH (where `../shared` has them, else ids of the
same lengths). Stock TRL, which scores completion rows alone as it does on CUDA by itself, and ours,
padded, packed and shared, take turns step by step, each in a process of its own: its time, its time
by part, its peak memory. Losses, gradient norms and log-probs of the first steps are compared with
stock's before a time counts; in 16 bits a small model in float32 is compared first. Exit status 1
where they differ. `--overhead` has next to nothing to compute: what is timed is the host's code,
ours beside a bare loop. `--record` appends to RESULTS.md.

    python benches/train.py [--sizes 50257x512 151936x256] [--training full lora]
                            [--reference live precomputed] [--rounds 7] [--record]
    python benches/train.py --overhead
    python benches/train.py --device cuda --model 1b --record
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from train_steps import BARE, COMPACT, CONTENDERS, FACTS, LOOP, PARTS, STOCK, Scenario, work

VERIFIED, PART_ROUNDS = 3, 2
# Relative, of losses and log-probs. Gradient norms of two versions of stock differ by 3.5e-5.
BOUNDS = {"float32": 1e-5, "bfloat16": 5e-2}
NORM_SLACK = 4
COMPARED = (COMPACT, "padded", "packed", "shared")
# Times of stock compact that a size wants of packed rows.
TARGETS = {(50_257, 512): 2.5, (151_936, 256): 4.0}
SHARED_TARGET, OVERHEAD_TARGET_MS, CUDA_TARGET = 1.2, 2.0, 4.0
# fmt: off
TINY: dict[str, Any] = {
    "vocabulary": 97, "longest": 48, "pairs": 4, "layers": 2, "hidden": 32, "inner": 64,
    "heads": 4, "key_heads": 2,
}
HOST: dict[str, Any] = {
    "vocabulary": 64, "longest": 24, "layers": 1, "hidden": 16, "inner": 32, "heads": 2,
    "key_heads": 1,
}
MODELS: dict[str, dict[str, Any]] = {
    "1b": {
        "vocabulary": 128_256, "layers": 16, "hidden": 2048, "inner": 8192, "heads": 32,
        "key_heads": 8, "tied": True, "spread": 0.02, "dtype": "bfloat16",
    },
    "8b": {
        "vocabulary": 128_256, "layers": 32, "hidden": 4096, "inner": 14336, "heads": 32,
        "key_heads": 8, "spread": 0.02, "dtype": "bfloat16",
    },
}
# fmt: on


class WrongError(Exception):
    """Two contenders do not train alike."""


class Contender:
    """A contender's process, and the rows that its steps gave."""

    def __init__(self, name: str) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, name), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, word: Any) -> dict[str, Any]:
        with contextlib.suppress(BrokenPipeError):  # it has said why before it ended
            self.connection.send(word)
        try:
            said = self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: its process ended") from None
        if "error" in said:
            raise RuntimeError(f"{self.name}:\n{said['error']}")
        return dict(said)

    def end(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(None)
        self.process.join()


def race(
    contenders: list[Contender], scenario: Scenario, rounds: int
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Facts of each contender, and its rows of all rounds; WrongError where the first differ."""
    facts = {c.name: c.ask(scenario) for c in contenders}
    rows: dict[str, list[dict[str, Any]]] = {c.name: [] for c in contenders}
    for number in range(rounds):
        whole = number < rounds - scenario.part_rounds and scenario.part_rounds
        for contender in contenders:
            rows[contender.name].append(contender.ask("step" if whole else "parts"))
        if number + 1 == min(VERIFIED, rounds):
            check(rows, BOUNDS[scenario.dtype] * (10 if scenario.device == "cuda" else 1))
    for contender in contenders:
        facts[contender.name] |= contender.ask("end")
    return facts, rows


def check(rows: dict[str, list[dict[str, Any]]], bound: float) -> None:
    """Whether all took the steps that the first took."""
    first, *others = rows
    for name in others:
        for number, (want, got) in enumerate(zip(rows[first], rows[name], strict=True)):
            for fact in FACTS:
                off = abs(got[fact] - want[fact]) / abs(want[fact])
                allowed = bound * (NORM_SLACK if fact == "grad_norm" else 1)
                if not off <= allowed:  # NaN too
                    found = f"{got[fact]:.9g}, {first} has {want[fact]:.9g}"
                    raise WrongError(
                        f"{name}, step {number}, {fact}: {found}: off by {off:.1e}, "
                        f"allowed {allowed:.0e}"
                    )


def seconds(row: dict[str, Any], scenario: Scenario) -> float:
    """What counts: on a CPU the process's own time, which other processes do not stop."""
    return float(row["cpu" if scenario.device == "cpu" else "wall"])


def spread(values: list[float], digits: int = 2) -> str:
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(rows: dict[str, Any], name: str, base: str, key: str, scenario: Scenario) -> float:
    """How many times as fast as ``base``, round by round, on the same pairs; the median."""

    def took(row: dict[str, Any]) -> float:
        return float(row[key]) if key else seconds(row, scenario)

    pairs = zip(rows[base], rows[name], strict=True)
    return statistics.median(took(theirs) / took(ours) for theirs, ours in pairs)


def report(
    scenario: Scenario, facts: dict[str, Any], rows: dict[str, list[dict[str, Any]]]
) -> list[str]:
    """A table of the contenders, and what is met of the targets."""
    cuda = scenario.device == "cuda"
    apart = scenario.part_rounds
    timed = {n: r[VERIFIED : len(r) - apart] for n, r in rows.items()}
    cut = {n: r[-apart:] if apart else timed[n] for n, r in rows.items()}
    base = next(iter(rows))
    unit = "s" if cuda else "CPU-s"
    head = ["", f"{unit} a step", "of them user", "wall s", f"pairs / {unit}", f"tokens / {unit}"]
    head += ["peak MB", f"times {base}: {unit}, user, wall", f"{unit} of {', '.join(PARTS)}"]
    lines = [f"| {' | '.join(head)} |\n", "| --- " * len(head) + "|\n"]
    for name, found in timed.items():
        took = [seconds(row, scenario) for row in found]
        tokens = [row["tokens"] / t for row, t in zip(found, took, strict=True)]
        parts = [statistics.median(row["parts"][part] for row in cut[name]) for part in PARTS]
        cells = [
            f"{name}, {facts[name]['how']}",
            spread(took),
            spread([row["user"] for row in found]),
            spread([row["wall"] for row in found]),
            f"{scenario.pairs / statistics.median(took):.2f}",
            f"{statistics.median(tokens):,.0f}",
            f"{facts[name]['peak']:,.0f}",
            ", ".join(
                f"{ratios(timed, name, base, k, scenario):.2f}" for k in ("", "user", "wall")
            ),
            ", ".join(f"{part:.3f}" for part in parts),
        ]
        lines.append(f"| {' | '.join(cells)} |\n")
    lines += [f"\n{said}\n" for said in steps_back(facts)]
    verdict = targets(scenario, facts, timed)
    return [*lines, f"\n{verdict}\n"] if verdict else lines


def steps_back(facts: dict[str, Any]) -> list[str]:
    return [f"{n} left to TRL: {f['steps_back']}." for n, f in facts.items() if f["steps_back"]]


def targets(
    scenario: Scenario, facts: dict[str, Any], rows: dict[str, list[dict[str, Any]]]
) -> str:
    """Which targets are met, against stock in its fair form."""
    said = []
    if COMPACT not in rows:
        return ""
    wanted = TARGETS.get((scenario.vocabulary, scenario.longest))
    wanted = CUDA_TARGET if scenario.device == "cuda" and scenario.layers > 4 else wanted
    if wanted and "packed" in rows:
        found = ratios(rows, "packed", COMPACT, "", scenario)
        met = "met" if found >= wanted else "missed"
        said.append(f"packed {found:.2f}x of {wanted:g}x {met}")
    if wanted and {"packed", "shared"} <= rows.keys():
        found = ratios(rows, "shared", "packed", "", scenario)
        met = "met" if found >= SHARED_TARGET else "missed"
        said.append(f"shared {found:.2f}x packed of {SHARED_TARGET:g}x {met}")
    above = [n for n, f in facts.items() if n != STOCK and f["peak"] > facts[COMPACT]["peak"]]
    said.append(f"peak memory above stock's: {', '.join(above) or 'none'}")
    return f"Targets: {'; '.join(said)}."


def overhead(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Milliseconds of host code a step: round by round, the median of the differences."""
    timed = {name: found[VERIFIED:] for name, found in rows.items()}

    def more(name: str, base: str) -> float:
        pairs = zip(timed[name], timed[base], strict=True)
        return 1e3 * statistics.median(a["cpu"] - b["cpu"] for a, b in pairs)

    lines = ["| | CPU-ms a step | more than the bare loop | more than stock TRL |\n"]
    lines.append("| --- | --- | --- | --- |\n")
    for name, found in timed.items():
        took = spread([1e3 * row["cpu"] for row in found])
        lines.append(
            f"| {name} | {took} | {more(name, BARE):+.2f} | {more(name, COMPACT):+.2f} |\n"
        )
    found = more(LOOP + "padded", BARE)
    met = "met" if found <= OVERHEAD_TARGET_MS else "missed"
    ours, bare = (1e3 * min(row["cpu"] for row in timed[name]) for name in (LOOP + "padded", BARE))
    said = f"{found:.2f} ms of {OVERHEAD_TARGET_MS:g} ms {met}; between the fastest steps"
    return [*lines, f"\nTarget: {said} {ours - bare:.2f} ms.\n"]


# ---- what is asked for ---------------------------------------------------------------------------


def scenarios(arguments: argparse.Namespace) -> list[Scenario]:
    found = []
    for training, reference in product(arguments.training, arguments.reference):
        given: dict[str, Any] = {"training": training, "reference": reference}
        given |= {"device": arguments.device, "steps": arguments.rounds + VERIFIED}
        if arguments.model:
            given["steps"] += PART_ROUNDS
            given |= {"longest": 1024, "part_rounds": PART_ROUNDS, **MODELS[arguments.model]}
        if arguments.tiny:
            found.append(Scenario(**given | TINY))
        elif arguments.overhead:
            found.append(Scenario(**given | HOST))
        elif arguments.model:
            found.append(Scenario(**given))
        else:
            found += [Scenario(*size, **given) for size in arguments.sizes]
    return found


def small_of(scenario: Scenario) -> Scenario:
    """The same in float32 and small, to be compared with stock."""
    plain = {"dtype": "float32", "spread": 0.2, "part_rounds": 0, "steps": VERIFIED}
    return replace(scenario, **TINY | plain)


def title_of(scenario: Scenario) -> str:
    reference = f"reference {scenario.reference}"
    training = "full fine-tuning" if scenario.training == "full" else "LoRA, frozen head"
    size = f"V {scenario.vocabulary:,}, up to {scenario.longest} tokens, {scenario.pairs} pairs"
    model = f"Llama {scenario.layers} x {scenario.hidden} {scenario.dtype}"
    return f"{training}, {reference}, {size}, {model}, gradient checkpointing"


def parse(given: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append lines to RESULTS.md")
    parser.add_argument("--rounds", type=int, help="timed steps of each, beside the first 3")
    parser.add_argument("--sizes", nargs="+", type=_size, default=list(TARGETS), metavar="VxT")
    parser.add_argument("--training", nargs="+", choices=("full", "lora"))
    parser.add_argument("--reference", nargs="+", choices=("live", "precomputed"))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, metavar="NAME")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=MODELS, help="a Llama of that size")
    parser.add_argument(
        "--tiny", action="store_true", help="all of it, in seconds: it runs, no more"
    )
    parser.add_argument("--overhead", action="store_true", help="host code beside a bare loop")
    arguments = parser.parse_args(given)
    if arguments.tiny and arguments.record:
        parser.error("a tiny run is never recorded")
    if arguments.model and arguments.device == "cpu" and not arguments.tiny:
        parser.error("`--model` needs `--device cuda`")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device: nothing was timed")
    if arguments.device == "cuda" and not (arguments.model or arguments.tiny):
        parser.error("`--device cuda` needs `--model`")
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.tiny else 50 if arguments.overhead else 7
    every = arguments.tiny and not arguments.model
    lora = arguments.model == "8b"  # a full one is beyond one device
    arguments.training = arguments.training or (
        ["full", "lora"] if every else ["lora"] if lora else ["full"]
    )
    arguments.reference = arguments.reference or (
        ["live", "precomputed"] if every else ["precomputed"] if arguments.overhead else ["live"]
    )
    if arguments.contenders is None:
        hosts = (LOOP + "padded", BARE) if arguments.tiny or arguments.overhead else ()
        arguments.contenders = [*COMPARED, *hosts]
    if arguments.overhead and not {COMPACT, LOOP + "padded", BARE} <= {*arguments.contenders}:
        parser.error(f"`--overhead` needs {COMPACT!r}, {LOOP + 'padded'!r} and {BARE!r}")
    return arguments


def _size(text: str) -> tuple[int, int]:
    vocabulary, _, longest = text.partition("x")
    return int(vocabulary), int(longest)


def record(lines: list[str], given: list[str]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    where = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    if torch.cuda.is_available():
        where = f"{torch.cuda.get_device_name()}, {where}"
    where += f", transformers {transformers.__version__}, TRL {trl.__version__}, load "
    where += f"{os.getloadavg()[0]:.1f}"
    title = f"\n{date.today()}, {commit}, {where}, one thread, medians of rounds in turn (range), "
    title += f"the first {VERIFIED} steps compared with stock's: "
    title += f"`python benches/train.py {' '.join(given)}`\n"
    with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as file:
        file.writelines([title, *lines])


def main(given: list[str] | None = None) -> None:
    given = sys.argv[1:] if given is None else given
    arguments = parse(given)
    lines: list[str] = []
    contenders: list[Contender] = []
    try:
        for number, scenario in enumerate(scenarios(arguments)):
            if not contenders:
                contenders = [Contender(name) for name in arguments.contenders]
            if scenario.dtype != "float32":
                race(contenders, small_of(scenario), VERIFIED)
            facts, rows = race(contenders, scenario, scenario.steps)
            found = overhead(rows) if arguments.overhead else report(scenario, facts, rows)
            lines += [f"\n{title_of(scenario)}:\n\n", *found]
            print(f"\n{number + 1}. {title_of(scenario)}\n\n{''.join(found)}", flush=True)
            if not arguments.tiny:  # what one scenario leaves in a process is not the next one's
                for contender in contenders:
                    contender.end()
                contenders = []
    except WrongError as error:
        sys.exit(f"losses differ: {error}")
    finally:
        for contender in contenders:
            contender.process.kill()
    if arguments.record:
        record(lines, given)


if __name__ == "__main__":
    main()
