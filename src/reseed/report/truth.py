"""Tables "Is a shared latent true?", for runs with labels of a known truth."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

import pyarrow as pa

from reseed.compare.cell import CellResult
from reseed.compare.strata import DECILES
from reseed.compare.truth import LABEL_COLUMN, PREFIX
from reseed.report.axes import MISSING, Cell, columns, knob_values, label
from reseed.report.wording import Wording, number, paired, with_interval

TITLE = "Is a shared latent true?"
_MARK = PREFIX + "atom_given_shared"
_WITH_INTERVAL = ("atom_given_shared", "difference", "difference_adjusted")
_WORDS = ("atom", "composite", "group", "neither")
_SHOWN = (*_WITH_INTERVAL, "atom_given_orphan", "likelihood_ratio")


def truth_tables(cells: Sequence[Cell]) -> list[Wording]:
    """Return the table of what sharing predicts about truth, then that of how true the SAEs are;
    empty without labels.

    There are two, so that each fits a terminal of 120 columns. Cells without labels are left out.
    """
    found = with_labels(cells)
    if not found:
        return []
    names = columns(cells)
    return [_sharing(cells, found, names), _quality(found, names)]


def with_labels(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells whose runs have labels of a known truth."""
    return [(knobs, cell) for knobs, cell in cells if _MARK in cell.estimates]


def with_labels_alike(tables: Sequence[pa.Table]) -> list[pa.Table]:
    """Give all tables of latents a column ``truth`` (null where unknown) if any of them has one."""
    if not any(LABEL_COLUMN in table.column_names for table in tables):
        return list(tables)
    return [
        table
        if LABEL_COLUMN in table.column_names
        else table.append_column(LABEL_COLUMN, pa.nulls(len(table), pa.string()))
        for table in tables
    ]


def _sharing(cells: Sequence[Cell], labelled: Sequence[Cell], names: Sequence[str]) -> Wording:
    settings = labelled[0][1].settings
    percent = f"[{settings.confidence:.0%}]"
    header = (
        *names,
        "shared\nlive",
        f"P(atom | shared)\n{percent}",
        "P(atom |\norphan)",
        f"difference\n{percent}",
        f"adjusted\n{percent}",
        "likelihood\nratio",
    )
    rows = tuple(
        (
            *knob_values(names, knobs),
            number(cell.estimates["shared_fraction_live"].mean),
            _shown(cell, "atom_given_shared"),
            _shown(cell, "atom_given_orphan"),
            _shown(cell, "difference"),
            _shown(cell, "difference_adjusted"),
            _shown(cell, "likelihood_ratio"),
        )
        for knobs, cell in labelled
    )
    one = paired(cells, plural=False)
    footnotes = (
        "**atom**: the decoder row has |cos| ≥ 0.9 with one true feature and fires with it (F1 ≥ "
        "0.8). **composite**: no atom, but a non-negative sum of at most 3 features has cos ≥ 0.9 "
        "with it. **group**: neither, but at least 0.9 of it lies in one group's subspace.",
        "**P(atom | shared)**, **P(atom | orphan)**: fraction of atoms among live latents that "
        f"another {one} shares and among those that it does not, counted over all ordered pairs.",
        "**difference**: the first minus the second. **adjusted**: the same among latents of equal "
        f"firing ({DECILES} deciles, Mantel–Haenszel).",
        "**likelihood ratio**: P(shared | atom) / P(shared | no atom); 1 means that sharing says "
        f"nothing about truth. Intervals leave one {one} out at a time.",
        *_reasons(cells, labelled),
    )
    # The first table has the live fraction, too.
    return Wording(header, rows, len(names), TITLE, footnotes, ("shared\nlive",))


def _quality(labelled: Sequence[Cell], names: Sequence[str]) -> Wording:
    metrics = {
        "MCC": "mcc",
        "F1": "f1",
        "recall of\nenergetic": "recall_energetic",
        "atoms": "atoms",
        "composites": "composites",
    }
    given = {f"P(shared |\n{word})": f"shared_given_{word}" for word in _WORDS}
    header = (*names, *metrics, *given)
    rows = tuple(
        (
            *knob_values(names, knobs),
            *(_shown(cell, name) for name in (*metrics.values(), *given.values())),
        )
        for knobs, cell in labelled
    )
    footnotes = (
        "**MCC**: mean |cos| of decoder rows with the true features, matched one to one. **F1**: "
        "of the live latents, each as a detector of its nearest feature.",
        "**recall of energetic**: fraction of the F features with the most energy (mean square; F "
        "is the number of latents) that have an atom among the live latents. **atoms**, "
        "**composites**: fractions of the live latents.",
        "**P(shared | …)**: fraction of the live latents with that label that is shared.",
    )
    title = "How true are the latents, and which are shared?"
    spare = ("P(shared |\nneither)", "P(shared |\ngroup)", "composites")
    return Wording(header, rows, len(names), title, footnotes, spare)


def _shown(cell: CellResult, name: str) -> str:
    found = cell.estimates.get(PREFIX + name)
    if found is None:
        return MISSING
    return with_interval(found) if name in _WITH_INTERVAL else number(found.mean)


def _reasons(cells: Sequence[Cell], labelled: Sequence[Cell]) -> list[str]:
    """Return each reason why a number or an interval is missing, once, with its cells."""
    about: dict[str, dict[str, None]] = {}
    for knobs, cell in labelled:
        for name in _SHOWN:
            found = cell.estimates[PREFIX + name]
            if found.reason and (name in _WITH_INTERVAL or isnan(found.mean)):
                about.setdefault(found.reason, {})[label(cells, knobs)] = None
    return [
        f"**{reason}**" + ("" if len(who) == len(cells) else f": {'; '.join(who)}")
        for reason, who in about.items()
    ]
