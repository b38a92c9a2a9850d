"""Figures with a line per cell, with the paper's numbers."""

import dataclasses

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection

from reseed.compare.measures import THRESHOLDS
from reseed.report.axis_figures import axis_figure
from reseed.report.captions import BY_LAYER, BY_THRESHOLD, SOURCE, UNSHARED
from reseed.report.figures import sharing_profile_figure
from reseed.report.line_figures import MOST_LINES, coverage_figure, decile_figure, threshold_figure
from reseed.report.sharing_by_firing import MAX_POINTS, firing_figure, matched_latents
from reseed.report.style import GREY, STYLE


def draw(figure_of, *arguments):
    with mpl.rc_context(STYLE):
        figure = figure_of(*arguments)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    return figure


def legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def references(axes):
    return [line for line in axes.lines if line.get_color() == GREY and line.get_marker() == "x"]


def own(axes):
    lines = [line for line in axes.lines if line.get_marker() not in ("", "None", None)]
    return [line for line in lines if line not in references(axes)]


def test_the_threshold_figure_has_estimates_and_intervals(cells):
    figure = draw(threshold_figure, cells)
    (axes,) = figure.axes
    for line, band, (_, cell) in zip(own(axes), axes.collections, cells, strict=True):
        found = [cell.estimates[f"shared_fraction_at_{tau}"] for tau in THRESHOLDS]
        assert np.allclose(line.get_xdata(), THRESHOLDS)
        assert np.allclose(line.get_ydata(), [e.mean for e in found])
        ends = {(t, x) for t, e in zip(THRESHOLDS, found, strict=True)
                for x in (e.low, e.high) if x is not None}  # fmt: skip
        corners = {tuple(v) for path in band.get_paths() for v in path.vertices}
        assert ends <= corners
    assert len({line.get_marker() for line in own(axes)}) == 3, "in grey, too"
    assert "95% interval over n = 2–3 seeds" in legend(figure)


def test_the_paper_s_thresholds_are_dashed_grey_and_named(cells):
    figure = draw(threshold_figure, cells)
    (line,) = references(figure.axes[0])
    assert dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) == dict(BY_THRESHOLD)
    assert line.get_linestyle() == "--"
    assert any(text.startswith(SOURCE) for text in legend(figure))


def by_layer(cells):
    """Return the cells as if their runs were of several layers, which are no sample."""
    return [
        (k, dataclasses.replace(c, settings=dataclasses.replace(
            c.settings, pair_by="layer", grid={"layer": [0, 1, 2]})))
        for k, c in cells
    ]  # fmt: skip


def test_the_paper_s_numbers_are_shown_for_pairs_of_seeds_only(make_cell):
    cells = by_layer([make_cell(n=5)])
    figure = draw(threshold_figure, cells)
    assert not references(figure.axes[0])
    assert not any(SOURCE in text for text in legend(figure))
    assert not any(references(axes) for axes in draw(sharing_profile_figure, cells).axes)


def test_two_seeds_have_no_bands(make_cell):
    figure = draw(threshold_figure, [make_cell(n=2)])
    assert "n = 2 seeds, no interval" in legend(figure)


def test_the_decile_figure_separates_latents_that_are_not_live(cells):
    figure = draw(decile_figure, cells)
    (axes,) = figure.axes
    named = [t.get_text() for t in axes.get_xticklabels()]
    assert named == ["0", "<10", *map(str, range(1, 11))]
    line = own(axes)[0]  # half of the latents are shared: the rarest
    at, height = line.get_xdata(), line.get_ydata()
    gap = np.flatnonzero(np.isnan(height))
    assert 1 < at[gap[0]] < 2, "no line from latents that are not live to the deciles"
    there = ~np.isnan(height)
    assert np.allclose(at[there].round(), range(12))
    assert height[there][:5].tolist() == [1.0] * 5
    assert height[there][6:].tolist() == [0.0] * 6
    assert any(isinstance(x, LineCollection) for x in axes.collections), "bars, no bands"


@pytest.fixture
def many(make_cell):
    """Return two architectures at four widths."""
    return [
        make_cell(sae, shared=shared, **{"sae.num_latents": width})
        for sae, shared in (("topk", 30), ("relu", 10))
        for width in (256, 512, 1024, 2048)
    ]


