"""The notebook of the documentation runs, and its stored outputs are those of its code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "quickstart.ipynb"
SCRIPT = runpy.run_path(str(ROOT / "scripts" / "run_notebook"))
SILENT = 1
"""Cells that show nothing: the imports."""
LONG = '"training.tokens=300_000"'
SHORT = """"training.tokens=10_000", "dataset.held_out_tokens=8192", "comparison.null_draws=1",
    "comparison.activation_tokens=4096\""""


@pytest.fixture
def stored() -> NotebookNode:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    return notebook


def kinds(cell: NotebookNode) -> list[tuple[str, ...]]:
    """Return the kind of each output: its type, and the formats of what is displayed."""
    return [
        (output.output_type, *sorted(output.get("data", [output.get("name")])))
        for output in cell.outputs
    ]


def texts(cell: NotebookNode) -> list[str]:
    """Return the text and HTML that a cell shows."""
    formats = ("text/plain", "text/html")
    return [o.get("text", "") + "".join(o.get("data", {}).get(f, "") for f in formats)
            for o in cell.outputs]  # fmt: skip


def headings(cell: NotebookNode) -> list[str]:
    """Return the headings of the columns and rows of the tables that a cell shows."""
    return [text for shown in texts(cell) for text in re.findall("<th[^>]*>(.*?)</th>", shown)]


def test_the_stored_outputs_are_those_of_the_stored_code(stored: NotebookNode) -> None:
    assert stored.metadata.code_digest == SCRIPT["code_digest"](stored), "run `make notebook`"
    cells = SCRIPT["code_cells"](stored)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(not cell.outputs for cell in cells) == SILENT
    shown = [kind for cell in cells for kind in kinds(cell)]
    assert {kind[0] for kind in shown} == {"stream", "execute_result", "display_data"}
    assert sum("image/png" in kind for kind in shown) == 2, "a figure of the report, and one more"


def test_the_stored_notebook_is_small_and_names_no_folder_of_a_machine(
    stored: NotebookNode,
) -> None:
    assert NOTEBOOK.stat().st_size < 600_000
    for shown in (text for cell in SCRIPT["code_cells"](stored) for text in texts(cell)):
        assert not re.search(r"(^|[\s'\"(])/\w+/|site-packages", shown), shown


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_is_stored(
    stored: NotebookNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # the folder that the notebook works in
    shorter = nbformat.from_dict(stored)
    for cell in SCRIPT["code_cells"](shorter):
        cell.source = cell.source.replace(LONG, SHORT)
        cell.outputs = []
    assert SCRIPT["code_digest"](shorter) != stored.metadata.code_digest, "it takes fewer tokens"
    SCRIPT["execute"](shorter)
    for was, now in zip(*map(SCRIPT["code_cells"], (stored, shorter)), strict=True):
        assert kinds(now) == kinds(was), now.source
        assert headings(now) == headings(was), now.source
    assert list(tmp_path.glob("*/sweeps/quickstart-*/report/index.html"))
