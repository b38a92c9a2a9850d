"""Figures of the shared fraction over a numeric axis: layout, and legibility."""

from itertools import pairwise

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from reseed.report.axis_figures import axis_figure
from reseed.report.style import COLOURS, STYLE


def draw(cells, axis="tokens"):
    with mpl.rc_context(STYLE):
        figure = axis_figure(cells, axis)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return figure


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes if axes.get_visible()}


def marked(axes):
    """Return the lines of cells; the paper's numbers have crosses (`test_curves`)."""
    return [line for line in axes.lines if line.get_marker() not in ("", "None", None, "x")]


def title(figure):
    return figure.get_suptitle()


@pytest.fixture(scope="session")
def sweep(make_cell):
    """Return cells of 6 architectures × 3 sparsities × 3 budgets."""
    made = {shared: make_cell(shared=shared)[1] for shared in (4, 12, 20)}
    return [
        ({"sae": sae, "sparsity": sparsity, "tokens": tokens}, made[shared])
        for sae in ("topk", "batch_topk", "matryoshka", "jumprelu", "gated", "relu")
        for sparsity in ("L0≈4", "L0≈8", "L0≈16")
        for tokens, shared in ((800, 4), (1600, 12), (3200, 20))
    ]


def test_there_is_a_panel_per_architecture_and_a_line_per_arm(budgets):
    figure = draw(budgets)
    found = panels(figure)
    assert list(found) == ["topk", "relu"]
    for axes in found.values():
        lines = marked(axes)
        assert [line.get_color() for line in lines] == list(COLOURS[:2])
        assert len({line.get_marker() for line in lines}) == 2, "in grey, too"
        for line in lines:
            assert np.array_equal(line.get_xdata(), [100, 200, 400, 1600])
            assert np.allclose(line.get_ydata(), np.array([4, 12, 20, 30]) / 48)
        controls = [line for line in axes.lines if line not in lines]
        starts = sorted((line.get_linestyle(), line.get_ydata()[0]) for line in controls)
        assert starts == [("--", 0), ("--", 0), ("--", 0), ("--", 1)]
        assert axes.get_ylim()[0] < 0 < 1 < axes.get_ylim()[1]
        assert axes.get_xlabel() == "optimiser steps of 8 tokens"
    assert title(figure) == "Some runs started from similar weights (dotted)"
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == [
        "other init",
        "same init",
        "95% interval over n = 3 seeds",
        "untrained",
        "null: random rows",
    ]


def test_untrained_weights_are_dotted_grey_and_the_null_is_dashed(budgets):
    lines = [line for axes in draw(budgets).axes for line in axes.lines if line not in marked(axes)]
    looks = {(line.get_color(), line._dash_pattern[1][0] > 2) for line in lines}
    assert looks == {("#767676", False), ("black", True)}


def test_bands_are_the_intervals(budgets):
    figure = draw(budgets)
    for name, axes in panels(figure).items():
        cells = [c for k, c in budgets if (k["sae"], k["arm"]) == (name, "other init")]
        ends = [
            (c.estimates["shared_fraction"].low, c.estimates["shared_fraction"].high) for c in cells
        ]
        vertices = axes.collections[0].get_paths()[0].vertices
        for at, interval in zip([100, 200, 400, 1600], ends, strict=True):
            assert interval[0] is not None
            here = vertices[vertices[:, 0] == at, 1]
            assert np.allclose([here.min(), here.max()], interval)


def test_a_place_without_an_interval_interrupts_the_band(make_cell, spread):
    """A shared fraction of 0 has no interval: a band on one side, a bar between two such places."""
    shared = (20, 0, 12, 20, 0)
    cells = [make_cell(shared=s, layer=i) for i, s in enumerate(shared)]
    cells = [(k, spread(c, 0.1) if k["layer"] not in (1, 4) else c) for k, c in cells]
    axes = draw(cells, "layer").axes[0]
    assert [e.estimates["shared_fraction"].low is None for _, e in cells] == [
        s == 0 for s in shared
    ]
    places = [{x for p in c.get_paths() for x in p.vertices[:, 0]} for c in axes.collections]
    assert places == [{0}, {2, 3}]


