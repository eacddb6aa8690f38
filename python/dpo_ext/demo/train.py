"""From a tokenizer to a policy: tiny random Llama, supervised fine-tuning, reference log-probs,
DPO.

Everything between the pairs and the gradient is `dpo_ext`: batches, score tables, log-probs and the
loss. The model is transformers', the optimizer torch's.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_ext import DpoExtError, PairDataset
from dpo_ext.demo.live import PlainShow
from dpo_ext.torch import PairLoader, ScoreTable, attach_scoring, preference_loss

LOG_2 = math.log(2.0)
# float32 against float64 through the whole model; measured 1e-6. A wrong sign gives 2, a lost
# factor 2 gives 0.5.
GRADIENT_TOLERANCE = 1e-4
LOG_2_TOLERANCE = 1e-6
SCORED_PAIRS = 64


@dataclass(frozen=True)
class Recipe:
    """What is trained and for how long; every number is in metrics.json.

    ``sft_both``: imitate both answers of a pair (in the generated world both are samples of the
    teacher), else chosen.
    """

    hidden: int
    layers: int
    sft_steps: int
    sft_pairs: int
    sft_lr: float
    sft_both: bool
    dpo_steps: int
    dpo_pairs: int
    dpo_lr: float
    beta: float
    max_length: int
    heads: int = 4
    evaluations: int = 8


@dataclass
class History:
    """What DPO did: one entry a step, and one an evaluation on held-out pairs."""

    loss: list[float] = field(default_factory=list)
    margin: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class StepZero:
    """The first step, where policy == reference: the loss, and the gradient against float64 by
    plain torch.
    """

    loss: float
    loss_float64: float
    gradient_norm: float
    gradient_error: float
    gradient_cosine: float

    @property
    def loss_ok(self) -> bool:
        return abs(self.loss - LOG_2) <= LOG_2_TOLERANCE

    @property
    def gradient_ok(self) -> bool:
        return self.gradient_norm > 0.0 and self.gradient_error <= GRADIENT_TOLERANCE


def new_model(vocab_size: int, pad_id: int, eos_id: int, recipe: Recipe, seed: int) -> Any:
    """A Llama of random weights, whose forward also takes ``score_table=``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.hidden * 5 // 2,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=2 * recipe.max_length,
        tie_word_embeddings=True,
        pad_token_id=pad_id,
        bos_token_id=None,
        eos_token_id=eos_id,
    )
    return attach_scoring(LlamaForCausalLM(config))


def fine_tune(
    model: Any, pairs: PairDataset, recipe: Recipe, seed: int, show: PlainShow
) -> list[float]:
    """Supervised fine-tuning on the answers; returns nats a token, step by step."""
    optimizer, scheduler = _optimizer(model, recipe.sft_lr, recipe.sft_steps)
    curve: list[float] = []
    model.train()
    for step, batch in enumerate(_batches(pairs, recipe.sft_pairs, recipe.sft_steps, seed), 1):
        rows = slice(None) if recipe.sft_both else slice(batch.n_pairs)
        ids, attention = batch.input_ids[rows], batch.attention_mask[rows]
        labels = ids.masked_fill(batch.completion_mask[rows] == 0, -100)
        table = ScoreTable.from_labels(labels).compact()
        logps = model(
            input_ids=ids, attention_mask=attention, use_cache=False, score_table=table
        ).logps
        loss = -logps.sum() / table.lengths.sum()
        _step(loss, model, optimizer, scheduler)
        curve.append(loss.item())
        show.step(step, **{"nats a token": curve[-1]})
    return curve


@torch.no_grad()
def pair_logps(model: Any, pairs: PairDataset, show: PlainShow | None = None) -> np.ndarray:
    """(n, 2) float64: log-probs of both answers of every pair, in the order of the data set."""
    model.eval()
    plan = pairs.plan(layout="padded", pairs_per_batch=SCORED_PAIRS, shuffle=False)
    values = np.full((len(pairs), 2), np.nan)
    for step, batch in enumerate(PairLoader(plan, device="cpu"), 1):
        logps = model(**batch.model_inputs, score_table=batch.table).logps
        values[np.asarray(batch.pair_index)] = logps.double().numpy()
        if show is not None:
            show.step(step)
    return values


