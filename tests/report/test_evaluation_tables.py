"""Results of evaluations joined to comparisons: columns, tables, files, figures."""

from __future__ import annotations

import dataclasses
import math

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from reseed.evaluate import load_all
from reseed.report.evaluation_figures import absorption_figure, evaluation_drawings
from reseed.report.evaluation_results import (
    EvaluatedRun,
    joined,
    letter_frame,
    run_frame,
    write_evaluations,
)
from reseed.report.evaluation_tables import evaluation_tables, run_tables
from reseed.report.figures import save_figures
from reseed.report.markup import summary_latex
from reseed.report.style import STYLE
from reseed.report.table_files import latent_table, summary_frame, summary_markdown
from reseed.store.results import L0, EvaluationDeclaration, Metric, StoredEvaluation
from reseed.study.absorbed_words import with_overlaps

F = 48


def absorption(run: int) -> StoredEvaluation:
    """Return a result in which one of two letters can be evaluated; latent 20 (21 in the last run)
    stands for it, and latent 1 absorbs its words."""
    fraction = 0.25 + 0.25 * run
    main = 20 + (run == 2)
    letters = pd.DataFrame(
        {
            "class": ["a", "b"], "reason": ["", "no word"], "fraction": [fraction, math.nan],
            "main": [[[main], [main]], []], "main_cosine": [0.8, math.nan],
        }
    )  # fmt: skip
    words = pd.DataFrame(
        {
            "token": range(40), "class": "a",
            "text": [f"a{i}" for i in range(40)], "frequency": range(40),
            "fraction": [float(i % 4 == 0) for i in range(40)],
        }
    )  # fmt: skip
    absorbers = pd.DataFrame({"class": ["a"], "latent": [1], "words": [10], "cosine": [0.3]})
    return StoredEvaluation(
        "absorption",
        {"type": "absorption"},
        {"absorption_letters": 1, "absorption_fraction": fraction,
         "absorption_fraction_words_low": fraction - 0.01,
         "absorption_fraction_words_high": fraction + 0.01,
         "absorption_fraction_null": 0.1, "absorption_fraction_untrained": None},
        {"letters": letters, "words": words, "absorbers": absorbers},
        {"absorption_is_absorber": np.arange(F) < 24, "absorption_words": np.arange(F)},
    )  # fmt: skip


def reconstruction() -> StoredEvaluation:
    density = np.geomspace(1e-4, 0.5, F).astype(np.float32)
    metrics = {"fvu": 0.2, "l0": 8.0, "shrinkage": None}
    return StoredEvaluation("reconstruction", {}, metrics, {}, {"density": density})


def faithfulness(run: int) -> StoredEvaluation:
    values = {"ce_clean": 3.0, "ce": 3.5, "ce_increase": 0.5 + run, "kl_recovered_mean": 0.75}
    return StoredEvaluation("faithfulness", {"tokens": 5}, values)


def splitting(run: int) -> StoredEvaluation:
    letters = absorption(run).tables["letters"].assign(probe_f1=0.9, f1=0.5)
    return StoredEvaluation("splitting", {}, {"splits": 1.0}, {"letters": letters})


@pytest.fixture(scope="module")
def evaluated(cells):
    """Return the first cell with all evaluations, and the second with that of the loss only."""
    load_all()
    (first, second) = cells[:2]
    runs = {}
    for i, run in enumerate(first[1].runs["run"]):
        found = (absorption(i), reconstruction(), faithfulness(i), splitting(i))
        about = {"sae": "topk", "seed": i, "run": run}
        own = {s.evaluation: s for s in found}
        runs[run] = EvaluatedRun(about, own, {"fvu": 0.25, "l0": 8.0})
    for i, run in enumerate(second[1].runs["run"]):
        about = {"sae": "relu", "seed": i, "run": run}
        runs[run] = EvaluatedRun(about, {"faithfulness": faithfulness(i)})
    return with_overlaps(joined([first, second], runs), runs), runs


