"""What was learned: accuracy on held-out pairs, sampled answers and their true reward, KL both
ways.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_ext.demo import world


@dataclass(frozen=True)
class Answers:
    """Sampled answers to some prompts: texts, the ids behind them, and how many ended by
    themselves.
    """

    texts: list[str]
    prompt_ids: list[list[int]]
    answer_ids: list[list[int]]
    finished: float


@dataclass(frozen=True)
class Mean:
    """A mean over independent samples, with its standard error."""

    value: float
    error: float

    @staticmethod
    def of(values: Any) -> Mean:
        values = np.asarray(values, float)
        error = values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        return Mean(float(values.mean()), float(error))

    def as_dict(self) -> dict[str, float]:
        return {"mean": self.value, "standard_error": self.error}


def margins(logps: np.ndarray, ref_logps: np.ndarray, beta: float) -> np.ndarray:
    """(n,) float64: implicit reward of chosen minus that of rejected, ``beta * log(policy /
    reference)``.
    """
    return beta * ((logps[:, 0] - ref_logps[:, 0]) - (logps[:, 1] - ref_logps[:, 1]))


def drawn_accuracy(margin: np.ndarray) -> float:
    """Share of pairs whose label the margin agrees with; an exact tie counts half."""
    return float(np.mean((margin > 0) + 0.5 * (margin == 0)))


def expected_accuracy(margin: np.ndarray, p_label: np.ndarray) -> float:
    """The same in expectation over the labels: a pair is worth p where the margin agrees, else 1 -
    p.

    No scorer exceeds ``mean(max(p, 1 - p))``, which the true reward reaches; the noise of the drawn
    labels is out.
    """
    p_agrees = np.where(margin > 0, p_label, np.where(margin < 0, 1.0 - p_label, 0.5))
    return float(np.mean(p_agrees))


def best_accuracy(p_label: np.ndarray) -> float:
    """``mean(max(p, 1 - p))``: what the true reward, the best scorer there is, reaches in
    expectation.
    """
    return float(np.mean(np.maximum(p_label, 1.0 - p_label)))


def expected_loss(margin: np.ndarray, p_label: np.ndarray) -> float:
    """The DPO loss in expectation over the labels: lowest, the entropy of the labels, where the
    margins are those of the true reward.
    """
    agrees, differs = np.logaddexp(0.0, -margin), np.logaddexp(0.0, margin)
    return float(np.mean(p_label * agrees + (1.0 - p_label) * differs))


@torch.no_grad()
def sample_answers(
    model: Any,
    decode: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    seed: int,
    on_token: Callable[[int], None] | None = None,
) -> Answers:
    """One answer a prompt, drawn from the model itself: temperature 1, nothing cut off.

    ``on_token`` hears how many tokens the longest answer has so far.
    """
    model.eval()
    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    for row, prompt in zip(ids, prompts, strict=True):
        row[width - len(prompt) :] = torch.tensor(prompt)
    attention = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    torch.manual_seed(seed)

    def never(found: Tensor, scores: Any, **_: Any) -> Tensor:
        if on_token is not None:
            on_token(found.shape[1] - width)
        return torch.zeros(len(found), dtype=torch.bool)

    drawn = model.generate(
        input_ids=ids,
        attention_mask=attention,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        eos_token_id=eos,
        stopping_criteria=[never],
    )[:, width:].tolist()
    answers = [row[: row.index(eos) + 1] if eos in row else row for row in drawn]
    return Answers(
        texts=[decode(row[:-1] if row[-1:] == [eos] else row) for row in answers],
        prompt_ids=[list(map(int, p)) for p in prompts],
        answer_ids=answers,
        finished=float(np.mean([row[-1:] == [eos] for row in answers])),
    )


@torch.no_grad()
def sequence_kl(sampled: Any, other: Any, answers: Answers, pad_id: int) -> Mean:
    """KL(sampled || other) of whole answers, in nats; ``answers`` must be samples of ``sampled``.

    Each position gives the exact KL of the two rows over the whole vocabulary, so only the prefixes
    are random: ``mean over answers of sum_t KL(sampled(. | y_<t) || other(. | y_<t))``.
    """
    totals: list[float] = []
    for start in range(0, len(answers.texts), 64):
        part = slice(start, start + 64)
        totals += _row_kl(
            sampled, other, answers.prompt_ids[part], answers.answer_ids[part], pad_id
        ).tolist()
    return Mean.of(totals)


def _row_kl(
    sampled: Any, other: Any, prompts: list[list[int]], answers: list[list[int]], pad_id: int
) -> Tensor:
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(prompts), width), pad_id)
    attention = torch.zeros_like(ids)
    predicts = torch.zeros(ids.shape, dtype=torch.bool)  # position t predicts a token of the answer
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        whole = len(prompt) + len(answer)
        ids[row, :whole] = torch.tensor([*prompt, *answer])
        attention[row, :whole] = 1
        predicts[row, len(prompt) - 1 : whole - 1] = True
    p, q = (
        model(input_ids=ids, attention_mask=attention, use_cache=False).logits.log_softmax(-1)
        for model in (sampled, other)
    )
    kl = (p.exp() * (p - q)).sum(-1).double()
    return torch.where(predicts, kl, 0.0).sum(1)


@dataclass(frozen=True)
class Judgement:
    """Answers of policy and reference to the same held-out prompts, by the true reward.

    ``wins``: (n,), 1 where the policy's answer has the higher true reward, 1/2 on a tie.
    ``bt_wins``: (n,), the probability that the world's own labeller prefers the policy's answer,
    ``a / (a + a')``.
    """

    policy_rewards: np.ndarray
    reference_rewards: np.ndarray
    wins: np.ndarray
    bt_wins: np.ndarray
    policy_features: dict[str, float]
    reference_features: dict[str, float]


def judge(tasks: Sequence[world.Task], policy: Answers, reference: Answers) -> Judgement:
    """Scores both sides' answers with the world's reward."""
    rewards = [
        np.array([world.reward(t, a) for t, a in zip(tasks, side.texts, strict=True)])
        for side in (policy, reference)
    ]
    means = [_mean_features(tasks, side.texts) for side in (policy, reference)]
    mine, theirs = rewards
    return Judgement(
        policy_rewards=mine,
        reference_rewards=theirs,
        wins=(mine > theirs) + 0.5 * (mine == theirs),
        bt_wins=1.0 / (1.0 + np.exp(theirs - mine)),
        policy_features=means[0],
        reference_features=means[1],
    )


def learned_weights(pairs: Sequence[world.LabelledPair], margin: np.ndarray) -> dict[str, float]:
    """The weight of each feature in the implicit reward, by least squares over the pairs' feature
    differences.
    """
    used = [name for name in world.FEATURES if name != "garbled"]  # the data has no garbled answers
    rows = []
    for pair in pairs:
        chosen = world.features(pair.task, pair.chosen)
        rejected = world.features(pair.task, pair.rejected)
        rows.append([chosen[name] - rejected[name] for name in used])
    weights, *_ = np.linalg.lstsq(np.array(rows, float), margin, rcond=None)
    return dict(zip(used, map(float, weights), strict=True))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's, 0 where one side does not vary."""
    if np.std(a) == 0 or np.std(b) == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _mean_features(tasks: Sequence[world.Task], texts: Sequence[str]) -> dict[str, float]:
    counts = [world.features(t, a) for t, a in zip(tasks, texts, strict=True)]
    return {name: float(np.mean([c[name] for c in counts])) for name in world.FEATURES}
