"""Values per latent and other run for figures, from a cell's table of latents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from jaxtyping import Bool, Float, Int

from reseed.compare.cell import CellResult
from reseed.compare.functional import bounded, quality_coverage
from reseed.compare.tables import lists

TEN_MILLION = 10_000_000


@dataclass(frozen=True, eq=False)
class MatchedLatents:
    """Latents of all runs against all other runs, where the decoder matching gives a match.

    Attributes:
        rate: firings in ten million tokens (Paulo & Belrose's unit); 0 for never.
        cosine: cosine of its decoder row with the match's.
        shared: whether it is shared with that match, by the strict rule.
    """

    rate: Float[np.ndarray, " n"]
    cosine: Float[np.ndarray, " n"]
    shared: Bool[np.ndarray, " n"]


def matched(cell: CellResult) -> MatchedLatents:
    """Return the points of the figure of firing against cosine."""
    table = cell.latents
    partner, cosine, shared = (
        lists(table, name) for name in ("partner_decoder", "cosine_decoder", "shared")
    )
    tokens = cell.runs.set_index("run")["held_out_tokens"]
    seen = tokens.loc[table["run"].to_pylist()].to_numpy(dtype=np.float64)
    rate = table["firing"].to_numpy() / np.maximum(seen, 1) * TEN_MILLION
    kept = partner >= 0
    every = np.broadcast_to(rate[:, None], partner.shape)
    return MatchedLatents(every[kept], cosine[kept].astype(np.float64), shared[kept].astype(bool))


def quality_by_rank(cell: CellResult) -> Float[np.ndarray, " ranks"]:
    """Return the mean R (0 … 1) of the r matches with the highest cosines, for r = 1 …, averaged
    over the ordered pairs of runs and cut to the shortest curve."""
    runs = cell.runs["run"].tolist()
    rows = {run: cell.latents.filter(pc.field("run") == run) for run in runs}
    curves = []
    for own in rows.values():
        values = {n: lists(own, n) for n in ("partner_decoder", "substitution", "match_cosine")}
        for i, other in enumerate(own["others"][0].as_py()):
            partner: Int[np.ndarray, " F"] = values["partner_decoder"][:, i]
            live = own["live"].to_numpy() & rows[other]["live"].to_numpy()[partner]
            both = live & (partner >= 0)
            quality = bounded(values["substitution"][both, i].astype(np.float64))
            curves.append(quality_coverage(quality, values["match_cosine"][both, i]))
    shortest = min(map(len, curves))
    return np.mean([curve[:shortest] for curve in curves], axis=0)
