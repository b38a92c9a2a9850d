"""A cell of many latents, with contexts that would break a page that parses tokens as markup."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from reseed.store.contexts import LATENTS_PER_GROUP, SCHEMA, Contexts

TEXTS = ["</script>", '"quoted"', "<b>bold</b>", " the", "\n", "\t", " caf\u00e9", "\u2028"]


def large_cell(make_cell, num_latents: int, seeds: int):
    """Return a cell of seeds with random partners; only their number matters here."""
    knobs, cell = make_cell(n=2)
    rng = np.random.default_rng(0)
    names = [f"large-seed{seed}" for seed in range(seeds)]
    n, m = num_latents * seeds, seeds - 1

    def lists(values):
        offsets = np.arange(n + 1, dtype=np.int32) * m
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.ravel()))

    partners = rng.integers(0, num_latents, (n, m), dtype=np.int32)
    cosines = rng.random((n, m), dtype=np.float32)
    shared = cosines > 0.7
    others = [[o for o in names if o != name] for name in names]
    latents = pa.table(
        {
            "run": np.repeat(names, num_latents),
            "seed": np.repeat([str(s) for s in range(seeds)], num_latents),
            "latent": np.tile(np.arange(num_latents), seeds),
            "firing": rng.integers(0, 5000, n),
            "live": np.ones(n, bool),
            "dead": np.zeros(n, bool),
            "shared_with": shared.sum(1),
            "reproducibility": rng.random(n),
            "reproducibility_low": np.zeros(n),
            "reproducibility_high": np.ones(n),
            "others": pa.array([o for o in others for _ in range(num_latents)]),
            "partner_encoder": lists(partners),
            "partner_decoder": lists(partners),
            "cosine_encoder": lists(cosines),
            "cosine_decoder": lists(cosines),
            "shared": lists(shared),
        }
    )
    runs = pd.DataFrame(
        {"run": names, "seed": [str(s) for s in range(seeds)], "held_out_tokens": 65_536}
    )
    return knobs, dataclasses.replace(cell, runs=runs, latents=latents)


def hostile_contexts(folder: Path, num_latents: int) -> Contexts:
    """Return five contexts of each latent, with tokens that would break a page that parses them as
    markup."""
    rng = np.random.default_rng(1)
    folder.mkdir(parents=True)
    rows = [
        {
            "firing": 9,
            "largest": 2.0,
            "mean": 1.0,
            "contexts": [
                {"quantile": None if j < 3 else 0.5, "position": j, "peak": 16,
                 "tokens": rng.integers(0, len(TEXTS), 33), "active": [16, 20],
                 "activations": [2.0, 0.5]}
                for j in range(5)
            ],
            "promoted": [{"token": 0, "logit": 1.0}],
            "suppressed": [{"token": 1, "logit": -1.0}],
            "neighbours": [{"latent": 1, "cosine": 0.5}],
        }
        for _ in range(num_latents)
    ]  # fmt: skip
    pq.write_table(
        pa.Table.from_pylist(rows, schema=SCHEMA),
        folder / "contexts.parquet",
        row_group_size=LATENTS_PER_GROUP,
    )
    ids = pa.array(range(len(TEXTS)), pa.int32())
    pq.write_table(pa.table({"token": ids, "text": TEXTS}), folder / "texts.parquet")
    return Contexts(folder, 65_536, {})
