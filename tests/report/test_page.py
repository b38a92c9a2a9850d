"""The parts of a report: escaping, warnings, provenance, data of the browser."""

from __future__ import annotations

import dataclasses
import json
import os
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from reseed.compare.registry import NOT_ASKED, NOTE, TOKENS
from reseed.report.captions import UNSHARED, caption, data_files, reference_table, title
from reseed.report.evaluation_results import EvaluatedRun, joined
from reseed.report.figures import comparison_drawings
from reseed.report.markup import Span, spans
from reseed.report.page.content import fvu_fall, warnings
from reseed.report.page.latent_browser import entries, latent_columns, write_browser
from reseed.report.page.provenance import command, flatten_settings, split_common
from reseed.report.page.render import (
    BulletList,
    Code,
    Html,
    Paragraph,
    Section,
    inline,
    table_html,
    tag,
    tex,
)
from reseed.report.table import Table
from reseed.report.table_files import figure_tables, matched_cosines_frame, sharing_profile_frame
from reseed.store.results import StoredEvaluation
from reseed.system.files import atomic_folder

HOSTILE = (
    """</script><script>alert("1")</script><img src=x onerror='alert(2)'>&amp;\u2028**a** `b`"""
)


class Text(HTMLParser):
    """Text and elements of an HTML document."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.elements = "", []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


def test_text_is_always_escaped():
    found = Text(tag("p", HOSTILE, title=HOSTILE))
    assert found.text == HOSTILE
    assert found.elements == ["p"]
    assert found.attributes == [("title", HOSTILE)]
    assert Text(tag("p", tag("b", "x"))).elements == ["p", "b"]


def test_entries_of_a_table_are_escaped():
    words = Table((HOSTILE, "n"), ((HOSTILE, "0.5 [0.4, 0.6]"),), 1, HOSTILE, (HOSTILE,))
    found = Text(table_html(words))
    assert "script" not in found.elements
    assert "img" not in found.elements
    assert found.text.count("</script>") == 4 * 2


def test_attributes_that_are_false_are_left_out():
    assert tag("a", class_="x", hidden=True, id=None, open=False) == '<a class="x" hidden></a>'
    assert isinstance(tag("a"), Html)


def test_a_text_is_split_into_spans():
    assert spans("a **b** `c` [d e](f.csv)") == [
        Span("plain", "a "), Span("bold", "b"), Span("plain", " "), Span("code", "c"),
        Span("plain", " "), Span("link", "d e", "f.csv"),
    ]  # fmt: skip
    # An interval is not a link, and a single star is literal.
    assert spans("[0.3, 0.5] (n = 3) 2 * 3") == [Span("plain", "[0.3, 0.5] (n = 3) 2 * 3")]
    assert inline("**x < y**") == "<strong>x &lt; y</strong>"


def test_tex_escapes_names_and_lists():
    made = tex("a_b", [Section("s", "50%", (Paragraph("**x_y** & `k=8`"), BulletList(("1 #",)),
                                           Code("a_b\nc")))])  # fmt: skip
    for said in (r"\title{a\_b}", r"\section{50\%}", r"\textbf{x\_y} \& ", r"\item 1 \#"):
        assert said in made


def curve(values):
    return pd.DataFrame({"fvu": values})


def test_the_fall_of_a_curve_compares_its_last_two_tenths():
    # 40 points: the last four are 0.9 of the four before.
    assert fvu_fall(curve([1.0] * 36 + [0.9] * 4)) == pytest.approx(0.1)
    assert fvu_fall(curve([3.0] * 20 + [1.0] * 20)) == pytest.approx(0)
    assert fvu_fall(curve([1.0] * 19)) is None
    assert fvu_fall(pd.DataFrame({"loss": [1.0] * 40})) is None


class Finished:
    """A finished run, as far as warnings read it."""

    finished = True

    def __init__(self, path: Path, values):
        self.path, self.id = path, path.name
        path.mkdir()
        curve(values).to_csv(path / "training.csv")

    def file(self, name: str) -> Path:
        return self.path / name


def test_warnings_state_their_rule_and_their_numbers(make_cell, tmp_path):
    good = make_cell(n=3, shared=24)
    # Latent i of 48 fires i times in 5,000 tokens: none is dense, 2 are dead.
    assert warnings([good], [Finished(tmp_path / "a", [1.0] * 40)]) == []

    found = warnings(
        [good], [Finished(tmp_path / "b", np.geomspace(1, 0.1, 40))], ["incomplete: x"]
    )
    assert found[0] == "**Incomplete.** x."
    # Each point is 0.1 ** (1/39) of the one before, so the last four are that to the fourth.
    assert f"{1 - 0.1 ** (4 / 39):.1%} in `b`" in found[1]
    assert "In 1 of 1 runs the FVU of training fell by more than 2%" in found[1]

    (short,) = warnings([good], [Finished(tmp_path / "c", [1.0] * 5)])
    assert "1 curve of 1 has fewer than 20 points" in short
    (few,) = warnings([make_cell(n=2, shared=24)], [])
    assert "With fewer than 3 seeds there is no interval" in few
    assert "(n = 2)" in few


def test_dead_and_dense_latents_are_warned_of(make_cell):
    knobs, cell = make_cell(n=3, shared=24)
    firing = np.tile(np.where(np.arange(48) < 12, 501, 0), 3)  # a quarter on over a tenth of 5,000
    at = cell.latents.schema.get_field_index("firing")
    latents = cell.latents.set_column(at, "firing", [firing])
    estimates = dict(cell.estimates)
    estimates["dead_fraction"] = dataclasses.replace(estimates["dead_fraction"], mean=0.25)
    dead, dense = warnings([(knobs, dataclasses.replace(cell, latents=latents,
                                                        estimates=estimates))], [])  # fmt: skip
    assert dead.startswith("**Many dead latents.** More than 10% of the latents")
    assert dead.endswith("(0.25).")
    assert "fire on more than 10% of the held-out tokens: topk (0.25)." in dense


def test_sharing_near_chance_and_l0_off_target_are_warned_of(make_cell):
    knobs, cell = make_cell(n=3, shared=0)
    told = warnings([(knobs | {"sparsity": "L0≈4"}, cell)], [])
    assert [line.partition(".**")[0] for line in told] == [
        "**Shared at most 10 × its null: not converged or not shared",
        "**L0 off its target by more than 5%",
    ]
    assert "L0 8.2" in told[1]


def test_settings_are_split_into_common_and_differing_ones():
    def run(sae, seed):
        return flatten_settings(
            {"model": {"type": "m"}, "sae": {"type": sae, sae: 1}, "seed": seed}
        )

    common, words = split_common({"A": [run("x", 0), run("x", 1)], "B": [run("y", 0), run("y", 1)]})
    assert common == {"model.type": "m", "seed": "0, 1"}
    assert words is not None
    assert words.header == ("", "A", "B")
    assert words.rows == (("sae.type", "x", "y"), ("sae.x", "1", "–"), ("sae.y", "–", "1"))
    assert split_common({"A": [{"k": 1}], "B": [{"k": 1}]}) == ({"k": "1"}, None)
    _, many = split_common({f"c{i}": [{"k": i}] for i in range(9)})
    assert many is not None
    assert many.rows[3] == ("c3", "3")


def test_a_command_is_shown_without_what_cannot_change_results():
    def typed(text):
        return command({"environment": {"command": text}})

    assert typed("reseed run -m comparison=quickstart runtime.threads=1 sae=topk hydra.sweep.dir=x"
                 ) == "reseed run comparison=quickstart sae=topk"  # fmt: skip
    assert typed("__main__.py train -m seed=0,1") == "reseed train -m seed=0,1"
    assert typed("study.py --mine") == "study.py --mine"


def test_every_figure_has_a_title_a_caption_and_data(cells):
    for name in comparison_drawings(cells):
        assert title(name) != name
        assert "n = 2–3 seeds" in caption(name, cells)
        assert data_files(name)


def test_tables_of_figures_have_the_drawn_numbers(cells):
    knobs, cell = cells[0]
    frame = sharing_profile_frame([(knobs, cell)])
    assert frame[frame["measure"] == "p"]["fraction"].tolist() == cell.p.tolist()
    assert frame[frame["measure"] == "u"]["count"].tolist() == [2, 3]
    assert set(matched_cosines_frame(cells)["sae"]) == {"topk", "relu", "batch_topk"}
    assert set(figure_tables(cells, {})) == {"seeds.csv", "cosines.csv"}


def test_the_paper_s_numbers_are_shown_with_the_range_of_the_cells(cells):
    words = reference_table(cells)
    assert words is not None
    rows = {row[0]: row[1:] for row in words.rows}
    assert rows["shared, threshold 0.7"][0] == "0.42"
    own = [cell.estimates["shared_fraction_at_0.7"].mean for _, cell in cells]
    assert rows["shared, threshold 0.7"][1] == f"0 to {max(own):.2f}"
    # Cells with three seeds have u_3; no cell here has u_9.
    assert [name for name in rows if name.startswith("u_")] == [
        f"u_{k}: shared with no other of k = {k} seeds" for k in (2, 3)
    ]
    assert rows["u_3: shared with no other of k = 3 seeds"][0] == f"{UNSHARED[3]:.2f}"


def test_columns_of_the_browser_equal_the_cell_s(cells):
    found = entries(cells)
    assert [entry.name for entry in found[:2]] == ["topk, seed 0", "topk, seed 1"]
    own = latent_columns(found[0].rows)
    assert own["firing"] == list(range(48))
    assert own["dead"] == [1, 1, *[0] * 46]
    assert own["live"] == [*[0] * 10, *[1] * 38]
    assert own["shared_with"][:24] == [2] * 24
    assert [len(values) for values in own["partner_decoder"]] == [48, 48]
    assert all(isinstance(value, int) for value in own["shared"][0])
    assert "pearson" not in own
    assert found[0].activations == (0, NOT_ASKED)


def test_the_browser_has_the_agreement_of_activations_or_the_reason(cells):
    knobs, cell = cells[0]
    others = cell.n_seeds - 1
    pearson = pa.array([[0.25, None][:others]] * len(cell.latents), type=pa.list_(pa.float32()))
    compared = dataclasses.replace(
        cell,
        latents=cell.latents.append_column("pearson", pearson),
        pairs=cell.pairs.assign(**{TOKENS: 4096, NOTE: ""}),
    )
    (entry, *_) = entries([(knobs, compared)])
    own = latent_columns(entry.rows)
    assert own["pearson"] == [[0.25] * 48, [None] * 48]
    encoder, decoder = (np.array(own[f"cosine_{kind}"]) for kind in ("encoder", "decoder"))
    best = np.minimum(encoder, decoder).argmax(0)
    assert own["best_pearson"] == [(0.25, None)[k] for k in best]
    assert entry.activations == (4096, "")
    gone = dataclasses.replace(
        cell, pairs=cell.pairs.assign(**{TOKENS: 0, NOTE: "the model is gone"})
    )
    assert entries([(knobs, gone)])[0].activations == (0, "the model is gone")


@pytest.mark.parametrize(
    ("encoder", "decoder", "shown"),
    [
        # The largest cosines and the largest Pearson are of three other runs.
        ([0.9, 0.6, 0.7], [0.1, 0.95, 0.7], [0.7, 0.7, -0.5]),
        ([0.9, 0.6, None], [0.1, 0.95, None], [0.6, 0.95, 0.8]),
        ([None] * 3, [None] * 3, [None] * 3),
    ],
)
def test_the_list_shows_numbers_of_one_match(cells, encoder, decoder, shown):
    """It is the match whose smaller cosine is largest."""
    rows = cells[0][1].latents.slice(0, 2)
    pearson = [
        None if cosine is None else r for r, cosine in zip([0.3, 0.8, -0.5], encoder, strict=True)
    ]
    for name, values in (("cosine_encoder", encoder), ("cosine_decoder", decoder),
                         ("pearson", pearson)):  # fmt: skip
        if name in rows.column_names:
            rows = rows.drop_columns([name])
        values = [float("nan") if v is None else v for v in values]
        rows = rows.append_column(name, pa.array([values] * 2, type=pa.list_(pa.float32())))
    own = latent_columns(rows)
    names = ("best_cosine_encoder", "best_cosine_decoder", "best_pearson")
    assert [own[name] for name in names] == [[value] * 2 for value in shown]


def test_files_of_the_browser_are_javascript_calls(cells, tmp_path):
    write_browser(cells, {}, {}, tmp_path)
    names = sorted(path.name for path in (tmp_path / "latents").iterdir())
    assert names == sorted(["runs.js", *(f"{i}.js" for i in range(8))])
    text = (tmp_path / "latents" / "runs.js").read_text()
    assert text.startswith('reseed.data("runs",{')
    found = json.loads(text.removeprefix('reseed.data("runs",').removesuffix(")\n"))
    assert [run["others"] for run in found["runs"]][-3:] == [[3, 4], [7], [6]]


def test_absorption_is_listed_by_its_letters(cells, tmp_path):
    letters = pd.DataFrame({"class": ["a", "b"]})
    columns_ = {
        "absorption_class": np.where(np.arange(48) == 7, 1, -1),
        "absorption_words": np.where(np.arange(48) == 9, 12, 0),
    }
    found = StoredEvaluation(
        "absorption", {}, {"absorption_letters": 2}, {"letters": letters}, columns_
    )
    runs = {run: EvaluatedRun({"run": run}, {"absorption": found}) for run in ("topk-0", "topk-1")}
    write_browser(joined(cells, runs), runs, {}, tmp_path)
    own = (tmp_path / "latents" / "0.js").read_text()
    values = json.loads(own.removeprefix('reseed.data("run/0",').removesuffix(")\n"))
    assert values["absorption_class"][7] == 1
    assert values["absorption_words"][9] == 12
    assert '"classes":["a","b"]' in (tmp_path / "latents" / "runs.js").read_text()
    # A run without evaluation has no such columns.
    assert "absorption" not in (tmp_path / "latents" / "2.js").read_text()


def test_a_folder_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    out = tmp_path / "report"
    atomic_folder(out, lambda folder: (folder / "a").write_text("1"))

    def fail(folder):
        (folder / "b").write_text("2")
        raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        atomic_folder(out, fail)
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert [p.name for p in out.iterdir()] == ["a"]
    atomic_folder(out, lambda folder: (folder / "c").write_text("3"))
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert [p.name for p in out.iterdir()] == ["c"]


def test_a_folder_that_cannot_be_replaced_is_kept(tmp_path, monkeypatch):
    """It is restored if it was moved away already."""
    out = tmp_path / "report"
    atomic_folder(out, lambda folder: (folder / "a").write_text("1"))
    replace, moved = os.replace, []

    def refusing(source, target):
        moved.append(source)
        if len(moved) == 2:
            raise PermissionError("not here")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refusing)
    with pytest.raises(PermissionError, match="not here"):
        atomic_folder(out, lambda folder: (folder / "b").write_text("2"))
    assert [p.name for p in tmp_path.iterdir()] == ["report"]
    assert [p.name for p in out.iterdir()] == ["a"]
