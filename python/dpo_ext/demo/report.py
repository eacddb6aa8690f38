"""report.html: one self-contained file from the numbers of `run_demo`, no script, light and dark.

What it is about stands here, what was measured in `findings.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dpo_ext.demo import findings, world
from dpo_ext.pages.axes import Axis
from dpo_ext.pages.numbers import duration, significant
from dpo_ext.pages.page import page, section, table, tile, tiles
from dpo_ext.pages.tracks import Row, bars

SECTIONS = {
    "about": "What DPO is, and who is trained here",
    "glance": "At a glance",
    "samples": "Samples, side by side",
    "step0": "Step 0: the mathematics before the learning",
    "training": "Training",
    "heldout": "Held-out pairs",
    "reward": "True reward of sampled answers",
    "learned": "What the policy learned to like",
    "kl": "How far it moved",
    "data": "The data",
    "seconds": "Time by stage",
    "how": "How it was measured",
    "next": "Next",
}
# Of a user's file, whose rewards nobody knows.
FILE_SECTIONS = {
    **SECTIONS,
    "reward": "Length of sampled answers",
    "learned": "Did it learn that longer is better?",
}
FORMULA = (
    "<span>loss = −log σ(</span> <span>β·log[ <i>π</i>(y<sub>w</sub>|x) ∕ <i>π</i><sub>ref</sub>"
    "(y<sub>w</sub>|x) ]</span> <span>− β·log[ <i>π</i>(y<sub>l</sub>|x) ∕ <i>π</i>"
    "<sub>ref</sub>(y<sub>l</sub>|x) ] )</span>"
)
SNIPPET = """\
import torch
from transformers import AutoModelForCausalLM
from dpo_ext import PairDataset, Tokenizer
from dpo_ext.torch import PairLoader, attach_scoring, preference_loss

policy = attach_scoring(AutoModelForCausalLM.from_pretrained("reference"))
reference = attach_scoring(AutoModelForCausalLM.from_pretrained("reference")).eval()
tokenizer = Tokenizer.from_pretrained("reference")
pairs = PairDataset.from_files({file}, tokenizer, max_length={max_length}, on_bad="skip")
train, held_out = pairs.split(0.1, seed=0)
optimizer = torch.optim.AdamW(policy.parameters(), lr=5e-4)

plan = train.plan(layout="padded", pairs_per_batch=16)
for step, batch in enumerate(PairLoader(plan, device="cpu")):
    with torch.no_grad():
        ref_logps = reference(**batch.model_inputs, score_table=batch.table).logps
    logps = policy(**batch.model_inputs, score_table=batch.table).logps
    out = preference_loss(logps, ref_logps, loss="dpo", beta=0.5)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    print(step, out.loss.item(), out.metrics["rewards/accuracies"].item())
    if step == 20:
        break
