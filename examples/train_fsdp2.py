"""DPO with a model in shards: FSDP2, on GPUs, or on CPUs over gloo.

torchrun --nproc-per-node 2 examples/train_fsdp2.py path/to/model pairs.jsonl.gz --out trained
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.torch import PairLoader, attach_scoring

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--encoded", action="store_true", help="`pairs` is a folder of shards of ids")
parser.add_argument("--out", default="trained")
parser.add_argument("--lr", type=float, default=1e-6)
parser.add_argument("--tokens-per-batch", type=int, default=8192)
parser.add_argument("--accumulate", type=int, default=1)
args = parser.parse_args()

kind = "cuda" if torch.cuda.is_available() else "cpu"
device = torch.device(kind, int(os.environ["LOCAL_RANK"]) if kind == "cuda" else None)
if kind == "cuda":
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if kind == "cuda" else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
mesh = dist.init_device_mesh(kind, (ranks,))

tokenizer = Tokenizer.from_pretrained(args.model)
how = {"tokenizer": tokenizer} if args.encoded else {"tokenizer": tokenizer, "on_bad": "skip"}
read = PairDataset.load if args.encoded else PairDataset.from_files
pairs = read(args.pairs, cache_dir="cache", **how)
# Scoring inside the forward that FSDP2 sees; the head stays with the root, which gathers it.
model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device)
model = attach_scoring(model, loss={"loss": "dpo", "beta": 0.1})
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
options = {"tokens_per_batch": args.tokens_per_batch, "rank": rank, "world_size": ranks}

# Each rank scores its share. All have as many batches: a forward is a collective of all ranks.
scored = torch.zeros(len(pairs), 3, device=device)
with torch.no_grad():
    for batch in PairLoader(pairs.plan(layout="padded", **options), device):
        logps = model(**batch.model_inputs, score_table=batch.table).logps
        scored[batch.pair_index] = torch.nn.functional.pad(logps, (0, 1), value=1.0)
dist.all_reduce(scored)  # the last column counts: the end of the plan repeats some pairs
pairs = pairs.with_ref_logps((scored[:, :2] / scored[:, 2:]).double().cpu().numpy())

plan = pairs.plan(layout="padded", **options)
total = torch.zeros((), device=device)
for i, batch in enumerate(PairLoader(plan, device)):
    first = i - i % args.accumulate
    step = range(first, min(first + args.accumulate, len(plan)))
    model.set_requires_gradient_sync(i + 1 == step.stop)
    num_pairs = sum(plan.pairs_in_step(k) for k in step)  # over all micro-batches and ranks
    what = {"score_table": batch.table, "ref_logps": batch.ref_logps, "num_pairs": num_pairs}
    loss = model(**batch.model_inputs, **what).loss
    (loss * ranks).backward()  # FSDP2 averages over ranks
    total += loss.detach()
    if i + 1 == step.stop:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {i // args.accumulate}: loss {total.item():.6f}")
        total.zero_()
whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    model.save_pretrained(args.out, state_dict=whole)
dist.barrier()
