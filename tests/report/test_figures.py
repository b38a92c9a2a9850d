import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from reseed.report.figures import (
    STYLE,
    cosine_figure,
    matched_cosines,
    shared_figure,
    sharing_profile_figure,
    write_figures,
)
from reseed.report.line_figures import decile_figure, threshold_figure
from reseed.report.sharing_by_firing import firing_figure


def draw(figure_of, cells):
    """Draw the figure with the layout that it has when it is written."""
    with mpl.rc_context(STYLE):
        figure = figure_of(cells)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return figure


def texts(figure):
    return " ".join(t.get_text() for t in figure.findobj(mpl.text.Text))


@pytest.fixture(scope="module")
def twelve(make_cell):
    return [
        make_cell(sae, n=n, shared=shared, **{"sae.num_latents": width})
        for sae, shared in (("topk", 30), ("relu", 10), ("batch_topk", 0))
        for width, n in ((256, 2), (1024, 3), (4096, 5), (16384, 3))
    ]


FIGURES = [shared_figure, sharing_profile_figure, cosine_figure, firing_figure, threshold_figure,
           decile_figure]  # fmt: skip
NAMES = ("shared_fraction", "seeds", "cosines", "firing", "threshold", "firing_deciles")


def test_figures_are_written_as_png_and_svg(cells, tmp_path):
    written = write_figures(cells, tmp_path)
    names = {f"{n}.{k}" for n in NAMES for k in ("png", "svg")}
    assert {path.name for path in written} == names == {p.name for p in tmp_path.iterdir()}
    for path in written:
        if path.suffix == ".svg":
            ET.parse(path)
        else:
            assert path.read_bytes().startswith(b"\x89PNG")


def test_drawing_needs_no_display():
    code = "import sys, reseed.report.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_same_cells_give_the_same_svg(cells, tmp_path):
    first, second = (write_figures(cells, tmp_path / name) for name in "ab")
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes(), a.name


@pytest.mark.parametrize("figure_of", FIGURES)
@pytest.mark.parametrize("count", [1, 2, 12])
def test_panels_do_not_overlap_and_text_stays_inside(twelve, figure_of, count):
    figure = draw(figure_of, twelve[:count])
    renderer = figure.canvas.get_renderer()
    boxes = [axes.get_tightbbox(renderer) for axes in figure.axes if axes.get_visible()]
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(width, height) < 1, "panels overlap by more than a pixel"
    for box in boxes:
        assert box.x0 > -1
        assert box.x1 < figure.bbox.x1 + 1


def test_shared_figure_shows_every_pair_and_the_interval(make_cell, spread):
    knobs, cell = make_cell(n=4, shared=24)
    cell = spread(cell, 0.1)
    axes = draw(shared_figure, [(knobs, cell)]).axes[0]
    marks = [line for line in axes.lines if line.get_marker() == "|"]
    assert np.allclose(marks[0].get_xdata(), cell.pairs["shared_fraction"])
    found = cell.estimates["shared_fraction"]
    assert any(np.allclose(line.get_xdata(), [found.low, found.high]) for line in axes.lines)


def test_figures_say_n_and_the_interval(cells):
    shared = texts(draw(shared_figure, cells))
    assert "95% interval over n = 2–3 seeds" in shared
    assert "n = 2, no interval" in shared
    assert "n = 2–3 seeds" in texts(draw(sharing_profile_figure, cells))


def test_the_ring_is_p_and_the_line_is_u(make_cell):
    knobs, cell = make_cell(n=5, shared=24)
    ring, line = draw(sharing_profile_figure, [(knobs, cell)]).axes
    turns = [(w.theta1 - w.theta2) / 360 for w in ring.patches]
    assert np.allclose(np.abs(turns), cell.p, atol=1e-6)
    points = next(x for x in line.lines if x.get_marker() not in ("", "None", None))
    assert np.allclose(points.get_xdata(), [2, 3, 4, 5])
    assert np.allclose(points.get_ydata(), cell.u)


def test_the_cosine_figure_has_the_matched_latents(make_cell):
    _, cell = make_cell(n=2, shared=24)
    encoder, decoder, agrees = matched_cosines(cell)
    assert len(encoder) == 2 * 48
    both = (encoder >= 0.7) & (decoder >= 0.7) & agrees
    assert both.sum() == 2 * 24
    assert len(matched_cosines(cell, at_most=10)[0]) == 10


def test_drawing_figures_of_no_cells_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there are no cells to draw figures of"):
        write_figures([], tmp_path)


def test_a_numeric_axis_of_three_values_has_a_figure(budgets, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(mpl.figure.Figure, "savefig", lambda self, path, **_: path.touch())
    for many in (4, 2):
        cells = [(k, c) for k, c in budgets if k["tokens"] in (800, 1600, 3200, 12800)[:many]]
        drawn.append({path.name for path in write_figures(cells, tmp_path)})
    names = {f"shared_fraction_by_tokens.{kind}" for kind in ("png", "svg")}
    assert drawn[0] - drawn[1] == names


@pytest.mark.parametrize("figure_of", FIGURES)
def test_names_of_many_cells_do_not_collide(budgets, figure_of):
    """No two texts of the panels overlap, with 16 cells of long names."""
    long = [(k | {"arm": f"{k['arm']}, another order of the data"}, c) for k, c in budgets]
    figure = draw(figure_of, long)
    boxes = []
    for axes in figure.axes:
        if axes.get_visible():
            shown = [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.get_yticklabels()]
            boxes += [t.get_window_extent() for t in shown if t.get_visible() and t.get_text()]
    boxes += [legend.get_window_extent() for legend in figure.legends]
    for i, one in enumerate(boxes):
        for other in boxes[:i]:
            width = min(one.x1, other.x1) - max(one.x0, other.x0)
            height = min(one.y1, other.y1) - max(one.y0, other.y0)
            assert min(width, height) < 1.5
