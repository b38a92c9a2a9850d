"""The tables of docs/measures.md are those of the declared measures."""

import re
import runpy
from pathlib import Path

import pytest

from reseed.compare.registry import declared

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


def test_tables_are_written_between_their_markers(script):
    page = "before\n<!-- measures: cycles -->\nold\n<!-- end -->\nafter"
    found = script["written"](page)
    assert found.startswith("before\n<!-- measures: cycles -->\n\n| measure | is |")
    assert "| `cycle_decoder` (cycle, dec) | the same by decoder |" in found
    assert found.endswith("|\n\n<!-- end -->\nafter")
    assert "old" not in found
    assert script["written"](found) == found


def test_a_table_without_measures_and_an_unknown_kind_are_refused(script):
    with pytest.raises(ValueError, match="no measure declares table='cylces'"):
        script["written"]("<!-- measures: cylces -->\n<!-- end -->")
    with pytest.raises(KeyError, match="tables"):
        script["written"]("<!-- tables: cycles -->\n<!-- end -->")


def test_a_cell_of_a_table_may_contain_a_bar(script):
    assert script["markdown"](("a", "b"), [("|x|", "")]) == "| a |\n| :-- |\n| \\|x\\| |"
