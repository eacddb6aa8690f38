"""The pages and the examples: their code runs, their links hold, and a stranger finds things by them."""

import re
import runpy
import sys

import pytest
from doc_blocks import blocks, run_blocks
from places import DOCS, ROOT

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")

PAGES = sorted(DOCS.rglob("*.md"))
ELSEWHERE = {"data.md", "derivation.md", "head.md"}  # run by the tests of their subjects
RUN_HERE = [page for page in PAGES if blocks(page) and page.name not in ELSEWHERE]
PLACE = ROOT / "examples"
EXAMPLES = {str(path.relative_to(PLACE)): path for path in sorted(PLACE.rglob("*.py"))}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("reader_folder")
@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_HERE, ids=lambda page: page.stem)
def test_every_python_block_runs(page):
    run_blocks(page, {"__name__": page.stem})


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::UserWarning", "ignore::DeprecationWarning"
)
@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("train.py", ("--epochs", "1"), "held-out pairs"),
        ("train_kto.py", ("--epochs", "1"), "held-out completions"),
        ("train_trl.py", ("--max-steps", "2"), "rows read"),
        ("train_accelerate.py", (), "batches on each of 1 processes"),
        ("train_lightning.py", (), "eval_rewards/accuracies"),
        ("train_hf_trainer.py", (), "step 0: loss 0.693147"),
        ("encode_arrow.py", (), "pairs of"),
        ("own_loss.py", None, "the optimum"),
    ],
)
def test_every_example_runs_in_one_process(name, options, said, reader_folder, monkeypatch, capsys):
    data = "thumbs.jsonl" if name == "train_kto.py" else "pairs.jsonl.gz"
    files = () if options is None else ("path/to/model", data, "--out", "made", *options)
    monkeypatch.setattr(sys, "argv", [name, *files])
    runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    assert said in capsys.readouterr().out
    if options is not None:
        assert any((reader_folder / "made").iterdir())


def test_an_example_is_short_and_listed():
    assert all(len(path.read_text().splitlines()) <= 80 for path in EXAMPLES.values())
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert [name for name in EXAMPLES if f"examples/{name}" not in index] == []


def anchors(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name
)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize("page", sorted([*ROOT.glob("*.md"), *PAGES]), ids=lambda page: page.name)
def test_no_page_keeps_both_sides_of_a_merge(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if re.match(r"(<{7}|={7}|>{7})( |$)", line)] == []


def test_every_page_is_reached_from_the_index():
    index = DOCS / "README.md"
    linked = {
        (index.parent / link.partition("#")[0]).resolve()
        for page in (index, DOCS / "losses" / "README.md")
        for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text(encoding="utf-8"))
        for link in [str((page.parent / link.partition("#")[0]).resolve())]
    }
    assert "docs/README.md" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.resolve() not in linked and page != index] == []


# What a stranger looks for, and the file and words that answer it. The file must be one that the
# first page, the index or the tree of `python/dpo_ext/` leads to by its name.
FOUND = {
    "how do I install it": ("README.md", r"pip install '\.\[all\]'"),
    "a training loop that evaluates": ("README.md", r"for epoch in range"),
    "does it run on my GPU": ("README.md", r"No GPU number is claimed"),
    "which versions work": ("README.md", r"## Supported versions"),
    "does my TRL option work": ("docs/trl.md", r"HONOURED"),
    "which row formats are read": ("docs/data.md", r"## What it reads"),
    "what happened to my bad rows": ("docs/data.md", r"`dropped`"),
    "hold out an evaluation set": ("docs/data.md", r"\.split\("),
    "Ray and Spark": ("docs/data.md", r"mapInArrow"),
    "packed or shared batches": ("docs/data.md", r"## Three layouts"),
    "resume in the middle of an epoch": ("docs/loop.md", r"## Resuming"),
    "gradient accumulation with unequal batches": ("docs/loop.md", r"num_pairs"),
    "KTO, or data with thumbs up and down": ("docs/kto.md", r"UnpairedDataset"),
    "keep the reference's log-probs": ("docs/reflogps.md", r"ReferenceStore"),
    "does it fit into Lightning": ("docs/hosts.md", r"PairDataModule"),
    "DDP and FSDP2": ("docs/distributed.md", r"attach, then wrap"),
    "the formula of SimPO": ("docs/losses/reference_free.md", r"simpo"),
    "what does loss_type X of another code base mean": (
        "python/dpo_ext/torch/losses/compat.py",
        r"openrlhf",
    ),
    "add a loss of my own": ("docs/testing.md", r"register_loss"),
    "softcap of Gemma": ("docs/head.md", r"softcap"),
    "train a reward model": ("docs/preference.md", r"reward_loss"),
    "why is log Z gone": ("docs/derivation.md", r"cancel"),
    "what does DataError carry": ("docs/errors.md", r"`reason`"),
    "where is the CUDA kernel of log-probs": ("cuda/token_stats.cu", r"Math"),
    "where are the losses in the code": (
        "python/dpo_ext/torch/losses/margin_rows.py",
        r"def dpo\b",
    ),
    "where is a chat template chosen": ("python/dpo_ext/data/templates.py", r"def choose"),
    "where does Rust meet Python": ("rust/py/mod.rs", r"pymodule"),
    "how do I run the tests that matter first": ("Makefile", r"^test-fast:"),
}


@pytest.mark.parametrize("question", FOUND)
def test_a_stranger_finds(question):
    file, words = FOUND[question]
    assert re.search(words, (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), file


def test_contributing_names_only_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set()
    for first, rest in re.findall(r"^\| `([^`]*/)` \|(.*)\|$", text, re.MULTILINE):
        assert (ROOT / first).is_dir(), first
        for name in re.findall(r"`([\w./-]+(?:/|\.(?:py|rs|cuh?|md|pyi)))`", rest):
            named.add(name if (ROOT / name).exists() else f"{first}{name}")
    assert len(named) > 50
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_contributing_names_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rooms = [path for top in ("python/dpo_ext", "rust") for path in (ROOT / top).iterdir()]
    rooms = [path.relative_to(ROOT) for path in rooms if path.is_dir() and not path.is_symlink()]
    missing = [str(room) for room in rooms if "__pycache__" not in room.parts]
    assert [room for room in missing if f"`{room}/`" not in text] == []
