"""The bench of whole training steps: it runs, contenders that differ are not timed, and stock is in its fair form."""

import math
import subprocess
import sys
import threading
from dataclasses import replace
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest
import torch
from places import ROOT

pytestmark = pytest.mark.slow  # it imports TRL

BENCHES = ROOT / "benches"
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def benches():
    """The scripts import each other by name, as when one of them is run."""
    sys.path.insert(0, str(BENCHES))
    yield
    sys.path.remove(str(BENCHES))


@pytest.fixture
def threads(monkeypatch):
    """Contenders in threads of this process, whose code a test can change; of trainers but one,
    since Accelerate has one state a process.
    """
    import train
    import train_steps

    class Threaded(train.Contender):
        def __init__(self, name):
            self.name = name
            self.connection, theirs = Pipe()
            thread = threading.Thread(target=train_steps.serve, args=(theirs, name), daemon=True)
            thread.start()
            self.process = SimpleNamespace(join=thread.join, kill=lambda: None)

    before = torch.get_num_threads()
    yield Threaded
    torch.set_num_threads(before)


def tiny(**options):
    import train
    import train_steps

    return train_steps.Scenario(steps=STEPS, **train.TINY | options)


def run(threads, names, scenario):
    import train

    contenders = [threads(name) for name in names]
    try:
        return train.race(contenders, scenario, STEPS)
    finally:
        for contender in contenders:
            contender.end()


# ---- the whole run -----------------------------------------------------------


