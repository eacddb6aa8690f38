"""Two processes train from one store of reference log-probs, which the first of them alone sees."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny
import warm
from pair_cases import random_pairs

pytest.importorskip("pyarrow")

from dpo_ext.reflogps import ReferenceStore

IMPORTS = (*warm.TORCH, "transformers.models.llama.modeling_llama")
pytestmark = pytest.mark.slow


class Watched(ReferenceStore):
    """Of a rank that must not look at it, or that counts what is scored."""

    def __init__(self, folder, rank):
        super().__init__(folder, fingerprint="model")
        self.rank, self.new = rank, 0

    def __getattribute__(self, name):
        if name in ("put", "get", "missing"):
            assert object.__getattribute__(self, "rank") == 0, f"rank 1 called {name}"
        return super().__getattribute__(name)

    def put(self, pairs, values, **how):
        put = super().put(pairs, values, **how)
        self.new += put
        return put


def as_a_rank(rank: int, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def write(out: str, rank: int, store: Watched, losses: list[float]) -> None:
    said = json.dumps({"new": store.new, "losses": losses})
    (Path(out) / f"rank{rank}.json").write_text(said)


def trl_rank(rank: int, port: str, material: str, out: str, folder: str) -> None:
    as_a_rank(rank, port)
    import trl_runs as runs

    data = runs.load(Path(material), "text_explicit")
    given, store = {}, Watched(folder or f"{out}/none", rank)
    if folder:
        given["reference"] = store
    trainer = runs.build(
        runs.DPOTrainer, Path(material), data, given, per_device_train_batch_size=2
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    write(out, rank, store, losses)


def lightning_rank(rank: int, port: str, material: str, out: str, folder: str) -> None:
    as_a_rank(rank, port)
    import lightning.pytorch as pl

    from dpo_ext.lightning import DPOModule, PairDataModule

    pairs, store = random_pairs(24), Watched(folder or f"{out}/none", rank)
    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, *_):
            losses.append(float(outputs["loss"]))

    trainer = pl.Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_steps=4,
        default_root_dir=out,
        callbacks=[Losses()],
        **dict.fromkeys(off, False),
    )
    module = DPOModule(tiny.model(), **({"reference": store} if folder else {}))
    trainer.fit(module, PairDataModule(pairs, pairs_per_batch=3, shuffle=False))
    write(out, rank, store, losses)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    pytest.importorskip("trl")
    import trl_runs as runs

    return runs.write_material(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(("host", "package"), [("trl", "trl"), ("lightning", "lightning")])
def test_two_ranks_fill_a_store_once_and_train_as_with_a_live_reference(
    host, package, own, tmp_path
):
    pytest.importorskip(package)
    found = {}
    for run, folder in (("live", ""), ("filled", "store"), ("read", "store")):
        out = tmp_path / run
        out.mkdir()
        given = (
            str(warm.free_port()),
            str(own),
            str(out),
            str(tmp_path / folder) if folder else "",
        )
        warm.ranks(__name__, f"{host}_rank", *given, imports=IMPORTS)
        found[run] = [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    rows = ReferenceStore(tmp_path / "store", fingerprint="model").stats.rows
    assert rows > 0
    assert [one["new"] for one in found["filled"]] == [rows, 0]
    assert [one["new"] for one in found["read"]] == [0, 0]
    for rank in (0, 1):
        live, filled, read = (found[run][rank]["losses"] for run in ("live", "filled", "read"))
        assert filled == read
        assert len(live) == len(filled)
        np.testing.assert_allclose(filled, live, atol=4e-5)
    first = [found["filled"][rank]["losses"][:1] for rank in (0, 1)]
    np.testing.assert_allclose([loss for one in first for loss in one], np.log(2), atol=1e-4)
