"""The evaluation ``contexts``: its settings, one pass over the text for all SAEs, and the result.

The result has the tables of `reseed.store.contexts`.

Shapes: K contexts stored for a latent, W tokens of a window, L context length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.intervention import unembedding
from reseed.activations.language_model import LanguageModel
from reseed.activations.text_source import TextSource
from reseed.config import setting
from reseed.errors import ConfigError
from reseed.evaluate.base import (
    EvaluationConfig,
    EvaluationInput,
    LoadedRun,
    Metric,
    Result,
    RunSource,
    needs_language_model,
)
from reseed.evaluate.context_gathering import (
    ContextGatherer,
    Ranked,
    TopKReservoir,
    lens,
    neighbours,
)
from reseed.store.contexts import CONTEXT, LATENTS_PER_GROUP, SCHEMA
from reseed.store.results import RowGroups
from reseed.system.console import counted, throttled_say

_BYTES_PER_PASS = 4 << 30
"""Maximum memory for the contexts of one pass; SAEs that need more take several passes."""
_STREAM = ("resid_pre", "resid_mid", "resid_post")
"""Sites of the residual stream, the only ones whose activations the unembedding can read."""
_BLOCK = 4_096
"""Number of tokens that are encoded at once; a longer sequence is encoded as a whole."""


@dataclass(frozen=True)
class ContextsConfig(EvaluationConfig, name="contexts"):
    """Text that latents fire on, tokens that they promote, and their nearest latents.

    Args:
        tokens: number of held-out activations, rounded up to whole sequences; the same for every
            SAE of one model.
        top: number of contexts where a latent fires most, at most one per sequence.
        sampled: number of contexts at evenly spaced quantiles of activation, from uniformly drawn
            firings.
        reservoir: number of firings drawn for each latent.
        window: number of tokens of a context on either side of the firing token.
        lens: number of promoted tokens, and of suppressed tokens.
        neighbours: number of nearest decoder rows.
        seed: seed of the draw.
    """

    with_untrained: ClassVar[bool] = False
    title = "What do latents fire on?"
    metrics = (
        Metric("silent_fraction", "never\nfired", "fraction of latents that fire on no token",
               advice="A latent that does not fire on a few tokens need not be dead."),
        Metric("tokens", help="held-out tokens that were read"),
    )  # fmt: skip
    latents = (Metric("largest", help="the latent's largest activation; 0 if it never fires"),)
    footnotes = (
        "**never fired**: fraction of latents that fired on none of the evaluated tokens. To "
        "see the contexts of the other latents: `reseed show RUN LATENT`.",
    )

    tokens: int = setting(65_536, at_least=1, at_most=2**31)
    top: int = setting(10, at_least=1)
    sampled: int = setting(5, at_least=0)
    reservoir: int = setting(30, at_least=1)
    window: int = setting(16, at_least=0)
    lens: int = setting(10, at_least=0)
    neighbours: int = setting(5, at_least=0)
    seed: int = setting(0, at_least=0)

    def validate(self) -> None:
        super().validate()
        if self.sampled > self.reservoir:
            raise ConfigError(
                f"{{key}} (={self.sampled}) must not exceed `reservoir` (={self.reservoir})",
                "sampled",
            )

    def check(self, source: RunSource) -> None:
        needs_language_model(self, source)

    def evaluate(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        source = inputs.source
        assert isinstance(source, TextSource)
        sequences, kept = source.held_out_sequences(self.tokens)
        with_lens = self.lens > 0 and any(s.hook.site in _STREAM for s in runs)
        matrix = unembedding(source.model) if with_lens else None
        for some in self._groups(runs):
            inputs.progress(f"{sequences.numel():,} tokens for {counted(len(some), 'SAE')}")
            gathered = self._gathered(some, source, sequences, kept)
            for run in some:
                described = self._described(run, gathered.pop(run.id), matrix, sequences)
                texts = _texts(described, inputs.tokenizer)
                yield run.id, described.result(int(kept.sum()), texts)

    def _groups(self, runs: Sequence[LoadedRun]) -> Iterator[list[LoadedRun]]:
        """Yield groups of SAEs whose contexts fit into `_BYTES_PER_PASS`, at least one SAE each."""
        each = (self.top + self.reservoir) * (4 * (2 * self.window + 1) + 16)
        group: list[LoadedRun] = []
        for run in runs:
            if group and sum(s.sae.num_latents for s in [*group, run]) * each > _BYTES_PER_PASS:
                yield group
                group = []
            group.append(run)
        yield group

    @torch.inference_mode()
    def _gathered(
        self,
        runs: Sequence[LoadedRun],
        source: TextSource,
        sequences: Int[Tensor, "sequences context"],
        kept: Bool[Tensor, "sequences context"],
    ) -> dict[str, ContextGatherer]:
        """Gather the contexts of each SAE in one pass over the text."""
        found = {
            run.id: ContextGatherer(run.sae, self.top, self.reservoir, self.window, self.seed)
            for run in runs
        }
        told, context = throttled_say(), sequences.shape[1]
        hooks = [run.hook for run in runs]
        for first, block in _blocks(source.model, sequences, hooks):
            for run in runs:
                x = block[run.hook]
                found[run.id].add(x, kept[first : first + len(x)], first * context)
            told(f"{first * context:,} of {sequences.numel():,} tokens")
        return found

    def _described(
        self,
        run: LoadedRun,
        gathered: ContextGatherer,
        matrix: Tensor | None,
        sequences: Int[Tensor, "sequences context"],
    ) -> LatentDescriptions:
        rows = run.sae.W_dec.detach()
        promoted = suppressed = Ranked.empty(len(rows))
        if matrix is not None and run.hook.site in _STREAM:
            promoted, suppressed = lens(rows, matrix, self.lens)
        near = neighbours(rows, self.neighbours) if self.neighbours else Ranked.empty(len(rows))
        return LatentDescriptions(gathered, self.sampled, promoted, suppressed, near, sequences)


def _blocks(
    model: LanguageModel, sequences: Int[Tensor, "sequences context"], hooks: Sequence[Hookpoint]
) -> Iterator[tuple[int, dict[Hookpoint, Float[Tensor, "some context d_in"]]]]:
    """Yield activations in blocks of about `_BLOCK` tokens, with each block's first sequence."""
    size, first = max(1, _BLOCK // sequences.shape[1]), 0
    for passed in model.activations(sequences, hooks):
        for block in zip(*(x.split(size) for x in passed.values()), strict=True):
            yield first, dict(zip(passed, block, strict=True))
            first += len(block[0])


@dataclass(frozen=True, eq=False)
class LatentDescriptions:
    """Description of the latents of an SAE.

    Attributes:
        gathered: the latents' contexts.
        sampled: number of drawn contexts to show.
        promoted, suppressed: tokens that each latent promotes or suppresses; empty without a lens.
        neighbours: nearest latents.
        sequences: the text that was read.
    """

    gathered: ContextGatherer
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
        quantile: quantile of a sampled context; NaN for a top context.
        position: position of the firing token.
        window: activations around that token.
    """

    row: Int[np.ndarray, " m"]
    quantile: Float[np.ndarray, " m"]
    position: Int[np.ndarray, " m"]
    window: Float[np.ndarray, "m W"]

    @classmethod
    def ranked(cls, reservoir: TopKReservoir, rows: slice, count: int) -> _Chosen:
        """Return the ``count`` contexts with the largest activation."""
        there = reservoir.counts(rows)
        place = torch.arange(count, device=there.device).expand(len(there), -1)
        return cls._of(reservoir, rows, place, place < there[:, None], sampled=False)

    @classmethod
    def spread(cls, reservoir: TopKReservoir, rows: slice, count: int) -> _Chosen:
        """Return ``count`` contexts at evenly spaced ranks of activation, or all if fewer."""
        there = reservoir.counts(rows)[:, None]
        step = torch.arange(count, device=there.device)
        place = ((2 * step + 1) * there) // (2 * count)
        # With fewer contexts than `count`, evenly spaced ranks would repeat some.
        place = torch.where(there < count, step, place)
        return cls._of(reservoir, rows, place, place < there, sampled=True)

    @classmethod
    def _of(
        cls,
        reservoir: TopKReservoir,
        rows: slice,
        place: Int[Tensor, "rows count"],
        wanted: Tensor,
        sampled: bool,
    ) -> _Chosen:
        """Return the contexts at some ranks by activation, the largest first."""
        row, order = wanted.nonzero(as_tuple=True)
        at = place[row, order]
        slot = reservoir.in_order(rows)[row, at]
        share = 1 - (at + 0.5) / reservoir.counts(rows)[row] if sampled else at * torch.nan
        each = row, share, reservoir.position[rows][row, slot], reservoir.window[rows][row, slot]
        return cls(*(values.cpu().numpy() for values in each))

    def joined(self, after: _Chosen) -> _Chosen:
        """Append other contexts, latent by latent."""
        both = [
            np.concatenate([getattr(self, name), getattr(after, name)])
            for name in ("row", "quantile", "position", "window")
        ]
        by_row = np.argsort(both[0], kind="stable")
        return _Chosen(*(values[by_row] for values in both))

    def array(self, sequences: Int[np.ndarray, "sequences L"], latents: int) -> pa.ListArray:
        """Return a list of contexts for each latent."""
        reach, context = self.window.shape[1] // 2, sequences.shape[1]
        offset = np.arange(-reach, reach + 1)
        place = self.position[:, None] % context + offset
        inside = (place >= 0) & (place < context)
        before = np.minimum(self.position % context, reach)  # number of tokens before the peak
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


def _texts(described: LatentDescriptions, tokenizer: Any) -> pd.DataFrame:
    """Return the text of every token in the result, with leading spaces."""
    shown = (described.sequences, described.promoted.index, described.suppressed.index)
    ids = np.unique(np.concatenate([np.unique(part.cpu().numpy()) for part in shown])).tolist()
    texts = tokenizer.batch_decode([[i] for i in ids], clean_up_tokenization_spaces=False)
    pieces = tokenizer.convert_ids_to_tokens(ids)
    # Some decoders strip the leading space of a text.
    spaced = [
        f" {text}" if piece and piece.startswith("▁") and not text.startswith(" ") else text
        for text, piece in zip(texts, pieces, strict=True)
    ]
    return pd.DataFrame({"token": np.array(ids, dtype=np.int32), "text": spaced})