def test_many_cells_are_split_into_panels_with_the_same_lines(many):
    assert len(many) > MOST_LINES
    figure = draw(threshold_figure, many)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["topk", "relu"]
    assert [len(own(axes)) for axes in shown] == [4, 4]
    assert legend(figure)[:4] == ["256", "512", "1024", "2048"]
    assert figure.legends[0].get_title().get_text() == "sae.num_latents"
    colours = [[line.get_color() for line in own(axes)] for axes in shown]
    assert colours[0] == colours[1]
    assert len(set(colours[0])) == 4


def test_coverage_needs_activations(cells):
    with pytest.raises(ValueError, match="no cell has measures on activations to draw"):
        coverage_figure(cells)


def test_the_coverage_figure_has_the_curve_and_its_area(acting):
    figure = draw(coverage_figure, [acting])
    (line,) = own(figure.axes[0])
    # Latents 10 … 47 of 48 are live; R grows with the index, from 10/48.
    assert np.allclose(line.get_xdata(), np.arange(1, 39) / 48)
    assert line.get_ydata()[0] == pytest.approx(10 / 48)
    assert line.get_ydata()[-1] == pytest.approx(np.mean(np.arange(10, 48) / 48))
    area = acting[1].estimates["substitution_area"].mean
    assert legend(figure)[0].startswith(f"topk: {area:.2f}")
    assert legend(figure)[-1] == "n = 3 seeds, 100 tokens"
    assert "area [95% interval]" in figure.legends[0].get_title().get_text()


def test_the_firing_figure_has_a_point_per_match(make_cell):
    knobs, cell = make_cell(n=3, shared=24)
    figure = draw(firing_figure, [(knobs, cell)])
    axes = figure.axes[0]
    orphans, shared = (c.get_offsets() for c in axes.collections)
    assert (len(orphans), len(shared)) == (144, 144)
    assert np.allclose(shared[:, 1], 1)
    assert all(c.get_rasterized() for c in axes.collections)
    rate = np.sort(matched_latents(cell).rate[matched_latents(cell).shared])
    drawn = np.sort(shared[:, 0])
    fired = rate > 0
    assert np.all(np.abs(np.log10(drawn[fired] / rate[fired])) < 0.11), "moved a little"
    assert drawn[~fired].max() < 2000 / 3, "never fired: left of what fired once"
    assert axes.get_xticklabels()[0].get_text() == "0"


def test_the_sample_of_many_latents_is_deterministic(make_cell, monkeypatch):
    assert MAX_POINTS <= 5000
    monkeypatch.setattr("reseed.report.sharing_by_firing.MAX_POINTS", 50)
    drawn = []
    for _ in range(2):
        axes = draw(firing_figure, [make_cell()]).axes[0]
        drawn.append(np.concatenate([c.get_offsets() for c in axes.collections]))
    assert len(drawn[0]) == 50
    assert np.array_equal(*drawn)


@pytest.mark.parametrize(("n", "there"), [(3, False), (4, True), (5, True)])
def test_the_paper_s_line_over_seeds_is_drawn_from_four_seeds_on(make_cell, n, there):
    figure = draw(sharing_profile_figure, [make_cell(n=n)])
    found = [line for axes in figure.axes for line in references(axes)]
    assert bool(found) == there
    if there:
        assert found[0].get_xdata().tolist() == list(range(2, n + 1))
        assert found[0].get_ydata().tolist() == [UNSHARED[k] for k in range(2, n + 1)]
        assert found[0].get_label() == SOURCE


def test_the_paper_s_layers_are_drawn_within_the_range_of_the_axis(make_cell):
    cells = [make_cell(layer=i, shared=s) for i, s in enumerate((4, 12, 20))]
    figure = draw(axis_figure, cells, "layer")
    (line,) = references(figure.axes[0])
    assert line.get_ydata().tolist() == [BY_LAYER[i] for i in range(3)]
    assert legend(figure)[-1] == "Paulo & Belrose, Pythia-160M MLP"


def test_the_axis_includes_the_paper_s_widths(make_cell):
    cells = [make_cell(num_latents=w) for w in (4000, 8000, 12000)]
    figure = draw(axis_figure, cells, "num_latents")
    (line,) = references(figure.axes[0])
    assert line.get_xdata().tolist() == [4084, 27648, 32768]
    assert len(figure.axes[0].get_xticks()) == 6
    assert SOURCE in legend(figure)
