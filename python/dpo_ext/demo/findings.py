"""What was measured, section by section of the report: each gives HTML from the metrics."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from dpo_ext.demo import world
from dpo_ext.pages.axes import Axis
from dpo_ext.pages.charts import Level, Series, histogram, line_chart, scatter
from dpo_ext.pages.numbers import significant
from dpo_ext.pages.page import table
from dpo_ext.pages.tracks import dumbbells

LOG_2 = math.log(2.0)
GOOD, BAD = 2.0, -2.0  # rewards beyond which a chip has a colour
NO_REWARD = (
    "The true reward of answers to your own prompts is not known. Without <code>--data</code> the "
    "demo generates a world in which it is."
)


def score(value: float | None) -> str:
    """A chip with a reward, coloured as `SCORES` explains."""
    if value is None:
        return ""
    css = "good" if value > GOOD else "bad" if value < BAD else "middling"
    return f'<span class="score {css}">{value:+.1f}</span>'.replace("-", "−")


SCORES = (
    '<p class=sub>The number is the true reward: <span class="score good">green</span>above '
    f'{GOOD:+.0f}, <span class="score bad">red</span>below −{-BAD:.0f}, '
    '<span class="score middling">grey</span>between.</p>'
)


def step_zero(zero: Mapping[str, Any]) -> str:
    """The first loss and gradient against what the mathematics says."""
    rows = [
        ("loss, float32, dpo_ext", f"{zero['loss']:.9f}", ""),
        (
            "log 2",
            f"{LOG_2:.9f}",
            f"difference {zero['loss'] - LOG_2:+.1e}, allowed {zero['loss_tolerance']:.0e}",
        ),
        ("gradient, norm", f"{zero['gradient_norm']:.6f}", "over all weights of the policy"),
        (
            "gradient, relative distance from float64",
            f"{zero['gradient_error']:.1e}",
            f"allowed {zero['gradient_tolerance']:.0e}",
        ),
        ("gradient, cosine with float64", f"{zero['gradient_cosine']:.9f}", ""),
    ]
    return (
        "<p>At the first step policy and reference are the same model, so every margin is 0 and "
        "the loss must be log&nbsp;2. That alone proves little: with a wrong sign it would be "
        "log&nbsp;2 too. So the first gradient is compared with the one that plain torch finds "
        "in float64 from the same weights and the same batch, with <code>log_softmax</code>, "
        "<code>gather</code> and nothing of dpo_ext.</p>" + table(("", "#", ""), rows)
    )


def training(m: Mapping[str, Any]) -> str:
    """Loss, margin and accuracy over the steps, and the fine-tuning before them."""
    dpo, held, known = m["dpo"], m["heldout"], m["known_reward"]
    # A batch is measured before its step, so step 0 is the start of both curves. There every
    # margin is 0, a tie, of which held-out accuracy counts half and TRL's metric nothing.
    values = {**dpo, "accuracy": [0.5, *dpo["accuracy"][1:]]}
    floor = [Level("loss floor", held["loss_floor"], below=True, left=True)] if known else []
    best = (
        Level("best reachable", held["best_accuracy"], left=True)
        if known
        else Level("chance", 0.5, below=True)
    )
    # Where the floor is not known a small change would be lost above an empty chart.
    losses = [LOG_2, *dpo["loss"], *(e["loss"] for e in dpo["evaluations"])]
    title, axis = (
        ("DPO loss", Axis.from_zero(losses))
        if known
        else ("DPO loss, on an axis that does not start at 0", Axis.around(losses))
    )
    charts = (
        _curve(values, "loss", title, [Level("log 2", LOG_2), *floor], axis),
        _curve(values, "margin", "margin, chosen − rejected", []),
        _curve(values, "accuracy", "accuracy", [best]),
        _fine_tuning(m["sft"]["nats_per_token"]),
    )
    labels = (
        "Held-out loss and accuracy are expectations over the labels, which are drawn by chance: "
        f"the floor is the labels' own entropy, {held['loss_floor']:.3f}, and no model can be "
        "below it, nor above the best reachable accuracy. Training values are those of the drawn "
        "labels, a batch each (faint) and smoothed: labels that were seen before can be known by "
        "heart, so these may pass both."
        if known
        else "Accuracy is the share of pairs whose chosen answer has the higher implicit reward. "
        "Training values are of a batch each (faint) and smoothed."
    )
    return (
        f'<div class="charts">{"".join(charts)}</div><p>The supervised model becomes the reference '
        f"and is frozen; DPO starts from it. {labels} All start where policy and reference are "
        "equal: loss log&nbsp;2, margin 0, accuracy one half, for ties count half. Accuracy counts "
        "signs alone, so it leaves one half at once, when the margins are still tiny.</p>"
    )


def _curve(
    dpo: Mapping[str, Any],
    name: str,
    label: str,
    levels: Sequence[Level],
    axis: Axis | None = None,
) -> str:
    evaluations, values = dpo["evaluations"], dpo[name]
    steps = list(range(len(values)))
    at = [e["step"] for e in evaluations]
    return line_chart(
        [
            Series("a batch", values, "policy", steps, faint=True),
            Series("training", _smooth(values), "policy", steps),
            Series("held-out", [e[name] for e in evaluations], "truth", at, dots=True),
        ],
        x_label="DPO steps done",
        x_axis=Axis(0, at[-1]),
        y_axis=axis,
        title=label,
        levels=levels,
    )


def _fine_tuning(nats: Sequence[float]) -> str:
    return line_chart(
        [Series("fine-tuning", nats, "reference", list(range(1, len(nats) + 1)))],
        x_label="fine-tuning step",
        x_axis=Axis(1, max(2, len(nats)), is_log=True),
        y_axis=Axis.tight_log(nats),
        title="nats a token before DPO, both axes logarithmic",
    )


def heldout(m: Mapping[str, Any]) -> str:
    """How often the policy agrees with pairs that it never saw."""
    held = m["heldout"]
    if not m["known_reward"]:
        margins = histogram(
            [Series("held-out pairs", held["margins"], "policy")],
            x_label="implicit reward, chosen − rejected",
            title="Margins after training; before it all were 0",
        )
        return (
            f'<div class="charts"><div><p>The policy\'s implicit reward agrees with '
            f"<b>{held['drawn_accuracy']:.1%}</b> of {m['heldout_pairs']:,} held-out labels "
            f"(standard error {held['drawn_error']:.1%}): the share of margins right of 0. How "
            "much any scorer could reach on this file is not known: its labels come with no "
            f"probabilities.</p></div>{margins}</div>"
        )
    rows = [
        ("expected over the labels", held["expected_accuracy"], held["best_accuracy"]),
        ("on the labels as drawn", held["drawn_accuracy"], held["drawn_accuracy_of_truth"]),
    ]
    cells = table(
        ("accuracy", "#policy", "#best reachable", "#ratio"),
        [(name, f"{a:.4f}", f"{b:.4f}", f"{a / b:.1%}") for name, a, b in rows],
    )
    points = scatter(
        held["true_margins"],
        held["margins"],
        x_label="true reward, chosen − rejected",
        title="Implicit reward by true reward, chosen − rejected",
        diagonal="DPO's optimum",
    )
    return (
        f'<div class="charts"><div>{cells}<p>Labels are drawn with probability p, so even the true '
        "reward disagrees with some. In expectation a pair is worth p where a scorer agrees with "
        "its label and 1&nbsp;−&nbsp;p where not; the true reward reaches mean(max(p, "
        "1&nbsp;−&nbsp;p)), and no scorer more. The first row is the one with the target: it has "
        "no noise of the drawn labels. No held-out prompt was trained on.</p></div>"
        f"{points}</div>"
    )


def reward(m: Mapping[str, Any]) -> str:
    """True rewards of answers of both models to the same prompts."""
    found = m["reward"]
    features = [
        (world.LABELS[name], found["reference_features"][name], found["policy_features"][name])
        for name in world.FEATURES
    ]
    rewards = histogram(
        [
            Series("reference", found["reference_rewards"], "reference"),
            Series("policy", found["policy_rewards"], "policy"),
        ],
        x_label="true reward of an answer",
        title="Share of answers by true reward",
    )
    counts = dumbbells(
        features,
        before=("reference", "reference"),
        after=("policy", "policy"),
        title="How often in an answer",
    )
    return (
        f'<div class="charts">{rewards}{counts}</div>'
        f"<p>Both models answer the same {len(found['policy_rewards']):,} held-out prompts, one "
        "sample each at temperature 1. The policy's answer has the higher true reward in "
        f"<b>{_pm(found['win_rate'], '.1%')}</b> of them, ties counted half; the world's own "
        "labeller, who prefers with the probability of Bradley and Terry, would prefer it in "
        f"<b>{_pm(found['bt_win_rate'], '.1%')}</b>.</p>"
    )


def answer_lengths(m: Mapping[str, Any]) -> str:
    """In place of the reward of a user's answers: how long they are."""
    tokens = m["answer_tokens"]
    finished = m["kl"]["finished"]
    lengths = histogram(
        [Series(name, tokens[name], name) for name in ("reference", "policy")],
        x_label="tokens of an answer",
        title="Share of answers by length",
    )
    rows = [
        (name, f"{np.mean(tokens[name]):.1f}", f"{finished[name]:.0%}")
        for name in ("reference", "policy")
    ]
    cells = table(("answers of the", "#mean tokens", "#ended by themselves"), rows)
    return (
        f'<div class="charts">{lengths}<div>{cells}<p>Both models answer the same '
        f"{m['kl']['answers']:,} held-out prompts, one sample each at temperature 1, cut where "
        f"the demo stops. {NO_REWARD} For answers to your prompts it takes a judge: people, or a "
        "reward model of yours.</p></div></div>"
    )


