"""The result of ``contexts``: the tables of `reseed.contexts`.

K contexts stored for a latent, W tokens of a window, L context length
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.contexts import CONTEXT, LATENTS_PER_GROUP, SCHEMA
from reseed.evaluate.base import Result
from reseed.evaluate.contexts.directions import Ranked
from reseed.evaluate.contexts.gathering import Gathering
from reseed.evaluate.contexts.kept import Kept
from reseed.evaluations import RowGroups


@dataclass(frozen=True, eq=False)
class Described:
    """Description of the latents of an SAE.

    Attributes:
        gathered: the latents' contexts.
        sampled: number of drawn contexts to show.
        promoted, suppressed: tokens; empty without a lens.
        neighbours: nearest latents.
        sequences: the text that was read.
    """

    gathered: Gathering
    sampled: int
    promoted: Ranked
    suppressed: Ranked
    neighbours: Ranked
    sequences: Int[Tensor, "sequences L"]

    def result(self, tokens: int, texts: pd.DataFrame) -> Result:
        """Return the result; its contexts are built piece by piece as they are written.

        Args:
            tokens: number of activations read.
            texts: texts of the tokens in the result.
        """
        silent = float((self.gathered.firing == 0).double().mean())
        return Result(
            {"tokens": tokens, "silent_fraction": silent},
            {"contexts": RowGroups(SCHEMA, self._pieces()), "texts": texts},
            {"largest": self._largest.cpu().numpy()},
        )

    @property
    def _largest(self) -> Float[Tensor, " F"]:
        return self.gathered.top.value.amax(1)

    def _pieces(self) -> Iterator[pa.Table]:
        firing, largest = self.gathered.firing, self._largest
        mean = (self.gathered.total / firing.clamp(min=1)).float()
        for begin in range(0, len(firing), LATENTS_PER_GROUP):
            rows = slice(begin, begin + LATENTS_PER_GROUP)
            yield pa.table(
                [
                    pa.array(firing[rows].cpu().numpy()),
                    pa.array(largest[rows].cpu().numpy()),
                    pa.array(mean[rows].cpu().numpy()),
                    self._contexts(rows),
                    *(
                        _listed(getattr(self, name), rows, SCHEMA.field(name).type.value_type)
                        for name in ("promoted", "suppressed", "neighbours")
                    ),
                ],
                schema=SCHEMA,
            )

    def _contexts(self, rows: slice) -> pa.ListArray:
        top, drawn = self.gathered.top, self.gathered.drawn
        best = _Chosen.ranked(top, rows, top.rank.shape[1])
        spread = _Chosen.spread(drawn, rows, self.sampled)
        return best.joined(spread).array(self.sequences.numpy(), len(self.gathered.firing[rows]))


@dataclass(frozen=True, eq=False)
class _Chosen:
    """Contexts of some latents.

    Attributes:
        row: row of each context's latent.
        order: index among the latent's contexts.
        quantile: quantile of a sampled context; NaN for a top one.
        position: position of the firing token.
        window: activations around it.
    """

    row: Int[np.ndarray, " m"]
    order: Int[np.ndarray, " m"]
    quantile: Float[np.ndarray, " m"]
    position: Int[np.ndarray, " m"]
    window: Float[np.ndarray, "m W"]

    @classmethod
    def ranked(cls, kept: Kept, rows: slice, count: int) -> _Chosen:
        """Return the ``count`` contexts with the largest activation."""
        there = kept.there(rows)
        place = torch.arange(count, device=there.device).expand(len(there), -1)
        return cls._of(kept, rows, place, place < there[:, None], sampled=False)

    @classmethod
    def spread(cls, kept: Kept, rows: slice, count: int) -> _Chosen:
        """Return ``count`` contexts at even steps by activation; all if there are fewer."""
        there = kept.there(rows)[:, None]
        step = torch.arange(count, device=there.device)
        place = ((2 * step + 1) * there) // (2 * count)
        # With fewer contexts than `count`, even steps would repeat some.
        place = torch.where(there < count, step, place)
        return cls._of(kept, rows, place, place < there, sampled=True)

    @classmethod
    def _of(
        cls,
        kept: Kept,
        rows: slice,
        place: Int[Tensor, "rows count"],
        wanted: Tensor,
        sampled: bool,
    ) -> _Chosen:
        """Return the contexts at some ranks by activation, the largest first."""
        row, order = wanted.nonzero(as_tuple=True)
        at = place[row, order]
        slot = kept.in_order(rows)[row, at]
        share = 1 - (at + 0.5) / kept.there(rows)[row] if sampled else at * torch.nan
        each = row, order, share, kept.position[rows][row, slot], kept.window[rows][row, slot]
        return cls(*(values.cpu().numpy() for values in each))

    def joined(self, after: _Chosen) -> _Chosen:
        """Append other contexts, latent by latent."""
        both = [
            np.concatenate([getattr(self, name), getattr(after, name)])
            for name in ("row", "order", "quantile", "position", "window")
        ]
        by_row = np.argsort(both[0], kind="stable")
        return _Chosen(*(values[by_row] for values in both))

    def array(self, sequences: Int[np.ndarray, "sequences L"], latents: int) -> pa.ListArray:
        """Return a list of contexts for each latent."""
        reach, context = self.window.shape[1] // 2, sequences.shape[1]
        offset = np.arange(-reach, reach + 1)
        place = self.position[:, None] % context + offset
        inside = (place >= 0) & (place < context)
        before = np.minimum(self.position % context, reach)  # tokens of the window before the peak
        fires = self.window != 0
        active = np.nonzero(fires)[1] - np.repeat(reach - before, fires.sum(1))
        token = (self.position[:, None] + offset)[inside]
        fields = [
            pa.array(self.quantile.astype(np.float32), from_pandas=True),
            pa.array(self.position),
            pa.array(before.astype(np.int32)),
            _lists(pa.array(sequences.reshape(-1)[token].astype(np.int32)), inside.sum(1)),
            _lists(pa.array(active.astype(np.int32)), fires.sum(1)),
            _lists(pa.array(self.window[fires]), fires.sum(1)),
        ]
        contexts = pa.StructArray.from_arrays(fields, fields=list(CONTEXT))
        return _lists(contexts, np.bincount(self.row, minlength=latents))


def _listed(ranked: Ranked, rows: slice, struct: pa.StructType) -> pa.ListArray:
    index, value = ranked.index[rows].cpu().numpy(), ranked.value[rows].cpu().numpy()
    there = index >= 0
    arrays = [pa.array(index[there].astype(np.int32)), pa.array(value[there])]
    return _lists(pa.StructArray.from_arrays(arrays, fields=list(struct)), there.sum(1))


def _lists(values: pa.Array, counts: Int[np.ndarray, " m"]) -> pa.ListArray:
    ends = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), values)
