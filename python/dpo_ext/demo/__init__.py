"""A complete DPO run on two CPU cores: data, tokenizer, model, reference, DPO, measurements,
report.

Needs the extras ``torch`` and ``hf``; the extra ``cli`` shows it live.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EEXIST
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dpo_ext import __version__
from dpo_ext.extras import need

need("torch", "dpo_ext.demo")
need("transformers", "dpo_ext.demo")
need("tokenizers", "dpo_ext.demo")

from dpo_ext.demo import measure, report, source, train, world
from dpo_ext.demo.live import PlainShow, open_show
from dpo_ext.demo.train import Recipe

__all__ = ["run_demo"]

STAGES = (
    "data", "tokenizer", "encode", "fine-tune", "reference", "DPO", "measure", "report",
)  # fmt: skip
SHOWN_SAMPLES = 12
PROMISES = {
    False: "two minutes on two cores that are free",
    True: "twenty seconds on two free cores",
}
CONTENTS = """Written by `dpo-ext demo`, which replaces it at its next run.

report.html      what was trained, measured and learned; one file, needs nothing else
metrics.json     every number of the report
model/           the policy after DPO: a folder of transformers with its tokenizer
reference/       the model that DPO started from, which is its reference
tokenizer/       the tokenizer alone
pairs.jsonl.gz   the generated pairs, those held out last; with --data there are none
"""


@dataclasses.dataclass(frozen=True)
class _Size:
    """How much of everything: tokens of vocabulary, pairs, samples, and the recipe."""

    vocab_size: int
    train_pairs: int
    heldout_pairs: int
    answers: int
    new_tokens: int
    recipe: Recipe


WORLD = _Size(
    vocab_size=1024,
    train_pairs=6000,
    heldout_pairs=500,
    answers=400,
    new_tokens=64,
    recipe=Recipe(
        hidden=96, layers=2, sft_steps=1000, sft_pairs=16, sft_lr=4e-3, sft_both=True,
        dpo_steps=450, dpo_pairs=32, dpo_lr=5e-4, beta=1.2, max_length=128,
    ),
)  # fmt: skip
WORLD_QUICK = _Size(
    vocab_size=1024,
    train_pairs=1200,
    heldout_pairs=120,
    answers=64,
    new_tokens=48,
    recipe=Recipe(
        hidden=64, layers=2, sft_steps=150, sft_pairs=16, sft_lr=5e-3, sft_both=True,
        dpo_steps=50, dpo_pairs=32, dpo_lr=4e-4, beta=1.5, max_length=128, evaluations=3,
    ),
)  # fmt: skip
FILE = _Size(
    vocab_size=2048,
    train_pairs=1600,
    heldout_pairs=200,
    answers=48,
    new_tokens=64,
    recipe=Recipe(
        hidden=128, layers=2, sft_steps=240, sft_pairs=16, sft_lr=4e-3, sft_both=False,
        dpo_steps=100, dpo_pairs=16, dpo_lr=2e-4, beta=0.1, max_length=256, evaluations=4,
    ),
)  # fmt: skip
FILE_QUICK = dataclasses.replace(
    FILE,
    train_pairs=160,
    heldout_pairs=40,
    answers=8,
    new_tokens=24,
    recipe=dataclasses.replace(
        FILE.recipe, hidden=64, sft_steps=20, dpo_steps=10, evaluations=2, max_length=128
    ),
)

ACCURACY_TARGET = 0.95
WIN_RATE_TARGET = 0.8


def run_demo(
    data: str | Path | None = None,
    out: str | Path = "demo_out",
    *,
    seed: int = 0,
    quick: bool = False,
    show_samples: bool = False,
) -> dict[str, Any]:
    """Trains a policy by DPO from start to report; about two minutes on two cores, 20 seconds if
    ``quick``.

    Args:
        data: a JSONL file of preferences, plain or gzip; None generates a world whose reward is
            known.
        out: folder for report.html, metrics.json, the models before and after DPO, the tokenizer
            and, if generated, pairs.jsonl.gz; contents.txt says what is what.
        seed: >= 0; draws the world, the weights, the order of the pairs and the answers.
        quick: a smaller model for fewer steps; the targets are shown but not expected to be
            reached.
        show_samples: put sampled answers to prompts of ``data`` into the report; the generated
            world's are always shown.

    Returns:
        dict: the content of metrics.json. ``checks`` lists name, value, target and whether it
            passed.

    Raises:
        DpoExtError: the first step is not what the mathematics says: loss log 2, gradient as in
            float64.
        DataError: the file has too few usable pairs.  FileNotFoundError: there is none.
        FileExistsError: ``out`` holds a file of that name that the demo did not write.
    """
    if seed < 0:
        raise ValueError(f"`seed` must be at least 0, found {seed}")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    _take(folder, None if data is None else Path(data))
    title = f"dpo_ext demo, seed {seed}" + (f", {Path(data).name}" if data is not None else "")
    _quiet_host()
    with open_show(title, STAGES, PROMISES[quick]) as show, _free_cores(show):
        return _run(None if data is None else Path(data), folder, seed, quick, show_samples, show)


def _take(folder: Path, data: Path | None) -> None:
    """Marks a folder as the demo's, unless it holds things of others that a run would replace."""
    mark = folder / "contents.txt"
    if not mark.exists():
        replaced = ["model", "reference", "tokenizer", "report.html", "metrics.json"]
        for name in [*replaced, *(["pairs.jsonl.gz"] if data is None else [])]:
            if (folder / name).exists():
                raise FileExistsError(
                    EEXIST,
                    "was not written by this demo, which would replace it\n"
                    "hint: name another folder with --out",
                    str(folder / name),
                )
    mark.write_text(CONTENTS, encoding="utf-8")


