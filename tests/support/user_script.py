"""What a user writes, checked by mypy --strict and pyright in strict mode."""

from collections.abc import Iterator
from typing import assert_type

import torch
from torch import Tensor, nn

from dpo_ext import Batch, BatchPlan, PairDataset, Report, Tokenizer, prepare
from dpo_ext.torch import (
    ModelScores,
    PairLoader,
    PreferenceLoss,
    ScoreTable,
    attach_scoring,
    preference_loss,
    register_loss,
)


class Model(nn.Module):
    pass


def train(folder: str, model: Model) -> None:
    tokenizer = Tokenizer.from_pretrained(folder)
    pairs = PairDataset.from_files("pairs.jsonl", tokenizer, max_length=512, on_bad="skip")
    train_pairs, held_out = pairs.split(0.1)
    assert_type(train_pairs, PairDataset)
    assert_type(held_out[:3], PairDataset)
    assert_type(pairs.select([1]).concat(held_out), PairDataset)
    plan = train_pairs.plan(layout="packed", tokens_per_batch=1024)
    assert_type(plan, BatchPlan)
    assert_type(plan[0], Batch)
    assert_type(plan[:2], list[Batch])
    scoring = attach_scoring(model)
    assert_type(scoring, Model)
    loader = PairLoader(plan, device="cpu")
    assert_type(iter(loader), Iterator[Batch])
    for batch in loader:
        assert_type(batch.table, ScoreTable)
        scores: ModelScores = scoring(**batch.model_inputs, score_table=batch.table)
        assert_type(scores.logps, Tensor)
        out = preference_loss(scores.logps, batch.ref_logps, loss="dpo", beta=0.1)
        assert_type(out, PreferenceLoss)
        assert_type(out.loss, Tensor)
        out.loss.backward()  # type: ignore[no-untyped-call]
        print(out.metrics["rewards/margins"], pairs[0]["prompt_ids"].shape)
    assert_type(prepare("pairs.jsonl", tokenizer, "out", on_bad="skip"), Report)


@register_loss("mine", replace=True)
def mine(logps: Tensor, ref_logps: Tensor, beta: float = 0.1) -> Tensor:
    return -torch.nn.functional.logsigmoid(beta * (logps - ref_logps).sum(1))


assert_type(mine(torch.zeros(1, 2), torch.zeros(1, 2)), Tensor)
