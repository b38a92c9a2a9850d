"""Tables of evaluations: one per evaluation, with a row per cell of a comparison or per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reseed.compare.cell import CellResult
from reseed.report.cell_labels import Cell, pair_axis_name
from reseed.report.evaluation_results import ORPHAN, OVERLAP, SHARED, Runs
from reseed.report.format import format_number
from reseed.report.table import (
    Column,
    Table,
    cell_table,
    count_column,
    estimate_columns,
    mean_column,
)


@dataclass(frozen=True)
class EvaluationTableSpec:
    """Specification of the table of one evaluation.

    Attributes:
        title: the question that the table answers.
        heads: column heading → column of the runs.
        with_interval: headings shown with their interval; summary.csv has all intervals.
        footnotes: how to read the table.
        counts: headings of columns that hold counts.
        spare: headings that a narrow window can leave out, the least useful first.
        latents: heading → column of the latents, shown as means over shared latents and orphans.
        about_latents: footnote that explains ``latents``.
    """

    title: str
    heads: Mapping[str, str]
    with_interval: tuple[str, ...] = ()
    footnotes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ("letters", "L0", "L1")
    spare: tuple[str, ...] = ()
    latents: Mapping[str, str] = field(default_factory=dict)
    about_latents: str = ""


SPECS: dict[str, EvaluationTableSpec] = {
    "reconstruction": EvaluationTableSpec(
        "What is lost of the activations?",
        {
            "FVU": "reconstruction_fvu",
            "EV\nuncentred": "reconstruction_explained_variance_uncentred",
            "cosine": "reconstruction_cosine",
            "L0": "reconstruction_l0",
            "L1": "reconstruction_l1",
            "never\nfired": "reconstruction_silent_fraction",
            "dense": "reconstruction_dense_fraction",
            "‖x̂‖/‖x‖": "reconstruction_shrinkage",
            "relative\nbias": "reconstruction_relative_bias",
        },
        with_interval=("FVU",),
        footnotes=(
            "**FVU**: fraction of variance unexplained; **EV uncentred**: 1 − squared error / "
            "Σ‖x‖², which a large mean alone brings near 1. **cosine** of x and x̂. **L0**, **L1**: "
            "active latents per token, and the sum of their activations.",
            "**never fired**, **dense** (active on more than a tenth of the tokens): fractions of "
            "latents.",
            "**‖x̂‖/‖x‖**: mean over tokens, below 1 if reconstructions are too short. "
            "**relative bias**: E‖x̂‖²/E[x̂·x], below 1 if x̂ should be longer (Rajamanoharan et "
            "al.).",
        ),
        spare=("L1", "relative\nbias", "EV\nuncentred", "dense"),
    ),
    "faithfulness": EvaluationTableSpec(
        "What does the model lose?",
        {
            "CE\nclean": "faithfulness_ce_clean",
            "CE\nspliced": "faithfulness_ce",
            "increase": "faithfulness_ce_increase",
            "recovered,\nzero": "faithfulness_ce_recovered_zero",
            "recovered,\nmean": "faithfulness_ce_recovered_mean",
            "KL": "faithfulness_kl",
            "KL recovered,\nzero": "faithfulness_kl_recovered_zero",
            "KL recovered,\nmean": "faithfulness_kl_recovered_mean",
        },
        with_interval=("increase",),
        footnotes=(
            "**CE**: cross-entropy of the next token in nats, of the **clean** model and with the "
            "SAE's reconstruction **spliced** in; **increase**: the difference. **KL**: KL(clean ‖ "
            "spliced) of the predictions. The reconstruction is spliced in, and the loss counted, "
            "at the positions that SAEs are trained on.",
            "**recovered**: the fraction of the cost of ablating the activations that the SAE "
            "recovers; ablated to **zero**, or to their **mean**, the harder test.",
        ),
        spare=("KL recovered,\nzero", "CE\nspliced", "recovered,\nzero"),
    ),
    "splitting": EvaluationTableSpec(
        "How many latents stand for a letter?",
        {
            "letters": "splitting_letters",
            "splits": "splitting_splits",
            "probe\nF1": "splitting_probe_f1",
            "latent\nF1": "splitting_f1",
            "precision": "splitting_precision",
            "recall": "splitting_recall",
            "L0": "l0",
        },
        with_interval=("splits", "latent\nF1"),
        footnotes=(
            "**letters**: classes of words that a probe finds in the model's activations (its F1 "
            "is above `probe_f1`); all means are over these. **splits**: number of latents that "
            "stand for a letter, minus one (k-sparse probing).",
            "**latent F1**, **precision**, **recall**: of the firing of the letter's first latent "
            "on words not used to choose it; **probe**: on the activations themselves. Low recall "
            "at high precision is a sign of absorption. Compare at equal **L0**.",
        ),
        spare=("L0",),
    ),
    "absorption": EvaluationTableSpec(
        "How much is hidden by absorption?",
        {
            "letters": "absorption_letters",
            "fraction": "absorption_fraction",
            "full": "absorption_full",
            "permuted": "absorption_fraction_null",
            "untrained": "absorption_fraction_untrained",
            "derived": "absorption_fraction_derived",
            "derived,\npermuted": "absorption_fraction_derived_null",
            "FVU": "fvu",
            "L0": "l0",
        },
        with_interval=("fraction", "derived"),
        footnotes=(
            "**fraction**: the part of a letter's probe projection, in words with that letter, "
            "that other latents carry instead of the letter's own; **full**: fraction of words on "
            "which its own latents are silent and one other takes over. Both follow Chanin et al. "
            "and their thresholds, over **letters** whose probe is good enough. Lower is better.",
            "**permuted**: the same with letters assigned to words at random; **untrained**: the "
            "same for the untrained SAE. A value no higher than these is no sign of absorption. "
            "**derived**: with thresholds that meaningless directions do not reach in this "
            "dictionary. An SAE that reconstructs little can score well: check **FVU** and **L0**.",
        ),
        spare=("derived,\npermuted", "L0", "full", "FVU"),
        latents={"absorbers": "absorption_is_absorber"},
        about_latents="**absorbers**: fraction of latents that take part in absorbing some word.",
    ),
    "contexts": EvaluationTableSpec(
        "What do latents fire on?",
        {"never\nfired": "contexts_silent_fraction"},
        footnotes=(
            "**never fired**: fraction of latents that fired on none of the evaluated tokens. To "
            "see the contexts of the other latents: `reseed show RUN LATENT`.",
        ),
    ),
}


def evaluation_tables(cells: Sequence[Cell]) -> list[Table]:
    """Return the tables of all evaluations that cells have results of, in the order of `SPECS`."""
    made = []
    for name in _names([cell.evaluated for _, cell in cells]):
        own = [(knobs, cell) for knobs, cell in cells if name in cell.evaluated]
        spec = _spec(name, {c: None for _, cell in own for c in cell.evaluated[name]})
        made.append(_table(own, spec))
        if spec.latents:
            made.append(_sharing_table(own, spec))
    return [*made, *_overlaps(cells)]


def run_tables(runs: Runs) -> list[Table]:
    """Return the tables of evaluations for runs outside a comparison: a row per run."""
    made = []
    for name in _names([run.results for run in runs.values()]):
        own = [run for run in runs.values() if name in run.results]
        spec = _spec(name, {c: None for run in own for c in run.metrics if c.startswith(name)})
        knobs = _distinguishing_knobs([run.about for run in own])
        rows = tuple(
            (
                *(str(run.about.get(knob, "")) for knob in knobs),
                *(format_number(run.numbers.get(of, float("nan"))) for of in spec.heads.values()),
            )
            for run in own
        )
        header = (*knobs, *spec.heads)
        made.append(Table(header, rows, len(knobs), spec.title, spec.footnotes, spec.spare))
    return made


def _names(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the evaluations, those in `SPECS` first."""
    found = dict.fromkeys(name for names in each for name in names)
    return [name for name in SPECS if name in found] + [n for n in found if n not in SPECS]


