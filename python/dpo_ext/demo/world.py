"""A village help desk: text tasks whose reward is known exactly, so that what DPO learns can be
checked.

A villager asks one of eight things; an answer is an opening, one piece of advice, perhaps some
rambling, perhaps a closing. Each part has a weight, their sum is the answer's reward r, its
strength is a = exp(r), and of two answers to one prompt the first is preferred with the probability
of Bradley and Terry (1952):

    P(i > j) = a_i / (a_i + a_j) = sigmoid(r_i - r_j)

Labels are drawn with it, so no scorer can agree with all of them: the best agrees with mean(max(p,
1 - p)).
"""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOPICS = {
    "keep bread fresh": "Wrap it in a clean cloth.",
    "wake up early": "Go to bed an hour sooner.",
    "find north at night": "Look for the pole star.",
    "stop a door from squeaking": "Put some oil on the hinges.",
    "grow good tomatoes": "Give them six hours of sun.",
    "calm a barking dog": "Speak low and stand still.",
    "learn a long poem": "Say one new line each day.",
    "sharpen a knife": "Draw it along a wet stone.",
}
NAMES = (
    "Ada", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ivy", "Jonas", "Kate", "Leo",
    "Mina", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tilda", "Victor",
)  # fmt: skip
ASKING = (
    "how do I {}?",
    "how can I {}?",
    "what is the best way to {}?",
    "is there a good way to {}?",
    "please tell me how to {}.",
    "I would like to {}. How?",
)

# Sentences other than advice: feature, text, how often the reference's teacher says it (out of its
# slot's total).
OPENINGS = (
    ("warm", "Gladly, {}!", 3),
    ("warm", "Good question, {}!", 3),
    ("", "", 5),
    ("cold", "Not you again.", 3),
    ("cold", "What a silly thing to ask.", 3),
)
VAGUE = ("It depends.", "Who can say?", "Just try something.")
RAMBLING = (
    "That reminds me of my uncle.",
    "People say many things about it.",
    "But where was I?",
    "The weather has been odd lately.",
)
CLOSINGS = (
    ("kind", "Good luck!", 3),
    ("kind", "Come back any time.", 2),
    ("", "", 6),
    ("rude", "Now go away.", 4),
)
ADVICE_ODDS = (("right", 4), ("vague", 3), ("wrong", 4))
RAMBLING_ODDS = ((0, 5), (1, 3), (2, 2))

# The reward is linear in these counts. A sentence outside the grammar, or a missing advice, is what
# `garbled` counts.
WEIGHTS = {
    "right": 4.0,
    "wrong": -3.0,
    "warm": 1.6,
    "cold": -2.0,
    "other_name": -2.0,
    "kind": 1.0,
    "rude": -2.4,
    "rambling": -1.2,
    "garbled": -6.0,
}
FEATURES = tuple(WEIGHTS)
LABELS = {
    "right": "right advice",
    "wrong": "wrong advice",
    "warm": "warm opening",
    "cold": "cold opening",
    "other_name": "someone else's name",
    "kind": "kind closing",
    "rude": "rude closing",
    "rambling": "rambling (each)",
    "garbled": "garbled (each)",
}

_SENTENCE = re.compile(r"[^.!?]+[.!?]")
_ADVICE_TOPIC = {advice: topic for topic, advice in TOPICS.items()}
_OTHER = {text: feature for feature, text, _ in (*OPENINGS, *CLOSINGS) if text and "{}" not in text}
_OTHER |= dict.fromkeys(VAGUE, "vague") | dict.fromkeys(RAMBLING, "rambling")
_GREETING = {
    template.format(name): name for _, template, _ in OPENINGS if "{}" in template for name in NAMES
}


@dataclass(frozen=True)
class Task:
    """One prompt of the world: who asks, about which topic, in which words."""

    name: str
    topic: str
    asking: str

    @property
    def prompt(self) -> str:
        return f"{self.name} asks: {self.asking.format(self.topic)}\n"


@dataclass(frozen=True)
class LabelledPair:
    """Two answers to one task in the order of the drawn label.

    ``margin``: true reward of chosen minus that of rejected; ``sigmoid(margin)`` is the probability
    of the label.
    """

    task: Task
    chosen: str
    rejected: str
    margin: float

    @property
    def p_label(self) -> float:
        return 1.0 / (1.0 + math.exp(-self.margin))

    @property
    def row(self) -> dict[str, str]:
        return {"prompt": self.task.prompt, "chosen": self.chosen, "rejected": self.rejected}


