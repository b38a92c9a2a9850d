"""Tables of a cell: a row per run, a row per latent, and estimates with their intervals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from reseed.compare.config import ComparisonConfig
from reseed.compare.pair import CellRuns, RunInCell
from reseed.compare.registry import (
    ESTIMATED,
    Column,
    Interval,
    columns,
    declared,
    evaluate,
    measure,
    measures,
)
from reseed.compare.sharing_profile import Reproducibility, run_reproducibilities
from reseed.compare.statistics import run_interval, seed_interval

RUN_COLUMNS = (
    "run",
    "seed",
    "num_latents",
    "d_in",
    "held_out_tokens",
    "live_fraction",
    "zero_latents",
)
"""Columns of `CellResult.runs` that describe a run; they have no estimates."""


def _reproducibilities(cell: CellRuns) -> list[Reproducibility]:
    return run_reproducibilities(cell.trained, cell.shared_with, cell.settings.confidence)


@measures(
    Column("reproducibility_alpha", "α of the run's beta prior; see `reproducibility`"),
    Column("reproducibility_beta", "β of the run's beta prior"),
    level="run",
    table="runs",
)
def prior(run: RunInCell) -> tuple[float, float]:
    found = run.cell.once(_reproducibilities)[run.index].prior
    return found.alpha, found.beta


@measures(
    Column("firing", "held-out tokens on which the latent fires"),
    Column("live", "true if these are at least `comparison.live_at_least`"),
    Column("dead", "true if the latent did not fire at the end of training"),
    Column("zero", "true if an encoder or decoder row is zero or not finite"),
    level="latent",
    table="latents",
)
def state(run: RunInCell) -> tuple[np.ndarray, ...]:
    return run.dictionary.firing, run.live, run.dictionary.dead, run.dictionary.zero


@measure(
    "shared_with", level="latent", table="latents", help="number m of other runs that share it"
)
def shared_with(run: RunInCell) -> np.ndarray:
    return run.shared_with


@measures(
    Column("reproducibility", "probability that one more seed shares it",
           formula="(m + α)/(n − 1 + α + β), with a beta prior fitted to the run"),
    Column("reproducibility_low", "lower end of its interval", advice="The interval holds for this "
           "latent alone: errors of several latents are correlated, because the seeds are the "
           "same. It knows how few seeds there are, but not that one of them may be bad for all."),
    Column("reproducibility_high", "upper end of its interval"),
    level="latent",
    table="latents",
)  # fmt: skip
def reproducibility_columns(run: RunInCell) -> tuple[np.ndarray, ...]:
    found = run.cell.once(_reproducibilities)[run.index]
    return found.mean, found.low, found.high


@measures(
    Column("duplicate", "true if its own dictionary has it twice"),
    Column("antipodal", "true if its own dictionary has its opposite"),
    Column("duplicate_product", "largest product of both cosines, if both are positive, with "
           "another latent of its dictionary"),
    Column("antipodal_product", "the same, if both are negative"),
    level="latent",
    table="latents",
)  # fmt: skip
def repeated(run: RunInCell) -> tuple[np.ndarray, ...]:
    own = run.duplicates
    products = (own.duplicate_product, own.antipodal_product)
    return own.duplicate, own.antipodal, *(x.astype(np.float32) for x in products)


@measures(
    Column("partner_encoder", "match by encoder in each of `others`; −1 if there is none"),
    Column("partner_decoder", "match by decoder; −1 if there is none"),
    Column("cosine_encoder", "encoder cosine with the match by encoder; 0 if there is none"),
    Column("cosine_decoder", "decoder cosine with the match by decoder"),
    Column("shared", "true if the run shares it by the strict rule"),
    Column("within", "number of latents of the other run that have both cosines at least at the "
           "threshold"),
    level="latent",
    table="latents",
)  # fmt: skip
def matches(run: RunInCell) -> tuple[np.ndarray, ...]:
    def listed(name: str, dtype: Any) -> np.ndarray:
        sides = run.against.values()
        return np.stack([getattr(side, name) for side in sides], axis=1).astype(dtype)

    return (
        listed("partner_encoder", np.int32),
        listed("partner_decoder", np.int32),
        listed("cosine_encoder", np.float32),
        listed("cosine_decoder", np.float32),
        listed("shared", np.bool_),
        listed("within", np.int32),
    )


def run_table(cell: CellRuns) -> pd.DataFrame:
    """Return a row per run: `RUN_COLUMNS`, measures without estimates, the metrics of the run, and
    the other measures of its weights."""
    rows = []
    for run in cell.runs:
        x, found = run.dictionary, evaluate(declared("run"), run)
        rows.append(
            {
                "run": x.id,
                "seed": x.seed,
                "num_latents": x.num_latents,
                "d_in": x.d_in,
                "held_out_tokens": x.held_out_tokens,
                "live_fraction": float(run.live.mean()),
                "zero_latents": int(x.zero.sum()),
                **{name: found.pop(name) for name in _without_estimates()},
                "dead_fraction": float(x.dead.mean()),
                **{name: float(value) for name, value in x.metrics.items()},
                **found,
            }
        )
    return pd.DataFrame(rows)


def _without_estimates() -> list[str]:
    return [name for name, column in columns("run").items() if column.scale not in ESTIMATED]


def latent_table(run: RunInCell) -> pa.Table:
    """Return the rows of one run in ``latents.parquet``, one per latent.

    Columns: ``run``, ``seed``, ``latent``; the measures with a value per latent; ``others``, the
    runs that it was compared with; and the measures with a list of values, one for each of them.
    """
    x, others = run.dictionary, list(run.against)
    found = evaluate(declared("latent", ""), run)
    single = {name: column for name, column in found.items() if np.ndim(column) < 2}
    return pa.table(
        {
            "run": pa.array([x.id] * x.num_latents),
            "seed": pa.array([x.seed] * x.num_latents),
            "latent": np.arange(x.num_latents),
            **{name: np.broadcast_to(v, x.num_latents) for name, v in single.items()},
            "others": _list_array(pa.array(others * x.num_latents), x.num_latents),
            **{
                name: _list_array(pa.array(column.ravel()), x.num_latents)
                for name, column in found.items()
                if name not in single
            },
        }
    )


def _list_array(flat: pa.Array, n: int) -> pa.ListArray:
    offsets = np.arange(n + 1, dtype=np.int32) * (len(flat) // n)
    return pa.ListArray.from_arrays(pa.array(offsets), flat)


def lists(table: pa.Table, name: str) -> np.ndarray:
    """Return a column of lists of equal length as an array [rows, length]; null becomes NaN."""
    flat = table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(len(table), -1)


def pair_estimates(
    pairs: pd.DataFrame, named: dict[str, Column], settings: ComparisonConfig, n: int
) -> dict[str, Interval]:
    """Estimate the columns that have a scale over the pairs of n runs, fractions first.

    Args:
        pairs: a row per pair (s, t), s < t, in order.
        named: the columns of the pairs.

    Raises:
        ValueError: a column that is declared as a fraction is not between 0 and 1.
    """
    upper = np.triu_indices(n, 1)
    estimates = {}
    for name, column in sorted(named.items(), key=lambda item: item[1].scale != "fraction"):
        if column.scale not in ESTIMATED:
            continue
        table = np.zeros((n, n))
        table[upper] = pairs[name]
        logit = column.scale == "fraction"
        try:
            estimates[name] = seed_interval(table + table.T, settings.confidence, logit=logit)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return estimates


def run_estimates(runs: pd.DataFrame, settings: ComparisonConfig) -> dict[str, Interval]:
    """Estimate the metrics and the measures of runs that have a scale over the runs."""
    described = (*RUN_COLUMNS, *_without_estimates())
    return {
        name: run_interval(runs[name].to_numpy(dtype=np.float64), settings.confidence)
        for name in runs.columns.difference(described, sort=False)
    }
