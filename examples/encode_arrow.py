"""Token ids inside a data pipeline: one function on Arrow tables, for `datasets`, Ray and Spark.

python examples/encode_arrow.py path/to/model pairs.jsonl.gz --out encoded
"""

import argparse

from datasets import load_dataset

from dpo_ext import PairDataset, Tokenizer
from dpo_ext.arrow import encode_table

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("--out", default="encoded")
args = parser.parse_args()

tokenizer = Tokenizer.from_pretrained(args.model)
rows = load_dataset("json", data_files=args.pairs, split="train")
encoded = rows.with_format("arrow").map(
    lambda table: encode_table(table, tokenizer, max_length=512, on_bad="skip", threads=1),
    batched=True,
    remove_columns=rows.column_names,
)
encoded.save_to_disk(args.out)
# Ray:   ds.map_batches(encode_table, batch_format="pyarrow", fn_kwargs={"tokenizer": tokenizer})
# Spark: df.mapInArrow(lambda batches: (encode_table(b, tokenizer) for b in batches), schema)

pairs = PairDataset.from_arrow(encoded.with_format("arrow"), tokenizer)  # rows of ids are rows, too
print(f"{len(pairs)} pairs of {len(rows)} rows")