def test_metrics_are_columns_with_a_mean_over_runs(evaluated) -> None:
    cells, _ = evaluated
    (_, first), (_, second) = cells
    assert first.runs["absorption_fraction"].tolist() == [0.25, 0.5, 0.75]
    found = first.estimates["absorption_fraction"]
    # t(2) at 97.5% is 4.3027, the standard error .25/√3.
    assert (found.mean, found.n) == (0.5, 3)
    assert found.high == pytest.approx(0.5 + 4.302653 * 0.25 / math.sqrt(3))
    assert math.isnan(first.estimates["absorption_fraction_untrained"].mean)
    assert "reconstruction_fvu" in first.estimates
    assert "fvu" in first.estimates, "the run's own stays"
    assert set(second.evaluated) == {"faithfulness"}
    frame = summary_frame(cells).set_index("sae")
    assert frame.loc["topk", "faithfulness_ce_increase"] == 1.5
    assert math.isnan(frame.loc["relu", "absorption_fraction"])
    # The interval over runs, and the mean ends of the runs' intervals over words.
    assert frame.loc["topk", "absorption_fraction_high"] == pytest.approx(found.high)
    assert frame.loc["topk", "absorption_fraction_low"] == pytest.approx(found.low)
    assert frame.loc["topk", "absorption_fraction_words_low"] == pytest.approx(0.49)


def test_latents_have_columns_of_one_type_in_all_cells(evaluated) -> None:
    table = latent_table(evaluated[0])
    own = table.to_pandas()
    topk = own[own["sae"] == "topk"]
    assert topk["absorption_words"].tolist() == [*range(F)] * 3
    assert own[own["sae"] == "relu"]["absorption_is_absorber"].isna().all()


def test_values_of_latents_are_averaged_over_shared_latents_and_orphans(evaluated) -> None:
    """The first 24 latents are those of every seed; those that fire at least 10 times are live."""
    cell = evaluated[0][0][1]
    shared = np.array(cell.latents["shared_with"][:F]) > 0
    live = np.arange(F) >= 10
    flags = np.arange(F) < 24
    for end, group in (("shared", shared & live), ("orphan", ~shared & live)):
        mean = cell.estimates[f"absorption_is_absorber_{end}"].mean
        assert mean == pytest.approx(flags[group].mean())
    assert cell.estimates["absorption_is_absorber_shared"].mean == 1
    assert cell.estimates["absorption_is_absorber_orphan"].mean == 0
    assert "absorption_words_shared" not in cell.estimates, "of whole numbers there is no mean"


def test_the_tables_of_evaluations_have_footnotes(evaluated) -> None:
    titles = [words.caption for words in evaluation_tables(evaluated[0])]
    assert titles == [
        "What is lost of the activations?",
        "What does the model lose?",
        "How many latents stand for a letter?",
        "How much is hidden by absorption?",
        "How much is hidden by absorption? Among shared latents and orphans",
        "Do runs absorb the same words?",
    ]
    for words in evaluation_tables(evaluated[0]):
        notes = " ".join(words.footnotes)
        assert notes
        for head in words.header[words.num_knobs :]:
            named = head.replace("\n", " ").partition(",")[0]
            known = (named, named.split()[-1], named.split()[0])
            assert any(name in notes for name in known), head
    text = summary_markdown(evaluated[0])
    assert "## How much is hidden by absorption?" in text
    assert "| topk | 0.50 [-0.12, 1.00] |" not in text  # no logit scale: a t interval
    loss = next(w for w in evaluation_tables(evaluated[0]) if "model lose" in w.caption)
    assert [row[0] for row in loss.rows] == ["topk", "relu"], "both cells have that one"


def test_every_character_of_the_tables_has_a_form_in_latex(evaluated) -> None:
    tables = evaluation_tables(evaluated[0])
    text = summary_latex(evaluated[0], tables)
    assert r"$\|$$\hat{x}$$\|$/$\|$x$\|$" in text
    assert not [c for c in text if ord(c) > 0x24F]


def test_without_evaluations_nothing_changes(cells) -> None:
    assert joined(cells, {}) == list(cells)
    assert evaluation_tables(cells) == []