def _spec(name: str, columns: Mapping[str, None]) -> EvaluationTableSpec:
    """Return the table's specification; for an evaluation not in `SPECS`, one with all columns."""
    if name in SPECS:
        return SPECS[name]
    return EvaluationTableSpec(
        name, {c.removeprefix(f"{name}_").replace("_", " "): c for c in columns}
    )


def _table(cells: Sequence[Cell], spec: EvaluationTableSpec) -> Table:
    made: dict[str, Column] = {}
    for head, name in spec.heads.items():
        if head in spec.with_interval:
            made |= estimate_columns({head: name})
        else:
            made[head] = count_column(name) if head in spec.counts else mean_column(name)
    table = cell_table(cells, made, *spec.footnotes)
    return replace(table, caption=spec.title, spare=spec.spare)


def _sharing_table(cells: Sequence[Cell], spec: EvaluationTableSpec) -> Table:
    """Return the table of means over shared latents and over orphans."""
    made: dict[str, Column] = {}
    for head, name in spec.latents.items():
        made |= estimate_columns(
            {f"{head},\nshared": name + SHARED, f"{head},\norphan": name + ORPHAN}
        )
    one = pair_axis_name(cells, plural=False)
    table = cell_table(
        cells,
        made,
        f"{spec.about_latents} Among live latents that another {one} shares (**shared**), and "
        "among those that none shares (**orphan**); mean over runs.",
    )
    return replace(table, caption=f"{spec.title} Among shared latents and orphans")


def _overlaps(cells: Sequence[Cell]) -> list[Table]:
    """Return the table of whether runs of a cell absorb the same words; empty if not measured."""
    own = [(knobs, cell) for knobs, cell in cells if OVERLAP in cell.estimates]
    if not own:
        return []
    made: dict[str, Column] = estimate_columns({"same words": OVERLAP})
    made |= {
        "by\nchance": lambda cell: format_number(cell.pair_mean(f"{OVERLAP}_expected")),
        "pairs\np < .05": _significant,
        "letters": lambda cell: f"{cell.pair_mean('absorbed_classes'):.1f}",
    }
    table = cell_table(
        own,
        made,
        f"**same words**: words absorbed in both of two {pair_axis_name(cells)} / in either, over "
        "**letters** whose latents are matched by the decoder; mean over pairs. **by chance**: the "
        "same after permuting words with one letter and similar frequency; **p**: p-value of a "
        "pair in that permutation test.",
    )
    return [replace(table, caption="Do runs absorb the same words?")]


def _significant(cell: CellResult) -> str:
    p = cell.pairs["absorbed_p"].dropna().to_numpy(dtype=np.float64)
    return f"{np.count_nonzero(p < 0.05)} of {len(p)}"


def _distinguishing_knobs(about: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the knobs that differ between runs; ``run`` if none does."""
    names = dict.fromkeys(name for own in about for name in own if name != "run")
    found = [n for n in names if len({str(own.get(n)) for own in about}) > 1]
    # An SAE that reseed did not train has no knobs, only its folder.
    return found if found and all(own.keys() >= set(found) for own in about) else ["run"]
