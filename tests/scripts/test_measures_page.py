"""The tables of docs/measures.md are those of the declared measures and metrics."""

import re
import runpy
from pathlib import Path

import pytest

from reseed.compare.registry import declared
from reseed.evaluate import load_all
from reseed.store.results import EvaluationDeclaration, Metric, column, declaration

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "measures.md"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(ROOT / "scripts" / "write_measures_page"))


def test_the_page_is_up_to_date(script):
    text = PAGE.read_text()
    assert script["written"](text) == text, "run .venv/bin/python scripts/write_measures_page"


def test_the_page_has_a_table_of_every_measure():
    written = set(re.findall(r"<!-- measures: (\w+) -->", PAGE.read_text()))
    ours = [own for own in declared() if own.compute.__module__.startswith("reseed.")]
    assert {own.table for own in ours} == written


def test_the_page_has_a_table_of_every_evaluation_with_all_of_its_metrics():
    load_all()
    tables = dict(re.findall(r"<!-- metrics: (\w+) -->\n(.*?)<!-- end -->", PAGE.read_text(), re.S))
    assert tables.keys() == {path.stem for path in (ROOT / "conf" / "evaluation").glob("*.yaml")}
    for name, table in tables.items():
        declared_here = declaration(name, ())
        for metric in (*declared_here.metrics, *declared_here.latents):
            assert f"`{column(name, metric.name)}`" in table
            assert metric.help in table


def test_tables_are_written_between_their_markers(script):
    page = "before\n<!-- measures: cycles -->\nold\n<!-- end -->\nafter"
    found = script["written"](page)
    assert found.startswith("before\n<!-- measures: cycles -->\n\n| measure | is |")
    assert "| `cycle_decoder` (cycle, dec) | the same by decoder |" in found
    assert found.endswith("|\n\n<!-- end -->\nafter")
    assert "old" not in found
    assert script["written"](found) == found


def test_metrics_alike_but_for_their_names_share_a_row(script):
    class Mine(EvaluationDeclaration, name="metrics_page"):
        metrics = (
            Metric("score_low", help="end of the interval"),
            Metric("score_high", help="end of the interval"),
            Metric("gini", "Gini\nindex", "unevenness", formula="1 − 2∫L", source="Gini 1912"),
        )
        latents = (Metric("gini", "Gini", "unevenness of the latent", advice="Needs firings."),)

    found = script["written"]("<!-- metrics: metrics_page -->\n<!-- end -->")
    assert found.splitlines()[2:-2] == [
        "| metric | is | source | advice |",
        "| :-- | :-- | :-- | :-- |",
        "| `metrics_page_score_low`, `metrics_page_score_high` | end of the interval |  |  |",
        "| `metrics_page_gini` (Gini index) | unevenness (1 − 2∫L) | Gini 1912 |  |",
        "| `metrics_page_gini` (Gini), in `latents.parquet` | unevenness of the latent |  "
        "| Needs firings. |",
    ]


def test_a_table_without_measures_and_an_unknown_kind_are_refused(script):
    with pytest.raises(ValueError, match="no measure declares table='cylces'"):
        script["written"]("<!-- measures: cylces -->\n<!-- end -->")
    with pytest.raises(ValueError, match="no evaluation 'splittings' declares metrics"):
        script["written"]("<!-- metrics: splittings -->\n<!-- end -->")
    with pytest.raises(KeyError, match="tables"):
        script["written"]("<!-- tables: cycles -->\n<!-- end -->")


def test_a_cell_of_a_table_may_contain_a_bar(script):
    assert script["markdown"](("a", "b"), [("|x|", "")]) == "| a |\n| :-- |\n| \\|x\\| |"