def test_the_tiny_run_times_every_contender_in_every_scenario():
    command = [sys.executable, str(BENCHES / "train.py"), "--tiny"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for training in ("full fine-tuning", "LoRA, frozen head"):
        for reference in ("live", "precomputed"):
            assert f"{training}, reference {reference}" in done.stdout
    for name in ("stock compact", "padded", "packed", "shared", "loop padded", "bare loop"):
        rows = [line for line in done.stdout.splitlines() if line.startswith(f"| {name}, ")]
        assert len(rows) == 4
    assert "left to TRL" not in done.stdout


def test_the_form_for_a_gpu_runs_small_in_bfloat16():
    command = [sys.executable, str(BENCHES / "train.py"), "--tiny", "--model", "1b"]
    command += ["--training", "full", "--reference", "live", "--contenders"]
    done = subprocess.run(
        [*command, "stock compact", "packed"],
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Llama 2 x 32 bfloat16" in done.stdout
    assert "| packed, trainer | " in done.stdout


@pytest.mark.parametrize("fault", ["another loss", "another gradient"])
def test_a_contender_that_trains_otherwise_is_not_timed(fault, threads, monkeypatch):
    import train

    import dpo_ext.trl.trainer as ours

    honest = ours.preference_loss

    def broken(*arguments, **options):
        out = honest(*arguments, **options)
        shift = 1e-4 * out.loss.detach()
        out.loss = out.loss + shift if fault == "another loss" else out.loss * 1.001 - 10 * shift
        return out

    monkeypatch.setattr(ours, "preference_loss", broken)
    wrong = "loss" if fault == "another loss" else "grad_norm"
    with pytest.raises(train.WrongError, match=f"packed, step 0, {wrong}: "):
        run(threads, ["bare loop", "packed"], tiny())


def test_a_contender_that_fails_says_why(threads, monkeypatch):
    import train_steps

    monkeypatch.setattr(train_steps, "network", lambda scenario: 1 / 0)
    with pytest.raises(RuntimeError, match=r"(?s)shared:.*ZeroDivisionError"):
        run(threads, ["shared"], tiny())


def test_stock_in_its_fair_form_scores_completion_rows_alone(threads, monkeypatch):
    import train_steps
    from trl.trainer import utils

    honest, rows = utils._ChunkedLogProbFunction.apply, []

    def counted(hidden, *arguments):
        rows.append(len(hidden))
        return honest(hidden, *arguments)

    monkeypatch.setattr(utils._ChunkedLogProbFunction, "apply", counted)
    scenario = tiny()
    pairs = train_steps.pairs_of(scenario)
    first = slice(0, scenario.pairs)
    lengths = [*map(len, pairs.chosen_ids[first]), *map(len, pairs.rejected_ids[first])]
    run(threads, ["stock compact"], scenario)
    assert rows[:2] == [sum(lengths)] * 2  # the policy and its reference
    rows.clear()
    run(threads, ["stock"], scenario)
    assert rows[0] > sum(lengths)


# ---- its parts -----------------------------------------------------------------


def rows_of(**facts):
    same = {"loss": 0.69, "grad_norm": 2.0, "logps/chosen": -100.0, "logps/rejected": -90.0}
    return {"stock": [same], "ours": [same | facts]}


@pytest.mark.parametrize("value", [0.69 * (1 + 2e-5), math.nan, math.inf])
def test_what_differs_from_the_first_contender_is_refused(value):
    import train

    with pytest.raises(train.WrongError, match="ours, step 0, loss: "):
        train.check(rows_of(loss=value), 1e-5)
    train.check(rows_of(loss=0.69 * (1 + 5e-6)), 1e-5)


def test_a_part_inside_another_is_counted_once():
    import train_steps

    clock = train_steps.Clock("cpu")
    now = iter([0, 1, 3, 7, 15, 31])
    clock._now = lambda: float(next(now))
    clock.start()
    with clock.part("loss"), clock.part("head"):
        pass
    clock.stop()
    spent = {part: seconds for part, seconds in clock.spent.items() if seconds}
    assert spent == {"other": 1 + 16, "loss": 2 + 8, "head": 4}


def test_without_the_rows_lengths_are_drawn_like_theirs(monkeypatch, tmp_path):
    import train_steps

    scenario = train_steps.Scenario(vocabulary=50_257, longest=512, steps=40)
    monkeypatch.setattr(train_steps, "PAIRS", tmp_path / "none")
    drawn = train_steps.pairs_of(scenario)
    assert len(drawn) == 16 * 41
    assert max(drawn.longest) <= 512
    prompts = sorted(map(len, drawn.prompt_ids))
    assert 80 <= prompts[len(prompts) // 2] <= 110  # HH: 95
    assert 280 <= drawn.tokens.mean() <= 380  # HH: 327


def test_targets_are_called_missed_where_they_are_missed():
    import train

    scenario = replace(tiny(), vocabulary=50_257, longest=512)
    row = {"wall": 1.0, "tokens": 10}
    rows = {
        "stock compact": [row | {"cpu": 4.0}] * 3,
        "packed": [row | {"cpu": 2.0}] * 3,
        "shared": [row | {"cpu": 1.0}] * 3,
    }
    facts = {name: {"peak": peak} for name, peak in zip(rows, (100, 101, 99), strict=True)}
    said = train.targets(scenario, facts, rows)
    assert "packed 2.00x of 2.5x missed" in said
    assert "shared 2.00x packed of 1.2x met" in said
    assert "peak memory above stock's: packed" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny", "--record"], "never recorded"),
        (["--model", "1b"], "needs `--device cuda`"),
        (["--contenders", "unsloth"], "invalid choice"),
        (["--overhead", "--contenders", "padded"], "needs 'stock compact'"),
    ],
)
def test_what_would_measure_nothing_is_refused(arguments, message, capsys):
    import train

    with pytest.raises(SystemExit):
        train.parse(arguments)
    assert message in capsys.readouterr().err


def test_a_recorded_run_says_when_on_what_and_by_which_command(monkeypatch, tmp_path):
    import train

    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    (tmp_path / "RESULTS.md").write_text("before\n", encoding="utf-8")
    train.record(["| a row |\n"], ["--record", "--rounds", "3"])
    text = (tmp_path / "RESULTS.md").read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert "`python benches/train.py --record --rounds 3`" in text
    assert text.endswith("| a row |\n")
