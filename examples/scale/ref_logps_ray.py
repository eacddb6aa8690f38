"""Reference log-probs of sharded ids by Ray Data: a model on each worker, columns into shards.

    python examples/scale/ref_logps_ray.py path/to/model ids/ --out scored/ --workers 8
    dpo-ext ref-logps path/to/model --import 'scored/*.parquet' --store reference \\
        --fingerprint 'my 8B, bfloat16'

`RefLogps` needs no Ray: it takes and gives a dict of NumPy arrays.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dpo_ext import PairDataset
from dpo_ext.pairs import IDS, REFERENCE
from dpo_ext.torch.reference import PairScorer


class RefLogps:
    """For ``map_batches``: the rows, with ``ref_chosen_logps`` and ``ref_rejected_logps``."""

    def __init__(
        self, model_folder: str, dtype: str = "auto", tokens_per_batch: int = 16_384
    ) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder, dtype=dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.score = PairScorer(model.to(device).eval(), tokens_per_batch=tokens_per_batch)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        values = self.score(PairDataset.from_ids(*(list(batch[name]) for name in IDS)))
        return {**batch, **dict(zip(REFERENCE, values.T, strict=True))}


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("ids", help="folder of Parquet with prompt_ids, chosen_ids, rejected_ids")
    parser.add_argument("--out", required=True)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    rows = ray.data.read_parquet(args.ids)
    scored = rows.map_batches(
        RefLogps,
        fn_constructor_args=(args.model,),
        batch_size=1024,
        concurrency=args.workers,
        num_gpus=1 if torch.cuda.is_available() else 0,
    )
    scored.write_parquet(args.out)


if __name__ == "__main__":
    main()
