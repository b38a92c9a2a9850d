"""One cell of a comparison: runs that differ only in the axes whose values are compared.

All pairs are measured, with their nulls and their initial weights. The resulting tables are written
to a folder, from which later commands read them. `cell_settings` names a cell by its settings.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from math import nan
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from reseed.compare.alignment import Alignment
from reseed.compare.config import ComparisonConfig, value_axes
from reseed.compare.dictionary import Dictionary, Rows, incompatible, no_common_space
from reseed.compare.matching import Matcher, match
from reseed.compare.nearest import find_duplicates
from reseed.compare.pair import WEIGHTS_NOTE, CellRuns, Pair
from reseed.compare.pairing import without_intervals
from reseed.compare.registry import Interval, columns, declared, evaluate, versions
from reseed.compare.sharing_profile import seed_profile, unshared_fractions
from reseed.compare.statistics import with_width
from reseed.compare.strata import strata_table
from reseed.compare.tables import latent_table, pair_estimates, run_estimates, run_table
from reseed.compare.truth import label_column
from reseed.store.runs import Run
from reseed.system.files import atomic_write
from reseed.system.integrity import (
    DamagedFileError,
    check_files,
    describe_files,
    read_record,
    write_record,
)

log = logging.getLogger(__name__)

_FORMAT = 3
_TABLES = ("pairs.parquet", "strata.parquet", "latents.parquet")
_ABOUT = "L0≈"
"""Prefix of the sparsity of a cell that was calibrated to an L0."""


@dataclass(frozen=True, eq=False)
class CellResult:
    """Result of comparing a cell.

    Attributes:
        settings: settings of the comparison that the cell belongs to.
        runs: a row per run, see `tables.run_table`.
        pairs: a row per pair of runs: `Pair.row`, then the measures that need all pairs; those of
            the map, if some pair has one; and `WEIGHTS_NOTE`, if some pair has no common space.
        latents: a row per latent of each run, see `tables.latent_table`.
        strata: numbers of latents and of shared latents by firing, see `strata.strata_table`.
        estimates: fractions and cosines over pairs of seeds, metrics over runs and cycles over
            triples, by name; if the truth is known, also those of `compare.truth` (``truth_…``).
        p: p_m, the fraction of latents shared with m = 0 … n−1 other runs; NaN if some pair has no
            common space.
        measures: name → version of the declared measures when the cell was compared; None for a
            cell that an older version compared, which recorded none.
        inputs: run → file → SHA-256 of the files that were compared; None if they are not known.
        evaluated: evaluation → the columns that it added to ``runs`` and ``estimates``. They do not
            belong to the comparison and are not written with it
            (`reseed.report.evaluation_results`).
        draws: run → its random draws (`difference.run_draws`), from the records of the runs; empty
            if these are not known. Not written, either.
    """

    settings: ComparisonConfig
    runs: pd.DataFrame
    pairs: pd.DataFrame
    latents: pa.Table
    strata: pd.DataFrame
    estimates: dict[str, Interval]
    p: Float[np.ndarray, " n"]
    measures: Mapping[str, int] | None = None
    inputs: Mapping[str, Mapping[str, str]] | None = None
    evaluated: Mapping[str, Sequence[str]] = field(default_factory=dict)
    draws: Mapping[str, Mapping[str, int | None]] = field(default_factory=dict)

    @property
    def u(self) -> Float[np.ndarray, " n-1"]:
        """u_k for k = 2 … n, the fraction of latents that none of k−1 other runs share."""
        return unshared_fractions(self.p)

    @property
    def n_seeds(self) -> int:
        return len(self.runs)

    @property
    def num_latents(self) -> int:
        """Number of latents of the widest run."""
        return int(self.runs["num_latents"].to_numpy().max())

    @property
    def compares_models(self) -> bool:
        """True if weights of two models are compared: by a map, or as they are if the paired axes
        choose the model."""
        if self.settings.align == "procrustes":
            return "map_r2" in self.pairs
        axes = value_axes(self.settings.pair_by)
        if self.settings.align is None:
            return "model" in axes
        return any(axis.split(".")[0] in ("model", "surrogate", "source") for axis in axes)

    @property
    def held_out_tokens(self) -> int:
        """Minimum number of held-out tokens over the runs."""
        return int(self.runs["held_out_tokens"].to_numpy().min())

    @property
    def null_simulated_latents(self) -> int:
        """Maximum size of a simulated side; if below `num_latents`, the null is extrapolated."""
        return int(self.pairs["null_simulated_latents"].fillna(0).to_numpy().max())

    def pair_mean(self, column: str) -> float:
        """Return the mean over pairs, for columns without interval (nulls, ceilings, untrained);
        NaN if the cell was compared without this measure."""
        if column not in self.pairs:
            return nan
        return float(self.pairs[column].to_numpy(dtype=np.float64).mean())

    def write(self, folder: Path | str) -> None:
        """Write ``pairs.parquet``, ``strata.parquet``, ``latents.parquet`` and, last,
        ``cell.json``."""
        folder = Path(folder)
        # Without cell.json, a half-written cell cannot be read with tables of an older cell.
        (folder / "cell.json").unlink(missing_ok=True)
        atomic_write(folder / "strata.parquet", lambda p: self.strata.to_parquet(p, index=False))
        atomic_write(folder / "pairs.parquet", lambda p: self.pairs.to_parquet(p, index=False))
        atomic_write(
            folder / "latents.parquet",
            lambda p: pq.write_table(self.latents, p, compression="zstd"),
        )
        record = {
            "format": _FORMAT,
            "settings": self.settings.to_dict(),
            "inputs": self.inputs,
            "files": describe_files(folder, _TABLES),
            "measures": self.measures,
            "runs": self.runs.to_dict("records"),
            "estimates": {name: asdict(value) for name, value in self.estimates.items()},
            "shared_with_fraction": self.p.tolist(),
            "unshared_fraction": dict(zip(range(2, len(self.p) + 1), self.u.tolist(), strict=True)),
        }
        write_record(folder / "cell.json", record)

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Read a cell that `write` wrote, after verifying its files.

        Raises:
            FileNotFoundError: the folder holds no finished cell.
            DamagedFileError: a file is damaged.
            ValueError: the cell has another format.
        """
        folder = Path(folder)
        try:
            record = read_record(folder / "cell.json")
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{folder} holds no compared cell: there is no cell.json"
            ) from None
        check_files(folder, record.get("files") or {})
        if record.get("format") != _FORMAT:
            raise ValueError(
                f"{folder / 'cell.json'} has format {record.get('format')}; this version reads "
                f"{_FORMAT}. Compare again."
            )
        try:
            return cls._from_record(record, folder)
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise DamagedFileError(
                folder / "cell.json", f"it or a table beside it cannot be read ({error})"
            ) from None

    @classmethod
    def _from_record(cls, record: dict[str, Any], folder: Path) -> Self:
        runs = pd.DataFrame(record["runs"])
        numbers = [c for c in runs.columns if c not in ("run", "seed")]
        runs[numbers] = runs[numbers].apply(pd.to_numeric)
        return cls(
            settings=ComparisonConfig.from_dict(record["settings"], "settings"),
            runs=runs,
            pairs=pd.read_parquet(folder / "pairs.parquet"),
            latents=pq.read_table(folder / "latents.parquet"),
            strata=pd.read_parquet(folder / "strata.parquet"),
            estimates={name: _interval(value) for name, value in record["estimates"].items()},
            p=np.array(record["shared_with_fraction"], dtype=np.float64),
            measures=record.get("measures"),
            inputs=record.get("inputs"),
        )


