"""Tables of a cell: a row per run, a row per latent, and estimates with their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int

from reseed.compare.columns import COSINES, FRACTIONS, RUN_COLUMNS, Interval
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary
from reseed.compare.measures import PairSide
from reseed.compare.nearest import Duplicates
from reseed.compare.sharing_profile import Reproducibility
from reseed.compare.statistics import run_interval, seed_interval


def run_table(
    trained: Sequence[Dictionary],
    repeated: Sequence[Duplicates],
    reproducible: Sequence[Reproducibility],
    directions: Mapping[str, Sequence[float]],
    settings: ComparisonConfig,
) -> pd.DataFrame:
    """Return a row per run: `RUN_COLUMNS`, metrics, and measures of its weights alone."""
    table = pd.DataFrame(
        [
            {
                "run": x.id,
                "seed": x.seed,
                "num_latents": x.num_latents,
                "d_in": x.d_in,
                "held_out_tokens": x.held_out_tokens,
                "live_fraction": float(x.live(settings.live_at_least).mean()),
                "zero_latents": int(x.zero.sum()),
                "reproducibility_alpha": chance.prior.alpha,
                "reproducibility_beta": chance.prior.beta,
                "dead_fraction": float(x.dead.mean()),
                **{name: float(value) for name, value in x.metrics.items()},
                "duplicate_fraction": float(own.duplicate.mean()),
                "antipodal_fraction": float(own.antipodal.mean()),
            }
            for x, own, chance in zip(trained, repeated, reproducible, strict=True)
        ]
    )
    return table.assign(**directions)


def latent_table(
    x: Dictionary,
    against: Mapping[str, PairSide],
    shared_with: Int[np.ndarray, " num_latents"],
    own: Duplicates,
    chance: Reproducibility,
) -> pa.Table:
    """Return the rows of one run in ``latents.parquet``, one per latent.

    Columns: ``run``, ``seed``, ``latent``, ``firing``, ``live``, ``dead``, ``zero``;
    ``shared_with``, m_i; ``reproducibility`` with ``_low`` and ``_high``
    (`reseed.compare.sharing_profile`); ``duplicate``, ``antipodal`` with ``_product``
    (`reseed.compare.nearest`); and lists with an entry per other run, in the order of ``others``:
    ``partner_encoder``, ``partner_decoder``, ``cosine_encoder``, ``cosine_decoder``, ``shared``,
    ``within`` (`PairSide`).
    """
    n, sides = x.num_latents, list(against.values())

    def listed(name: str, dtype: Any) -> pa.ListArray:
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
            "reproducibility": chance.mean,
            "reproducibility_low": chance.low,
            "reproducibility_high": chance.high,
            "duplicate": own.duplicate,
            "antipodal": own.antipodal,
            "duplicate_product": own.duplicate_product.astype(np.float32),
            "antipodal_product": own.antipodal_product.astype(np.float32),
            "others": _list_array(pa.array(list(against) * n), n),
            "partner_encoder": listed("partner_encoder", np.int32),
            "partner_decoder": listed("partner_decoder", np.int32),
            "cosine_encoder": listed("cosine_encoder", np.float32),
            "cosine_decoder": listed("cosine_decoder", np.float32),
            "shared": listed("shared", np.bool_),
            "within": listed("within", np.int32),
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
    pairs: pd.DataFrame, runs: pd.DataFrame, settings: ComparisonConfig
) -> dict[str, Interval]:
    """Estimate fractions (logit) and cosines (linear) over pairs of seeds, metrics over runs."""
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