@contextmanager
def _free_cores(show: PlainShow) -> Iterator[None]:
    """One thread where others use the cores: two that wait for each other are many times slower."""
    import torch

    threads = torch.get_num_threads()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if threads > 1 and load > 1.5 * (os.cpu_count() or 1):
        show.note(f"one thread, for the machine is busy (load {load:.0f})")
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _run(
    data: Path | None, out: Path, seed: int, quick: bool, show_samples: bool, show: PlainShow
) -> dict[str, Any]:
    size = (WORLD_QUICK if quick else WORLD) if data is None else (FILE_QUICK if quick else FILE)
    pairs = _read(data, out, seed, size, show)
    recipe, truth = size.recipe, pairs.heldout_pairs

    with show.stage("fine-tune", recipe.sft_steps):
        model = train.new_model(
            pairs.tokenizer.vocab_size, pairs.train.pad_id, pairs.end_id, recipe, seed
        )
        sft = train.fine_tune(model, pairs.train, recipe, seed, show)
    reference = train.frozen(model)
    with show.stage("reference", -(-len(pairs.train) // train.SCORED_PAIRS)):
        ref_train = train.pair_logps(reference, pairs.train, show)
        ref_heldout = train.pair_logps(reference, pairs.heldout)

    followed = [pairs.heldout[0]["prompt_ids"].tolist()]

    def evaluate(step: int) -> dict[str, float]:
        logps = train.pair_logps(model, pairs.heldout)
        if truth is not None or show_samples:
            now = measure.sample_answers(
                model, pairs.decode, followed, max_new_tokens=size.new_tokens, seed=seed + step
            )
            reward = None if truth is None else world.reward(truth[0].task, now.texts[0])
            show.answer(pairs.decode(followed[0]), now.texts[0], reward)
        return _heldout_curve(logps, ref_heldout, recipe.beta, truth)

    with show.stage("DPO", recipe.dpo_steps):
        history, step_zero = train.train_dpo(
            model, pairs.train.with_ref_logps(ref_train), recipe, seed, show, evaluate
        )
    with show.stage("measure", 2 * size.new_tokens):
        found, samples = _measure(model, reference, pairs, ref_heldout, size, seed, show)
    metrics = {
        "source": pairs.name,
        "known_reward": pairs.known_reward,
        "seed": seed,
        "quick": quick,
        "train_pairs": len(pairs.train),
        "heldout_pairs": len(pairs.heldout),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocab_size": pairs.tokenizer.vocab_size,
        "limits": pairs.limits,
        "data_report": str(pairs.report),
        "data_counts": {"read": pairs.report.read, "kept": pairs.report.kept},
        "recipe": dataclasses.asdict(recipe),
        "versions": _versions(),
        "step_zero": {
            **dataclasses.asdict(step_zero),
            "loss_tolerance": train.LOG_2_TOLERANCE,
            "gradient_tolerance": train.GRADIENT_TOLERANCE,
            "passed": step_zero.loss_ok and step_zero.gradient_ok,
        },
        "sft": {"nats_per_token": sft},
        "dpo": dataclasses.asdict(history),
        **found,
    }
    shown = samples if pairs.known_reward or show_samples else None
    with show.stage("report"):
        for trained, name in ((model, "model"), (reference, "reference")):
            train.save(trained, out / "tokenizer", out / name)
        metrics["seconds"] = {**show.seconds}
        page = report.render(metrics, shown, derivation=derivation(out))
        (out / "report.html").write_text(page, encoding="utf-8")
        (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    return metrics


def _read(data: Path | None, out: Path, seed: int, size: _Size, show: PlainShow) -> source.Source:
    folder = out / "tokenizer"
    truth, chat, limits = None, False, []
    with show.stage("data"):
        if data is None:
            path, truth, texts = source.generate(out, seed, size.train_pairs, size.heldout_pairs)
        else:
            corpus = source.look_at(data, out)
            path, texts, chat, limits = corpus.path, corpus.texts, corpus.chat, corpus.limits
    with show.stage("tokenizer"):
        source.train_tokenizer(texts, size.vocab_size, chat, folder)
    with show.stage("encode"):
        pairs = source.encode(
            path,
            folder,
            name="A generated world, pairs.jsonl.gz" if data is None else data.name,
            seed=seed,
            max_length=size.recipe.max_length,
            train_pairs=size.train_pairs,
            heldout_pairs=size.heldout_pairs,
            truth=truth,
            limits=limits,
        )
    show.note(str(pairs.report).splitlines()[0])
    for text in pairs.limits:
        show.note(text)
    return pairs


def _heldout_curve(
    logps: np.ndarray, ref_logps: np.ndarray, beta: float, truth: list[world.LabelledPair] | None
) -> dict[str, float]:
    """Loss, margin and accuracy on held-out pairs at one moment of training; loss and accuracy in
    expectation over the labels where their probabilities are known.
    """
    margin = measure.margins(logps, ref_logps, beta)
    rewards = beta * (logps - ref_logps).mean(0)
    if truth is None:
        accuracy, loss = measure.drawn_accuracy(margin), float(np.logaddexp(0.0, -margin).mean())
    else:
        p_label = np.array([pair.p_label for pair in truth])
        accuracy = measure.expected_accuracy(margin, p_label)
        loss = measure.expected_loss(margin, p_label)
    return {
        "loss": loss,
        "margin": float(margin.mean()),
        "accuracy": accuracy,
        "chosen_reward": float(rewards[0]),
        "rejected_reward": float(rewards[1]),
    }


def _measure(
    policy: Any,
    reference: Any,
    pairs: source.Source,
    ref_heldout: np.ndarray,
    size: _Size,
    seed: int,
    show: PlainShow,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Everything that is measured after training, and rows of samples."""
    truth = pairs.heldout_pairs
    margin = measure.margins(train.pair_logps(policy, pairs.heldout), ref_heldout, size.recipe.beta)
    agrees = measure.drawn_accuracy(margin)
    longer = pairs.heldout.chosen_ids.lengths - pairs.heldout.rejected_ids.lengths
    found: dict[str, Any] = {
        "heldout": {
            "drawn_accuracy": agrees,
            "drawn_error": float(np.sqrt(agrees * (1.0 - agrees) / len(margin))),
            "margins": margin.tolist(),
            "length_differences": longer.tolist(),
            "length_correlation": measure.correlation(longer, margin),
        },
        "checks": [],
    }
    chosen = _distinct_prompts(pairs, size.answers)
    prompts = [pairs.heldout[i]["prompt_ids"].tolist() for i in chosen]
    theirs, ours = (
        measure.sample_answers(
            model,
            pairs.decode,
            prompts,
            max_new_tokens=size.new_tokens,
            seed=seed + k,
            on_token=partial(_told, show, k * size.new_tokens),
        )
        for k, model in enumerate((reference, policy))
    )
    found["answer_tokens"] = {
        name: [len(ids) for ids in side.answer_ids]
        for name, side in (("reference", theirs), ("policy", ours))
    }
    pad = pairs.train.pad_id
    found["kl"] = {
        "policy_reference": measure.sequence_kl(policy, reference, ours, pad).as_dict(),
        "reference_policy": measure.sequence_kl(reference, policy, theirs, pad).as_dict(),
        "answers": len(prompts),
        "finished": {"policy": ours.finished, "reference": theirs.finished},
    }
    samples: list[dict[str, Any]] = [
        {"prompt": pairs.decode(p), "reference": a, "policy": b}
        for p, a, b in zip(prompts, theirs.texts, ours.texts, strict=True)
    ]
    if truth is not None:
        p_label = np.array([pair.p_label for pair in truth])
        tasks = [truth[i].task for i in chosen]
        judged = measure.judge(tasks, ours, theirs)
        for row, a, b in zip(samples, judged.reference_rewards, judged.policy_rewards, strict=True):
            row |= {"reference_reward": float(a), "policy_reward": float(b)}
        expected, best = measure.expected_accuracy(margin, p_label), measure.best_accuracy(p_label)
        found["heldout"] |= {
            "expected_accuracy": expected,
            "best_accuracy": best,
            "loss_floor": measure.expected_loss(np.array([p.margin for p in truth]), p_label),
            "drawn_accuracy_of_truth": measure.drawn_accuracy(
                np.array([pair.margin for pair in truth])
            ),
            "true_margins": [pair.margin for pair in truth],
        }
        win_rate = measure.Mean.of(judged.wins)
        found["reward"] = {
            "policy": measure.Mean.of(judged.policy_rewards).as_dict(),
            "reference": measure.Mean.of(judged.reference_rewards).as_dict(),
            "best_answer": world.best_reward(),
            "win_rate": win_rate.as_dict(),
            "bt_win_rate": measure.Mean.of(judged.bt_wins).as_dict(),
            "policy_rewards": judged.policy_rewards.tolist(),
            "reference_rewards": judged.reference_rewards.tolist(),
            "policy_features": judged.policy_features,
            "reference_features": judged.reference_features,
        }
        found["learned_weights"] = measure.learned_weights(truth, margin)
        found["checks"] = [
            _check("held-out accuracy / best reachable", expected / best, ACCURACY_TARGET),
            _check("win rate over the reference", win_rate.value, WIN_RATE_TARGET),
        ]
    return found, samples[:SHOWN_SAMPLES]


def _told(show: PlainShow, before: int, done: int) -> None:
    show.step(before + done)


def _check(name: str, value: float, target: float) -> dict[str, Any]:
    return {"name": name, "value": value, "target": target, "passed": bool(value >= target)}


def _distinct_prompts(pairs: source.Source, count: int) -> list[int]:
    """Positions of held-out pairs with different prompts, the first ``count`` of them."""
    first: dict[bytes, int] = {}
    for i in range(len(pairs.heldout)):
        first.setdefault(pairs.heldout[i]["prompt_ids"].tobytes(), i)
    return list(first.values())[:count]


def derivation(out: Path) -> str | None:
    """Where docs/derivation.md is, seen from the report, if both lie in one checkout."""
    checkout, folder = Path(__file__).resolve().parents[3], out.resolve()
    found = checkout / "docs" / "derivation.md"
    if not found.is_file() or not folder.is_relative_to(checkout):
        return None
    return Path(os.path.relpath(found, folder)).as_posix()


def _versions() -> dict[str, str]:
    import torch
    import transformers

    return {
        "dpo_ext": __version__,
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "Python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _quiet_host() -> None:
    """transformers' own progress and warnings would tear the live view."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