def features(task: Task, answer: str) -> dict[str, int]:
    """How often each feature of ``FEATURES`` occurs in ``answer``, for any text at all.

    >>> task = Task("Ada", "sharpen a knife", ASKING[0])
    >>> counts = features(task, "Gladly, Ben! Draw it along a wet stone. Blah.")
    >>> {name: n for name, n in counts.items() if n}
    {'right': 1, 'warm': 1, 'other_name': 1, 'garbled': 1}
    """
    counts = dict.fromkeys(FEATURES, 0)
    advice = 0
    rest = _SENTENCE.sub("", answer).strip()
    for sentence in (found.strip() for found in _SENTENCE.findall(answer)):
        if sentence in _ADVICE_TOPIC:
            advice += 1
            counts["right" if _ADVICE_TOPIC[sentence] == task.topic else "wrong"] += 1
        elif sentence in _GREETING:
            counts["warm"] += 1
            counts["other_name"] += _GREETING[sentence] != task.name
        elif sentence in _OTHER:
            feature = _OTHER[sentence]
            if feature == "vague":
                advice += 1
            else:
                counts[feature] += 1
        else:
            counts["garbled"] += 1
    # One answer carries one piece of advice: repeating the good parts earns nothing.
    counts["garbled"] += bool(rest) + abs(advice - 1)
    for feature in ("right", "warm", "kind"):
        counts["garbled"] += max(0, counts[feature] - 1)
        counts[feature] = min(1, counts[feature])
    return counts


def reward(task: Task, answer: str) -> float:
    """The true reward r, the log of the answer's strength: ``sum(WEIGHTS[f] * features[f])``.

    >>> task = Task("Ada", "sharpen a knife", ASKING[0])
    >>> reward(task, "Gladly, Ada! Draw it along a wet stone. Good luck!")
    6.6
    """
    counts = features(task, answer)
    return round(sum(WEIGHTS[name] * counts[name] for name in FEATURES), 6)


def best_reward() -> float:
    """The highest reward that an answer can have: right, warm and kind, and nothing else."""
    return sum(WEIGHTS[name] for name in ("right", "warm", "kind"))


def sample_answer(rng: random.Random, task: Task) -> str:
    """An answer of the teacher, who is right, kind and brief only now and then; the reference
    learns to imitate it.
    """
    parts = [_draw(rng, OPENINGS).format(task.name if rng.random() < 0.7 else rng.choice(NAMES))]
    kind = _draw_odds(rng, ADVICE_ODDS)
    if kind == "right":
        parts.append(TOPICS[task.topic])
    elif kind == "vague":
        parts.append(rng.choice(VAGUE))
    else:
        parts.append(TOPICS[rng.choice([topic for topic in TOPICS if topic != task.topic])])
    parts += rng.sample(RAMBLING, _draw_odds(rng, RAMBLING_ODDS))
    parts.append(_draw(rng, CLOSINGS))
    return " ".join(part for part in parts if part)


def draw_world(
    seed: int, train_pairs: int, heldout_pairs: int
) -> tuple[list[LabelledPair], list[LabelledPair]]:
    """Labelled pairs for training and for measuring; no prompt is in both."""
    rng = random.Random(f"dpo_ext demo {seed}")
    tasks = [Task(name, topic, asking) for name in NAMES for topic in TOPICS for asking in ASKING]
    rng.shuffle(tasks)
    border = len(tasks) // 4
    heldout, train = tasks[:border], tasks[border:]
    return _draw_pairs(rng, train, train_pairs), _draw_pairs(rng, heldout, heldout_pairs)


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    """JSON lines, gzipped; the same rows give the same bytes."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _draw_pairs(rng: random.Random, tasks: list[Task], count: int) -> list[LabelledPair]:
    pairs = []
    for i in range(count):
        task = tasks[i % len(tasks)]
        first = second = sample_answer(rng, task)
        while second == first:
            second = sample_answer(rng, task)
        pair = LabelledPair(task, first, second, reward(task, first) - reward(task, second))
        if rng.random() >= pair.p_label:
            pair = LabelledPair(task, second, first, -pair.margin)
        pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def _draw(rng: random.Random, slot: tuple[tuple[str, str, int], ...]) -> str:
    return rng.choices([text for _, text, _ in slot], [odds for _, _, odds in slot])[0]


def _draw_odds(rng: random.Random, odds: tuple[tuple[Any, int], ...]) -> Any:
    return rng.choices([value for value, _ in odds], [weight for _, weight in odds])[0]