def test_tables_show_the_interval_over_words_beside_that_over_runs(evaluated) -> None:
    cells, runs = evaluated
    table = next(t for t in evaluation_tables(cells) if t.caption.startswith("How much is hidden"))
    entry = dict(zip(table.header, table.rows[0], strict=True))["fraction"]
    assert entry.replace("\u00a0", " ") == "0.50 [-0.12, 1.12] / [0.49, 0.51]"
    assert any(note.startswith("The interval after **/**") for note in table.footnotes)
    alone = next(t for t in run_tables(runs) if t.caption.startswith("How much is hidden"))
    entries = [dict(zip(alone.header, row, strict=True))["fraction"] for row in alone.rows]
    assert entries[0] == "0.25 [0.24, 0.26]"
    assert any(note.startswith("Intervals are over words") for note in alone.footnotes)


def test_a_table_without_an_evaluable_letter_says_so_and_why(evaluated) -> None:
    cells, runs = evaluated
    nothing = {"absorption_letters": 0, "absorption_weak_probes": 19, "absorption_few_words": 7,
               "absorption_fraction": None}  # fmt: skip
    wanted = (
        "**no letter can be evaluated: the F1 of the probe is not above `probe_f1` for 19, and "
        "fewer than `min_test_words` words are measured for 7; the table `letters` has each "
        "letter's reason**"
    )
    empty = {
        name: dataclasses.replace(
            run, results={"absorption": StoredEvaluation("absorption", {}, nothing)}
        )
        for name, run in runs.items()
    }
    bare = [(knobs, dataclasses.replace(cell, evaluated={})) for knobs, cell in cells]
    (table,) = [t for t in evaluation_tables(joined(bare, empty)) if "hidden" in t.caption][:1]
    assert wanted in table.footnotes
    (alone,) = run_tables(empty)
    assert wanted in alone.footnotes
    mixed = {**runs, next(iter(runs)): empty[next(iter(runs))]}
    (some,) = [t for t in run_tables(mixed) if t.caption.startswith("How much is hidden")]
    assert [n for n in some.footnotes if n.startswith(wanted)] == [f"{wanted}: 0"]


def test_an_evaluation_of_a_user_has_the_table_that_it_declares(cells) -> None:
    class Mine(EvaluationDeclaration, name="declared"):
        title = "How uneven are latents?"
        metrics = (
            Metric("gini", "Gini", "Gini coefficient of the activations", interval=True),
            Metric("tokens", help="tokens that were read"),
            Metric("top_share", "top\nshare", "share of the largest activation"),
        )
        latents = (Metric("flat", "flat", "fraction of latents with one value"),)
        run_metrics = (L0,)
        spare = ("top_share",)

    latents = {"flat": np.arange(F) < 24}
    runs = {}
    for i, run in enumerate(cells[0][1].runs["run"]):
        metrics = {"gini": i, "tokens": 9, "top_share": 0.5}
        found = StoredEvaluation("declared", {}, metrics, {}, latents)
        runs[run] = EvaluatedRun({"run": run}, {"declared": found}, {"l0": 8.25})
    own, by_sharing = evaluation_tables(joined(cells[:1], runs))
    assert own.caption == "How uneven are latents?"
    # t(2) at 97.5% is 4.3027, the standard error 1/√3.
    assert own.header[own.num_knobs :] == ("Gini", "top\nshare", "L0")
    assert own.rows[0][own.num_knobs :] == ("1.00 [-1.48, 3.48]", "0.50", "8.2")
    assert own.spare == ("top\nshare",)
    assert own.footnotes == (
        "**Gini**: Gini coefficient of the activations.",
        "**top share**: share of the largest activation.",
        "**L0**: active latents per token at the end of training.",
    )
    assert by_sharing.header[own.num_knobs :] == ("flat,\nshared", "flat,\norphan")
    assert by_sharing.footnotes[0].startswith("**flat**: fraction of latents with one value. Among")
    (alone,) = run_tables(runs)
    assert alone.header == ("run", "Gini", "top\nshare", "L0")
    assert alone.footnotes == own.footnotes


def test_an_evaluation_that_is_not_installed_shows_all_its_metrics(cells) -> None:
    knobs, cell = cells[0]
    runs = {
        run: EvaluatedRun(
            {"run": run}, {"mine": StoredEvaluation("mine", {}, {"score": 0.5, "size": 3})}
        )
        for run in cell.runs["run"]
    }
    (words,) = evaluation_tables(joined([(knobs, cell)], runs))
    assert words.caption == "mine"
    assert words.header[-2:] == ("score", "size")
    (alone,) = run_tables(runs)
    assert alone.header == ("run", "score", "size")
    assert len(alone.rows) == 3


