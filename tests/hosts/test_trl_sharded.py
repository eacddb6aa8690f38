"""`dpo_ext.trl.DPOTrainer` under FSDP2 and DeepSpeed: two processes have the history of one.

Accelerate shards on accelerators alone. Here it is told that two gloo processes on a CPU are such.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
import trl_runs as runs
import warm
from accelerate import state
from accelerate.utils import DistributedType

from dpo_ext.trl import DPOTrainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]

IMPORTS = (*warm.TORCH, "trl", "dpo_ext.trl", "transformers.models.llama.modeling_llama")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return runs.write_material(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def alone(own):
    """The history of one process."""
    return runs.train(DPOTrainer, own, runs.load(own, "text_explicit"))


def check(own, alone, out, how, names):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    warm.ranks(__name__, how, port, own, out, imports=IMPORTS)
    for name in names:
        found = json.loads((out / f"{name}.json").read_text())
        # Halves of a batch are padded less; a cached reference moves accuracies from exact ties.
        skip = ("total_flos", *(("rewards/accuracies",) if name == "precomputed" else ()))
        assert runs.differences(alone, found, skip=skip) == [], name


def as_a_rank(rank: int, port: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


def run(material: str, out: str, name: str, rank: int, layout: str, **options) -> DPOTrainer:
    data = runs.load(Path(material), "text_explicit")
    trainer = runs.build(
        DPOTrainer,
        Path(material),
        data,
        {"layout": layout},
        per_device_train_batch_size=2,
        **options,
    )
    trainer.train()
    assert trainer.layout == layout
    assert trainer.accelerator.num_processes == 2
    if rank == 0:
        (Path(out) / f"{name}.json").write_text(json.dumps(runs.history(trainer)))
    return trainer


# --- FSDP2 ------------------------------------------------------------------------------------------------------------

FSDP = {"padded": "padded", "packed": "packed", "shared": "shared", "precomputed": "padded"}


def test_fsdp2_has_the_history_of_one_process(own, alone, tmp_path):
    check(own, alone, tmp_path, "under_fsdp2", FSDP)


def under_fsdp2(rank: int, port: str, material: str, out: str) -> None:
    as_a_rank(rank, port)
    start = state.AcceleratorState.__init__

    def sharded(self, *args, fsdp_plugin=None, **options):
        start(self, *args, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    state.AcceleratorState.__init__ = sharded
    config = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "FULL_STATE_DICT",
    }
    for name, layout in FSDP.items():
        options = {"precompute_ref_log_probs": name == "precomputed"}
        trainer = run(
            material, out, name, rank, layout,
            fsdp="full_shard auto_wrap", fsdp_config=dict(config), **options,
        )  # fmt: skip
        assert isinstance(trainer.model_wrapped, torch.distributed.fsdp.FSDPModule)
        assert isinstance(trainer.model.lm_head.weight, torch.distributed.tensor.DTensor)
    torch.distributed.barrier()


# --- DeepSpeed --------------------------------------------------------------------------------------------------------

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None and shutil.which("ninja")


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed with ninja is not installed")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_has_the_history_of_one_process(own, alone, tmp_path, stage):
    check(own, alone, tmp_path, f"under_zero{stage}", ("padded", "packed", "shared"))


def under_zero2(rank: int, port: str, material: str, out: str) -> None:
    under_zero(2, rank, port, material, out)


def under_zero3(rank: int, port: str, material: str, out: str) -> None:
    under_zero(3, rank, port, material, out)


def under_zero(stage: int, rank: int, port: str, material: str, out: str) -> None:
    as_a_rank(rank, port)
    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}

    def gloo(self, *args, **options):
        return "gloo", DistributedType.MULTI_GPU

    state.PartialState._prepare_backend = gloo
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # else small ones stay whole
    sizes = ("train_micro_batch_size_per_gpu", "train_batch_size", "gradient_accumulation_steps")
    config = {"zero_optimization": zero, **dict.fromkeys((*sizes, "gradient_clipping"), "auto")}
    for layout in ("padded", "packed", "shared"):
        trainer = run(material, out, layout, rank, layout, deepspeed=dict(config), use_cpu=False)
        assert trainer.accelerator.distributed_type == DistributedType.DEEPSPEED
    torch.distributed.barrier()
