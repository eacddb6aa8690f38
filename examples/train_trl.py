"""DPO with TRL's trainer and LoRA: one import differs from stock TRL.

python examples/train_trl.py path/to/model pairs.jsonl.gz --out trained
"""

import argparse

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import DPOConfig

from dpo_ext.trl import DPOTrainer  # instead of trl.DPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--out", default="trained")
parser.add_argument("--max-steps", type=int, default=-1)
args = parser.parse_args()

data = load_dataset("json", data_files=args.pairs, split="train").train_test_split(0.1, seed=0)
trainer = DPOTrainer(
    args.model,
    args=DPOConfig(
        output_dir=args.out,
        max_steps=args.max_steps,
        max_length=512,
        learning_rate=1e-5,
        per_device_train_batch_size=4,
        precompute_ref_log_probs=True,
        eval_strategy="epoch",
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=AutoTokenizer.from_pretrained(args.model),
    peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
    layout="padded",
)
print(trainer.data_reports["train"])
trainer.train()
trainer.save_model(args.out)
