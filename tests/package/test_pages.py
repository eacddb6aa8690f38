"""The pieces of pages: axes, charts and tracks that do not lie, and notebooks that are not forged."""

from __future__ import annotations

import re

import numpy as np
import pytest

from dpo_ext import PairDataset, Report
from dpo_ext.pages import charts, notebook, page, tracks
from dpo_ext.pages.axes import Axis
from dpo_ext.pages.numbers import duration, significant
from dpo_ext.report import Example

EVIL = "<script>alert(1)</script>&\"'"


def shares(markup, css):
    """Places or widths of the marks of a class, in per cent."""
    return [
        float(x) for x in re.findall(rf'class="{css} \w+" style="(?:left|width):([0-9.]+)%', markup)
    ]


def test_charts_escape_names_and_stay_in_their_frame():
    chart = charts.line_chart(
        [charts.Series("a<b", [1.0, 5.0, 3.0], "policy", [0, 1, 2])],
        x_label="x<", title="t<", levels=[charts.Level("top<", 9.0)],
    )  # fmt: skip
    assert "a&lt;b" in chart
    assert not re.search("[xt]<[^/]|top<[^/]", chart)
    points = re.search(r'points="([^"]*)"', chart).group(1).split()
    for point in points:
        x, y = map(float, point.split(","))
        assert charts.LEFT <= x <= charts.WIDTH - charts.RIGHT
        assert charts.TOP <= y <= charts.HEIGHT - charts.BOTTOM


def test_names_of_levels_are_drawn_over_every_curve():
    chart = charts.line_chart(
        [charts.Series("a", [1.0, 2.0], "policy", [0, 1], dots=True)],
        x_label="x", title="t", levels=[charts.Level("bound", 1.5)],
    )  # fmt: skip
    assert chart.rindex("bound</text>") > max(chart.rindex("<polyline"), chart.rindex("<circle"))
    assert "paint-order:stroke" in page.STYLE


def test_charts_of_constant_values_do_not_divide_by_zero():
    charts.line_chart([charts.Series("a", [1.0], "policy", [0])], x_label="x", title="t")
    charts.histogram([charts.Series("a", [2.0, 2.0], "policy")], x_label="x", title="t")
    charts.scatter([0.0], [0.0], x_label="x", title="t", diagonal="d")
    tracks.bars([tracks.Row("a", 0.0, "0")], axis=Axis.from_zero([0.0]), title="t")


def test_bars_are_as_long_as_their_values():
    rows = [tracks.Row(str(v), v, str(v)) for v in (213.0, 227_648.0)]
    axis = Axis.from_zero([row.value for row in rows])
    short, long = shares(tracks.bars(rows, axis=axis, title="t"), "fill")
    assert long / short == pytest.approx(227_648 / 213, rel=0.1)
    with pytest.raises(ValueError, match="linear axis that starts at 0"):
        tracks.bars(rows, axis=Axis.decades([213.0, 227_648.0]), title="t")


def test_dots_on_a_logarithmic_axis_stand_where_its_numbers_say():
    rows = [tracks.Row("a", 213.0, "213"), tracks.Row("b", 227_648.0, "227,648")]
    drawn = tracks.dots(rows, axis=Axis.decades([213.0, 227_648.0]), title="t")
    ticks = {
        text: float(left)
        for left, text in re.findall(r'<span style="left:([0-9.]+)%">([^<]*)</span>', drawn)
    }
    assert list(ticks) == ["100", "1 k", "10 k", "100 k", "1 M"]
    low, high = shares(drawn, "mark")
    assert ticks["100"] < low < ticks["1 k"]
    assert ticks["100 k"] < high < ticks["1 M"]


@pytest.mark.parametrize(
    "axis",
    [
        Axis(0.0, 1.0),
        Axis(-3.2, 17.0),
        Axis(6.1, 7.9, True),
        Axis(0.4, 7.0, True),
        Axis(1.0, 1e6, True),
    ],
)
def test_every_axis_has_ticks_inside_it(axis):
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 11
    assert all(-1e-9 <= axis.share(tick) <= 1 + 1e-9 for tick in ticks)
    assert len({axis.text(tick) for tick in ticks}) == len(ticks)