def learned(m: Mapping[str, Any]) -> str:
    """The weights of the implicit reward beside the true ones."""
    rows = [
        (world.LABELS[name], world.WEIGHTS[name], value)
        for name, value in m["learned_weights"].items()
    ]
    weights = dumbbells(
        rows,
        before=("true weight", "truth"),
        after=("learned", "policy"),
        title="Weight in the reward",
        form="{:+.2f}",
    )
    return (
        f'<div class="charts">{weights}<div><p>The policy was never told about features: it saw '
        "which of two texts was preferred. Its implicit reward, β·log(policy/reference) with "
        f"β = {m['recipe']['beta']}, is fitted here by the features of the held-out answers. At "
        "DPO's optimum it equals the true reward up to a constant of the prompt, so the dots would "
        "meet; a short run stops short of it.</p></div></div>"
    )


def length_bias(m: Mapping[str, Any]) -> str:
    """In place of the weights of a known reward: the one feature that every text has."""
    held = m["heldout"]
    points = scatter(
        held["length_differences"],
        held["margins"],
        x_label="tokens, chosen − rejected",
        title="Implicit reward by length, chosen − rejected",
    )
    longer = float(np.mean(held["length_differences"]))
    return (
        f'<div class="charts">{points}<div><p>Preferred answers are often the longer ones, and a '
        "policy can learn that and little else. In the held-out pairs the chosen answer has "
        f"<b>{longer:+.1f}</b> tokens more than the rejected one on average. The margin's "
        f"correlation with that difference is <b>{_signed(held['length_correlation'])}</b>: near 0 "
        "length explains nothing, near −1 or +1 nearly everything.</p>"
        f"<p>{NO_REWARD} There this section compares what the policy likes with what it should "
        "like.</p></div></div>"
    )