def test_files_have_a_row_per_run_and_per_letter(evaluated, tmp_path) -> None:
    _, runs = evaluated
    assert write_evaluations(runs, tmp_path) == ["evaluations.csv", "letters.csv"]
    rows = pd.read_csv(tmp_path / "evaluations.csv")
    assert rows["run"].tolist() == list(runs)
    assert rows["faithfulness_ce_increase"].tolist() == [0.5, 1.5, 2.5] * 2
    assert rows["fvu"].tolist()[:3] == [0.25] * 3
    letters = pd.read_csv(tmp_path / "letters.csv")
    assert len(letters) == 3 * 2 * 2
    own = letters[(letters["evaluation"] == "absorption") & (letters["seed"] == 1)]
    assert own["main"].tolist()[0] == "20; 20"
    assert own["reason"].fillna("").tolist() == ["", "no word"]
    pd.testing.assert_frame_equal(letter_frame(runs)[["seed"]], letters[["seed"]])
    assert len(run_frame(runs)) == 6
    assert write_evaluations({}, tmp_path) == []


def test_absorbed_words_are_compared_where_main_latents_are_matched(evaluated) -> None:
    """All runs absorb the same 10 of 40 words. Latent 20 is in every seed and matched to itself;
    in the last run another latent stands for the letter."""
    cell = evaluated[0][0][1]
    last = cell.runs["run"].iloc[-1]
    for _, row in cell.pairs.iterrows():
        if last in (row["a"], row["b"]):
            assert row["absorbed_classes"] == 0
            assert math.isnan(row["absorbed_overlap"])
        else:
            assert row["absorbed_classes"] == 1
            assert row["absorbed_overlap"] == 1
            assert row["absorbed_overlap_expected"] < 0.5
            assert row["absorbed_p"] < 0.05
    found = cell.estimates["absorbed_overlap"]
    assert (found.n, found.low) == (3, None), "undefined in some pairs"
    assert "absorbed_overlap" not in evaluated[0][1][1].pairs, "that cell has no absorption"


def test_figures_are_drawn_of_the_evaluations_that_exist(evaluated, tmp_path) -> None:
    cells, runs = evaluated
    written = save_figures(evaluation_drawings(cells[1:], runs), tmp_path)
    assert written == [tmp_path / f"faithfulness.{kind}" for kind in ("png", "svg")]
    assert all(path.stat().st_size > 1000 for path in written)

    drawings = evaluation_drawings(cells, runs)
    names = ["density", "faithfulness", "probe_f1", "absorption", "absorption_letters", "absorbers"]
    assert list(drawings) == names
    with mpl.rc_context(STYLE):
        for draw in drawings.values():
            FigureCanvasAgg(draw()).figure.draw_without_rendering()


def test_absorption_is_drawn_against_l0_and_against_width_if_it_differs(evaluated) -> None:
    knobs, cell = evaluated[0][0]
    sweep = []
    for k, width in ((4, F), (8, F), (8, 2 * F)):
        runs = cell.runs.assign(l0=float(k), num_latents=width)
        own = {**knobs, "num_latents": width, "sparsity": f"k={k}"}
        sweep.append((own, dataclasses.replace(cell, runs=runs)))
    with mpl.rc_context(STYLE):
        figure = absorption_figure(sweep)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        (alone,) = absorption_figure(sweep[:2]).axes
    by_l0, by_width = figure.axes
    assert (by_l0.get_xlabel(), by_width.get_xlabel()) == ("L0", "latents")
    joined_at = [line.get_xdata().tolist() for line in by_l0.lines if line.get_linestyle() == "-"]
    assert joined_at == [[4, 8]], "cells that differ in k alone"
    assert [
        line.get_xdata().tolist() for line in by_width.lines if line.get_linestyle() == "-"
    ] == [[F, 2 * F]]
    assert alone.get_xlabel() == "L0"
