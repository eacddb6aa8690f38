"""report.html: one self-contained file from the numbers of `run_demo`, no link, no script, light
and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dpo_ext.demo import world
from dpo_ext.pages import charts
from dpo_ext.pages.charts import Level, Series
from dpo_ext.pages.page import page

LOG_2 = math.log(2.0)
SECTIONS = {
    "glance": "At a glance",
    "step0": "Step 0: the mathematics before the learning",
    "training": "Training",
    "heldout": "Held-out pairs",
    "reward": "True reward of sampled answers",
    "learned": "What the policy learned to like",
    "kl": "How far it moved",
    "samples": "Samples, side by side",
    "data": "The data",
    "seconds": "Seconds by stage",
    "how": "How it was measured",
}
NO_REWARD = (
    "Left out: the true reward of answers to your own prompts is not known. Without "
    "<code>--data</code> the demo generates a world in which it is."
)


def render(metrics: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] | None) -> str:
    """The page. ``metrics`` is what metrics.json holds; ``samples`` are rows to show, None to show
    none.
    """
    m = metrics
    bodies = {
        "glance": _glance(m),
        "step0": _step_zero(m["step_zero"]),
        "training": _training(m),
        "heldout": _heldout(m),
        "reward": _reward(m) if m["known_reward"] else _left_out(),
        "learned": _learned(m) if m["known_reward"] else _left_out(),
        "kl": _kl(m),
        "samples": _samples(samples),
        "data": _data(m),
        "seconds": charts.bars(list(m["seconds"].items()), unit="s"),
        "how": _how(m),
    }
    sections = "".join(
        f'<section id="{key}"><h2>{escape(SECTIONS[key])}</h2>{bodies[key]}</section>'
        for key in SECTIONS
    )
    subtitle = (
        f"{escape(m['source'])} · seed {m['seed']} · {m['train_pairs']:,} pairs to train on, "
        f"{m['heldout_pairs']:,} held out · a Llama of {m['parameters']:,} weights · "
        f"{sum(m['seconds'].values()):.0f} s"
    )
    return page(subtitle, sections)


def _glance(m: Mapping[str, Any]) -> str:
    held, zero = m["heldout"], m["step_zero"]
    tiles = []
    if m["known_reward"]:
        checks = {check["name"]: check for check in m["checks"]}
        ratio, win = (
            checks["held-out accuracy / best reachable"],
            checks["win rate over the reference"],
        )
        tiles.append(
            _tile(
                f"{ratio['value']:.1%}",
                "of the best reachable accuracy on held-out pairs",
                f"{held['expected_accuracy']:.3f} of {held['best_accuracy']:.3f}; target "
                f"{ratio['target']:.0%}",
                _mark(m, ratio),
            )
        )
        tiles.append(
            _tile(
                f"{win['value']:.1%}",
                "of answers beat the reference's, by true reward",
                f"ties count half; target {win['target']:.0%}",
                _mark(m, win),
            )
        )
        reward = m["reward"]
        tiles.append(
            _tile(
                f"{reward['reference']['mean']:+.2f} → {reward['policy']['mean']:+.2f}",
                "mean true reward of an answer",
                f"the best possible answer has {reward['best_answer']:+.2f}",
                None,
            )
        )
    else:
        tiles.append(
            _tile(
                f"{held['drawn_accuracy']:.1%}",
                "accuracy on held-out pairs",
                "chance is 50 %; the best reachable is not known",
                None,
            )
        )
        tiles.append(
            _tile(
                f"{m['dpo']['loss'][0]:.3f} → {_last(m['dpo']['loss']):.3f}",
                "DPO loss, from log 2",
                "training batches",
                None,
            )
        )
    tiles.append(
        _tile(
            f"{zero['gradient_error']:.0e}",
            "relative distance of first gradient from float64",
            f"loss − log 2 = {zero['loss'] - LOG_2:+.0e}",
            zero["passed"],
        )
    )
    kl = m["kl"]
    tiles.append(
        _tile(
            f"{kl['policy_reference']['mean']:.1f} nats",
            "KL(policy ‖ reference) of an answer",
            f"KL(reference ‖ policy): {kl['reference_policy']['mean']:.1f} nats",
            None,
        )
    )
    limits = "".join(f"<li>{escape(text)}</li>" for text in m["limits"])
    note = f"<p>What the demo limited to stay short:</p><ul>{limits}</ul>" if limits else ""
    if not m["known_reward"]:
        note += (
            "<p>A model this small, trained for about a minute, learns little of real "
            "conversations; what this page shows is that the whole path runs on your file, and "
            "that its first step is right.</p>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>{note}'


def _step_zero(zero: Mapping[str, Any]) -> str:
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
    cells = "".join(
        f"<tr><td>{escape(a)}</td><td class=n>{b}</td><td>{escape(c)}</td></tr>" for a, b, c in rows
    )
    return (
        "<p>At the first step policy and reference are the same model, so every margin is 0 and "
        "the loss must be log&nbsp;2. That alone proves little: with a wrong sign it would be "
        "log&nbsp;2 too. So the first gradient is compared with the one that plain torch finds "
        "in float64 from the same weights and the same batch, with <code>log_softmax</code>, "
        f"<code>gather</code> and nothing of dpo_ext.</p><table>{cells}</table>"
    )


def _training(m: Mapping[str, Any]) -> str:
    dpo = m["dpo"]
    evaluations = dpo["evaluations"]
    at = [e["step"] for e in evaluations]

    def curve(name: str, label: str, levels: Sequence[Level], first: int = 0) -> str:
        values = dpo[name][first:]
        steps = list(range(first + 1, len(dpo[name]) + 1))
        return charts.line_chart(
            [
                Series("a batch", values, "policy", steps, faint=True),
                Series("training", _smooth(values), "policy", steps),
                Series("held-out", [e[name] for e in evaluations], "truth", at, dots=True),
            ],
            x_label="DPO step",
            y_label=label,
            levels=levels,
        )

    best = (
        [Level("best reachable", m["heldout"]["best_accuracy"])]
        if m["known_reward"]
        else [Level("chance", 0.5)]
    )
    # At the first step every margin is exactly 0, which counts as no agreement: not shown.
    accuracy = curve("accuracy", "accuracy", best, first=1)
    sft = m["sft"]["nats_per_token"]
    fine_tuning = charts.line_chart(
        [Series("fine-tuning", sft, "reference", list(range(1, len(sft) + 1)))],
        x_label="fine-tuning step",
        y_label="nats a token",
    )
    accuracy_note = (
        "Held-out accuracy is the expected one (see below); training accuracy is that of the "
        "drawn labels."
        if m["known_reward"]
        else "Accuracy is the share of pairs whose chosen answer has the higher implicit reward."
    )
    return (
        f'<div class="charts">{curve("loss", "DPO loss", [Level("log 2", LOG_2)])}'
        f"{curve('margin', 'margin: implicit reward of chosen − rejected', [])}"
        + f"{accuracy}{fine_tuning}</div><p>The supervised model becomes the reference and is "
        f"frozen; DPO starts from it. {accuracy_note}</p>"
    )


def _heldout(m: Mapping[str, Any]) -> str:
    held = m["heldout"]
    if not m["known_reward"]:
        return (
            f"<p>The policy's implicit reward agrees with <b>{held['drawn_accuracy']:.1%}</b> of "
            f"{m['heldout_pairs']:,} held-out labels (standard error {held['drawn_error']:.1%}). "
            "How much any scorer could reach on this file is not known: its labels come with no "
            "probabilities.</p>"
        )
    rows = [
        ("expected over the labels", held["expected_accuracy"], held["best_accuracy"]),
        ("on the labels as drawn", held["drawn_accuracy"], held["drawn_accuracy_of_truth"]),
    ]
    cells = "".join(
        f"<tr><td>{a}</td><td class=n>{b:.4f}</td><td class=n>{c:.4f}</td><td "
        f"class=n>{b / c:.1%}</td></tr>"
        for a, b, c in rows
    )
    points = charts.scatter(
        held["true_margins"],
        held["margins"],
        x_label="true reward, chosen − rejected",
        y_label="implicit reward, chosen − rejected",
        diagonal="DPO's optimum",
    )
    return (
        '<div class="charts"><div><table><tr><th>accuracy</th><th class=n>policy</th>'
        f"<th class=n>best reachable</th><th class=n>ratio</th></tr>{cells}</table><p>Labels are "
        "drawn with probability p, so even the true reward disagrees with some. In expectation a "
        "pair is worth p where a scorer agrees with its label and 1&nbsp;−&nbsp;p where not; the "
        "true reward reaches mean(max(p, 1&nbsp;−&nbsp;p)), and no scorer more. The first row is "
        "the one with the target: it has no noise of the drawn labels. No held-out prompt was "
        f"trained on.</p></div>{points}</div>"
    )


def _reward(m: Mapping[str, Any]) -> str:
    reward = m["reward"]
    before = Series("reference", reward["reference_rewards"], "reference")
    after = Series("policy", reward["policy_rewards"], "policy")
    features = [
        (world.LABELS[name], reward["reference_features"][name], reward["policy_features"][name])
        for name in world.FEATURES
    ]
    rewards = charts.histogram([before, after], x_label="true reward of an answer")
    counts = charts.dumbbells(
        features, before=before, after=after, x_label="how often in an answer"
    )
    return (
        f'<div class="charts">{rewards}{counts}</div>'
        f"<p>Both models answer the same {len(reward['policy_rewards']):,} held-out prompts, one "
        "sample each at temperature 1. The policy's answer has the higher true reward in "
        f"<b>{_pm(reward['win_rate'], '.1%')}</b> of them, ties counted half; the world's own "
        "labeller, who prefers i to j with probability a_i/(a_i+a_j), would prefer it in "
        f"<b>{_pm(reward['bt_win_rate'], '.1%')}</b>.</p>"
    )


def _learned(m: Mapping[str, Any]) -> str:
    learned = m["learned_weights"]
    truth, policy = Series("true weight", [], "truth"), Series("learned", [], "policy")
    rows = [(world.LABELS[name], world.WEIGHTS[name], value) for name, value in learned.items()]
    weights = charts.dumbbells(rows, before=truth, after=policy, x_label="weight in the reward")
    table = "".join(
        f"<tr><td>{escape(name)}</td><td class=n>{a:+.2f}</td><td class=n>{b:+.2f}</td></tr>"
        for name, a, b in rows
    )
    return (
        f'<div class="charts">{weights}'
        "<div><p>The policy was never told about features: it saw which of two texts was "
        f"preferred. Its implicit reward, β·log(policy/reference) with β = {m['recipe']['beta']}, "
        "is fitted here by the features of the held-out answers. At DPO's optimum it equals the "
        "true reward up to a constant of the prompt, so the dots would meet; a short run stops "
        "short of it.</p><details><summary>The same as "
        "numbers</summary><table><tr><th>feature</th><th class=n>true</th><th "
        f"class=n>learned</th></tr>{table}</table></details></div></div>"
    )


def _kl(m: Mapping[str, Any]) -> str:
    kl, at = m["kl"], [e["step"] for e in m["dpo"]["evaluations"]]
    both = [
        (
            "KL(policy ‖ reference)",
            kl["policy_reference"],
            "over the policy's own answers: what training paid",
        ),
        (
            "KL(reference ‖ policy)",
            kl["reference_policy"],
            "over the reference's answers: what the policy gave up",
        ),
    ]
    cells = "".join(
        f"<tr><td>{a}</td><td class=n>{_pm(b, '.2f')} nats</td><td>{escape(c)}</td></tr>"
        for a, b, c in both
    )
    drift = charts.line_chart(
        [
            Series(
                "chosen",
                [e["chosen_reward"] for e in m["dpo"]["evaluations"]],
                "policy",
                at,
                dots=True,
            ),
            Series(
                "rejected",
                [e["rejected_reward"] for e in m["dpo"]["evaluations"]],
                "reference",
                at,
                dots=True,
            ),
        ],
        x_label="DPO step",
        y_label="implicit reward on held-out pairs",
        levels=[Level("reference", 0.0)],
    )
    return (
        f'<div class="charts"><div><table>{cells}</table><p>Sums over the tokens of an answer, '
        "each token's KL exact over the whole vocabulary; only the answers are sampled. The loss "
        "sees the difference of the two curves alone: both may fall, which makes the chosen "
        f"answers less likely than they were.</p></div>{drift}</div>"
    )


def _samples(samples: Sequence[Mapping[str, Any]] | None) -> str:
    if samples is None:
        return (
            "<p>Not shown: these are your texts. <code>dpo-ext demo --data FILE "
            "--show-samples</code> shows them.</p>"
        )
    rows = []
    for s in samples:
        cells = "".join(
            f"<td>{_score(s.get(side + '_reward'))}{escape(s[side].strip())}</td>"
            for side in ("reference", "policy")
        )
        rows.append(f"<tr><td class=q>{escape(s['prompt'].strip())}</td>{cells}</tr>")
    return (
        "<table class=samples><tr><th>held-out prompt</th><th>reference (before)</th><th>policy "
        f"(after)</th></tr>{''.join(rows)}</table>"
    )


def _data(m: Mapping[str, Any]) -> str:
    return (
        f"<p>{escape(m['source'])}. The tokenizer is a byte-level BPE of {m['vocab_size']:,} "
        f"tokens, trained for this run.</p><pre>{escape(m['data_report'])}</pre>"
    )


def _how(m: Mapping[str, Any]) -> str:
    recipe = "".join(
        f"<tr><td>{escape(k)}</td><td class=n>{v}</td></tr>" for k, v in m["recipe"].items()
    )
    world_text = ""
    if m["known_reward"]:
        weights = ", ".join(
            f"{world.LABELS[name]} {value:+.1f}" for name, value in world.WEIGHTS.items()
        )
        world_text = (
            f"<p><b>The world.</b> A villager asks one of {len(world.TOPICS)} things; an answer "
            "is an opening, one piece of advice, perhaps some rambling and a closing. Its reward "
            f"r is a sum: {escape(weights)}. Its strength is a = exp(r), and labels are drawn "
            "with P(i&nbsp;&gt;&nbsp;j) = a_i/(a_i + a_j) (Bradley and Terry, 1952). The rows "
            "are in pairs.jsonl.gz.</p>"
        )
    versions = ", ".join(f"{escape(name)} {escape(str(v))}" for name, v in m["versions"].items())
    return (
        f"{world_text}<p><b>The path.</b> dpo_ext reads, encodes, pads and batches the pairs "
        "(Rust), computes the log-probs and their gradient (CPU kernels behind a "
        "torch.autograd.Function) and the loss; the model is transformers', the optimizer AdamW. "
        "Reference log-probs are computed once and carried by the batches.</p><p><b>± </b>is one "
        "standard error over prompts. Every number of this page is in "
        f"metrics.json.</p><details><summary>Recipe</summary><table>{recipe}</table></details><p "
        f"class=sub>{versions}</p>"
    )


def _left_out() -> str:
    return f"<p>{NO_REWARD}</p>"


def _tile(value: str, label: str, note: str, passed: bool | None) -> str:
    value = value.replace("-", "−")
    mark = "" if passed is None else '<i class="ok">✓</i>' if passed else '<i class="bad">✗</i>'
    return (
        f'<div class="tile"><b>{escape(value)}{mark}</b><span>{escape(label)}</span>'
        f"<small>{escape(note)}</small></div>"
    )


def _mark(m: Mapping[str, Any], check: Mapping[str, Any]) -> bool | None:
    """None where a quick run, which is not meant to, misses a target."""
    return None if m["quick"] and not check["passed"] else check["passed"]


def _score(value: float | None) -> str:
    if value is None:
        return ""
    css = "good" if value > 2 else "bad" if value < -2 else "middling"
    return f'<span class="score {css}">{value:+.1f}</span>'


def _pm(value: Mapping[str, float], form: str) -> str:
    return f"{value['mean']:{form}} ± {value['standard_error']:{form}}"


def _smooth(values: Sequence[float], weight: float = 0.92) -> list[float]:
    """Exponential moving average, corrected for its start."""
    total = norm = 0.0
    out = []
    for value in values:
        total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
        out.append(total / norm)
    return out


def _last(values: Sequence[float]) -> float:
    return _smooth(values)[-1]
