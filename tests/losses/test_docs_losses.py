"""The derivation runs; the pages and pictures of the losses are those of the table."""

import re
import subprocess
import sys
from xml.etree import ElementTree

import make_losses
import pytest
from doc_blocks import blocks, run_blocks
from places import DOCS

from dpo_ext.torch.losses.catalogue import losses_table
from dpo_ext.torch.losses.registry import LOSSES

PICTURES = {
    file: names for family in make_losses.FAMILIES for file, names in make_losses.pictures(family)
}


def test_the_derivation_runs():
    page = DOCS / "derivation.md"
    assert len(blocks(page)) >= 12
    assert any("assert" in block for block in blocks(page))
    run_blocks(page, {})


def test_the_loss_of_your_own_runs():
    try:
        run_blocks(DOCS / "losses" / "README.md", {})
        assert list(LOSSES["square_gap"].parameters) == ["target", "beta"]
    finally:
        LOSSES.pop("square_gap", None)


def test_its_links_exist():
    for source in (DOCS / "derivation.md", *(DOCS / "losses").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)\)", source.read_text(encoding="utf-8")):
            if not link.startswith("http"):
                assert (source.parent / link).is_file(), f"{source.name}: {link}"


def test_the_committed_pages_are_those_of_the_table(capsys):
    assert make_losses.main(["--check"]) == 0, capsys.readouterr().err


def test_the_check_tells_what_is_stale_missing_or_too_much(tmp_path, capsys):
    assert make_losses.main([str(tmp_path)]) == 0
    for file in PICTURES:
        (tmp_path / file).touch()
    assert make_losses.main([str(tmp_path), "--check"]) == 0
    (tmp_path / "dpo.md").write_text("# other", encoding="utf-8")
    (tmp_path / "hinge.svg").unlink()
    (tmp_path / "gone.md").touch()
    assert make_losses.main([str(tmp_path), "--check"]) == 1
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[0] for line in told] == [
        "docs/losses/dpo.md", "docs/losses/gone.md", "docs/losses/hinge.svg",
    ]  # fmt: skip


def test_every_loss_is_on_exactly_one_page():
    named = [name for family in make_losses.FAMILIES.values() for name in family.names]
    assert len(named) == len(set(named))
    built_in = {entry.name for entry in losses_table() if not entry.registered}
    assert set(named) == built_in
    assert len(built_in) == 46 + 11 + 1  # and TRL's token mean
    assert "`sigmoid`" in make_losses.page("dpo")


def test_every_page_shows_its_pictures():
    for family in make_losses.FAMILIES:
        text = (DOCS / "losses" / f"{family}.md").read_text(encoding="utf-8")
        shown = [file for file, _ in make_losses.pictures(family)]
        assert re.findall(r"!\[[^]]*\]\(([^)]+)\)", text) == shown


@pytest.mark.parametrize("file", PICTURES)
def test_a_picture_shows_at_most_six_losses_by_name_on_a_background_of_its_own(file):
    text = (DOCS / "losses" / file).read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert float(root.get("width").removesuffix("pt")) == 648  # the width of a page
    assert 0 < len(PICTURES[file]) <= make_losses.PANELS
    assert all(f">{name}</text>" in text for name in PICTURES[file])
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    assert "fill: #ffffff" in light
    assert "fill: #0d1117" in dark
    sizes = [float(size) for size in re.findall(r"font-size: ([\d.]+)px", text)]
    assert min(sizes) >= 9
    assert len(text) < 60_000


@pytest.mark.slow
@pytest.mark.parametrize("family", ["hinge", "batch", "single", "list"])
def test_the_pictures_are_those_that_are_drawn(family, tmp_path):
    pytest.importorskip("matplotlib")
    import make_plots

    ((file, names),) = make_losses.pictures(family)
    make_plots.draw_family(tmp_path / file, names)
    made = (tmp_path / file).read_text(encoding="utf-8")
    committed = (DOCS / "losses" / file).read_text(encoding="utf-8")
    assert made.count("<path") == committed.count("<path")
    assert re.findall(r">([a-z_]+)</text>", made) == re.findall(r">([a-z_]+)</text>", committed)


@pytest.mark.slow
def test_the_pictures_of_the_derivation_are_those_that_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    import make_plots

    for draw, name in ((make_plots.draw_kl, "kl.svg"), (make_plots.draw_optimum, "optimum.svg")):
        draw(tmp_path / name)
        made, committed = (
            (folder / name).read_text(encoding="utf-8") for folder in (tmp_path, DOCS)
        )
        assert made.count("<path") == committed.count("<path") > 5


@pytest.mark.slow
def test_the_generator_is_a_command():
    command = [sys.executable, str(DOCS / "make_losses.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
