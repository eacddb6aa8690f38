"""`dpo-ext verify`: is what we compute of your model and your rows what their own code computes?

N pairs. Each check is a comparison of numbers, with what the dtype explains beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from os import PathLike
from typing import Any, Literal

import numpy as np

from dpo_ext.cli.models import check_dtype, device_of, loaded
from dpo_ext.data.dataset import PairDataset
from dpo_ext.data.options import Options
from dpo_ext.data.tokenizer import Tokenizer
from dpo_ext.errors import DataError, DpoExtError
from dpo_ext.extras import need
from dpo_ext.layout.batch import Layout

State = Literal["same", "differs", "not compared"]
MARKS: dict[State, str] = {"same": "ok", "differs": "WRONG", "not compared": "-"}


@dataclass(frozen=True)
class Check:
    """One comparison."""

    name: str
    state: State
    said: str


def verify_model(
    model_folder: str | PathLike[str],
    files: Sequence[str],
    tokenizer_folder: str | PathLike[str],
    *,
    pairs: int,
    dtype: str,
    device: str,
    **options: Any,
) -> dict[str, Any]:
    """Compares the first ``pairs`` pairs of the files, prints a table and returns what ``--json``
    writes; ``"same"`` is the verdict.

    Raises:
        DataError: no pair can be read; a dtype that there is not.
    """
    need("torch", "`dpo-ext verify`")
    need("transformers", "`dpo-ext verify`")
    check_dtype(dtype)
    where = device_of(device)
    tokenizer = Tokenizer.from_pretrained(tokenizer_folder)
    given: Options = {**options}  # type: ignore[typeddict-item]
    data = PairDataset.from_files(files, tokenizer, **given)
    if not len(data):
        raise DataError("no row gives a pair\nhint: `dpo-ext stats` says why", reason="no_pairs")
    some = _first(data, pairs)
    print(f"{len(some)} of {len(data):,} pairs, {some.longest.max()} tokens at most\n")
    checks: list[Check] = []

    def tell(check: Check) -> None:
        checks.append(check)
        print(f"{MARKS[check.state]:<7}{check.name:<30}{check.said}")

    tell(_ids(files, tokenizer_folder, tokenizer, given, pairs))
    model = loaded(model_folder, dtype, where)
    for check in _scores(model, some, where):
        tell(check)
    wrong = [check.name for check in checks if check.state == "differs"]
    print(f"\ndiffers: {', '.join(wrong)}" if wrong else "\nthe same, where it was compared")
    return {
        "pairs": len(some),
        "model": type(model).__name__,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "device": where,
        "checks": [asdict(check) for check in checks],
        "same": not wrong,
    }


def _first(data: PairDataset, pairs: int) -> PairDataset:
    n = min(pairs, len(data))
    return PairDataset.from_ids(
        *(
            [data[i][name] for i in range(n)]
            for name in ("prompt_ids", "chosen_ids", "rejected_ids")
        ),
        pad_id=data.pad_id,
    )


# ---- ids ----------------------------------------------------------------------------------------


def _ids(
    files: Sequence[str], folder: Any, tokenizer: Tokenizer, options: Options, pairs: int
) -> Check:
    """Ids of prompt and sides beside TRL's own preparation, by transformers' tokenizer."""
    from dpo_ext.bench.peers import trl_times

    name = "ids, beside TRL's"
    as_trl: Options = {**options, "boundary": "trl", "max_length": None, "on_useless": "keep"}
    try:
        ours = PairDataset.from_files(files, tokenizer, **as_trl)
        theirs = trl_times(list(files), folder, ours, pairs, max(pairs, 1), as_trl)
    except DpoExtError:
        raise
    except Exception as error:  # of TRL's, on these rows
        said = str(error).strip().partition("\n")[0][:120]
        return Check(name, "not compared", f"TRL stops: {type(error).__name__}: {said}")
    if theirs is None:
        return Check(name, "not compared", "it needs TRL, and rows in JSON lines")
    said = f"{theirs.same} of {theirs.pairs} pairs, id for id"
    return Check(name, "same" if theirs.same == theirs.pairs else "differs", said)


# ---- scores -------------------------------------------------------------------------------------


def _scores(model: Any, pairs: PairDataset, device: str) -> Iterator[Check]:
    import torch

    from dpo_ext.torch import attach_scoring
    from dpo_ext.torch.attention import PACKED
    from dpo_ext.torch.audit import OF_OTHER_BATCHES, allowed

    dtype = next(model.parameters()).dtype
    batch = _batch(pairs, "padded", device)
    lengths = batch.table.lengths.cpu()
    with torch.no_grad():
        try:
            own = _own_logps(model, batch)
        except (IndexError, RuntimeError, ValueError) as error:
            said = f"{type(error).__name__}: {_first_line(error)}"
            raise DataError(
                f"the model cannot read these rows: {said}\n"
                "hint: is the tokenizer the model's, and `max_length` within its positions?"
            ) from error
        if not own.isfinite().all():
            said = f"{int((~own.isfinite()).sum())} of {own.numel()} are no numbers"
            yield Check("log-probs of the model", "differs", said)
            return
        try:
            attach_scoring(model)
            scores = model(**batch.model_inputs, score_table=batch.table)
        except (TypeError, DpoExtError) as error:
            yield Check("log-probs of the model", "differs", _first_line(error))
            return
    padded = scores.logps.cpu()

    def compared(name: str, found: Any, beside: str, slack: float = 1.0) -> Check:
        found = found.cpu().double()
        budget = slack * allowed(own, lengths, dtype)
        off = (found - own).abs()
        worst = int((off / budget).nan_to_num(torch.inf).argmax())
        same = bool((off <= budget).all())
        said = (
            f"off by {float(off.flatten()[worst]):.2g} nats of {float(own.flatten()[worst]):.1f}, "
            f"{float(budget.flatten()[worst]):.2g} allowed{beside}"
        )
        return Check(name, "same" if same else "differs", said)

    yield compared("log-probs, beside own logits", padded, f"; plan {scores.plan}")
    for layout in PACKED:
        yield _in_rows(model, pairs, layout, device, partial(compared, slack=OF_OTHER_BATCHES))
    yield _audit(model, batch, padded, lengths)


def _batch(pairs: PairDataset, layout: Layout, device: str) -> Any:
    plan = pairs.plan(layout=layout, pairs_per_batch=len(pairs), shuffle=False)
    (batch,) = plan
    return batch.to(device)


def _own_logps(model: Any, batch: Any) -> Any:
    """(N, 2) float64, from the logits that the model's own forward gives, row by row."""
    import torch

    table = batch.table
    logits = model(**batch.model_inputs).logits.flatten(0, -2)
    sums = []
    for first, end in zip(table.host_offsets[:-1], table.host_offsets[1:], strict=True):
        rows, targets = table.logit_rows[first:end], table.targets[first:end].long()
        logps = logits[rows].double().log_softmax(-1)
        sums.append(logps.gather(1, targets[:, None]).sum())
    return torch.stack(sums).reshape(-1, 2).cpu()


