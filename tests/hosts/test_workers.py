"""Workers that persist build the batches of the epoch that the plan was set to, in every host."""

import copy
import multiprocessing
import os
import pickle

import pytest
from pair_cases import OPTIONS, random_pairs

torch = pytest.importorskip("torch")
from torch.utils.data import DataLoader, Dataset, get_worker_info  # noqa: E402

from dpo_ext import UnpairedDataset  # noqa: E402

EPOCHS = (0, 1, 5, 0)
# Of machines with few cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def first(batches):
    return batches[0]


def tensors(batches):
    return {"pair_index": torch.from_numpy(batches[0].pair_index)}


def plan_of(layout="padded", **more):
    return random_pairs(60).plan(layout=layout, seed=5, **OPTIONS[layout], **more)


def loader_of(plan, collate=first, workers=2, **more):
    return DataLoader(
        plan,
        batch_size=1,
        collate_fn=collate,
        num_workers=workers,
        persistent_workers=workers > 0,
        **more,
    )


def pairs_in(batches):
    return [batch.pair_index.tolist() for batch in batches]


class Behind(Dataset):
    """A data set of the user's own around a plan."""

    def __init__(self, plan):
        self.plan = plan

    def __len__(self):
        return len(self.plan)

    def __getitem__(self, i):
        return self.plan[i]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "workers", "layout"),
    [
        ("fork", 1, "packed"),
        ("fork", 4, "padded"),
        ("spawn", 2, "shared"),
        ("forkserver", 3, "packed"),
    ],
)
def test_workers_that_persist_build_the_epoch_that_was_set(start, workers, layout):
    plan = plan_of(layout)
    orders = [pairs_in(plan_of(layout, epoch=epoch)) for epoch in EPOCHS]
    assert orders[0] == orders[3] != orders[1] != orders[2]
    loader = loader_of(plan, workers=workers, multiprocessing_context=start)
    for epoch, order in zip(EPOCHS, orders, strict=True):
        plan.set_epoch(epoch)
        assert pairs_in(loader) == order, epoch
    for _ in loader:
        break
    plan.set_epoch(5)
    assert pairs_in(loader) == orders[2]
    state = plan_of(layout, epoch=1).state_dict() | {"seed": 8}
    plan.load_state_dict(state)
    assert pairs_in(loader) == pairs_in(plan) != orders[1]


@pytest.mark.slow
def test_one_plan_serves_several_loaders_and_data_sets_around_it():
    plan = plan_of()
    loaders = [loader_of(plan), loader_of(Behind(plan)), loader_of(plan, tensors, workers=1)]
    for epoch in (0, 3):
        plan.set_epoch(epoch)
        want = pairs_in(plan)
        assert pairs_in(loaders[0]) == pairs_in(loaders[1]) == want
        assert [batch["pair_index"].tolist() for batch in loaders[2]] == want


@pytest.mark.slow
def test_single_completions_follow_too():
    n = 12
    data = UnpairedDataset.from_ids([[1]] * n, [[i] for i in range(n)], labels=[True, False] * 6)
    plan = data.plan(layout="padded", examples_per_batch=4)
    loader = loader_of(plan)
    for epoch in (0, 1):
        plan.set_epoch(epoch)
        assert pairs_in(loader) == pairs_in(plan)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "collate"), [("fork", first), ("fork", tensors), ("spawn", first)]
)
def test_an_epoch_that_is_set_during_a_pass_is_an_error(start, collate):
    plan = plan_of()
    loader = loader_of(plan, collate, multiprocessing_context=start)
    whole = len(list(loader))
    batches = iter(loader)
    next(batches)
    plan.set_epoch(1)
    with pytest.raises(RuntimeError, match="the epoch of the plan was set while"):
        [getattr(batch, "pair_index", None) for batch in batches]
    plan.set_epoch(0)
    assert len(list(loader)) == whole  # and the next pass is whole again


def test_an_epoch_that_is_set_while_a_plan_is_read_is_an_error():
    plan = plan_of()
    with pytest.raises(RuntimeError, match="the epoch of the plan was set while"):
        [plan.set_epoch(1) for _ in plan]


