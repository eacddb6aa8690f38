"""KTO in a loop of one's own against TRL's KTOTrainer: the same ids, batches and history."""

import contextlib
import os
import tempfile
from dataclasses import replace

import datasets
import pytest
import torch
import trl
import trl_runs as runs
from transformers import AutoModelForCausalLM

from dpo_ext import PairDataset, Tokenizer, UnpairedDataset
from dpo_ext.torch import PairLoader, attach_scoring, kto_z, unpaired_loss

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

N, STEPS, LR = 4, 4, 1e-3
LENGTH = 96  # cuts some completions, and takes some prompts for themselves
FORMATS = ("text_explicit", "chat_explicit")


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A model, its data, and another model near it: the reference, under which z is not 0."""
    out = runs.write_material(tmp_path_factory.mktemp("kto"), pairs=40)
    other = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    torch.manual_seed(8)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    other.save_pretrained(out / "reference")
    return out


def rows_of(material, name):
    """Single completions; the first batches are mixed, then all desirable, then all not."""
    labels = [i % 3 != 0 for i in range(2 * N)] + [True] * N + [False] * 40
    kept = {True: "chosen", False: "rejected"}
    data = runs.load(material, name)
    tokenizer = runs.tokenizer(material)
    rows = []
    for row in data:
        if len(rows) == STEPS * N:
            break
        label = labels[len(rows)]
        prompt = row["prompt"]
        if isinstance(prompt, str):
            length = len(tokenizer(prompt)["input_ids"])
        else:
            length = len(tokenizer.apply_chat_template(prompt)["input_ids"])
        if length < LENGTH - 8:
            rows.append({"prompt": prompt, "completion": row[kept[label]], "label": label})
    return rows


def stock(material, rows, **options):
    """A trainer of TRL's."""
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    args = trl.KTOConfig(
        output_dir=tempfile.mkdtemp(dir=material),
        max_steps=STEPS,
        logging_steps=1,
        per_device_train_batch_size=N,
        max_length=LENGTH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    return trl.KTOTrainer(
        str(material / "model"),
        ref_model=model_of(material, "reference"),
        args=args,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=runs.tokenizer(material),
    )


def stock_history(material, rows, **options):
    trainer = stock(material, rows, **options)
    with contextlib.redirect_stdout(None):
        trainer.train()
    dropped = ("learning_rate", "num_tokens", "epoch", "step")
    history = runs.history(trainer)[:STEPS]
    return [{k: v for k, v in row.items() if k not in dropped} for row in history]


def model_of(material, name):
    return AutoModelForCausalLM.from_pretrained(material / name, dtype=torch.float32)


def examples_of(material, rows, **options):
    tokenizer = Tokenizer.from_pretrained(material / "model")
    chosen = {"boundary": "trl", "on_useless": "keep", "max_length": LENGTH} | options
    return UnpairedDataset.from_rows(rows, tokenizer, **chosen)


def history(
    material,
    examples,
    *,
    layout="padded",
    loss="kto",
    columns=False,
    change=lambda batch: batch,
    names=("model", "reference"),
    **params,
):
    """The history of a plain loop, with the keys of TRL's."""
    has_kl = loss == "kto"
    policy, reference = (attach_scoring(model_of(material, name)) for name in names)

    def score(model, batch):
        return model(
            **batch.model_inputs, score_table=batch.table, score_stats=("entropy", "mean_logit")
        )

    def plan(examples):
        return examples.plan(layout=layout, examples_per_batch=N, shuffle=False, kl=has_kl)

    if columns:
        examples = with_reference(examples, plan(examples), lambda b: score(reference, b))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    found = []
    for batch in map(change, PairLoader(plan(examples))):
        with torch.no_grad():
            if columns:
                known, kl_known = batch.ref_logps, batch.kl.ref_logps if has_kl else None
            else:
                known = score(reference, batch).logps[:, 0]
                kl_known = score(reference, batch.kl).logps[:, 0] if has_kl else None
            if has_kl:
                params["z"] = kto_z(score(policy, batch.kl).logps[:, 0], kl_known)
        scores = score(policy, batch)
        out = unpaired_loss(scores.logps[:, 0], known, batch.labels, loss=loss, beta=0.1, **params)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        metrics = out.metrics_over(scores=scores.tokens, table=batch.table)
        metrics |= {"loss": out.loss, "grad_norm": norm}
        if not has_kl:
            metrics["kl"] = torch.zeros(())
        found.append({name: value.item() for name, value in metrics.items()})
    return found


def with_reference(examples, plan, score):
    """The examples with what a reference says of them and of the plan's mismatched completions."""
    known, kl = torch.zeros(len(examples)), torch.zeros(len(examples))
    whose = torch.zeros(len(examples), dtype=torch.int64)
    with torch.no_grad():
        for batch in PairLoader(plan):
            known[batch.pair_index] = score(batch).logps[:, 0]
            kl[batch.kl.pair_index] = score(batch.kl).logps[:, 0]
            whose[batch.kl.pair_index] = batch.kl.completion_index
    return examples.with_ref_logps(known.numpy(), kl=kl.numpy(), kl_completions=whose.numpy())


@pytest.fixture(scope="module")
def expected(material):
    """TRL's history of each format and loss, made once."""
    made = {}

    def of(name, **options):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = stock_history(material, rows_of(material, name), **options)
        return made[key]

    return of


@pytest.mark.parametrize("name", FORMATS)
def test_ids_and_batches_are_stocks(material, name):
    rows = [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in runs.load(material, name)
        for side in ("chosen", "rejected")
    ]
    trainer = stock(material, rows)
    prepared = trainer.train_dataset
    examples = examples_of(material, rows, on_bad="skip")
    assert 0 < examples.report.dropped["no_completion_tokens"] == len(rows) - len(prepared)
    assert examples.prompt_ids.tolist() == prepared["prompt_ids"][:]
    assert examples.completion_ids.tolist() == prepared["completion_ids"][:]
    assert examples.labels.tolist() == prepared["label"][:]
    cut = 0
    for batch in examples.plan(layout="padded", examples_per_batch=N, shuffle=False):
        batch = batch.to("cpu")
        wanted = trainer.data_collator([prepared[i] for i in batch.pair_index.tolist()])
        assert torch.equal(batch.labels, wanted["label"])
        for prefix, found in (("", batch), ("KL_", batch.kl)):
            for field in ("input_ids", "attention_mask", "completion_mask"):
                assert torch.equal(getattr(found, field), wanted[prefix + field]), field
            labels = found.input_ids.masked_fill(found.completion_mask == 0, -100)
            flat = labels[:, 1:][labels[:, 1:] != -100]
            assert torch.equal(found.table.targets.long(), flat)
            cut += int((found.attention_mask.sum(1) == LENGTH).sum())
    assert cut > 0


@pytest.mark.parametrize("name", FORMATS)
def test_pairs_are_unpaired_in_stocks_order(material, name, monkeypatch):
    monkeypatch.setattr("dpo_ext.data.unpaired.TRLS_PART", 7)
    rows = runs.load(material, name)
    tokenizer = Tokenizer.from_pretrained(material / "model")
    pairs = PairDataset.from_rows(rows, tokenizer, boundary="trl", max_length=None)
    examples = UnpairedDataset.from_pairs(pairs)
    unpaired = trl.data_utils.unpair_preference_dataset(rows, batch_size=7)
    single = examples_of(material, unpaired, max_length=None)
    assert examples.prompt_ids == single.prompt_ids
    assert examples.completion_ids == single.completion_ids
    assert examples.labels.tolist() == unpaired["label"][:]


@pytest.mark.parametrize("columns", [False, True], ids=["live", "columns"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", FORMATS)
def test_the_history_is_stocks(material, expected, name, layout, columns):
    wanted = expected(name)
    assert sum(row["kl"] > 0 for row in wanted) >= STEPS - 1
    # Two batches have one class alone.
    assert ["rewards/margins" in row for row in wanted] == [True, True, False, False]
    examples = examples_of(material, rows_of(material, name))
    found = history(material, examples, layout=layout, columns=columns)
    assert not runs.differences(wanted, found)


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"desirable_weight": 1.33, "undesirable_weight": 0.5}, {"lam_d": 1.33, "lam_u": 0.5}),
        ({"loss_type": "apo_zero_unpaired"}, {"loss": "apo_zero_unpaired"}),
    ],
    ids=["weights", "apo_zero_unpaired"],
)
def test_the_history_of_other_options_is_stocks(material, expected, options, params):
    wanted = expected("text_explicit", **options)
    examples = examples_of(material, rows_of(material, "text_explicit"))
    assert not runs.differences(wanted, history(material, examples, **params))