def compare_cell(
    trained: Sequence[Dictionary],
    untrained: Sequence[Dictionary],
    settings: ComparisonConfig,
    *,
    alignments: Mapping[tuple[int, int], Alignment] | None = None,
    matcher: Matcher = match,
    device: str = "cpu",
) -> CellResult:
    """Compare all pairs of the runs of a cell.

    Weights of runs without a common space (`incompatible`) are not compared; their columns are NaN.

    Args:
        trained: the runs, in the order of the values of the paired axis.
        untrained: the same runs with their initial weights, in the same order; their firing is
            ignored. If empty, the columns ``untrained_…`` are NaN.
        alignments: pair (s, t), s < t, of runs of two models → the map between their bases.
        matcher: computes every assignment of rows of two runs (the nulls use `match`).
        device: device of the passes over all pairs of latents.

    Raises:
        ValueError: there are fewer than 2 runs, or a run or a value of the axis occurs twice.
        MemoryError: an exact matching of so many latents does not fit into memory.
    """
    _check(trained, untrained, settings)
    repeated = [find_duplicates(Rows.of(x), settings.threshold, device) for x in trained]
    cell = CellRuns(trained, settings, repeated, alignments or {})
    pairs = _pair_table(cell, untrained, matcher, device)
    comparable = {
        (s, t): side
        for (s, t), side in cell.sides.items()
        if not incompatible(trained[s], trained[t])
    }
    runs, p = run_table(cell), seed_profile(cell.shared).p
    return CellResult(
        settings=settings,
        runs=runs,
        pairs=pairs,
        latents=label_column(pa.concat_tables(map(latent_table, cell.runs)), trained),
        strata=strata_table(trained, comparable, settings.live_at_least),
        estimates=_estimates(cell, pairs, runs),
        p=np.full_like(p, np.nan) if WEIGHTS_NOTE in pairs else p,
        measures=versions(),
    )