def train_dpo(
    policy: Any,
    pairs: PairDataset,
    recipe: Recipe,
    seed: int,
    show: PlainShow,
    evaluate: Callable[[int], dict[str, float]],
) -> tuple[History, StepZero]:
    """DPO on pairs that carry reference log-probs; raises if the first step is not what the
    mathematics says.

    ``evaluate(step)`` is called before the first step and then ``recipe.evaluations`` times, the
    last time after the last step.
    """
    optimizer, scheduler = _optimizer(policy, recipe.dpo_lr, recipe.dpo_steps)
    history, step_zero = History(), None
    parts = min(recipe.evaluations, recipe.dpo_steps)
    evaluated = {round(recipe.dpo_steps * (k + 1) / parts) for k in range(parts)}
    history.evaluations.append({"step": 0, **evaluate(0)})
    for step, batch in enumerate(_batches(pairs, recipe.dpo_pairs, recipe.dpo_steps, seed + 1), 1):
        policy.train()
        logps = policy(**batch.model_inputs, score_table=batch.table).logps
        out = preference_loss(logps, batch.ref_logps, loss="dpo", beta=recipe.beta)
        if step_zero is None:
            optimizer.zero_grad(set_to_none=True)
            out.loss.backward(retain_graph=True)
            step_zero = check_step_zero(policy, batch, out.loss.item(), recipe.beta)
            _require(step_zero)
            show.note(f"step 0: loss - log 2 = {step_zero.loss - LOG_2:+.1e}")
            show.note(f"step 0: gradient off float64 by {step_zero.gradient_error:.1e} (relative)")
        _step(out.loss, policy, optimizer, scheduler)
        history.loss.append(out.loss.item())
        history.margin.append(out.metrics["rewards/margins"].item())
        history.accuracy.append(out.metrics["rewards/accuracies"].item())
        show.step(
            step, loss=history.loss[-1], margin=history.margin[-1], accuracy=history.accuracy[-1]
        )
        if step in evaluated:
            history.evaluations.append({"step": step, **evaluate(step)})
    assert step_zero is not None  # dpo_steps >= 1
    return history, step_zero


def check_step_zero(policy: Any, batch: Any, loss: float, beta: float) -> StepZero:
    """Compares the gradient in ``policy`` with the one of the same loss in float64, by plain torch
    alone.

    Loss log 2 proves little: a wrong sign or a broken kernel gives it too, because the margin is 0
    by construction.
    """
    plain = _bare(policy)
    ids, mask = torch.as_tensor(batch.input_ids), torch.as_tensor(batch.completion_mask)[:, 1:]
    attention = torch.as_tensor(batch.attention_mask)
    logits = plain(input_ids=ids, attention_mask=attention, use_cache=False).logits[:, :-1]
    tokens = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    chosen, rejected = tokens.mul(mask).sum(1).view(2, -1)
    margin = (chosen - chosen.detach()) - (rejected - rejected.detach())
    loss64 = -torch.nn.functional.logsigmoid(beta * margin).mean()
    loss64.backward()
    ours = _gradient(policy)
    theirs = _gradient(plain)
    return StepZero(
        loss=loss,
        loss_float64=loss64.item(),
        gradient_norm=ours.norm().item(),
        gradient_error=((ours - theirs).norm() / theirs.norm()).item(),
        gradient_cosine=torch.nn.functional.cosine_similarity(ours, theirs, 0).item(),
    )


def save(model: Any, tokenizer: Path, folder: Path) -> None:
    """A folder that transformers and `Tokenizer.from_pretrained` load: weights, configuration, and
    the tokenizer's files. What stood there is replaced as a whole.
    """
    fresh = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    shutil.copytree(tokenizer, fresh, dirs_exist_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def frozen(model: Any) -> Any:
    """A copy that is never trained: the reference."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def _require(found: StepZero) -> None:
    if not found.loss_ok:
        raise DpoExtError(
            f"step 0: the loss must be log 2 within {LOG_2_TOLERANCE:.0e} where policy == "
            "reference, found "
            f"{found.loss:.8f}\nhint: please report this as a bug of dpo_ext, with the output of "
            "`pip freeze`"
        )
    if not found.gradient_ok:
        raise DpoExtError(
            f"step 0: the gradient must be within {GRADIENT_TOLERANCE:.0e} of the one in float64, "
            "found "
            f"{found.gradient_error:.1e} (norm {found.gradient_norm:.3g}, cosine "
            f"{found.gradient_cosine:.4f})\n"
            "hint: please report this as a bug of dpo_ext, with the output of `pip freeze`"
        )


def _bare(model: Any) -> Any:
    """The same weights in float64, in a model that `dpo_ext` has not touched."""
    from transformers import LlamaForCausalLM

    plain = LlamaForCausalLM(copy.deepcopy(model.config)).double()
    plain.load_state_dict(model.state_dict())
    return plain.train(model.training)


def _gradient(model: Any) -> Tensor:
    return torch.cat([p.grad.double().reshape(-1) for _, p in sorted(model.named_parameters())])


def _batches(pairs: PairDataset, pairs_per_batch: int, steps: int, seed: int) -> Any:
    """Batches for ``steps`` steps, over as many epochs as it takes."""
    plan = pairs.plan(layout="padded", pairs_per_batch=pairs_per_batch, seed=seed, drop_last=True)
    done = epoch = 0
    while done < steps:
        plan.set_epoch(epoch)
        for batch in PairLoader(plan, device="cpu"):
            yield batch
            done += 1
            if done == steps:
                return
        epoch += 1


def _optimizer(model: Any, rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW; the rate rises over a tenth of the steps, then falls to 0 along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    warm = max(1, steps // 10)

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _step(loss: Tensor, model: Any, optimizer: Any, scheduler: Any) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    scheduler.step()