def test_copies_are_plans_of_their_own():
    plan = plan_of()
    copies = [copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))]
    before = pairs_in(plan)
    plan.set_epoch(2)
    assert all(pairs_in(other) == before for other in copies)
    copies[0].set_epoch(3)
    assert pairs_in(plan) == pairs_in(plan_of(epoch=2))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_child_that_is_no_worker_keeps_its_epoch():
    plan = plan_of()
    before, after = pairs_in(plan), pairs_in(plan_of(epoch=1))
    (told, tell), (answered, answer) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.read(told, 1)
        kept = pairs_in(plan) == before
        plan.set_epoch(4)
        os.write(answer, b"1" if kept else b"0")
        os._exit(0)
    plan.set_epoch(1)
    os.write(tell, b"x")
    assert os.read(answered, 1) == b"1"
    os.waitpid(child, 0)
    assert pairs_in(plan) == after  # whatever the child set


def child_with_workers(plan, start, epochs, answers):
    """In a process that has a copy of a plan: what its own workers give, and what it has itself."""
    loader = loader_of(plan, workers=1, multiprocessing_context=start)
    for epoch in epochs:
        if epoch is not None:
            plan.set_epoch(epoch)
        answers.put((plan.epoch, pairs_in(loader), pairs_in(plan)))


@pytest.mark.slow
@pytest.mark.parametrize("outer", ["fork", "spawn"])
@pytest.mark.parametrize("inner", ["fork", "spawn"])
def test_workers_of_a_copy_follow_the_copy_and_not_what_it_is_a_copy_of(outer, inner):
    plan = plan_of()
    context = multiprocessing.get_context(outer)
    answers = context.Queue()
    child = context.Process(target=child_with_workers, args=(plan, inner, (None, 2), answers))
    child.start()
    plan.set_epoch(3)
    for epoch in (0, 2):
        told, of_workers, own = answers.get(timeout=120)
        assert told == epoch
        assert of_workers == own == pairs_in(plan_of(epoch=epoch))
    child.join()
    assert pairs_in(plan) == pairs_in(plan_of(epoch=3))


class Own(Dataset):
    """A worker that sets the epoch of its own copy."""

    def __init__(self, plan):
        self.plan = plan

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if get_worker_info() is not None and self.plan.epoch != 7:
            self.plan.set_epoch(7)
        return self.plan[i]


@pytest.mark.slow
def test_an_epoch_that_a_worker_sets_is_its_own():
    plan = plan_of()
    loader = loader_of(Own(plan))
    want = pairs_in(plan_of(epoch=7)[:4])
    for epoch in (0, 1):
        plan.set_epoch(epoch)
        assert pairs_in(loader) == want
        assert plan.epoch == epoch


@pytest.mark.slow
def test_accelerate_tells_workers_that_persist_its_epochs():
    accelerate = pytest.importorskip("accelerate")
    plan = plan_of("packed")
    loader = accelerate.Accelerator(cpu=True).prepare(loader_of(plan))
    for epoch in range(3):
        assert pairs_in(loader) == pairs_in(plan_of("packed", epoch=epoch))


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, pair_index):
        self.seen.append(pair_index.tolist())
        return {"loss": self.weight * 1.0}


@pytest.mark.slow
def test_the_trainer_with_workers_that_persist_sees_every_epoch(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    plan, model = plan_of("packed"), Model()

    class Trainer(transformers.Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(plan)

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=3,
        per_device_train_batch_size=1,
        dataloader_num_workers=2,
        dataloader_persistent_workers=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=plan, data_collator=tensors).train()
    # Accelerate tells the plan its epochs by itself.
    orders = [pairs_in(plan_of("packed", epoch=epoch)) for epoch in range(3)]
    assert model.seen == [index for order in orders for index in order]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_lightning_with_workers_that_persist_sees_every_epoch():
    pl = pytest.importorskip("lightning.pytorch")
    plan = plan_of("packed")

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = Model()

        def on_train_epoch_start(self):
            plan.set_epoch(self.current_epoch)

        def training_step(self, batch, i):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        reload_dataloaders_every_n_epochs=0,
    )
    module = Module()
    trainer.fit(module, loader_of(plan, tensors))
    orders = [pairs_in(plan_of("packed", epoch=epoch)) for epoch in range(3)]
    assert module.model.seen == [index for order in orders for index in order]
