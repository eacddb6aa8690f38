"""Shards of rows to shards of token ids by Ray Data: as many workers as there are cores.

python examples/scale/encode_ray.py path/to/model rows/ --out encoded
torchrun --nproc-per-node 2 examples/train_fsdp2.py path/to/model encoded --encoded
"""

import argparse
from collections import Counter
from functools import partial
from pathlib import Path

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.arrow import encode_table


def encode(table, tokenizer, max_length):
    """The rows of a block, a pyarrow Table, as a Table of ids: of each block by itself."""
    # The other cores have blocks of their own.
    return encode_table(table, tokenizer, max_length=max_length, on_bad="skip", threads=1)


def read(folder):
    """The rows of a folder of Parquet or of JSONL, plain, gzip or zstd."""
    import ray

    kinds = Counter(path.suffix == ".parquet" for path in Path(folder).iterdir())
    return (ray.data.read_parquet if kinds[True] else ray.data.read_json)(str(folder))


def main(words=None):
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("rows", help="a folder of Parquet or JSONL files")
    parser.add_argument("--out", default="encoded")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--batch-rows", type=int, default=4096)
    args = parser.parse_args(words)

    import ray

    # Shards in the order of the rows, so that two runs make the same data set.
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    tokenizer = Tokenizer.from_pretrained(args.model)
    encoded = read(args.rows).map_batches(
        partial(encode, tokenizer=tokenizer, max_length=args.max_length),
        batch_format="pyarrow",
        batch_size=args.batch_rows,
        zero_copy_batch=True,
    )
    encoded.write_parquet(args.out)
    pairs = PairDataset.load(args.out, tokenizer=tokenizer)  # as every rank of a trainer does
    print(f"{len(pairs)} pairs, {int(pairs.tokens.sum())} tokens in {args.out}")


if __name__ == "__main__":
    main()
