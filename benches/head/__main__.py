"""How close does the log-prob head come to its own bound on this GPU, and what do its peers take?

Three questions, each verified against float64 before it is timed, rulers and candidates taking
turns in each round of one process:

- `fused`: each plan of the head inside beside its bound (its own products at the same chunks and
  buffers, plus its elementwise bytes at the rate of the copy), its peak memory, and peers;
- `given`: our operators on given logits, in GB/s beside the device's own copy, and peers;
- `small`: what a call costs the host for few tokens, eager and as a CUDA graph.

    python benches/head [--quick] [--record] [--only fused given small] [--json times.json]
    python benches/head --predict

Beside each row of ours stands what `model` predicts for this device; `--predict` prints that for
all devices it knows, and measures nothing. A result of ours that float64 contradicts is not timed,
and the exit status is 1; it is 3 where time alone left a case out. `--device cpu --smoke` runs the
same code on tiny shapes without a GPU, to see that it runs; its times mean nothing and are never
recorded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import model as predicted
import report
import torch
from cases import PLANS, Candidate, HeadCase, Layout, Model, WrongError, chunk_rows
from given import GivenCase
from peers import given_peers, head_peers, reason
from rulers import (
    Copy,
    Job,
    Spread,
    Steps,
    bound_ms,
    documented_bytes,
    flops,
    free_bytes,
    logit_bytes,
    other_bytes,
    peaks,
    steps,
    take_turns,
)
from small import small

MODELS = (
    Model("Llama-3-8B", 4096, 128_256),
    Model("Qwen2.5-7B", 3584, 152_064),
    Model("Gemma-2-9B", 3584, 256_000),
    Model("Gemma-2-9B", 3584, 256_000, softcap=30.0),
    Model("Qwen2.5-0.5B", 896, 151_936),
)
SCORED = (512, 1024, 4096, 16_384, 65_536)
GIVEN_ROWS = (1024, 4096, 16_384)
SPENT = "the time of this run is spent"
CUT = 3  # exit status where a case was left out for the time alone
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Size(NamedTuple):
    """What one run measures."""

    models: tuple[Model, ...]
    scored: tuple[int, ...]
    given_rows: tuple[int, ...]
    shares: tuple[float, ...]
    dtypes: tuple[str, ...]
    tokens: int
    """Scored rows of a sequence."""
    chunk_rows: int | None
    copy_bytes: int
    seconds: float
    """Of one case, at most; its 30 calls or one second come first where they fit."""
    small: tuple[Model, tuple[int, ...]]
    """Model and tokens of the small batches."""


FULL = Size(
    models=MODELS,
    scored=SCORED,
    given_rows=GIVEN_ROWS,
    shares=(1.0, 0.4),
    dtypes=("bfloat16",),
    tokens=512,
    chunk_rows=None,
    copy_bytes=2 << 30,
    seconds=20.0,
    small=(MODELS[-1], (64, 512)),
)
QUICK = FULL._replace(models=MODELS[:1], seconds=6.0)
TINY = Model("tiny", 16, 1000)
SMOKE = Size(
    models=(TINY, TINY._replace(softcap=5.0)),
    scored=(64, 256),
    given_rows=(64,),
    shares=(1.0, 0.4),
    dtypes=("float32",),
    tokens=16,
    chunk_rows=48,
    copy_bytes=1 << 20,
    seconds=0.05,
    small=(TINY, (32,)),
)


class Shape(NamedTuple):
    """What one case is of."""

    model: Model
    rows: int
    """Scored ones of the fused head, all of given logits."""
    share: float
    dtype: str


def called(shape: Shape) -> str:
    cap = f", softcap {shape.model.softcap:g}" if shape.model.softcap else ""
    part = f", {shape.share:.0%} scored" if shape.share < 1 else ""
    dtype = f", {shape.dtype}" if shape.dtype != "bfloat16" else ""
    return f"{shape.model.name}{cap}{part}{dtype}"


def shapes(size: Size, counts: Iterable[int], quick: bool) -> Iterator[Shape]:
    """Of the fused head; quick: every size whole, the largest but one at 40 %."""
    counts = tuple(counts)
    for model in size.models:
        for dtype in size.dtypes:
            for share in size.shares:
                for count in counts:
                    partly = share < 1 and quick and count != counts[-2:][0]
                    if not partly:
                        yield Shape(model, count, share, dtype)


def given_shapes(size: Size, quick: bool) -> Iterator[Shape]:
    """Of given logits: a softcap is the same bytes."""
    seen = set()
    for shape in shapes(size, size.given_rows, quick):
        what = (shape.model.vocabulary, *shape[1:])
        if what not in seen:
            seen.add(what)
            yield shape


FIELDS = ("models", "scored", "given_rows", "shares", "dtypes", "seconds")


def chosen(arguments: argparse.Namespace) -> Size:
    size = SMOKE if arguments.smoke else QUICK if arguments.quick else FULL
    asked = {field: getattr(arguments, field) for field in FIELDS}
    return size._replace(**{field: value for field, value in asked.items() if value is not None})


class Run:
    """One run: where it measures, how much, what it found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.device = torch.device(arguments.device)
        self.size = chosen(arguments)
        self.quick, self.smoke = arguments.quick, arguments.smoke
        self.ends = time.monotonic() + 60 * arguments.minutes
        self.peers, self.cut = not arguments.without_peers, False
        self.report = report.Report(self.device, sys.argv, arguments.log)
        self.copy = Copy(self.device, self.size.copy_bytes)
        self.facts = predicted.device_called(self.report.facts["device"])

    def guarded(self, label: str, measure: Callable[[], None]) -> None:
        """Runs one case that the log does not have; what does not fit or has no time left is said,
        and the next one comes."""
        case = f"{label}{'' if self.peers else ', ours alone'}"
        if case in self.report.finished:
            self.report.say(f"measured before: {case}")
            return
        if time.monotonic() > self.ends:
            self.report.left_out(label, SPENT)
            self.cut = True
            return
        wrong = len(self.report.wrong)
        try:
            measure()
        except torch.OutOfMemoryError as error:
            self.report.left_out(label, reason(error))
        if len(self.report.wrong) == wrong:  # what was wrong is measured again
            self.report.done(case)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def usable(self, label: str, found: Iterable[Any], size: int, verify: Callable) -> list[Any]:
        """Candidates that fit and whose results are right."""
        kept = []
        for candidate in found:
            needs, free = int(candidate.needs * size), free_bytes(self.device)
            if needs > free:
                text = f"needs {needs / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                self.report.left_out(f"{label}: {candidate.name}", text)
                continue
            try:
                for warning in verify(candidate) or ():
                    self.report.warn(f"{label}: {warning}")
                kept.append(candidate)
            except Exception as error:  # a peer may fail in any way, and must not end the run
                own = candidate.name.startswith("ours")
                if own and not isinstance(error, WrongError | torch.OutOfMemoryError):
                    raise
                self.report.left_out(f"{label}: {candidate.name}", reason(error))
                if own and isinstance(error, WrongError):
                    self.report.say_wrong(f"{label}: {candidate.name}")
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return kept

    # ---- given logits -------------------------------------------------

    def given(self) -> None:
        for model, rows, share, dtype in given_shapes(self.size, self.quick):
            label = f"given logits, {rows:,} rows, {called(Shape(model, rows, share, dtype))}"
            # The logits, a copy, a gradient.
            needs = 3.5 * rows * model.vocabulary * DTYPES[dtype].itemsize
            if needs > free_bytes(self.device):
                self.report.left_out(label, f"needs {needs / 1e9:.1f} GB")
                continue
            what = (model.name, rows, model.vocabulary, share, DTYPES[dtype])
            self.guarded(label, lambda what=what: self.one_given(GivenCase(*what, self.device)))

    def one_given(self, case: GivenCase) -> None:
        torch.compiler.reset()
        try:
            case.verify_ours()
        except WrongError as error:
            self.report.left_out(case.label, reason(error))
            self.report.say_wrong(case.label)
            return
        ours = case.ours()

        def left_out(name: str, why: str) -> None:
            self.report.left_out(f"{case.label}: {name}", why)

        found = given_peers(case, left_out) if self.peers else []
        size = case.values.numel() * case.values.element_size()
        peers = self.usable(case.label, found, size, case.verify)
        jobs = [self.copy.job, *(job for job, _ in ours.values()), *map(case.job, peers)]
        memory = {job.name: peaks(job, self.device) for job in jobs}
        times = take_turns(jobs, self.device, self.size.seconds)
        rate = self.copy.gbps(times["copy"])
        self.report.case(
            "given",
            case.label,
            times,
            memory,
            copy_gbps=rate,
            bytes={n: b for n, (_, b) in ours.items()},
        )
        of = predicted.Logits(*case.values.shape, case.values.dtype, None, int(case.mask.sum()))
        for name, (_, count) in ours.items():
            expected = predicted.GIVEN[name](self.facts, of) if self.facts else None
            middle = Spread.of(times[name].forward)
            got = count / middle.median / 1e6
            self.report.row(
                f"{case.label}: {name}",
                f"{report.ms(middle)}, {got:,.0f} GB/s, {report.peak(memory[name])}",
                f"copy {rate:,.0f} GB/s",
                f"{got / rate:.1%} of copy; {predicted.beside(middle.median, expected)}",
            )
        if not peers:
            return
        best = sum(Spread.of(times[n].forward).median for n in ("forward", "gradient in place"))
        found = {peer.name: Spread.of(times[peer.name].both) for peer in peers}
        for peer in peers:
            text = f"{report.ms(found[peer.name])}, {report.peak(memory[peer.name])}"
            self.report.say(f"{peer.name} ({peer.note}): {text}")
        self.report.row(
            f"{case.label}: peers, forward + backward",
            f"{best:.3f} ms (forward + gradient in place)",
            "; ".join(
                f"{peer.name} ({peer.note}) {found[peer.name].median:.3f} ms" for peer in peers
            ),
            "; ".join(f"{name} {took.median / best:.2f}x ours" for name, took in found.items()),
        )

    # ---- the head inside ----------------------------------------------

    def fused(self) -> None:
        for model, scored, share, dtype in shapes(self.size, self.size.scored, self.quick):
            name = f"fused head, M {scored:,}, {called(Shape(model, scored, share, dtype))}"
            size = DTYPES[dtype].itemsize
            H, V = model.hidden, model.vocabulary
            # The head, hidden states, two chunks of logits, float32 dW of the ruler and of a plan.
            needs = (
                V * H * (2 * size + 8) + 5 * scored / share * H * size + 3.3e9 * (not self.smoke)
            )
            if needs > free_bytes(self.device):
                self.report.left_out(name, f"needs {needs / 1e9:.1f} GB")
                continue
            what = (model, scored, share, DTYPES[dtype])
            self.guarded(name, lambda what=what: self.one_fused(self.head_case(*what)))

    def head_case(self, model: Model, scored: int, share: float, dtype: torch.dtype) -> HeadCase:
        size = self.size
        return HeadCase(model, scored, share, dtype, self.device, size.tokens, size.chunk_rows)

    def one_fused(self, case: HeadCase) -> None:
        torch.compiler.reset()
        label = f"fused head, {case.label}"

        def left_out(name: str, why: str) -> None:
            self.report.left_out(f"{label}: {name}", why)

        products = case.products()  # its buffers first, so that they count as taken
        rulers = {plan: product_job(plan, products, case.steps(plan)) for plan in PLANS}
        for ruler in rulers.values():
            ruler.backward(ruler.forward())
        ours = self.usable(label, case.ours(), 1, case.verify)
        found = head_peers(case, left_out) if self.peers else []
        peers = self.usable(label, found, 1, case.verify)
        jobs = {c.name: case.job(c) for c in [*ours, *peers]}
        memory = {name: peaks(job, self.device) for name, job in jobs.items()}
        turns = [self.copy.job, *(rulers[c.plan] for c in ours), *jobs.values()]
        times = take_turns(turns, self.device, self.size.seconds)
        rate = self.copy.gbps(times["copy"])
        self.report.case("fused", label, times, memory, copy_gbps=rate)
        for candidate in ours:
            self.own_row(label, case, candidate, times, memory[candidate.name], rate)
        for trained in (True, False):
            beside = [c for c in ours if c.trained is trained]
            group = [c for c in peers if c.trained is trained]
            self.peers_row(label, "trained" if trained else "frozen", beside, group, times, memory)

    def own_row(
        self,
        label: str,
        case: HeadCase,
        candidate: Candidate,
        times: dict,
        memory: tuple[int, int] | None,
        rate: float,
    ) -> None:
        H, V, size = case.model.hidden, case.model.vocabulary, case.dtype.itemsize
        plan, M = candidate.plan, case.M
        planned, parts = case.steps(plan), {}
        short = str(case.dtype).removeprefix("torch.")
        shape = Shape(case.model, M, case.share, short)
        for part in ("forward", "backward", "both"):
            of = planned.forward + planned.backward if part == "both" else getattr(planned, part)
            own = Spread.of(getattr(times[candidate.name], part))
            alone = Spread.of(getattr(times[f"products, {plan}"], part))
            floor = bound_ms(alone.median, logit_bytes(of, V, size), rate)
            parts[part] = (own, alone, floor, flops(of, H, V))
        own, alone, floor, work = parts["both"]
        apart = "; ".join(
            f"{part} {report.ms(parts[part][0])}, bound {parts[part][2]:.3f}"
            for part in ("forward", "backward")
        )
        allowed = documented_bytes(plan, M, case.head.chunk_rows, H, V, size)
        also = other_bytes(plan, M, case.R, H, V, size) / rate / 1e6
        expected = predict_plan(self.facts, shape, plan, self.size) if self.facts else None
        beside = predicted.beside(own.median, expected and expected.total)
        of_products = f"products {alone.median / own.median:.1%}"
        self.report.bound(label, plan, own.median, floor, alone.median, work)
        self.report.row(
            f"{label}: plan {plan}, chunks of {case.head.chunk_rows:,} rows",
            f"{report.ms(own)} ({apart}), {report.peak(memory)}, documented {allowed / 1e9:.2f} GB",
            f"bound {floor:.3f} ms = products {report.ms(alone)} ({work / (M * H * V):.2f}MHV, "
            f"{work / alone.median / 1e9:,.0f} TFLOP/s) + elementwise at {rate:,.0f} GB/s; "
            f"other bytes {also:.3f} ms",
            f"{own.median / floor:.3f}x its bound, {of_products}; {beside}",
        )

    def peers_row(
        self,
        label: str,
        head: str,
        ours: list[Candidate],
        peers: list[Candidate],
        times: dict,
        memory: dict,
    ) -> None:
        """One row for all peers; each with its parts on the screen and in the JSON."""
        if not peers:
            return
        medians = {c.plan: Spread.of(times[c.name].both).median for c in ours}
        texts, ratios = [], []
        for peer in peers:
            took = Spread.of(times[peer.name].both)
            forward, backward = (Spread.of(part) for part in times[peer.name])
            note = f"{peer.gives}{'; ' + peer.note if peer.note else ''}"
            peak = report.peak(memory[peer.name])
            self.report.say(
                f"{peer.name} ({note}): {report.ms(took)}; forward {report.ms(forward)}; backward "
                f"{report.ms(backward)}; {peak}"
            )
            texts.append(f"{peer.name} ({note}) {took.median:.3f} ms, {peak}")
            beside = (f"{took.median / median:.2f}x {plan}" for plan, median in medians.items())
            ratios.append(f"{peer.name} {', '.join(beside)}")
        self.report.row(
            f"{label}: peers, {head} head",
            ", ".join(f"{plan} {median:.3f} ms" for plan, median in medians.items()),
            "; ".join(texts),
            "; ".join(ratios),
        )

    def small(self) -> None:
        model, counts = self.size.small
        dtype = DTYPES[self.size.dtypes[0]]
        for tokens in counts:
            case = HeadCase(model, tokens, 1.0, dtype, self.device, tokens // 4)
            self.guarded(f"small, {tokens} tokens", lambda case=case: small(case, self.report))


# ---- without a device -------------------------------------------------


def predict_plan(
    device: predicted.Device, shape: Shape, plan: str, size: Size
) -> predicted.Prediction:
    """What a plan should take in one case of the fused head."""
    model, dtype = shape.model, DTYPES[shape.dtype]
    layout = Layout.of(shape.rows, shape.share, size.tokens)
    cut = chunk_rows(model, dtype, size.chunk_rows)
    planned = steps(plan, layout.scored, cut, layout.offsets)
    of = predicted.Projection(model.hidden, model.vocabulary, dtype, model.softcap)
    return predicted.plan_ms(device, plan, planned, of, layout.scored, layout.rows)


def predictions(size: Size, quick: bool, only: str = "") -> str:
    """Every row of ours, on each device that `model` knows by that name, as two tables."""
    fused, given = [], []
    devices = [device for device in predicted.DEVICES if only.lower() in device.name.lower()]
    for device in devices:
        cells: dict[tuple[str, str], dict[int, str]] = {}
        for shape in shapes(size, size.scored, quick):
            for plan in PLANS:
                of = predict_plan(device, shape, plan, size)
                text = f"{of.total:.2f} ({of.total / of.bound:.3f})"
                cells.setdefault((called(shape), plan), {})[shape.rows] = text
        for (name, plan), row in cells.items():
            fused.append((device.name, name, plan, *(row.get(n, "") for n in size.scored)))
        for model, rows, share, dtype in given_shapes(size, quick):
            of = predicted.Logits(rows, model.vocabulary, DTYPES[dtype], None, round(rows * share))
            texts = []
            for name, call in predicted.GIVEN.items():
                took = call(device, of)
                rate = predicted.given_bytes(name, of) / took / 1e6
                texts.append(f"{took:.3f} ({rate / device.copy_gbps:.0%})")
            given.append(
                (device.name, called(Shape(model, rows, share, dtype)), f"{rows:,}", *texts)
            )
    counts = [f"M {count:,}" for count in size.scored]
    facts = "; ".join(
        f"{d.name}: {d.sms} SMs at {d.ghz:g} GHz, copy {d.copy_gbps:,g} GB/s, "
        f"products {d.share:.0%} of {d.tflops:,g} TFLOP/s"
        for d in devices
    )
    return (
        f"{facts}.\n\nHead inside, forward + backward, ms (over its bound):\n\n"
        + predicted.markdown(("device", "model", "plan", *counts), fused)
        + "\nLogits given, ms (share of a copy):\n\n"
        + predicted.markdown(("device", "model", "rows", *predicted.GIVEN), given)
    )


def product_job(plan: str, products: Any, planned: Steps) -> Job:
    def backward(_: Any) -> None:
        products.run(planned.backward)

    return Job(f"products, {plan}", lambda: products.run(planned.forward), backward)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help="append the rows to RESULTS.md")
    parser.add_argument("--quick", action="store_true", help="one model; 8 minutes on an H100")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, nothing recorded")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", nargs="+", choices=["fused", "given", "small"])
    parser.add_argument("--model", help="part of a name, for example Llama")
    parser.add_argument("--scored", type=int, nargs="+", help="scored rows of the fused head")
    parser.add_argument("--given-rows", type=int, nargs="+", help="rows of given logits")
    parser.add_argument("--shares", type=float, nargs="+", help="of the rows, what is scored")
    parser.add_argument("--without-peers", action="store_true", help="ours and the rulers alone")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--seconds", type=float, help="of one case, at most")
    parser.add_argument("--minutes", type=float, help="of the run: later cases are left out")
    predict = "without a GPU: what the rows of ours should be, on all devices or on one"
    parser.add_argument("--predict", nargs="?", const="", metavar="DEVICE", help=predict)
    log = "each row goes here as it is measured; a case that is done there is not measured again"
    parser.add_argument("--log", type=Path, help=log)
    blocks = "without a GPU: append the rows of such a log to RESULTS.md"
    parser.add_argument("--record-log", type=Path, metavar="LOG", help=blocks)
    parser.add_argument("--json", default="dist/head.json", help="raw times go here")
    found = parser.parse_args(arguments)
    if found.device == "cpu" and not (found.smoke or found.record_log) and found.predict is None:
        parser.error("--device cpu needs --smoke: this bench measures the kernels of a GPU")
    if found.smoke and found.record:
        parser.error("--smoke is never recorded")
    known = [device.name for device in predicted.DEVICES]
    if found.predict and not any(found.predict.lower() in name.lower() for name in known):
        parser.error(f"--predict {found.predict}: the devices are {known}")
    found.models = None
    if found.model:
        found.models = tuple(m for m in MODELS if found.model.lower() in m.name.lower())
        if not found.models:
            parser.error(f"--model {found.model}: the names are {[m.name for m in MODELS]}")
    for field in ("scored", "given_rows", "shares"):
        setattr(found, field, tuple(getattr(found, field) or ()) or None)
    wrong = [n for n in found.scored or () if n != 512 and (n < 1 or n % 1024)]
    if wrong:
        parser.error(f"--scored: 512, or whole pairs of 2 x 512 rows, found {wrong}")
    if found.minutes is None:
        found.minutes = 8.0 if found.quick else float("inf")
    return found


def main() -> None:
    arguments = parse()
    if arguments.predict is not None:
        print(predictions(chosen(arguments), arguments.quick, arguments.predict))
        return
    if arguments.record_log is not None:
        with report.RESULTS.open("a", encoding="utf-8") as results:
            results.write(report.block_of(arguments.record_log))
        return
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: this bench measures the kernels of a GPU")
    run = Run(arguments)
    print(run.report.header(), flush=True)
    for part in arguments.only or ("fused", "given", "small"):
        getattr(run, part)()
    run.report.finish(arguments.json, record=arguments.record)
    sys.exit(1 if run.report.wrong else CUT if run.cut else 0)


if __name__ == "__main__":
    main()