def _in_rows(
    model: Any,
    pairs: PairDataset,
    layout: Literal["packed", "shared"],
    device: str,
    compared: Callable[..., Check],
) -> Check:
    """The pairs in rows without padding, if the model keeps segments apart."""
    import torch

    from dpo_ext.torch import assert_packing_safe

    name = f"{layout} rows"
    try:
        assert_packing_safe(model, layout=layout, inputs=lambda batch: batch.inputs_for(model))
        batch = _batch(pairs, layout, device)
        with torch.no_grad():
            logps = model(**batch.inputs_for(model), score_table=batch.table).logps
    except Exception as error:  # it is refused, or the model cannot read such rows
        return Check(name, "not compared", f"padded batches serve: {_first_line(error)}")
    order = torch.as_tensor(np.argsort(np.asarray(batch.pair_index.cpu())))
    return compared(name, logps.cpu()[order], "")


def _audit(model: Any, batch: Any, padded: Any, lengths: Any) -> Check:
    """The first step of a training: the model in training mode beside itself as the reference."""
    import torch

    from dpo_ext.errors import RefLogpsError
    from dpo_ext.torch import audit_first_step, preference_loss
    from dpo_ext.torch.audit import causes_of

    name = "first step"

    def scored(seed: int) -> Any:
        torch.manual_seed(seed)
        return model(**batch.model_inputs, score_table=batch.table).logps.cpu()

    with torch.no_grad(), torch.random.fork_rng():
        model.train()
        try:
            logps, again = scored(0), scored(1)
            causes = list(causes_of(model, None))
        finally:
            model.eval()
    if not causes and not torch.equal(logps, again):
        causes = ["its training mode draws numbers (dropout)"]
    loss = float(preference_loss(logps, padded.to(logps.dtype)).loss)
    dtype = next(model.parameters()).dtype
    try:
        audit_first_step(logps, padded, lengths, dtype=dtype, causes=lambda _: causes)
    except RefLogpsError as error:
        if causes:  # training with dropout is a choice
            return Check(name, "same", f"{'; '.join(causes)}: the loss starts at {loss:.4f}")
        return Check(name, "differs", _first_line(error))
    return Check(name, "same", f"the loss starts at {loss:.6f}, log 2 is 0.693147")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__