def _pair_table(
    cell: CellRuns, untrained: Sequence[Dictionary], matcher: Matcher, device: str
) -> pd.DataFrame:
    """Return the rows of all pairs, and put their sides into the cell."""
    settings, trained = cell.settings, cell.trained
    rule: dict[str, Any] = {"matcher": matcher, "device": device}
    rule |= {"threshold": settings.threshold, "live_at_least": settings.live_at_least}
    drawn: dict[str, Any] = {"null_seed": settings.null_seed, "null_draws": settings.null_draws}
    rows, pairs = [], []
    for s, t in combinations(range(len(trained)), 2):
        a, b = trained[s], trained[t]
        log.info("comparing %s with %s", a.id, b.id)
        rule["alignment"] = cell.alignments.get((s, t))
        started = untrained and not incompatible(a, b)
        start = Pair(untrained[s], untrained[t], **rule) if started else None
        pair = Pair(a, b, **rule, **drawn, start=start, cell=cell, place=(s, t))
        of_map = declared("pair", "map") if cell.alignments else ()
        rows.append(pair.row() | evaluate(of_map, pair))
        cell.sides[s, t], cell.sides[t, s] = pair.a, pair.b
        pair.release()
        pairs.append(pair)
    after = [evaluate(declared("pair", "cell"), pair) for pair in pairs]
    table = pd.DataFrame([row | more for row, more in zip(rows, after, strict=True)])
    if no_common_space(trained):
        both = combinations(trained, 2)
        table[WEIGHTS_NOTE] = [no_common_space(two) for two in both]
    return table


def _estimates(cell: CellRuns, pairs: pd.DataFrame, runs: pd.DataFrame) -> dict[str, Interval]:
    """Return the estimates over pairs, over runs and of the whole cell."""
    named = columns("pair", "") | columns("pair", "cell")
    found = pair_estimates(pairs, named, cell.settings, len(runs))
    found |= run_estimates(runs, cell.settings)
    unknown = Interval(nan, None, None, None, len(runs), no_common_space(cell.trained))
    for own in declared("cell"):
        if own.needs <= cell.known:
            found |= own.values(cell)
        elif "truth" not in own.needs:  # only cells with labels have estimates of truth
            found |= dict.fromkeys((c.name for c in own.own), unknown)
    return without_intervals(found, cell.settings)


def _check(
    trained: Sequence[Dictionary], untrained: Sequence[Dictionary], settings: ComparisonConfig
) -> None:
    if len(trained) < 2:
        raise ValueError(f"a comparison needs at least 2 runs in a cell; got {len(trained)}")
    for name, values in (
        ("run", [x.id for x in trained]),
        (settings.pair_words, [x.seed for x in trained]),
    ):
        repeated = [v for i, v in enumerate(values) if v in values[:i]]
        if repeated:
            raise ValueError(f"each {name} must occur once in a cell; {repeated[0]} occurs twice")
    if untrained and [x.seed for x in untrained] != [x.seed for x in trained]:
        raise ValueError(
            "`untrained` must hold the initial weights of `trained` in the same order; the values "
            f"of {settings.pair_words} are {', '.join(x.seed for x in untrained)} and "
            f"{', '.join(x.seed for x in trained)}"
        )


def _interval(record: dict[str, Any]) -> Interval:
    mean = record.pop("mean")
    return with_width(Interval(nan if mean is None else mean, **record))


def cell_settings(runs: list[Run], axes: dict[str, str]) -> dict[str, Any]:
    """Return the settings that identify a cell, by their command-line names.

    Values that differ between the runs are joined by ``|``.
    """
    rows = [_run_settings(run.record) for run in runs]
    out: dict[str, Any] = {"arm": axes["arm"]} if "arm" in axes else {}
    for name in rows[0]:
        values = list(dict.fromkeys(row[name] for row in rows))
        out[name] = values[0] if len(values) == 1 else "|".join(map(str, values))
    # Omit axes that are already shown under another name.
    shown = {"sae.num_latents", "training.tokens", "sae.target_l0"}
    amount = str(out["sparsity"]).partition("=")[2]
    shown |= {axis for axis, value in axes.items() if axis.startswith("sae.") and value == amount}
    return out | {axis: v for axis, v in axes.items() if axis not in shown and axis not in out}


def unify_sparsity(
    cells: Sequence[tuple[Mapping[str, Any], Any]],
) -> list[tuple[Mapping[str, Any], Any]]:
    """Write the sparsity of all cells in one form: as an L0 if any cell is calibrated to one."""
    if not any(_ABOUT in str(settings["sparsity"]) for settings, _ in cells):
        return list(cells)
    alike: list[tuple[Mapping[str, Any], Any]] = []
    for settings, cell in cells:
        words = str(settings["sparsity"]).replace("k=", _ABOUT).split("|")
        alike.append(({**settings, "sparsity": "|".join(dict.fromkeys(words))}, cell))
    return alike


def _run_settings(record: dict[str, Any]) -> dict[str, Any]:
    e = record["experiment"]
    # A calibrated SAE is named by its target L0, not by the penalty found; a k is named as k.
    target = None if "k" in e["sae"] else e["sae"].get("target_l0")
    return {
        "model": record["labels"]["model"],
        "layer": e["layer"],
        "hookpoint": e["hookpoint"]["module"] or e["hookpoint"]["site"],
        "dataset": record["labels"]["dataset"],
        "sae": "pretrained " * bool(record.get("pretrained")) + e["sae"]["type"],
        "num_latents": record["num_latents"],
        "sparsity": record["sparsity"] if target is None else f"{_ABOUT}{target:g}",
        "tokens": record["tokens"],
        "training": e["training"]["recipe"],
    }
