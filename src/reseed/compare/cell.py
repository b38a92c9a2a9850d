"""One cell of a comparison: runs that differ only in the axes whose values are compared.

All pairs are measured, with their nulls and their initial weights. The resulting tables are written
to a folder, from which later commands read them. `cell_settings` names a cell by its settings.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import combinations
from math import isnan, nan
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from reseed.compare.columns import Interval
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary, Rows, any_incompatible, incompatible
from reseed.compare.matching import Matcher, match
from reseed.compare.measures import PairSide
from reseed.compare.nearest import Duplicates, find_duplicates
from reseed.compare.nulls import null_measures
from reseed.compare.pair import (
    NO_COMMON_SPACE,
    WEIGHTS_NOTE,
    compare_pair,
    duplicate_measures,
    incompatible_pair,
)
from reseed.compare.pairing import without_intervals
from reseed.compare.sharing_profile import (
    CYCLES,
    cycle_estimates,
    run_reproducibilities,
    seed_profile,
    unshared_fractions,
)
from reseed.compare.strata import strata_table
from reseed.compare.subspaces import subspaces
from reseed.compare.tables import latent_table, pair_estimates, run_table
from reseed.compare.truth import cell_truth, label_column
from reseed.store.runs import Run
from reseed.system.files import atomic_write, atomic_write_json

log = logging.getLogger(__name__)

_FORMAT = 3
_ABOUT = "L0≈"
"""Prefix of the sparsity of a cell that was calibrated to an L0."""


@dataclass(frozen=True, eq=False)
class CellResult:
    """Result of comparing a cell.

    Attributes:
        settings: settings of the comparison that the cell belongs to.
        runs: a row per run, see `tables.run_table`.
        pairs: a row per pair of runs: `PairResult.row`, then the columns ``null_…``,
            ``kappa``, ``untrained_…`` (NaN without untrained weights) and ``subspace_…``; and if
            some runs differ in ``d_in``, `WEIGHTS_NOTE`.
        latents: a row per latent of each run, see `tables.latent_table`.
        strata: numbers of latents and of shared latents by firing, see `strata.strata_table`.
        estimates: fractions and cosines over pairs of seeds, metrics over runs and cycles over
            triples, by name; if the truth is known, also those of `compare.truth` (``truth_…``).
        p: p_m, the fraction of latents shared with m = 0 … n−1 other runs; NaN if some runs differ
            in ``d_in`` and cannot be compared (`reseed.compare.pair`).
        evaluated: evaluation → the columns that it added to ``runs`` and ``estimates``. They do not
            belong to the comparison and are not written with it
            (`reseed.report.evaluation_results`).
    """

    settings: ComparisonConfig
    runs: pd.DataFrame
    pairs: pd.DataFrame
    latents: pa.Table
    strata: pd.DataFrame
    estimates: dict[str, Interval]
    p: Float[np.ndarray, " n"]
    evaluated: Mapping[str, Sequence[str]] = field(default_factory=dict)

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
    def held_out_tokens(self) -> int:
        """Minimum number of held-out tokens over the runs."""
        return int(self.runs["held_out_tokens"].to_numpy().min())

    @property
    def null_simulated_latents(self) -> int:
        """Maximum size of a simulated side; if below `num_latents`, the null is extrapolated."""
        return int(self.pairs["null_simulated_latents"].fillna(0).to_numpy().max())

    def pair_mean(self, column: str) -> float:
        """Return the mean over pairs, for columns without interval (nulls, ceilings, untrained)."""
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
            "runs": self.runs.to_dict("records"),
            "estimates": {name: asdict(value) for name, value in self.estimates.items()},
            "shared_with_fraction": self.p.tolist(),
            "unshared_fraction": dict(zip(range(2, len(self.p) + 1), self.u.tolist(), strict=True)),
        }
        atomic_write_json(folder / "cell.json", record)

    @classmethod
    def read(cls, folder: Path | str) -> Self:
        """Read a cell that `write` wrote.

        Raises:
            FileNotFoundError: the folder holds no finished cell.
            ValueError: the cell has another format.
        """
        folder = Path(folder)
        if not (folder / "cell.json").is_file():
            raise FileNotFoundError(f"{folder} holds no compared cell: there is no cell.json")
        record = json.loads((folder / "cell.json").read_text(encoding="utf-8"))
        if record.get("format") != _FORMAT:
            raise ValueError(
                f"{folder / 'cell.json'} has format {record.get('format')}; this version reads "
                f"{_FORMAT}. Compare again."
            )
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
        )


def compare_cell(
    trained: Sequence[Dictionary],
    untrained: Sequence[Dictionary],
    settings: ComparisonConfig,
    *,
    matcher: Matcher = match,
    device: str = "cpu",
) -> CellResult:
    """Compare all pairs of the runs of a cell.

    Two runs of different ``d_in`` have no common space: their weights are not compared, and their
    columns are NaN (`reseed.compare.pair`).

    Args:
        trained: the runs, in the order of the values of the paired axis.
        untrained: the same runs with their initial weights, in the same order; their firing is
            ignored. If empty, the columns ``untrained_…`` are NaN.
        matcher: computes every assignment of rows of two runs (the nulls use `match`).
        device: device of the passes over all pairs of latents.

    Raises:
        ValueError: there are fewer than 2 runs, or a run or a value of the axis occurs twice.
        MemoryError: an exact matching of so many latents does not fit into memory.
    """
    _check(trained, untrained, settings)
    repeated = [find_duplicates(Rows.of(x), settings.threshold, device) for x in trained]
    rows, sides = _pairs(trained, untrained, repeated, settings, matcher, device)
    against = [
        {other.id: sides[s, t] for t, other in enumerate(trained) if t != s}
        for s in range(len(trained))
    ]
    profile = seed_profile(
        [np.stack([side.shared for side in row.values()], axis=1) for row in against]
    )
    likely = run_reproducibilities(trained, profile.shared_with, settings.confidence)
    spanned = subspaces(trained, profile.shared_with, settings.live_at_least, settings.null_seed)
    pairs = pd.DataFrame(rows).assign(**spanned.pairs)
    if any_incompatible(trained):
        pairs[WEIGHTS_NOTE] = [
            NO_COMMON_SPACE if isnan(x) else "" for x in pairs["shared_fraction"]
        ]
    tables = [
        latent_table(*values)
        for values in zip(trained, against, profile.shared_with, repeated, likely, strict=True)
    ]
    comparable = {
        (s, t): side for (s, t), side in sides.items() if not incompatible(trained[s], trained[t])
    }
    runs = run_table(trained, repeated, likely, spanned.runs, settings)
    return CellResult(
        settings=settings,
        runs=runs,
        pairs=pairs,
        latents=label_column(pa.concat_tables(tables), trained),
        strata=strata_table(trained, comparable, settings.live_at_least),
        estimates=_estimates(trained, sides, pairs, runs, settings),
        p=np.full_like(profile.p, np.nan) if WEIGHTS_NOTE in pairs else profile.p,
    )


def _pairs(
    trained: Sequence[Dictionary],
    untrained: Sequence[Dictionary],
    repeated: Sequence[Duplicates],
    settings: ComparisonConfig,
    matcher: Matcher,
    device: str,
) -> tuple[list[dict[str, Any]], dict[tuple[int, int], PairSide]]:
    """Return the row of every pair, and for each ordered pair (s, t) the side of s."""
    against_each = partial(
        compare_pair,
        threshold=settings.threshold,
        live_at_least=settings.live_at_least,
        matcher=matcher,
        device=device,
    )
    rows: list[dict[str, Any]] = []
    sides: dict[tuple[int, int], PairSide] = {}
    for s, t in combinations(range(len(trained)), 2):
        log.info("comparing %s with %s", trained[s].id, trained[t].id)
        no_space = incompatible(trained[s], trained[t])
        pair = (
            incompatible_pair(trained[s], trained[t], settings.live_at_least)
            if no_space
            else against_each(trained[s], trained[t])
        )
        sides[s, t], sides[t, s] = pair.a, pair.b
        started = untrained and not no_space
        start = against_each(untrained[s], untrained[t], brief=True).measures if started else {}
        more = null_measures(pair.measures, trained[s], trained[t], start, settings)
        own = duplicate_measures(pair, repeated[s], repeated[t])
        rows.append(pair.row() | own | more)
    return rows, sides


def _estimates(
    trained: Sequence[Dictionary],
    sides: Mapping[tuple[int, int], PairSide],
    pairs: pd.DataFrame,
    runs: pd.DataFrame,
    settings: ComparisonConfig,
) -> dict[str, Interval]:
    """Return the estimates over pairs, runs and triples; those over triples need one ``d_in``."""
    found = pair_estimates(pairs, runs, settings)
    if WEIGHTS_NOTE in pairs:
        found |= dict.fromkeys(
            CYCLES, Interval(nan, None, None, None, len(trained), NO_COMMON_SPACE)
        )
    else:
        found |= cycle_estimates(sides, settings.confidence)
        found |= cell_truth(trained, sides, settings)
    return without_intervals(found, settings)


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
    return Interval(nan if mean is None else mean, **record)


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