"""


def render(
    metrics: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]] | None,
    *,
    derivation: str | None = None,
) -> str:
    """The page. ``metrics`` is what metrics.json holds; ``samples`` are rows to show, None to show
    none; ``derivation`` is where docs/derivation.md is, seen from the page.
    """
    m, known = metrics, metrics["known_reward"]
    bodies = {
        "about": _about(m, derivation),
        "glance": _glance(m),
        "samples": findings.samples(samples),
        "step0": findings.step_zero(m["step_zero"]),
        "training": findings.training(m),
        "heldout": findings.heldout(m),
        "reward": findings.reward(m) if known else findings.answer_lengths(m),
        "learned": findings.learned(m) if known else findings.length_bias(m),
        "kl": findings.kl(m),
        "data": _data(m),
        "seconds": _seconds(m["seconds"]),
        "how": _how(m),
        "next": _next(m),
    }
    names = SECTIONS if known else FILE_SECTIONS
    subtitle = (
        f"{m['source']} · seed {m['seed']} · {m['train_pairs']:,} pairs to train on, "
        f"{m['heldout_pairs']:,} held out · a Llama of {m['parameters']:,} weights · "
        f"{duration(sum(m['seconds'].values()))}"
    )
    return page(
        kicker="dpo_ext demo",
        title="From preferences to a policy",
        subtitle=escape(subtitle),
        sections="".join(section(key, name, bodies[key]) for key, name in names.items()),
    )


def _about(m: Mapping[str, Any], derivation: str | None) -> str:
    proof = "<code>docs/derivation.md</code>"
    if derivation is not None:
        proof = f'<a href="{escape(derivation)}">{proof}</a>'
    intro = (
        "<p class=lead>Direct Preference Optimization teaches a language model from pairs of "
        "answers of which one was preferred. It needs no reward model and no reinforcement "
        "learning: for a prompt x, the preferred answer y<sub>w</sub> and the other one "
        "y<sub>l</sub>, it lowers</p>"
        f'<p class="formula">{FORMULA}</p>'
        "<p>where <i>π</i> is the policy, the model that is trained, and <i>π</i><sub>ref</sub> "
        "the reference, a frozen copy of it from before. β·log(<i>π</i>∕<i>π</i>"
        "<sub>ref</sub>) of an answer is its <b>implicit reward</b>: the loss is that of a "
        "classifier which says, from the difference of two implicit rewards, the <b>margin</b>, "
        "which answer was preferred. Why this is the same as reinforcement learning with a KL "
        f"penalty, step by step and with every step run: {proof} in the repository.</p>"
    )
    return intro + (_about_world(m) if m["known_reward"] else _about_file(m))


def _about_world(m: Mapping[str, Any]) -> str:
    task = world.Task("Victor", "sharpen a knife", world.ASKING[0])
    good = "Gladly, Victor! Draw it along a wet stone. Good luck!"
    bad = "Not you again. Wrap it in a clean cloth. But where was I? Now go away."
    answers = "".join(
        f"<tr><td>{findings.score(world.reward(task, text))}{escape(text)}</td></tr>"
        for text in (good, bad)
    )
    weights = table(
        ("what an answer has", "#reward"),
        [
            (world.LABELS[name], f"{value:+.1f}".replace("-", "−"))
            for name, value in world.WEIGHTS.items()
        ],
    )
    return (
        f'<div class="charts"><div><p><b>Who is trained.</b> A Llama of {m["parameters"]:,} '
        "weights, random at first, at the help desk of a village. Victor and "
        f"{len(world.NAMES) - 1} other villagers ask one of {len(world.TOPICS)} things. First the "
        "model imitates a teacher who is right, kind and brief only now and then: that is the "
        "reference. Then DPO shows it which of two such answers was preferred, and nothing "
        f"else.</p><p>{escape(task.prompt.strip())}</p><table>{answers}</table>"
        f"{findings.SCORES}<p>This reward r is a sum that nobody tells the model. Answer i is "
        "preferred to answer j with probability <i>a</i><sub>i</sub>∕(<i>a</i><sub>i</sub> + "
        "<i>a</i><sub>j</sub>), where <i>a</i> = exp(r) (Bradley and Terry, 1952). So what DPO "
        f"can reach here is known, and can be checked.</p></div><div>{weights}</div></div>"
    )


def _about_file(m: Mapping[str, Any]) -> str:
    return (
        f"<p><b>Who is trained.</b> A Llama of {m['parameters']:,} weights, random at first. It "
        f"imitates the chosen answers of {escape(m['source'])}: that is the reference. Then DPO "
        "shows it which of two answers was preferred. A model this small, trained for about a "
        "minute, learns little of real conversations; what this page shows is that the whole path "
        "runs on your file, and that its first step is right.</p>"
    )


def _glance(m: Mapping[str, Any]) -> str:
    held, zero, kl = m["heldout"], m["step_zero"], m["kl"]
    shown = []
    if m["known_reward"]:
        ratio, win = m["checks"]
        reward = m["reward"]
        shown += [
            tile(
                f"{ratio['value']:.1%}",
                "of the best reachable accuracy on held-out pairs",
                f"{held['expected_accuracy']:.3f} of {held['best_accuracy']:.3f}; target "
                f"{ratio['target']:.0%}",
                _mark(m, ratio),
            ),
            tile(
                f"{win['value']:.1%}",
                "of answers beat the reference's, by true reward",
                f"ties count half; target {win['target']:.0%}",
                _mark(m, win),
            ),
            tile(
                f"{reward['reference']['mean']:+.2f} → {reward['policy']['mean']:+.2f}",
                "mean true reward of an answer",
                f"the best possible answer has {reward['best_answer']:+.2f}",
            ),
        ]
    else:
        start, *_, end = m["dpo"]["evaluations"]
        shown += [
            tile(
                f"{held['drawn_accuracy']:.1%}",
                "accuracy on held-out pairs",
                f"chance is 50 %, standard error {held['drawn_error']:.1%}; the best reachable is "
                "not known",
            ),
            tile(
                f"{start['loss']:.3f} → {end['loss']:.3f}",
                "DPO loss on held-out pairs",
                "it starts at log 2",
            ),
        ]
    shown += [
        tile(
            f"{zero['loss']:.6f}",
            "loss of the first step: log 2, as it must be",
            f"its gradient is within {significant(zero['gradient_error'] * 1e6)} millionths of "
            "that of float64",
            zero["passed"],
        ),
        tile(
            f"{significant(kl['policy_reference']['mean'])} nats",
            "KL(policy ‖ reference) of an answer",
            f"KL(reference ‖ policy): {significant(kl['reference_policy']['mean'])} nats",
        ),
    ]
    limits = "".join(f"<li>{escape(text)}</li>" for text in m["limits"])
    note = f"<p>What the demo limited to stay short:</p><ul>{limits}</ul>" if limits else ""
    if m["quick"] and m["known_reward"]:
        note += "<p>A run with <code>--quick</code> is not expected to reach the targets.</p>"
    return tiles(*shown) + note


def _data(m: Mapping[str, Any]) -> str:
    return (
        f"<p>{escape(m['source'])}. The tokenizer is a byte-level BPE of {m['vocab_size']:,} "
        f"tokens, trained for this run.</p><pre>{escape(m['data_report'])}</pre>"
    )


def _seconds(seconds: Mapping[str, float]) -> str:
    rows = [Row(name, value, duration(value)) for name, value in seconds.items()]
    longest = max(seconds.values())
    size, unit = (60.0, "minutes") if longest > 180 else (1.0, "seconds")
    scaled = [Row(row.name, row.value / size, row.text) for row in rows]
    return bars(scaled, axis=Axis.from_zero([row.value for row in scaled]), title=unit)


def _how(m: Mapping[str, Any]) -> str:
    recipe = table(("", "#"), [(name, str(value)) for name, value in m["recipe"].items()])
    versions = ", ".join(f"{name} {value}" for name, value in m["versions"].items())
    return (
        "<p><b>The path.</b> dpo_ext reads, encodes, pads and batches the pairs (Rust), computes "
        "the log-probs and their gradient (CPU kernels behind a torch.autograd.Function) and the "
        "loss; the model is transformers', the optimizer AdamW. Reference log-probs are computed "
        "once and carried by the batches.</p><p><b>± </b>is one standard error over prompts. "
        "Every number of this page is in metrics.json.</p><details><summary>Recipe</summary>"
        f"{recipe}</details><p class=sub>{escape(versions)}</p>"
    )


def _next(m: Mapping[str, Any]) -> str:
    file = "pairs.jsonl.gz" if m["known_reward"] else m["source"]
    where = "" if m["known_reward"] else ", with your file in it"
    places = table(
        ("", ""),
        [
            ("model/", "the policy after DPO, a folder of transformers with its tokenizer"),
            ("reference/", "the model that DPO started from"),
            ("tokenizer/", "the tokenizer alone"),
            *(
                [("pairs.jsonl.gz", "the generated pairs, those held out last")]
                if m["known_reward"]
                else []
            ),
            ("metrics.json", "every number of this page"),
        ],
    )
    snippet = SNIPPET.format(file=json.dumps(file), max_length=m["recipe"]["max_length"])
    own = (
        "<p><b>Your own pairs.</b> <code>dpo-ext demo --data pairs.jsonl.gz</code> does all this "
        "on your file: a JSON object a line with <code>prompt</code>, <code>chosen</code> and "
        "<code>rejected</code>, as strings or as lists of messages.</p>"
        if m["known_reward"]
        else "<p><b>A world with a known answer.</b> <code>dpo-ext demo</code> without "
        "<code>--data</code> generates pairs whose reward is known, and shows how much of it DPO "
        "finds.</p>"
    )
    return (
        f"<p><b>What was trained lies beside this page.</b></p>{places}{own}"
        f"<p><b>A loop of yours.</b> In the folder of this page{where}, from the same start again; "
        "another name for <code>loss</code> trains with another one, and <code>dpo-ext "
        f"losses</code> lists them:</p><pre id=snippet>{escape(snippet)}</pre>"
        "<p><b>A model of yours.</b> Put its folder where the snippet says "
        "<code>reference</code>. Any causal language model of transformers works, and "
        "<code>from dpo_ext.trl import DPOTrainer</code> is the same in TRL's trainer: the README "
        "shows both.</p>"
    )


def _mark(m: Mapping[str, Any], check: Mapping[str, Any]) -> bool | None:
    """None where a quick run, which is not meant to, misses a target."""
    return None if m["quick"] and not check["passed"] else check["passed"]
