"""One cell of a comparison: runs that are equal in everything but what pairs them up.

All pairs are measured, beside their nulls and their untrained selves; what comes out is numbers
and tables, which a later command reads from the folder that they were written to.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from reseed.atomic import atomic_write, atomic_write_json
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary
from reseed.compare.matching import match
from reseed.compare.measures import LIVE_SHOWN, THRESHOLDS
from reseed.compare.nulls import isotropic_null, kappa
from reseed.compare.profile import seed_profile, unshared_fractions
from reseed.compare.stability import Matcher, PairSide, compare_pair
from reseed.compare.statistics import Interval, run_interval, seed_interval
from reseed.compare.truth import cell_truth, label_column

log = logging.getLogger(__name__)

FRACTIONS = (
    "shared_fraction",
    "shared_fraction_live",
    *(f"shared_fraction_live_{limit}" for limit in LIVE_SHOWN),
    "shared_fraction_not_dead",
    "shared_fraction_decoder",
    "shared_fraction_decoder_live",
    "shared_fraction_correlation",
    "shared_fraction_correlation_live",
    "index_agreement",
    "index_agreement_live",
    "coverage",
    "coverage_live",
    *(f"shared_fraction_at_{tau}" for tau in THRESHOLDS),
    *(f"shared_fraction_live_at_{tau}" for tau in THRESHOLDS),
    "shared_fraction_joint",
    "shared_fraction_joint_live",
    "shared_fraction_by_firing",
    "shared_fraction_by_variance",
    "shared_fraction_dense",
    "shared_fraction_sparse",
    "split_fraction",
    "split_fraction_live",
    "mutual_nearest",
    "mutual_nearest_live",
    "mutual_nearest_decoder",
    "mutual_nearest_decoder_live",
)
COSINES = (
    "cosine_encoder",
    "cosine_decoder",
    "cosine_encoder_live",
    "cosine_decoder_live",
    "cosine_correlation",
    "mmcs",
    "mmcs_live",
    "pw_mcc_signed",
    "pw_mcc_absolute",
)
UNTRAINED = (
    "shared_fraction",
    "index_agreement",
    "coverage",
    "cosine_encoder",
    "cosine_decoder",
)
"""Measures that are also made on the initial weights: columns ``untrained_…`` of the pairs."""
RUN_COLUMNS = (
    "run",
    "seed",
    "num_latents",
    "d_in",
    "held_out_tokens",
    "live_fraction",
    "zero_latents",
)
"""Columns of `CellResult.runs` that come before the metrics of the runs."""
_FORMAT = 3


@dataclass(frozen=True, eq=False)
class CellResult:
    """All that was measured on a cell.

    Attributes:
        settings: the comparison that the cell belongs to.
        runs: a row per run: `RUN_COLUMNS`, then its metrics.
        pairs: a row per pair of runs: `stability.PairResult.row`, then the columns ``null_…``,
            ``kappa``, ``untrained_…`` (NaN where there were no untrained weights).
        latents: a row per latent of each run, with lists over the other runs (``others``).
        estimates: fractions and cosines over pairs of seeds and metrics over runs, by name; where
            the truth is known, also those of `compare.truth` (``truth_…``).
        p: p_m, the fraction of latents shared with m = 0 … n−1 other runs.
    """

    settings: ComparisonConfig
    runs: pd.DataFrame
    pairs: pd.DataFrame
    latents: pa.Table
    estimates: dict[str, Interval]
    p: Float[np.ndarray, " n"]

    @property
    def u(self) -> Float[np.ndarray, " n-1"]:
        """u_k for k = 2 … n: the fraction of latents that none of k−1 other runs share."""
        return unshared_fractions(self.p)

    @property
    def n_seeds(self) -> int:
        return len(self.runs)

    @property
    def num_latents(self) -> int:
        """Of the widest run."""
        return int(self.runs["num_latents"].to_numpy().max())

    @property
    def held_out_tokens(self) -> int:
        """Of the run with the fewest."""
        return int(self.runs["held_out_tokens"].to_numpy().min())

    @property
    def null_simulated_latents(self) -> int:
        """Larger side of the simulated null; below `num_latents` it was extended."""
        return int(self.pairs["null_simulated_latents"].to_numpy().max())

    def pair_mean(self, column: str) -> float:
        """Mean over pairs of a column that has no interval (nulls, ceilings, untrained)."""
        return float(self.pairs[column].to_numpy(dtype=np.float64).mean())

    def write(self, folder: Path | str) -> None:
        """Write ``pairs.parquet``, ``latents.parquet`` and, last, ``cell.json``."""
        folder = Path(folder)
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
        """The inverse of `write`.

        Raises:
            FileNotFoundError: the folder holds no finished cell.
            ValueError: it was written in another format.
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
            estimates={name: _interval(value) for name, value in record["estimates"].items()},
            p=np.array(record["shared_with_fraction"]),
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

    Args:
        trained: the runs, in the order of the axis that pairs up.
        untrained: the same runs with their initial weights, in the same order; their firing is not
            looked at. May be empty: then the columns ``untrained_…`` are NaN.
        matcher: makes every assignment of rows of two runs (those of nulls are made by `match`).
        device: of passes over all pairs of latents.

    Raises:
        ValueError: fewer than 2 runs, a run or a value of the axis twice, different ``d_in``.
        MemoryError: more latents than an exact matching can take.
    """
    _check(trained, untrained, settings)
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
        pair = against_each(trained[s], trained[t])
        sides[s, t], sides[t, s] = pair.a, pair.b
        start = against_each(untrained[s], untrained[t], brief=True).measures if untrained else {}
        rows.append(pair.row() | _beside(pair.measures, trained[s], trained[t], start, settings))
    pairs = pd.DataFrame(rows)
    against = [
        {other.id: sides[s, t] for t, other in enumerate(trained) if t != s}
        for s in range(len(trained))
    ]
    profile = seed_profile(
        [np.stack([side.shared for side in row.values()], axis=1) for row in against]
    )
    tables = [
        _latent_table(x, row, shared_with)
        for x, row, shared_with in zip(trained, against, profile.shared_with, strict=True)
    ]
    runs = _run_table(trained, settings)
    return CellResult(
        settings=settings,
        runs=runs,
        pairs=pairs,
        latents=label_column(pa.concat_tables(tables), trained),
        estimates=_estimates(pairs, runs, settings) | cell_truth(trained, sides, settings),
        p=profile.p,
    )


def _check(
    trained: Sequence[Dictionary], untrained: Sequence[Dictionary], settings: ComparisonConfig
) -> None:
    if len(trained) < 2:
        raise ValueError(f"a comparison needs at least 2 runs in a cell; got {len(trained)}")
    for name, values in (
        ("run", [x.id for x in trained]),
        (settings.pair_by, [x.seed for x in trained]),
    ):
        repeated = [v for i, v in enumerate(values) if v in values[:i]]
        if repeated:
            raise ValueError(f"every {name} may occur once in a cell; {repeated[0]} is there twice")
    for x in (*trained, *untrained):
        if x.d_in != trained[0].d_in:
            raise ValueError(
                f"all runs of a cell must have the same `d_in`; {trained[0].id} has "
                f"{trained[0].d_in}, {x.id} has {x.d_in}"
            )
    if untrained and [x.seed for x in untrained] != [x.seed for x in trained]:
        raise ValueError(
            "`untrained` must hold the initial weights of `trained` in the same order; the values "
            f"of {settings.pair_by} are {', '.join(x.seed for x in untrained)} and "
            f"{', '.join(x.seed for x in trained)}"
        )


def _beside(
    measures: dict[str, float],
    a: Dictionary,
    b: Dictionary,
    start: dict[str, float],
    settings: ComparisonConfig,
) -> dict[str, float]:
    """The columns of a pair that put its numbers in proportion: null and untrained selves.

    Args:
        start: the measures of the untrained pair; empty where there is none.
    """
    tau = settings.threshold
    null = isotropic_null(
        a.num_latents, b.num_latents, a.d_in, tau, settings.null_seed, settings.null_draws
    )
    return {
        "null_cosine": null.cosine,
        "null_shared_fraction": null.shared_fraction,
        "null_coverage": null.coverage,
        "null_simulated_latents": null.simulated_latents,
        "kappa": kappa(measures["shared_fraction"], null.shared_fraction),
        **{f"untrained_{name}": start.get(name, float("nan")) for name in UNTRAINED},
    }


def _run_table(trained: Sequence[Dictionary], settings: ComparisonConfig) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "run": x.id,
                "seed": x.seed,
                "num_latents": x.num_latents,
                "d_in": x.d_in,
                "held_out_tokens": x.held_out_tokens,
                "live_fraction": float(x.live(settings.live_at_least).mean()),
                "zero_latents": int(x.zero.sum()),
                "dead_fraction": float(x.dead.mean()),
                **{name: float(value) for name, value in x.metrics.items()},
            }
            for x in trained
        ]
    )


def _latent_table(
    x: Dictionary, against: dict[str, PairSide], shared_with: Int[np.ndarray, " num_latents"]
) -> pa.Table:
    """A row per latent; the lists have an entry per other run, in the order of ``others``."""
    n, sides = x.num_latents, list(against.values())

    def lists(name: str, dtype: Any) -> pa.ListArray:
        values = np.stack([getattr(side, name) for side in sides], axis=1).astype(dtype)
        return _list_array(pa.array(values.ravel()), n)

    return pa.table(
        {
            "run": pa.array([x.id] * n),
            "seed": pa.array([x.seed] * n),
            "latent": np.arange(n),
            "firing": x.firing,
            "live": sides[0].live,
            "dead": x.dead,
            "zero": x.zero,
            "shared_with": shared_with,
            "others": _list_array(pa.array(list(against) * n), n),
            "partner_encoder": lists("partner_encoder", np.int32),
            "partner_decoder": lists("partner_decoder", np.int32),
            "cosine_encoder": lists("cosine_encoder", np.float32),
            "cosine_decoder": lists("cosine_decoder", np.float32),
            "shared": lists("shared", np.bool_),
            "within": lists("within", np.int32),
        }
    )


def _list_array(flat: pa.Array, n: int) -> pa.ListArray:
    offsets = np.arange(n + 1, dtype=np.int32) * (len(flat) // n)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def _estimates(
    pairs: pd.DataFrame, runs: pd.DataFrame, settings: ComparisonConfig
) -> dict[str, Interval]:
    """Fractions (logit) and cosines (linear) over pairs of seeds, metrics over runs."""
    n = len(runs)
    upper = np.triu_indices(n, 1)
    estimates = {}
    for name in (*FRACTIONS, *COSINES):
        values = np.zeros((n, n))
        values[upper] = pairs[name]
        estimates[name] = seed_interval(
            values + values.T, settings.confidence, logit=name in FRACTIONS
        )
    for name in runs.columns.difference(RUN_COLUMNS, sort=False):
        estimates[name] = run_interval(runs[name].to_numpy(dtype=np.float64), settings.confidence)
    return estimates


def _interval(record: dict[str, Any]) -> Interval:
    mean = record.pop("mean")
    return Interval(float("nan") if mean is None else mean, **record)
