"""The evaluation ``contexts``: its settings, and one pass over the text for all SAEs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.hookpoint import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.reading import Reading
from reseed.activations.unembedding import unembedding
from reseed.config import ConfigError, setting
from reseed.console import counted, now_and_then
from reseed.evaluate.base import (
    Evaluated,
    EvaluationConfig,
    Result,
    Subject,
    needs_language_model,
)
from reseed.evaluate.contexts.directions import Ranked, lens, neighbours
from reseed.evaluate.contexts.gathering import Gathering
from reseed.evaluate.contexts.result import Described

if TYPE_CHECKING:
    from reseed.experiment import Resolved

_KEPT_BYTES = 4 << 30
"""Memory for the contexts of one pass; SAEs that need more take several passes."""
_READ_OUT = "resid_post"
"""The site in the residual stream, which the unembedding reads."""
_BLOCK = 4_096
"""Tokens encoded at once, or one sequence if it is longer."""


@dataclass(frozen=True)
class ContextsConfig(EvaluationConfig, name="contexts"):
    """Text that latents fire on, tokens that they promote, and their nearest latents.

    Args:
        tokens: held-out activations, rounded up to whole sequences; the same for every SAE of one
            model.
        top: number of contexts where a latent fires most, at most one per sequence.
        sampled: number of contexts at even quantiles of activation, from uniformly drawn firings.
        reservoir: number of firings drawn for each latent.
        window: tokens of a context on either side of the firing token.
        lens: number of promoted tokens, and of suppressed tokens.
        neighbours: number of nearest decoder rows.
        seed: seed of the draw.
    """

    with_untrained: ClassVar[bool] = False

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

    def check(self, resolved: Resolved) -> None:
        needs_language_model(self, resolved)

    def evaluate(
        self, subjects: Sequence[Subject], evaluated: Evaluated
    ) -> Iterator[tuple[str, Result]]:
        source = evaluated.source
        assert isinstance(source, Reading)
        sequences, kept = source.held_out_sequences(self.tokens)
        with_lens = self.lens > 0 and any(s.hook.site == _READ_OUT for s in subjects)
        matrix = unembedding(source.model) if with_lens else None
        for some in self._together(subjects):
            evaluated.note(f"{sequences.numel():,} tokens for {counted(len(some), 'SAE')}")
            gathered = self._gathered(some, source, sequences, kept)
            for subject in some:
                described = self._described(subject, gathered.pop(subject.id), matrix, sequences)
                texts = _texts(described, evaluated.tokenizer)
                yield subject.id, described.result(int(kept.sum()), texts)

    def _together(self, subjects: Sequence[Subject]) -> Iterator[list[Subject]]:
        """Yield groups of SAEs whose contexts fit into `_KEPT_BYTES`; at least one SAE in each."""
        each = (self.top + self.reservoir) * (4 * (2 * self.window + 1) + 16)
        group: list[Subject] = []
        for subject in subjects:
            if group and sum(s.sae.num_latents for s in [*group, subject]) * each > _KEPT_BYTES:
                yield group
                group = []
            group.append(subject)
        yield group

    @torch.inference_mode()
    def _gathered(
        self,
        subjects: Sequence[Subject],
        source: Reading,
        sequences: Int[Tensor, "sequences context"],
        kept: Bool[Tensor, "sequences context"],
    ) -> dict[str, Gathering]:
        """Gather the contexts of each SAE in one pass over the text."""
        found = {
            subject.id: Gathering(subject.sae, self.top, self.reservoir, self.window, self.seed)
            for subject in subjects
        }
        told, context = now_and_then(), sequences.shape[1]
        hooks = [subject.hook for subject in subjects]
        for first, block in _blocks(source.model, sequences, hooks):
            for subject in subjects:
                x = block[subject.hook]
                found[subject.id].add(x, kept[first : first + len(x)], first * context)
            told(f"{first * context:,} of {sequences.numel():,} tokens")
        return found

    def _described(
        self,
        subject: Subject,
        gathered: Gathering,
        matrix: Tensor | None,
        sequences: Int[Tensor, "sequences context"],
    ) -> Described:
        rows = subject.sae.W_dec.detach()
        promoted = suppressed = Ranked.empty(len(rows))
        if matrix is not None and subject.hook.site == _READ_OUT:
            promoted, suppressed = lens(rows, matrix, self.lens)
        near = neighbours(rows, self.neighbours) if self.neighbours else Ranked.empty(len(rows))
        return Described(gathered, self.sampled, promoted, suppressed, near, sequences)


def _blocks(
    model: LanguageModel, sequences: Int[Tensor, "sequences context"], hooks: Sequence[Hookpoint]
) -> Iterator[tuple[int, dict[Hookpoint, Float[Tensor, "some context d_in"]]]]:
    """Yield activations in blocks of about `_BLOCK` tokens, with each block's first sequence."""
    size, first = max(1, _BLOCK // sequences.shape[1]), 0
    for passed in model.activations(sequences, hooks):
        for block in zip(*(x.split(size) for x in passed.values()), strict=True):
            yield first, dict(zip(passed, block, strict=True))
            first += len(block[0])


def _texts(described: Described, tokenizer: Any) -> pd.DataFrame:
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
