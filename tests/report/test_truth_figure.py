"""Figure "Is a shared latent true?": the dots are the estimates, and grey means undefined."""

import dataclasses

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from reseed.compare.registry import Interval
from reseed.report.figures import write_figures
from reseed.report.style import BLUE, GREY, ORANGE, STYLE
from reseed.report.truth import truth_figure

NAN = float("nan")


def interval(mean, low=None, high=None, reason=""):
    return Interval(mean, low, high, None, 3, reason)


@pytest.fixture(scope="module")
def worlds(make_cell):
    """Return cells of two worlds and three architectures, one of them without a shared latent, and
    one cell without labels."""
    _, cell = make_cell()
    why = "no live latent is shared"
    defined = {
        "truth_atom_given_shared": interval(0.75, 0.5, 0.875),
        "truth_atom_given_orphan": interval(0.25, 0.125, 0.375),
        "truth_difference": interval(0.5, 0.4, 0.6),
    }
    undefined = {
        "truth_atom_given_shared": interval(NAN, reason=why),
        "truth_atom_given_orphan": interval(0.25, 0.125, 0.375),
        "truth_difference": interval(NAN, reason=why),
    }
    found = []
    for arm in ("easy", "subspaces"):
        for sae in ("topk", "relu", "gated"):
            more = undefined if (arm, sae) == ("subspaces", "gated") else defined
            made = dataclasses.replace(cell, estimates=cell.estimates | more)
            found.append(({"arm": arm, "sae": sae}, made))
    return [*found, ({"arm": "text", "sae": "topk"}, cell)]


def draw(cells):
    with mpl.rc_context(STYLE):
        figure = truth_figure(cells)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return figure


def dots(axes, row):
    return {
        line.get_color(): float(line.get_xdata()[0])
        for line in axes.lines
        if line.get_marker() in ("o", "D") and line.get_ydata()[0] == row
    }


def row_texts(axes, row):
    return [text.get_text() for text in axes.texts if text.get_position()[1] == row]


def bars(axes, row):
    return {
        to_hex(bar.get_facecolor()).upper(): (bar.get_x(), bar.get_x() + bar.get_width())
        for bar in axes.patches
        if abs(bar.get_y() + bar.get_height() / 2 - row) < 0.3
    }


def test_dots_lines_and_bars_show_the_estimates(worlds):
    axes = draw(worlds).axes[0]
    rows = list(axes.get_yticks())
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["easy, topk", "relu", "gated", "subspaces, topk", "relu", "gated"]
    steps = np.diff(rows)
    assert steps[2] > steps[0], "a gap between worlds"
    for row in rows[:-1]:
        assert dots(axes, row) == {BLUE: 0.75, ORANGE: 0.25}
        found = bars(axes, row)
        assert found[BLUE] == pytest.approx((0.5, 0.875))
        assert found[ORANGE] == pytest.approx((0.125, 0.375))
        joined = [line for line in axes.lines if list(line.get_ydata()) == [row, row]]
        assert [sorted(line.get_xdata()) for line in joined] == [[0.25, 0.75]]
        assert row_texts(axes, row) == ["0.50 [0.40, 0.60]"]


def test_an_undefined_row_is_grey_with_its_reason(worlds):
    axes = draw(worlds).axes[0]
    row = axes.get_yticks()[-1]
    found = dots(axes, row)
    assert set(found) == {GREY}
    assert list(bars(axes, row)) == [GREY]
    assert [line for line in axes.lines if list(line.get_ydata()) == [row, row]] == []
    assert row_texts(axes, row) == ["no live latent is shared"]


def test_the_legend_names_everything_that_is_drawn(worlds):
    def said(cells):
        return [text.get_text() for text in draw(cells).legends[0].get_texts()]

    both = ["shared with another seed", "not shared with another seed"]
    assert said(worlds) == [
        *both,
        "95% interval over n = 3 seeds",
        "only one of the two is defined",
    ]
    assert said(worlds[:2]) == [*both, "95% interval over n = 3 seeds"]


def test_the_figure_is_written_if_there_are_labels(worlds, tmp_path, monkeypatch):
    monkeypatch.setattr(mpl.figure.Figure, "savefig", lambda self, path, **_: path.touch())
    written = [{path.name for path in write_figures(c, tmp_path)} for c in (worlds, worlds[-1:])]
    assert written[0] - written[1] == {"truth.png", "truth.svg"}
    with pytest.raises(ValueError, match="no cell has labels of a known truth to draw"):
        truth_figure(worlds[-1:])


@pytest.mark.parametrize("count", [1, 6])
def test_text_stays_inside_and_does_not_overlap(worlds, count):
    figure = draw(worlds[6 - count : 6])
    axes = figure.axes[0]
    renderer = figure.canvas.get_renderer()
    box = axes.get_tightbbox(renderer)
    assert box.x0 > -1
    assert box.x1 < figure.bbox.x1 + 1
    assert box.y1 < figure.bbox.y1 + 1
    assert figure.legends[0].get_window_extent().y1 < box.y0 + 1
    shown = [axes.title, axes.xaxis.label, *axes.get_yticklabels(), *axes.texts]
    extents = [text.get_window_extent() for text in shown if text.get_text()]
    for i, one in enumerate(extents):
        assert not any(one.overlaps(other) for other in extents[:i])