def kl(m: Mapping[str, Any]) -> str:
    """KL both ways, and where the implicit rewards of both sides went."""
    found, evaluations = m["kl"], m["dpo"]["evaluations"]
    at = [e["step"] for e in evaluations]
    names = {
        "policy_reference": (
            "KL(policy ‖ reference)",
            "over the policy's own answers: what training paid",
        ),
        "reference_policy": (
            "KL(reference ‖ policy)",
            "over the reference's answers: what the policy gave up",
        ),
    }
    rows = [(name, _nats(found[key]), what) for key, (name, what) in names.items()]
    sides = {"chosen": "policy", "rejected": "reference"}
    drift = line_chart(
        [
            Series(side, [e[f"{side}_reward"] for e in evaluations], colour, at, dots=True)
            for side, colour in sides.items()
        ],
        x_label="DPO steps done",
        title="Implicit reward on held-out pairs",
        levels=[Level("reference", 0.0, left=True)],
    )
    return (
        f'<div class="charts"><div>{table(("", "#", ""), rows)}<p>Sums over the tokens of an '
        "answer, each token's KL exact over the whole vocabulary; only the answers are sampled. "
        "The loss sees the difference of the two curves alone: both may fall, which makes the "
        f"chosen answers less likely than they were.</p></div>{drift}</div>"
    )


def samples(rows: Sequence[Mapping[str, Any]] | None) -> str:
    """Answers before and after, to the same prompts."""
    if rows is None:
        return (
            "<p>Not shown: these are your texts. <code>dpo-ext demo --data FILE "
            "--show-samples</code> shows them.</p>"
        )
    sides = {"reference": "reference (before)", "policy": "policy (after)"}
    head = "".join(f"<th>{name}</th>" for name in ("held-out prompt", *sides.values()))
    body = []
    for row in rows:
        cells = "".join(
            f'<td data-who="{name}">{score(row.get(side + "_reward"))}{escape(row[side].strip())}'
            "</td>"
            for side, name in sides.items()
        )
        body.append(f"<tr><td class=q>{escape(row['prompt'].strip())}</td>{cells}</tr>")
    legend = SCORES if any("policy_reward" in row for row in rows) else ""
    return f"{legend}<table class=samples><tr>{head}</tr>{''.join(body)}</table>"


def _pm(value: Mapping[str, float], form: str) -> str:
    return f"{value['mean']:{form}} ± {value['standard_error']:{form}}"


def _nats(value: Mapping[str, float]) -> str:
    error = significant(value["standard_error"], 1)
    places = len(error.partition(".")[2])
    return f"{value['mean']:.{places}f} ± {error} nats"


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def _smooth(values: Sequence[float], weight: float = 0.92) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total = norm = 0.0
    out = []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out
