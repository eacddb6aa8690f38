"""DPO in Lightning's trainer, on one device or, with `--devices`, on many.

python examples/train_lightning.py path/to/model pairs.jsonl.gz --out trained --devices 2
"""

import argparse

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from transformers import AutoModelForCausalLM

from dpo_ext.lightning import DPOModule, PairDataModule

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--out", default="trained")
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--lr", type=float, default=1e-6)
parser.add_argument("--tokens-per-batch", type=int, default=8192)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--held-out", type=float, default=0.1)
args = parser.parse_args()

data = PairDataModule(
    args.pairs,
    args.model,  # its tokenizer
    held_out=args.held_out or None,
    tokens_per_batch=args.tokens_per_batch,
    on_bad="skip",
    cache_dir="cache",  # one process encodes, the others map what it wrote
)
module = DPOModule(
    AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
    loss="dpo",
    beta=0.1,  # the reference is the model before training, which scores all pairs once
    optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0),
)
trainer = Trainer(
    max_epochs=1,
    devices=args.devices,
    accelerator="auto" if torch.cuda.is_available() else "cpu",
    strategy="ddp" if args.devices > 1 else "auto",
    accumulate_grad_batches=args.accumulate,
    gradient_clip_val=1.0,
    logger=CSVLogger(args.out, name="logs", version="0"),
    log_every_n_steps=1,
    enable_checkpointing=False,
)
trainer.fit(module, data)
if trainer.is_global_zero:
    for name, value in sorted(trainer.callback_metrics.items()):
        print(f"{name}: {value:.4f}")
    module.model.save_pretrained(args.out)
