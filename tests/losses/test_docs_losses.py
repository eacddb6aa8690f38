"""The derivation runs; the pages and pictures of the losses are those of the table."""

import re
from xml.etree import ElementTree

import pytest
from doc_blocks import blocks, run_blocks
from places import DOCS

from dpo_ext.torch.losses.catalogue import FAMILIES, losses_table, page
from dpo_ext.torch.losses.catalogue import main as write_pages
from dpo_ext.torch.losses.registry import LOSSES

DRAWN = [name for name, row in LOSSES.items() if not (row.couples_batch or row.autograd)]


def test_the_derivation_runs():
    page = DOCS / "derivation.md"
    assert len(blocks(page)) >= 12
    assert any("assert" in block for block in blocks(page))
    run_blocks(page, {})


def test_its_links_exist():
    for source in (DOCS / "derivation.md", *(DOCS / "losses").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", source.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (source.parent / link).is_file(), f"{source.name}: {link}"


def test_the_pages_are_those_of_the_table(tmp_path):
    write_pages(str(tmp_path))
    for made in tmp_path.iterdir():
        committed = (DOCS / "losses" / made.name).read_text(encoding="utf-8")
        assert committed == made.read_text(encoding="utf-8"), (
            f"docs/losses/{made.name} is stale: python -m dpo_ext.torch.losses.catalogue docs/losses"
        )
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in (DOCS / "losses").iterdir()}


def test_every_loss_is_on_exactly_one_page():
    named = [name for family in FAMILIES.values() for name in family.names]
    assert len(named) == len(set(named))
    built_in = {
        e.name for e in losses_table() if e.name not in LOSSES or not LOSSES[e.name].autograd
    }
    assert set(named) == built_in
    assert len(built_in) == 46 + 11 + 1  # and TRL's token mean
    assert "`sigmoid`" in page(FAMILIES["dpo"])


@pytest.mark.slow
def test_the_pictures_can_be_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    from make_plots import main

    main(str(tmp_path))
    for name in ("losses.svg", "kl.svg", "optimum.svg"):
        made = (tmp_path / name).read_text(encoding="utf-8")
        committed = (DOCS / name).read_text(encoding="utf-8")
        for text in (made, committed):
            assert 5_000 < len(text) < 200_000
            ElementTree.fromstring(text)
        assert made.count("<path") == committed.count("<path")
    assert all(f">{name}</text>" in (DOCS / "losses.svg").read_text() for name in DRAWN)
