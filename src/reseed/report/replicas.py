"""Matches of a latent in other runs, read from a sweep's ``latents.parquet``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

FILE = "latents.parquet"
_OWN = ("run", "seed", "latent", "shared_with", "others", "partner_decoder", "shared")
_BY_WEIGHTS = ("cosine_encoder", "cosine_decoder")
_CHANCE = ("reproducibility", "reproducibility_low", "reproducibility_high")


@dataclass(frozen=True)
class Partner:
    """Match of a latent in another run, by decoder.

    Attributes:
        run: id of the other run.
        name: its name within the cell: ``seed 1``.
        latent: index of the match; None if there is none.
        cosine_encoder, cosine_decoder: cosines with the match; None if rows cannot be compared.
        shared: whether it is shared by the strict rule.
    """

    run: str
    name: str
    latent: int | None
    cosine_encoder: float | None
    cosine_decoder: float | None
    shared: bool


@dataclass(frozen=True)
class Replicas:
    """Matches of a latent in the other runs of its cell.

    Attributes:
        shared_with: number of other runs that share it.
        reproducibility: probability that one more run shares it, and the bounds of its interval;
            None if the runs differ in more than the seed.
        partners: a match per other run.
    """

    shared_with: int
    reproducibility: tuple[float, float, float] | None
    partners: tuple[Partner, ...]


def replicas_of(sweep: Path, run: str, latents: Sequence[int]) -> dict[int, Replicas]:
    """Return latent → its matches, for those latents of a run that the sweep's table has. Only
    their rows are read."""
    path = sweep / FILE
    wanted = [
        name for name in (*_OWN, *_BY_WEIGHTS, *_CHANCE) if name in pq.read_schema(path).names
    ]
    rows = pq.read_table(
        path, columns=wanted, filters=[("run", "==", run), ("latent", "in", list(latents))]
    ).to_pylist()
    if not rows:
        return {}
    seeds = {
        row["run"]: row["seed"]
        for row in pq.read_table(
            path, columns=["run", "seed"], filters=[("latent", "==", 0)]
        ).to_pylist()
    }
    cell = [run, *rows[0]["others"]]
    apart = len({seeds[each] for each in cell}) == len(cell)
    names = {each: f"seed {seeds[each]}" if apart else each for each in cell}
    return {row["latent"]: _replicas(row, names) for row in rows}


def _replicas(row: Mapping[str, Any], names: Mapping[str, str]) -> Replicas:
    others = row["others"]
    partners = []
    for i, other in enumerate(others):
        latent = row["partner_decoder"][i]
        there = latent is not None and latent >= 0
        encoder, decoder = (row[n][i] if there and n in row else None for n in _BY_WEIGHTS)
        partners.append(
            Partner(
                other,
                names[other],
                latent if there else None,
                encoder,
                decoder,
                bool(row["shared"][i]),
            )
        )
    mean, low, high = _CHANCE
    chance = (row[mean], row[low], row[high]) if row.get(mean) is not None else None
    return Replicas(row["shared_with"], chance, tuple(partners))