def test_a_wide_range_is_logarithmic_with_a_number_at_every_value(budgets):
    for axes in panels(draw(budgets)).values():
        assert axes.get_xscale() == "log"
        assert axes.xaxis.get_transform().base == 2
        assert [t.get_text() for t in axes.get_xticklabels()] == ["100", "200", "400", "1,600"]


def test_a_short_range_is_linear(budgets):
    some = [({"sae": k["sae"], "layer": k["tokens"] // 800}, c) for k, c in budgets]
    some = [(k, c) for k, c in some if k["layer"] <= 4]
    (axes,) = draw(some[::2], "layer").axes
    assert (axes.get_xscale(), axes.get_xlabel()) == ("linear", "layer")
    assert len(marked(axes)) == 2, "a line per architecture"


def test_the_title_asks_about_movement_only_if_some_arms_start_alike(budgets):
    alone = [(knobs, cell) for knobs, cell in budgets if knobs["arm"] == "other init"]
    assert title(draw(alone)) == ""


@pytest.mark.parametrize(
    ("axis", "names"),
    [
        ("tokens", ["L0≈4", "L0≈8", "L0≈16"]),
        ("sparsity", ["800 tokens", "1,600 tokens", "3,200 tokens"]),
    ],
)
def test_without_arms_there_is_a_line_per_architecture(sweep, axis, names):
    found = panels(draw(sweep, axis))
    assert list(found) == names
    for axes in found.values():
        assert [line.get_color() for line in marked(axes)] == list(COLOURS[:6])
        assert len({line.get_marker() for line in marked(axes)}) == 6


def test_two_seeds_have_no_band(make_cell):
    cells = [make_cell(n=2, shared=s, layer=s) for s in (4, 12, 20)]
    figure = draw(cells, "layer")
    assert not figure.axes[0].collections
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said[:3] == ["n = 2 seeds, no interval", "untrained", "null: random rows"]


def test_surrogates_are_dashed(budgets):
    named = {"other init": "other init", "same init": "Gaussian surrogate"}
    cells = [(k | {"arm": named[k["arm"]]}, c) for k, c in budgets]
    for axes in panels(draw(cells)).values():
        assert [line.get_linestyle() for line in marked(axes)] == ["-", "--"]


@pytest.mark.parametrize("many", [1, 2, 4])
def test_all_text_is_inside_the_figure_and_nothing_is_covered(budgets, sweep, many):
    """There are one, two and four panels, with a long axis name and numbers close together."""
    cells = [
        (k | {"model": model, "arm": f"{k['arm']}, another order of the data"}, c)
        for model in ("one", "another")[: max(1, many // 2)]
        for k, c in budgets
        if many > 1 or k["sae"] == "topk"
    ]
    for figure in (draw(cells), draw(sweep, "sparsity"), draw(sweep, "tokens")):
        renderer = figure.canvas.get_renderer()
        shown = [axes for axes in figure.axes if axes.get_visible()]
        parts = [a.get_tightbbox(renderer) for a in shown]
        parts += [legend.get_window_extent() for legend in figure.legends]
        for i, one in enumerate(parts):
            assert one.x0 > -1
            assert one.y0 > -1
            assert one.x1 < figure.bbox.x1 + 1
            assert one.y1 < figure.bbox.y1 + 1
            for other in parts[:i]:
                width = min(one.x1, other.x1) - max(one.x0, other.x0)
                height = min(one.y1, other.y1) - max(one.y0, other.y0)
                assert min(width, height) < 1.5
        for axes in shown:
            labels = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_text()]
            assert bool(labels) == bool(axes.get_xlabel()), "where nothing is below"
            assert all(a.x1 < b.x0 for a, b in pairwise(labels))


def test_numbers_that_would_touch_are_left_out(make_cell):
    """On a linear axis of three panels from 1,000 to 8,000, 1,500 is a tenth of an inch from the
    first."""
    cells = [
        make_cell(sparsity=s, tokens=t)
        for s in ("k=4", "k=8", "k=16")
        for t in (1000, 1500, 2000, 4000, 8000)
    ]
    axes = draw(cells).axes[0]
    named = [t.get_text() for t in axes.get_xticklabels()]
    assert len(named) == 5
    assert named[-1] == "8,000"
    assert "" in named
