"""Shared fractions by firing: the tables of ``summary.md`` and the file ``strata.csv``."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from reseed.compare.strata import by_stratum, standardised
from reseed.report.axes import Cell, columns, knob_values
from reseed.report.cell_tables import Column, cell_table, measured
from reseed.report.wording import Wording, number, with_interval


def with_strata(cells: Sequence[Cell]) -> list[Cell]:
    """Return the cells with strata: those whose runs have a common space, where latents can be
    shared."""
    return [(knobs, cell) for knobs, cell in cells if not cell.strata.empty]


def by_decile(cells: Sequence[Cell]) -> Wording:
    """Return the table of the shared fraction of latents by how often they fire."""
    knobs = columns(cells)
    tables = [by_stratum(cell.strata, "decile", cell.settings.confidence) for _, cell in cells]
    names = [str(name).replace("decile ", "") for name in tables[0]["name"]]
    rows = tuple(
        (*knob_values(knobs, k), *(number(float(x)) for x in table["shared_fraction"]))
        for (k, _), table in zip(cells, tables, strict=True)
    )
    limit = cells[0][1].settings.live_at_least
    footnotes = (
        "Strict shared fraction of latents that **never fired** in the held-out tokens, that fired "
        f"fewer than {limit} times (**not live**), and of each decile of live latents by firing, "
        "**1** (rarest) to **10**; the partner's firing does not matter. strata.csv has intervals, "
        "and bins of density that are the same for all cells.",
    )
    return Wording((*knobs, *names), rows, len(knobs), "", footnotes)


def by_kind_of_firing(cells: Sequence[Cell]) -> Wording:
    """Return the table of the shared fraction at equal firing, weighted, and of special latents."""
    made: dict[str, Column] = {}
    footnotes = []
    if len(cells) > 1:
        confidence = cells[0][1].settings.confidence
        alike = standardised([cell.strata for _, cell in cells], confidence)
        texts = {id(c): with_interval(s.estimate) for (_, c), s in zip(cells, alike, strict=True)}
        made["at equal firing"] = lambda cell: texts[id(cell)]
        footnotes.append(
            "**at equal firing**: shared fraction of each cell if its latents fired like those of "
            "all cells together (direct standardisation over bins of density, without latents that "
            f"never fired; {alike[0].kept:.0%} of that distribution lies in bins that all cells "
            "have)."
        )
    made |= measured(
        {
            "by firing": "shared_fraction_by_firing",
            "by variance": "shared_fraction_by_variance",
            "dense": "shared_fraction_dense",
            "other firing": "shared_fraction_sparse",
            "duplicate": "shared_fraction_duplicate",
            "antipodal": "shared_fraction_antipodal",
        }
    )
    return cell_table(
        cells,
        made,
        *footnotes,
        "**by firing**, **by variance**: latents weighted by how often they fire, or by the "
        "variance of their contribution. **dense**: latents that fire on more than a tenth of "
        "the tokens; **other firing**: the others that fired. **duplicate**, **antipodal**: "
        "latents that their own dictionary has twice, with the same or the opposite sign.",
    )


def strata_frame(cells: Sequence[Cell]) -> pd.DataFrame:
    """Return ``strata.csv``: a row per stratum of each cell, its knobs first; see
    `compare.strata`."""
    frames = []
    for knobs, cell in with_strata(cells):
        for kind in ("decile", "density"):
            frame = by_stratum(cell.strata, kind, cell.settings.confidence)
            frame.insert(0, "kind", kind)
            for i, (name, value) in enumerate(knobs.items()):
                if name not in frame:
                    frame.insert(i, name, value)
            frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
