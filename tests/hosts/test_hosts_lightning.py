"""`dpo_ext.lightning`: the numbers of a plain loop, exact evaluation, resuming, and where a reference comes from."""

import copy
import importlib
import os
import runpy
import subprocess
import sys
import warnings

import pytest
import tiny
import warm
from pair_cases import random_pairs

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pl = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.loggers.logger import DummyLogger  # noqa: E402

from dpo_ext import DataError, PairDataset, TensorError, Tokenizer  # noqa: E402
from dpo_ext.errors import RefLogpsError  # noqa: E402
from dpo_ext.lightning import DPOModule, PairDataModule, host  # noqa: E402
from dpo_ext.torch import PairLoader, attach_scoring, preference_loss  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.slow,
]
TOKENS = 120
TRL_KEYS = {
    "loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins",
    "logps/chosen", "logps/rejected",
}  # fmt: skip


class History(DummyLogger):
    """What is logged, step by step."""

    def __init__(self):
        super().__init__()
        self.train, self.eval = [], []

    def log_metrics(self, metrics, step=None):
        values = {name: float(value) for name, value in metrics.items() if name != "epoch"}
        (self.eval if any(name.startswith("eval_") for name in values) else self.train).append(
            values
        )


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def trainer_of(tmp_path, **options):
    settings = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "logger": History(),
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": tmp_path,
    }
    return pl.Trainer(**{**settings, **options})


def fitted(tmp_path, data, trainer=None, ckpt_path=None, **options):
    module = DPOModule(tiny.model(), **{"optimizer": sgd, **options})
    trainer = trainer or trainer_of(tmp_path)
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return module, trainer


