"""Resuming in the middle of an epoch gives the same batches, in every host; other data is refused."""

import itertools
import logging

import pytest
from pair_cases import OPTIONS, batch_bits, random_pairs

from dpo_ext import DataError

torch = pytest.importorskip("torch")

from dpo_ext.torch import PairLoader  # noqa: E402

LAYOUTS = ("padded", "packed", "shared")


def plan_of(layout="packed", n=40, **more):
    return random_pairs(n).plan(**{"layout": layout, "seed": 5, **OPTIONS[layout], **more})


def first(batches):
    return batches[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loader_goes_on_where_its_state_was_taken(layout):
    plan = plan_of(layout)
    plan.set_epoch(2)
    whole = [batch_bits(batch) for batch in PairLoader(plan)]
    assert len(whole) > 4
    for k in (0, 1, len(whole) - 1, len(whole)):
        loader = PairLoader(plan, prefetch=3)
        for _ in itertools.islice(loader, k):
            pass
        state = loader.state_dict()
        assert state == {"seed": 5, "epoch": 2, "position": k, "digest": plan.digest}
        resumed = PairLoader(plan_of(layout, seed=1))
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        resumed.set_epoch(2)  # as a loop over epochs does, from the epoch of the state on
        assert [batch_bits(batch) for batch in resumed] == whole[k:]
        assert resumed.state_dict()["position"] == len(whole)
        assert [
            batch_bits(batch) for batch in resumed
        ] == whole  # the next iteration is whole again
    resumed.load_state_dict(state)
    resumed.set_epoch(3)
    assert resumed.state_dict()["position"] == 0


def test_a_state_of_other_batches_is_refused():
    plan = plan_of()
    state = plan.state_dict(3)
    others = {
        "layout": plan_of("padded"),
        "data": plan_of(n=41),
        "tokens": plan_of(tokens_per_batch=180),
        "bin": plan_of(bin_length=61),
        "world": plan_of(world_size=2),
        "order": plan_of(shuffle=False),
        "tail": plan_of(drop_last=True),
        "padding": plan_of(pad_to_multiple_of=4),
    }
    for name, other in others.items():
        assert other.digest != plan.digest, name
        with pytest.raises(DataError, match="saved for other batches") as caught:
            PairLoader(other).load_state_dict(state)
        assert caught.value.reason == "bad_state"
    assert plan_of(rank=1, world_size=2).digest == others["world"].digest
    assert plan_of(epoch=4).digest == plan.digest == plan_of(seed=9).digest
    # Changed lengths in one pair, everything else alike.
    pairs = random_pairs(40)
    assert (len(pairs.chosen_ids[0]), len(pairs.rejected_ids[0])) != (2, 2)
    prompt, chosen, rejected = (
        list(ids) for ids in (pairs.prompt_ids, pairs.chosen_ids, pairs.rejected_ids)
    )
    chosen[0] = chosen[0][:-1]
    changed = type(pairs).from_ids(prompt, chosen, rejected)
    assert changed.plan(layout="packed", seed=5, **OPTIONS["packed"]).digest != plan.digest
    for key in state:
        with pytest.raises(DataError, match=f"no `{key}`"):
            plan.load_state_dict({k: v for k, v in state.items() if k != key})
    plan.set_epoch(1)
    for position in (-1, len(plan) + 99):
        with pytest.raises(DataError, match="`position` must be in"):
            plan.load_state_dict({**state, "seed": 8, "position": position})
        assert (plan.seed, plan.epoch) == (5, 1)
    with pytest.raises(TypeError, match="has no state"):
        PairLoader([1, 2]).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_plain_data_loader_resumes_by_its_sampler(layout, workers):
    plan = plan_of(layout)
    whole = [batch_bits(batch) for batch in plan]

    def loader(sampler):
        return torch.utils.data.DataLoader(
            plan, batch_size=1, sampler=sampler, collate_fn=first, num_workers=workers
        )

    assert [batch_bits(batch) for batch in loader(None)] == whole
    assert [batch_bits(batch) for batch in loader(range(3, len(plan)))] == whole[3:]


def test_accelerate_skips_to_the_same_batches():
    accelerate = pytest.importorskip("accelerate")
    plan = plan_of()
    whole = [batch_bits(batch) for batch in plan]

    def prepare():
        loader = torch.utils.data.DataLoader(plan, batch_size=1, collate_fn=first)
        return accelerate.Accelerator(cpu=True).prepare(loader)

    assert [batch_bits(batch) for batch in accelerate.skip_first_batches(prepare(), 4)] == whole[4:]
    prepared = prepare()
    assert [batch_bits(batch) for batch in prepared] == whole
    # Accelerate tells the plan its epochs by itself.
    second = [batch_bits(batch) for batch in prepared]
    assert plan.epoch == 1
    assert second == [batch_bits(batch) for batch in plan] != whole


def test_the_trainer_resumes_with_the_same_batches(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    plan = plan_of("padded")
    seen = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, **inputs):
            seen.append({name: value.numpy().tobytes() for name, value in inputs.items()})
            return {"loss": self.weight * 1.0}

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(plan, batch_size=1, collate_fn=collate)

    def collate(batches):
        names = ("input_ids", "attention_mask", "completion_mask", "pair_index")
        return {name: torch.from_numpy(getattr(batches[0], name)) for name in names}

    def run(resume=None):
        seen.clear()
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            num_train_epochs=1,
            save_steps=5,
            per_device_train_batch_size=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            logging_strategy="no",
        )
        Trainer(model=Model(), args=arguments, train_dataset=plan).train(
            resume_from_checkpoint=resume
        )
        return list(seen)

    whole = run()
    assert len(whole) == len(plan) > 5
    assert run(str(tmp_path / "checkpoint-5")) == whole[5:]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_lightning_resumes_with_the_same_batches(tmp_path):
    lightning = pytest.importorskip("lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    plan = plan_of()
    seen = []

    path = tmp_path / "middle.ckpt"

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch, i):
            seen.append(batch_bits(batch))
            return self.weight * 1.0

        def on_train_batch_end(self, outputs, batch, i):
            if i == 3 and not path.exists():
                self.trainer.save_checkpoint(path)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    def run(resume=None):
        seen.clear()
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(Module(), PairLoader(plan), ckpt_path=resume)
        return list(seen)

    whole = run()
    assert whole == [batch_bits(batch) for batch in PairLoader(plan)]
    assert run(resume=path) == whole[4:]