def rolled(examples, batch):
    """The prompts with the completions of the example after them, and not before."""
    turned = examples.select(batch.pair_index.flip(0).numpy())
    (other,) = turned.plan(layout="padded", examples_per_batch=N, shuffle=False)
    return replace(batch, kl=other.kl.to("cpu"))


SABOTAGE = {
    "rolled KL completions": rolled,
    "matched KL completions": lambda _, batch: replace(batch, kl=batch),
    "flipped labels": lambda _, batch: replace(batch, labels=~batch.labels),
    "one label flipped": lambda _, batch: replace(
        batch, labels=batch.labels ^ (torch.arange(N) == 0)
    ),
}


@pytest.mark.parametrize("how", SABOTAGE)
def test_a_wrong_batch_is_seen(material, expected, how):
    examples = examples_of(material, rows_of(material, "text_explicit"))
    found = history(material, examples, change=lambda batch: SABOTAGE[how](examples, batch))
    assert runs.differences(expected("text_explicit"), found)


def test_a_swapped_reference_is_seen(material, expected):
    examples = examples_of(material, rows_of(material, "text_explicit"))
    found = history(material, examples, names=("model", "model"))
    assert runs.differences(expected("text_explicit"), found)
    swapped = lambda b: replace(  # noqa: E731
        b, ref_logps=b.kl.ref_logps, kl=replace(b.kl, ref_logps=b.ref_logps)
    )
    found = history(material, examples, columns=True, change=swapped)
    assert runs.differences(expected("text_explicit"), found)
