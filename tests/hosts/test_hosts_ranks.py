"""The examples as two processes over gloo, with unequal micro-batches and accumulation, against one plain loop."""

import csv
import gzip
import json
import os
import re
import runpy
import sys

import pytest
import tiny
import warm
from places import ROOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dpo_ext import PairDataset, Tokenizer  # noqa: E402
from dpo_ext.torch import PairLoader, attach_scoring, preference_loss  # noqa: E402

ROWS, TOKENS, RATE = 48, 800, 3e-4
RANKS, ACCUMULATE = 2, 2
HOSTS = {
    "accelerate": ("accelerate",),
    "fsdp2": (),
    "hf_trainer": ("accelerate",),
    "lightning": ("lightning",),
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and pairs whose batches are even in number and uneven in pairs."""
    folder = tmp_path_factory.mktemp("hosts")
    rows = tiny.rows(ROWS)
    for i, row in enumerate(rows):
        row["chosen"] *= 1 + i % 3
    tiny.write_jsonl(folder / "pairs.jsonl.gz", rows)
    tiny.tokenizer().save_pretrained(folder / "model")
    tiny.model().save_pretrained(folder / "model")
    return folder


def plain_loop(folder, per_batch=False):
    """Parameters and losses of one process; ``per_batch`` normalises each batch by itself."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model = attach_scoring(model)
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    pairs = PairDataset.from_files(folder / "pairs.jsonl.gz", tokenizer)
    plan = pairs.plan(layout="padded", tokens_per_batch=TOKENS)
    batches = list(PairLoader(plan))
    assert len(batches) % RANKS == 0
    assert len(batches) % (RANKS * ACCUMULATE) != 0  # the last step is a short one
    assert len({batch.n_pairs for batch in batches}) > 1

    def score(batch):
        return model(**batch.model_inputs, score_table=batch.table).logps

    with torch.no_grad():
        reference = [score(batch) for batch in batches]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)
    losses, size = [], RANKS * ACCUMULATE
    for first in range(0, len(batches), size):
        step = range(first, min(first + size, len(batches)))
        num_pairs = sum(batches[i].n_pairs for i in step)
        parts = []
        for i in step:
            count = batches[i].n_pairs * len(step) if per_batch else num_pairs
            out = preference_loss(score(batches[i]), reference[i], beta=0.1, num_pairs=count)
            out.loss.backward()
            parts.append(out.loss.item())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(sum(parts))
    assert len(losses) > 2
    return dict(model.named_parameters()), losses


@pytest.fixture(scope="module")
def plain(folder):
    return plain_loop(folder)


def furthest(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def encoded(folder):
    """The pairs as shards of ids, by the map function of the Ray job."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    encode = runpy.run_path(str(ROOT / "examples" / "scale" / "encode_ray.py"))["encode"]
    tokenizer = Tokenizer.from_pretrained(folder / "model")
    text = gzip.decompress((folder / "pairs.jsonl.gz").read_bytes())
    rows = [json.loads(line) for line in text.splitlines()]
    (folder / "encoded").mkdir()
    for i in range(0, ROWS, 20):
        table = encode(pa.Table.from_pylist(rows[i : i + 20]), tokenizer, 1024)
        parquet.write_table(table, folder / "encoded" / f"{i:03}.parquet")
    return folder / "encoded"


def example(rank, port, name, folder, out, pairs="pairs.jsonl.gz", *switches):
    """One rank of an example."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "HF_HUB_OFFLINE": "1"}
    os.chdir(folder)
    options = {"out": out, "lr": RATE, "tokens-per-batch": TOKENS, "accumulate": ACCUMULATE}
    if name == "lightning":
        options |= {"devices": RANKS, "held-out": 0}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    path = str(ROOT / "examples" / f"train_{name}.py")
    sys.argv = [path, "model", pairs, *words, *switches]
    runpy.run_path(path, run_name="__main__")
    sys.stdout.flush()


def losses_of(name, out, said):
    if name == "lightning":
        with (out / "logs" / "0" / "metrics.csv").open() as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]
    return [float(value) for value in re.findall(r"step \d+: loss (\S+)", said)]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            "fsdp2",
            marks=pytest.mark.skipif(
                torch.__version__ < "2.9", reason="FSDP2 of torch 2.8 over gloo"
            ),
        ),
        "accelerate",
        "hf_trainer",
        "lightning",
    ],
)
def test_two_processes_of_a_host_end_where_a_plain_loop_does(name, folder, plain, tmp_path):
    for package in HOSTS[name]:
        pytest.importorskip(package)
    imports = (*warm.TORCH, "transformers.models.llama.modeling_llama")
    said = warm.ranks(
        __name__, "example", warm.free_port(), name, folder, tmp_path, count=RANKS, imports=imports
    )
    parameters, losses = plain
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert furthest(parameters, dict(made.named_parameters())) <= 1e-5
    assert losses_of(name, tmp_path, said) == pytest.approx(losses, abs=1e-5)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="FSDP2 of torch 2.8 over gloo")
@pytest.mark.usefixtures("encoded")
def test_two_processes_on_a_folder_of_shards_end_where_a_plain_loop_does(folder, plain, tmp_path):
    imports = (*warm.TORCH, "transformers.models.llama.modeling_llama")
    given = ("fsdp2", folder, tmp_path, "encoded", "--encoded")
    said = warm.ranks(__name__, "example", warm.free_port(), *given, count=RANKS, imports=imports)
    parameters, losses = plain
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert furthest(parameters, dict(made.named_parameters())) <= 1e-5
    assert losses_of("fsdp2", tmp_path, said) == pytest.approx(losses, abs=1e-5)


def test_the_mean_of_each_batch_ends_elsewhere(folder, plain):
    parameters, losses = plain
    others, other_losses = plain_loop(folder, per_batch=True)
    assert furthest(parameters, others) > 1e-4
    assert other_losses != pytest.approx(losses, abs=1e-4)