def test_a_histogram_shows_the_count_of_each_bin():
    drawn = charts.counted([3, 0, 41], [0, 10, 20, 30], x_label="tokens", title="t")
    assert re.findall(r'class="count"[^>]*>([^<]*)<', drawn) == ["3", "41"]
    assert "20 to 29: 41</title>" in drawn


def test_a_page_follows_the_theme_and_needs_nothing_from_outside():
    whole = page.page(kicker="k<", title="t<", subtitle="s", sections=page.section("a", "b<", "c"))
    assert "prefers-color-scheme:dark" in whole
    assert 'name="viewport"' in whole
    assert not re.search(r"https?:|src=|href=|<script|url\(|@import|<link", whole)
    for raw in ("k<", "t<", "b<"):
        assert raw + "/" not in whole
        assert raw.replace("<", "&lt;") in whole


def test_tables_and_tiles_escape_what_they_are_given():
    for markup in (
        page.table(("a", "#b"), [(EVIL, EVIL)]),
        page.tile(EVIL, EVIL, EVIL),
        page.facts({EVIL: EVIL}),
        tracks.dots([tracks.Row(EVIL, 1.0, EVIL)], axis=Axis(0.0, 2.0), title=EVIL),
    ):
        assert "<script" not in markup
        assert "&lt;script&gt;" in markup


def test_numbers_keep_their_size_in_words():
    assert duration(1964.3) == "32 min 44 s"
    assert duration(59.6) == "1 min"
    assert duration(3599.7) == "1 h"
    assert significant(0.0218) == "0.022"


def test_notebooks_show_text_of_the_data_as_text():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]}]
    pairs = PairDataset.from_ids(*([row[k]] for row in rows for k in row))
    pairs.columns["note<b>"] = np.array([EVIL], object)
    pairs.report = Report(
        3,
        1,
        {EVIL: 2},
        {"warned": 1},
        {EVIL: Example(EVIL, 4, EVIL, EVIL)},
        (EVIL,),
    )
    batch = pairs.plan(layout="padded", pairs_per_batch=1)[0]
    batch.columns["note<b>"] = [EVIL]
    for shown in (pairs, pairs.report, batch):
        markup = shown._repr_html_()
        assert "<script" not in markup
        assert "<b>" not in markup
        assert "&lt;script&gt;" in markup
        assert "style" not in markup  # the notebook's theme decides


def test_notebooks_show_what_is_known_of_pairs():
    pairs = PairDataset.from_ids([[1, 2]] * 9, [[3]] * 9, [list(range(40))] * 9)
    markup = pairs._repr_html_()
    assert "9 pairs, 405 tokens" in markup
    assert markup.count("<tr>") == 1 + 5 + 1
    assert "0 1 2 3 4 5 6 7 … (40 ids)" in markup
    assert "ref_chosen_logps" not in markup
    known = pairs.with_ref_logps(np.full((9, 2), -1.25))._repr_html_()
    assert "<td>-1.25</td>" in known


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
def test_notebooks_show_the_fields_that_a_layout_has(layout):
    pairs = PairDataset.from_ids([[1, 2]] * 3, [[3]] * 3, [[4, 5]] * 3)
    batch = pairs.plan(layout=layout, pairs_per_batch=3)[0]
    markup = batch._repr_html_()
    for name, value in vars(batch).items():
        shown = f"<td>{name}</td>" in markup
        assert shown == (value is not None and name not in ("layout", "columns")), name
    assert f"3 pairs, {layout}" in markup
    torch = pytest.importorskip("torch")
    moved = batch.to()
    assert isinstance(moved.input_ids, torch.Tensor)
    assert moved._repr_html_() == markup


def test_a_long_cell_is_cut_and_says_so():
    assert "… (500 characters)" in notebook.table("t", ("a",), [("x" * 500,)])
