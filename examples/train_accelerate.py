"""DPO under Accelerate, in one process or, by `accelerate launch`, in many.

python examples/train_accelerate.py path/to/model pairs.jsonl.gz --out trained
"""

import argparse
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.torch import PairLoader, attach_scoring, preference_loss

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--out", default="trained")
parser.add_argument("--lr", type=float, default=1e-6)
parser.add_argument("--tokens-per-batch", type=int, default=8192)
parser.add_argument("--accumulate", type=int, default=1)
args = parser.parse_args()

accelerator = Accelerator(cpu=not torch.cuda.is_available())
tokenizer = Tokenizer.from_pretrained(args.model)
with accelerator.main_process_first():  # one process encodes, the others map what it wrote
    pairs = PairDataset.from_files(args.pairs, tokenizer, on_bad="skip", cache_dir="cache")

# Attach, then wrap: scoring must be inside the forward that DDP and FSDP2 see.
model = attach_scoring(AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32))
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
model, optimizer = accelerator.prepare(model, optimizer)


def plan(pairs, ranks, rank):
    size = args.tokens_per_batch
    return pairs.plan(layout="padded", tokens_per_batch=size, rank=rank, world_size=ranks)


ref_logps = torch.empty(len(pairs), 2, dtype=torch.float64)
with torch.no_grad():  # every process scores all pairs; a large reference is scored once and saved
    for batch in PairLoader(plan(pairs, 1, 0), device=accelerator.device):
        logps = model(**batch.model_inputs, score_table=batch.table).logps
        ref_logps[batch.pair_index.cpu()] = logps.double().cpu()
pairs = pairs.with_ref_logps(ref_logps.numpy())

# A plan knows ranks, so the loader is not prepared: its batches are this process' own.
mine = plan(pairs, accelerator.num_processes, accelerator.process_index)
losses = []
for i, batch in enumerate(PairLoader(mine, device=accelerator.device)):
    first = i - i % args.accumulate
    step = range(first, min(first + args.accumulate, len(mine)))
    last = i + 1 == step.stop
    with nullcontext() if last else accelerator.no_sync(model):
        logps = model(**batch.model_inputs, score_table=batch.table).logps
        # Token budgets give ranks unequal numbers of pairs: the exact mean is over all of the step.
        num_pairs = sum(mine.pairs_in_step(k) for k in step)
        out = preference_loss(logps, batch.ref_logps, beta=0.1, num_pairs=num_pairs)
        accelerator.backward(out.loss * accelerator.num_processes)  # it averages over them
    losses.append(accelerator.reduce(out.loss.detach()).item())
    if last:
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.print(f"step {i // args.accumulate}: loss {sum(losses[first:]):.6f}")
accelerator.print(f"{len(mine)} batches on each of {accelerator.num_processes} processes")
if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(args.out)
