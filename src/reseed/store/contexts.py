"""Contexts, lens and neighbours of latents, as ``evaluation=contexts`` stores them.

<run>/evaluations/contexts-<digest>/
    contexts.parquet   a row per latent (`SCHEMA`), with `LATENTS_PER_GROUP` rows per row group, so
                       that one latent can be read without the whole file
    texts.parquet      id and text of every token in the result
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float, Int

from reseed.errors import ReseedError
from reseed.store.results import FOLDER, StoredEvaluation, is_finished
from reseed.store.runs import Run

EVALUATION = "contexts"
TOP, SAMPLED = "top", "sampled"
LATENTS_PER_GROUP = 128
"""Number of latents in a row group, which has about 100 KiB of contexts."""


def _pairs(first: str, second: str) -> pa.DataType:
    return pa.list_(pa.struct([(first, pa.int32()), (second, pa.float32())]))


CONTEXT = pa.struct(
    [
        ("quantile", pa.float32()),  # null for a top context
        ("position", pa.int64()),
        ("peak", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("active", pa.list_(pa.int32())),  # indices in the window
        ("activations", pa.list_(pa.float32())),  # on the active tokens
    ]
)
SCHEMA = pa.schema(
    [
        ("firing", pa.int64()),
        ("largest", pa.float32()),
        ("mean", pa.float32()),
        ("contexts", pa.list_(CONTEXT)),
        ("promoted", _pairs("token", "logit")),
        ("suppressed", _pairs("token", "logit")),
        ("neighbours", _pairs("latent", "cosine")),
    ]
)


@dataclass(frozen=True, eq=False)
class Context:
    """A passage that a latent fires in.

    Attributes:
        kind: ``top``: from a sequence where the latent fires most; ``sampled``: around a token
            sampled uniformly from those that the latent fires on.
        quantile: activation quantile of a sampled context among all sampled ones; 1 is the largest.
        tokens: token ids.
        active: indices of the tokens that the latent fires on.
        values: its activations on these tokens.
        peak: index in the passage of the token for which the passage was chosen.
        position: position of that token in the held-out text: index of its sequence × context
            length + index in the sequence.
    """

    kind: str
    quantile: float | None
    tokens: Int[np.ndarray, " window"]
    active: Int[np.ndarray, " n"]
    values: Float[np.ndarray, " n"]
    peak: int
    position: int

    @property
    def activations(self) -> Float[np.ndarray, " window"]:
        """The latent's activation on each token."""
        found = np.zeros(len(self.tokens), dtype=np.float32)
        found[self.active] = self.values
        return found


@dataclass(frozen=True, eq=False)
class LatentContexts:
    """Contexts, lens and neighbours of one latent.

    Attributes:
        latent: index of the latent.
        firing: number of tokens that it fired on.
        density: fraction of all tokens that it fired on.
        largest, mean: its largest and mean activation over those tokens; 0 if there are none.
        contexts: top contexts, best first, then sampled contexts by descending quantile.
        promoted, suppressed: tokens, with the logits that its decoder row gives through the
            unembedding, the most extreme first; empty without a lens.
        neighbours: other latents, with the cosines of their decoder rows and its own, the nearest
            first.
    """

    latent: int
    firing: int
    density: float
    largest: float
    mean: float
    contexts: tuple[Context, ...]
    promoted: tuple[tuple[int, float], ...]
    suppressed: tuple[tuple[int, float], ...]
    neighbours: tuple[tuple[int, float], ...]


@dataclass(frozen=True, eq=False)
class Contexts:
    """The contexts of a run's latents, read one row group at a time.

    Attributes:
        folder: folder of the result.
        tokens: number of held-out activations that the evaluation read.
        settings: settings of the evaluation.
    """

    folder: Path
    tokens: int
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, run_folder: Path) -> Contexts | None:
        """Read the contexts of a run: its newest result, or None without a result.

        Raises:
            EvaluationError: the result is damaged, or is of other weights than the run's.
        """
        found = [f for f in (run_folder / FOLDER).glob(f"{EVALUATION}-*") if is_finished(f)]
        if not found:
            return None
        newest = max(found, key=lambda f: (f / "result.json").stat().st_mtime_ns)
        return cls.read(newest, Run(run_folder).hashes().get("sae.safetensors"))

    @classmethod
    def read(cls, folder: Path, weights: str | None = None) -> Contexts:
        """Read the contexts in the folder of a result.

        Args:
            weights: SHA-256 of the SAE's weights; None: unknown.

        Raises:
            EvaluationError: the result is damaged.
        """
        stored = StoredEvaluation.read(folder, weights)
        tokens = stored.metrics["tokens"]
        assert isinstance(tokens, int)
        return cls(folder, tokens, stored.settings)

    @property
    def num_latents(self) -> int:
        return self._file.metadata.num_rows

    def latent(self, latent: int) -> LatentContexts:
        """Read one latent.

        Raises:
            ReseedError: there is no such latent.
        """
        if not 0 <= latent < self.num_latents:
            raise ReseedError(
                f"latent must be from 0 to {self.num_latents - 1} in {self.folder}; got {latent}"
            )
        (found,) = self.latents(latent, latent + 1)
        return found

    def latents(self, begin: int, end: int) -> Iterator[LatentContexts]:
        """Yield the latents from ``begin`` to ``end`` (exclusive), in order."""
        for group in range(begin // LATENTS_PER_GROUP, -(-end // LATENTS_PER_GROUP)):
            first = group * LATENTS_PER_GROUP
            table = self._file.read_row_group(group)
            low = max(begin - first, 0)
            part = table.slice(low, min(end - first, len(table)) - low)
            for latent, row in enumerate(part.to_pylist(), first + low):
                yield _latent(latent, row, self.tokens)

    def text(self, ids: Sequence[int] | Int[np.ndarray, " n"]) -> list[str]:
        """Return the texts of tokens, with their leading spaces."""
        return [self._texts[int(i)] for i in ids]

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.folder / "contexts.parquet")

    @cached_property
    def _texts(self) -> dict[int, str]:
        table = pq.read_table(self.folder / "texts.parquet")
        return dict(zip(table["token"].to_pylist(), table["text"].to_pylist(), strict=True))


def _latent(latent: int, row: Mapping[str, Any], tokens: int) -> LatentContexts:
    return LatentContexts(
        latent,
        row["firing"],
        row["firing"] / tokens,
        row["largest"],
        row["mean"],
        tuple(map(_context, row["contexts"])),
        *(
            tuple((pair[of], pair[how]) for pair in row[name])
            for name, of, how in (
                ("promoted", "token", "logit"),
                ("suppressed", "token", "logit"),
                ("neighbours", "latent", "cosine"),
            )
        ),
    )


def _context(row: Mapping[str, Any]) -> Context:
    return Context(
        TOP if row["quantile"] is None else SAMPLED,
        row["quantile"],
        np.array(row["tokens"], dtype=np.int32),
        np.array(row["active"], dtype=np.int32),
        np.array(row["activations"], dtype=np.float32),
        row["peak"],
        row["position"],
    )