def parameters_of(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def furthest(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def scored(pairs, model):
    """The pairs with their log-probs under a model."""
    model = attach_scoring(model)
    values = torch.empty(len(pairs), 2)
    with torch.no_grad():
        for batch in PairLoader(pairs.plan(layout="padded", pairs_per_batch=7, shuffle=False)):
            logps = model(**batch.model_inputs, score_table=batch.table).logps
            values[batch.pair_index] = logps
    return pairs.with_ref_logps(values.double().numpy())


def plain(pairs, accumulate, epochs=1, seed=0, **loss):
    """A loop without Lightning: parameters, and the metrics of each step over its pairs."""
    model = attach_scoring(tiny.model())
    optimizer, history, counts = sgd(model.parameters()), [], []
    for epoch in range(epochs):
        batches = list(
            PairLoader(pairs.plan(layout="padded", tokens_per_batch=TOKENS, seed=seed, epoch=epoch))
        )
        counts.append(len(batches))
        for first in range(0, len(batches), accumulate):
            step = batches[first : first + accumulate]
            num_pairs = sum(batch.n_pairs for batch in step)
            outs = []
            for batch in step:
                logps = model(**batch.model_inputs, score_table=batch.table).logps
                out = preference_loss(
                    logps, batch.ref_logps, lengths=batch.table.lengths, num_pairs=num_pairs, **loss
                )
                out.loss.backward()
                outs.append(out)
            optimizer.step()
            optimizer.zero_grad()
            history.append({"loss": sum(out.loss.item() for out in outs)})
            for name in TRL_KEYS - {"loss"}:
                total = sum(out.metrics[name].item() * out.logps.shape[0] for out in outs)
                history[-1][name] = total / num_pairs
    return dict(model.named_parameters()), history, counts


def test_it_does_what_a_plain_loop_does(tmp_path):
    """Two epochs of unequal micro-batches, an unequal number of them, and a last step that is short."""
    pairs = scored(random_pairs(30), tiny.model())
    parameters, history, counts = plain(pairs, 3, epochs=3, loss="dpo", beta=0.1)
    assert len(set(counts)) > 1
    assert any(count % 3 for count in counts)
    trainer = trainer_of(tmp_path, max_epochs=3, accumulate_grad_batches=3)
    module, _ = fitted(tmp_path, PairDataModule(pairs, tokens_per_batch=TOKENS), trainer)
    assert furthest(parameters, parameters_of(module)) <= 1e-5
    found = trainer.logger.train
    assert [set(values) for values in found] == [TRL_KEYS] * len(history)
    for mine, theirs in zip(found, history, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)
    assert not trainer.logger.eval


@pytest.mark.parametrize(
    "loss", [{"loss": "simpo"}, {"loss": ["dpo", "sft"], "loss_weights": [1.0, 0.5]}]
)
def test_losses_by_name_with_their_parameters(loss, tmp_path):
    pairs = scored(random_pairs(30), tiny.model())
    own = {"gamma": 0.7} if loss["loss"] == "simpo" else {}
    parameters, history, _ = plain(pairs, 2, **loss, **own)
    trainer = trainer_of(tmp_path, accumulate_grad_batches=2)
    data = PairDataModule(pairs, tokens_per_batch=TOKENS)
    module, _ = fitted(tmp_path, data, trainer, **loss, **own)
    assert furthest(parameters, parameters_of(module)) <= 1e-5
    found = [values["loss"] for values in trainer.logger.train]
    assert found == pytest.approx([values["loss"] for values in history], abs=1e-5)


def test_a_loss_without_reference_scores_nothing_before_training(tmp_path):
    data = PairDataModule(random_pairs(12), pairs_per_batch=4)
    fitted(tmp_path, data, loss="simpo")
    assert not data.scored
    assert data.train.ref_logps is None


def test_the_router_loss_is_the_mean_over_the_batches_of_a_step(tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    def model():
        torch.manual_seed(0)
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=99, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
            )
        )  # fmt: skip

    pairs = scored(random_pairs(9), model())
    other = attach_scoring(model())
    batches = list(PairLoader(pairs.plan(layout="padded", pairs_per_batch=3, shuffle=False)))
    losses = []
    for batch in batches:
        scores = other(**batch.model_inputs, score_table=batch.table)
        own = preference_loss(scores.logps, batch.ref_logps, beta=0.1, num_pairs=9).loss
        losses.append(own + 0.5 * scores.aux_loss / 3)
        losses[-1].backward()
    sgd(other.parameters()).step()
    trainer = trainer_of(tmp_path, accumulate_grad_batches=4)  # the only step is a short one
    module = DPOModule(model(), beta=0.1, optimizer=sgd)
    trainer.fit(module, PairDataModule(pairs, pairs_per_batch=3, shuffle=False))
    assert furthest(dict(other.named_parameters()), parameters_of(module)) <= 1e-6
    assert trainer.logger.train[0]["loss"] == pytest.approx(sum(losses).item(), abs=1e-5)


# ---- the reference ------------------------------------------------------------------------------


def first_rewards(tmp_path, pairs, **options):
    trainer = trainer_of(tmp_path, max_steps=1)
    module, _ = fitted(
        tmp_path, PairDataModule(pairs, pairs_per_batch=6, shuffle=False), trainer, **options
    )
    return module, trainer.logger.train[0]


def test_where_the_reference_comes_from(tmp_path):
    pairs, other = random_pairs(12), tiny.model(seed=1)
    known = scored(pairs, copy.deepcopy(other))
    _, of_the_start = first_rewards(tmp_path, pairs)
    assert of_the_start["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert of_the_start["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    _, of_the_data = first_rewards(tmp_path, known, audit=False)
    assert of_the_data == first_rewards(tmp_path, known, reference="data", audit=False)[1]
    assert of_the_data["rewards/chosen"] != pytest.approx(0.0, abs=0.1)
    module, of_a_model = first_rewards(tmp_path, pairs, reference=other)
    assert of_a_model == pytest.approx(of_the_data, abs=1e-4)
    assert not any("frozen" in name for name in module.state_dict())
    assert all(p.grad is None for p in other.parameters())
    assert first_rewards(tmp_path, known, reference="policy")[1] == pytest.approx(
        of_the_start, abs=1e-4
    )
    with pytest.raises(TensorError, match="no reference log-probs\nhint: `fit` scores them"):
        first_rewards(tmp_path, pairs, reference="data")


def test_data_scored_by_another_model_stop_the_first_step(tmp_path):
    pairs = random_pairs(12)
    with pytest.raises(RefLogpsError, match="the policy is its own reference at the first step"):
        first_rewards(tmp_path, scored(pairs, tiny.model(seed=1)))
    mine = scored(pairs, tiny.model())
    swapped = pairs.with_ref_logps(mine.ref_logps[:, ::-1])
    with pytest.raises(RefLogpsError, match="found: chosen and rejected are swapped"):
        first_rewards(tmp_path, swapped)
    module, _ = first_rewards(tmp_path, mine)
    assert not module._audits


def test_a_fresh_dora_in_bfloat16_passes_the_audit(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", use_dora=True)
    model = peft.get_peft_model(tiny.model().to(torch.bfloat16), config)
    trainer = trainer_of(tmp_path, max_steps=1)
    module = DPOModule(model, optimizer=sgd, reference="adapter")
    trainer.fit(module, PairDataModule(random_pairs(12), pairs_per_batch=6, shuffle=False))
    assert not module._audits


def test_dropout_of_the_policy_is_none_of_the_audits_business(tmp_path):
    model = tiny.model()
    model.model.layers[0].mlp.act_fn = torch.nn.Sequential(
        model.model.layers[0].mlp.act_fn, torch.nn.Dropout(0.5)
    )
    pairs = random_pairs(12)
    mine = scored(pairs, copy.deepcopy(model).eval())
    trainer = trainer_of(tmp_path, max_steps=1)
    module = DPOModule(model, optimizer=sgd, disable_dropout=False)
    trainer.fit(module, PairDataModule(mine, pairs_per_batch=6, shuffle=False))
    assert trainer.logger.train[0]["loss"] != pytest.approx(0.6931472, abs=1e-4)


def test_an_adapter_is_switched_off_for_the_reference(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False
    )
    pairs = random_pairs(12)

    def run(**options):
        torch.manual_seed(0)
        model = peft.get_peft_model(tiny.model(), config)
        module = DPOModule(model, optimizer=sgd, **options)
        trainer = trainer_of(tmp_path)
        trainer.fit(module, PairDataModule(pairs, pairs_per_batch=6, shuffle=False))
        return trainer.logger.train

    with pytest.raises(RefLogpsError, match="12 of 12 sequences have other log-probs"):
        run(reference="adapter")
    off, before = run(reference="adapter", audit=False), run()
    assert before[0]["rewards/chosen"] == pytest.approx(0.0, abs=1e-4)
    assert abs(off[0]["rewards/chosen"]) > 0.1
    trainer = trainer_of(tmp_path)
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny.model(), config)
    module = DPOModule(model, optimizer=sgd, audit=False)
    trainer.fit(
        module, PairDataModule(scored(pairs, tiny.model()), pairs_per_batch=6, shuffle=False)
    )
    assert trainer.logger.train[0] == pytest.approx(off[0], abs=1e-4)


def test_dropout_is_off_unless_it_is_wanted(tmp_path):
    def model():
        return torch.nn.ModuleList([torch.nn.Dropout(0.5)]), tiny.model()

    for wanted in (True, False):
        dropout, llama = model()
        llama.model.drop = dropout
        module = DPOModule(llama, disable_dropout=wanted)
        assert module.model.model.drop[0].p == (0.0 if wanted else 0.5)


# ---- evaluation ---------------------------------------------------------------------------------


def held_out_means(module, held_out):
    """By hand, each held-out pair once."""
    with torch.no_grad():
        outs = [
            preference_loss(
                module(**b.model_inputs, score_table=b.table).logps, b.ref_logps, beta=0.1
            )
            for b in PairLoader(held_out.plan(layout="padded", pairs_per_batch=1, shuffle=False))
        ]
    means = {
        name: sum(out.metrics[name].item() for out in outs) / len(outs)
        for name in TRL_KEYS - {"loss"}
    }
    means["loss"] = sum(out.loss.item() for out in outs) / len(outs)
    return {f"eval_{name}": value for name, value in means.items()}


def test_evaluation_is_the_mean_over_the_held_out_pairs(tmp_path):
    data = PairDataModule(random_pairs(40), held_out=0.3, tokens_per_batch=TOKENS)
    trainer = trainer_of(
        tmp_path, accumulate_grad_batches=2, val_check_interval=3, num_sanity_val_steps=2
    )
    module, _ = fitted(tmp_path, data, trainer)
    assert len(data.train) + len(data.held_out) == 40
    assert len(trainer.logger.eval) > 1
    assert all(set(values) == TRL_KEYS for values in trainer.logger.train)
    trainer.validate(module, data, verbose=False)
    assert trainer.logger.eval[-1] == pytest.approx(held_out_means(module, data.held_out), abs=1e-4)


# ---- two processes ------------------------------------------------------------------------------


def one_rank(rank, port, out):
    """Fits in a rank of two, and writes what came out."""
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    warnings.simplefilter("ignore")
    found = {loss: run_of(loss, out, ranks=2) for loss in ("dpo", "aot_paired")}
    if torch.__version__ >= "2.9":  # FSDP2 of torch 2.8 gives other gradients over gloo
        found["dpo, fsdp2"] = run_of("dpo", out, ranks=2, strategy="fsdp2")
    if rank == 0:
        torch.save(found, f"{out}/found.pt")
    torch.distributed.barrier()


class Sharded(DPOModule):
    """With its weights in shards by FSDP2."""

    def configure_model(self):
        from torch.distributed.fsdp import fully_shard

        for part in (*self.model.model.layers, self.model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def on_train_end(self):
        for part in (*self.model.model.layers, self.model):
            part.reshard()
        self.whole = {name: p.full_tensor() for name, p in self.model.named_parameters()}


def run_of(loss, folder, ranks=1, strategy="ddp"):
    """Parameters, history and evaluation of one process or two, with the same pairs in each step."""
    options = {"devices": 2, "strategy": strategy} if ranks == 2 else {}
    if strategy == "fsdp2":
        options["strategy"] = pl.strategies.ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1
        )
    if loss == "dpo":
        data = PairDataModule(
            random_pairs(34), held_out=random_pairs(11, seed=3), tokens_per_batch=TOKENS
        )
        trainer = trainer_of(folder, accumulate_grad_batches=4 // ranks, **options)
    else:  # it couples the pairs of a batch, which is that of all ranks
        data = PairDataModule(
            random_pairs(32), held_out=random_pairs(16, seed=3), pairs_per_batch=8 // ranks
        )
        trainer = trainer_of(folder, accumulate_grad_batches=2, **options)
    module = (Sharded if strategy == "fsdp2" else DPOModule)(tiny.model(), optimizer=sgd, loss=loss)
    trainer.fit(module, data)
    parameters = module.whole if strategy == "fsdp2" else parameters_of(module)
    sizes = {batch.n_pairs for batch in data.train_dataloader()}
    repeated = data.val_dataloader().plan.stats.repeated
    history = [(values["loss"], values["rewards/margins"]) for values in trainer.logger.train]
    return parameters, torch.tensor(history), trainer.logger.eval[-1], (len(sizes), repeated)


def test_two_processes_do_what_one_does(tmp_path):
    """The reference scored in shares, unequal batches, repeats in evaluation, a loss that couples the batch."""
    imports = (*warm.TORCH, "transformers.models.llama.modeling_llama", "lightning.pytorch")
    warm.ranks(__name__, "one_rank", warm.free_port(), tmp_path, imports=imports)
    found = torch.load(tmp_path / "found.pt")
    one = {loss: run_of(loss, tmp_path) for loss in ("dpo", "aot_paired")}
    for name, (parameters, history, evaluated, (sizes, repeated)) in found.items():
        loss = name.partition(",")[0]
        one_parameters, one_history, one_evaluated, _ = one[loss]
        assert len(history) > 1
        torch.testing.assert_close(history, one_history, atol=1e-5, rtol=1e-5)
        assert furthest(parameters, one_parameters) <= 1e-5, name
        assert evaluated == pytest.approx(one_evaluated, abs=1e-4)
        assert loss != "dpo" or (sizes > 1 and repeated)


# ---- resuming -----------------------------------------------------------------------------------


class SaveAt(pl.Callback):
    """A checkpoint behind a micro-batch, or behind an epoch."""

    def __init__(self, path, batch=None):
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.current_epoch == 1 and batch_idx == self.batch:
            trainer.save_checkpoint(self.path)

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 1 and self.batch is None:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("batch", "limit"),
    [(5, {"max_epochs": 3}), (None, {"max_epochs": -1, "max_steps": 12})],
    ids=["middle", "end"],
)
def test_a_run_that_was_cut_off_ends_where_the_whole_one_does(batch, limit, tmp_path):
    path = tmp_path / "cut.ckpt"

    def data():
        return PairDataModule(random_pairs(26), held_out=0.2, tokens_per_batch=TOKENS)

    def run(ckpt_path=None, **options):
        trainer = trainer_of(tmp_path, accumulate_grad_batches=2, **limit, **options)
        return fitted(tmp_path, data(), trainer, ckpt_path)

    module, trainer = run(callbacks=[SaveAt(path, batch)])
    again, resumed = run(path)
    assert furthest(parameters_of(module), parameters_of(again)) == 0.0
    count = len(resumed.logger.train)
    assert 0 < count < len(trainer.logger.train)
    assert resumed.logger.train == trainer.logger.train[-count:]


def test_a_checkpoint_inside_a_step_says_what_is_gone(tmp_path):
    path = tmp_path / "inside.ckpt"
    data = PairDataModule(random_pairs(24), pairs_per_batch=3)
    trainer = trainer_of(
        tmp_path, max_epochs=2, accumulate_grad_batches=4, callbacks=[SaveAt(path, 5)]
    )
    fitted(tmp_path, data, trainer)
    trainer = trainer_of(tmp_path, max_epochs=2, accumulate_grad_batches=4)
    with pytest.warns(
        UserWarning, match="resumed inside an optimizer step: 2 of its 4 micro-batches"
    ):
        fitted(tmp_path, PairDataModule(random_pairs(24), pairs_per_batch=3), trainer, path)


def test_a_checkpoint_of_other_pairs_or_without_the_reference_is_refused(tmp_path):
    path = tmp_path / "end.ckpt"
    fitted(
        tmp_path,
        PairDataModule(random_pairs(20), pairs_per_batch=4),
        trainer_of(tmp_path, max_epochs=2, callbacks=[SaveAt(path)]),
    )
    with pytest.raises(DataError, match="other pairs than `train`"):
        fitted(
            tmp_path, PairDataModule(random_pairs(20, seed=1), pairs_per_batch=4), ckpt_path=path
        )
    # Its weights are the start of another run: the policy before that training is the reference.
    module = DPOModule.load_from_checkpoint(path, model=tiny.model(), optimizer=sgd)
    trainer = trainer_of(tmp_path)
    trainer.fit(module, PairDataModule(random_pairs(8), pairs_per_batch=4))
    assert trainer.logger.train[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    state = torch.load(path, weights_only=True)
    del state["PairDataModule"]
    torch.save(state, path)
    with pytest.raises(TensorError, match="the policy before training is gone"):
        fitted(
            tmp_path,
            PairDataModule(random_pairs(20), pairs_per_batch=4),
            trainer_of(tmp_path, max_epochs=3),
            path,
        )


# ---- precision, layouts, sources ----------------------------------------------------------------


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_leaves_reference_log_probs_as_they_are(precision, tmp_path):
    pairs = random_pairs(12)
    seen = []

    class See(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.append(batch.ref_logps)

    data = PairDataModule(pairs, pairs_per_batch=6)
    trainer = trainer_of(tmp_path, precision=precision, callbacks=[See()])
    fitted(tmp_path, data, trainer)
    assert {values.dtype for values in seen} == {torch.float32}
    assert trainer.logger.train[0]["loss"] == pytest.approx(0.6931472, abs=1e-5)
    assert trainer.logger.train[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("layout", ["packed", "shared"])
def test_layouts_give_the_numbers_of_padded(layout, tmp_path):
    def run(name):
        trainer = trainer_of(tmp_path, accumulate_grad_batches=2)
        module, _ = fitted(
            tmp_path, PairDataModule(random_pairs(24), layout=name, pairs_per_batch=3), trainer
        )
        return parameters_of(module), trainer.logger.train

    parameters, history = run(layout)
    others, expected = run("padded")
    assert furthest(parameters, others) <= 1e-5
    for mine, theirs in zip(history, expected, strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)


def test_pairs_from_files_are_encoded_once(reader_folder, monkeypatch):
    calls = []
    own = PairDataset.from_files.__func__

    def seen(cls, paths, tokenizer, **options):
        calls.append(options)
        return own(cls, paths, tokenizer, **options)

    monkeypatch.setattr(PairDataset, "from_files", classmethod(seen))
    data = PairDataModule(
        "pairs.jsonl.gz", "path/to/model", held_out="pairs.jsonl.gz", pairs_per_batch=4,
        cache_dir="cache", max_length=256,
    )  # fmt: skip
    data.prepare_data()
    data.setup("fit")
    data.setup("validate")
    assert len(calls) == 4
    tokenizer = Tokenizer.from_pretrained("path/to/model")
    expected = own(PairDataset, "pairs.jsonl.gz", tokenizer, max_length=256)
    assert tiny.same_pairs(data.train, expected)
    assert tiny.same_pairs(data.held_out, expected)


# ---- what is refused ----------------------------------------------------------------------------


def test_what_would_go_unheard_or_is_wrong_is_refused(tmp_path):
    pairs = random_pairs(8)
    for options, message in [
        ({"tokenizer": "path"}, "`tokenizer` would go unheard"),
        ({"max_length": 5}, "`max_length` would go unheard"),
        ({"cache_dir": "here"}, "`cache_dir` would go unheard"),
        ({"layout": "pakced"}, "unknown `layout`"),
        ({"tokens_per_batch": 9}, "exactly one of"),
        ({"bin_length": 9}, "`bin_length` needs"),
    ]:
        with pytest.raises(ValueError, match=message):
            PairDataModule(pairs, **{"pairs_per_batch": 2, **options})
    with pytest.raises(TypeError, match="`tokenizer` is missing"):
        PairDataModule("pairs.jsonl", pairs_per_batch=2)
    with pytest.raises(TypeError, match="max_lenght"):
        PairDataModule("pairs.jsonl", "path", pairs_per_batch=2, max_lenght=3)
    model = tiny.model()
    for options, error, message in [
        ({"loss": "dppo"}, ValueError, "unknown"),
        ({"refrence": "data"}, ValueError, "refrence"),
        ({"loss": "simpo", "beta": -1.0}, ValueError, "`beta`"),
        ({"reference": "copy"}, ValueError, "`reference` must be a model or one of"),
        ({"reference": model}, ValueError, "is the model that is trained"),
        ({"reference": "adapter"}, TypeError, "needs a PEFT model"),
        ({"loss": "simpo", "reference": "policy"}, ValueError, "`reference` would go unheard"),
    ]:
        with pytest.raises(error, match=message):
            DPOModule(model, **options)
    with pytest.raises(TypeError, match="takes its batches from a PairDataModule, found NoneType"):
        trainer_of(tmp_path).fit(
            DPOModule(model), PairLoader(pairs.plan(layout="padded", pairs_per_batch=2))
        )


def child(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("installed", "imported", "meant"),
    [
        ("lightning pytorch_lightning", "", "lightning.pytorch"),
        ("lightning pytorch_lightning", "lightning.pytorch", "lightning.pytorch"),
        ("lightning pytorch_lightning", "pytorch_lightning", "pytorch_lightning"),
        ("lightning pytorch_lightning", "pytorch_lightning lightning.pytorch", "lightning.pytorch"),
        ("lightning", "", "lightning.pytorch"),
        ("pytorch_lightning", "", "pytorch_lightning"),
    ],
)
def test_the_lightning_that_was_imported_is_meant(
    installed, imported, meant, tmp_path, monkeypatch
):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        if name.partition(".")[0] not in installed.split():
            monkeypatch.setitem(sys.modules, name, None)
            continue
        package = tmp_path.joinpath(*name.split("."))
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    for name in imported.split():
        importlib.import_module(name)
    assert runpy.run_path(host.__file__)["pl"].__name__ == meant
    for name in [
        name for name in sys.modules if name.startswith(("lightning", "pytorch_lightning"))
    ]:
        monkeypatch.delitem(sys.modules, name)  # ours, of this test; the true ones come back


def test_a_trainer_of_pytorch_lightning_takes_it():
    pytest.importorskip("pytorch_lightning")
    done = child(
        "import pytorch_lightning as pl\n"
        "from dpo_ext.lightning import DPOModule, PairDataModule\n"
        "print(issubclass(DPOModule, pl.LightningModule), issubclass(PairDataModule, pl.LightningDataModule))"
    )
    assert done.stdout == "True True\n", done.stderr


def test_without_any_lightning_the_extra_is_named():
    done = child(
        "import sys; sys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\nimport dpo_ext.lightning"
    )
    assert done.stderr.endswith(
        'dpo_ext.lightning needs lightning\nhint: pip install "dpo_ext[lightning]"\n'
    )
