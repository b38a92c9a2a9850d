"""Matryoshka BatchTopK (Bussmann et al. 2025, *Learning Multi-Level Features*, 2503.17547)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.config import setting
from reseed.errors import ConfigError
from reseed.sae.batch_topk import BatchSparseSAE, BatchTopKConfig
from reseed.sae.losses import fvu
from reseed.sae.pairs import SparseLatents
from reseed.sae.sparse import sparse_decode


@dataclass(frozen=True)
class MatryoshkaConfig(BatchTopKConfig, name="matryoshka"):
    """BatchTopK in which each nested prefix m of the latents reconstructs x: L = Σ_m β_m FVU_m.

    Args:
        prefixes: fractions of the latents, ascending; the last is 1 (all latents).
        multipliers: β_m of each prefix; null: 1 for all. With 0 for all but the last prefix, the
            loss is that of BatchTopK.
    """

    prefixes: tuple[float, ...] = setting((0.0625, 0.125, 0.25, 0.5, 1.0))
    multipliers: tuple[float, ...] | None = setting(None)

    def validate(self) -> None:
        super().validate()
        steps = zip((0.0, *self.prefixes), self.prefixes, strict=False)
        if not self.prefixes or self.prefixes[-1] != 1 or any(a >= b for a, b in steps):
            raise ConfigError(
                f"{{key}} must ascend from above 0 to 1; got {list(self.prefixes)}", "prefixes"
            )
        beta = self.multipliers
        if beta is not None and len(beta) != len(self.prefixes):
            raise ConfigError(
                f"{{key}} must have as many entries as `prefixes` (={len(self.prefixes)}); "
                f"got {len(beta)}",
                "multipliers",
            )
        if beta is not None and (min(beta) < 0 or beta[-1] == 0):
            raise ConfigError(
                f"{{key}} must be at least 0, and the last one above 0; got {list(beta)}",
                "multipliers",
            )
        if self.num_latents is not None:
            self._check_prefixes(self.num_latents)

    def check_d_in(self, d_in: int) -> None:
        super().check_d_in(d_in)
        self._check_prefixes(self.width(d_in))

    def _check_prefixes(self, num_latents: int) -> None:
        ends = self.prefix_sizes(num_latents)
        if any(a >= b for a, b in zip((0, *ends), ends, strict=False)):
            raise ConfigError(
                f"{{key}} (={list(self.prefixes)}) must each add a latent; with {num_latents} "
                f"latents their sizes are {list(ends)}",
                "prefixes",
            )

    def prefix_sizes(self, num_latents: int) -> tuple[int, ...]:
        """Return the number of latents of each prefix."""
        return tuple(round(fraction * num_latents) for fraction in self.prefixes)

    def empty(self, d_in: int) -> Matryoshka:
        return Matryoshka(self, d_in)


@final
class Matryoshka(BatchSparseSAE):
    """A Matryoshka BatchTopK sparse autoencoder."""

    config: MatryoshkaConfig

    def _reconstruction_loss(
        self,
        x: Float[Tensor, "batch d_in"],
        latents: SparseLatents,
        variance: Float[Tensor, ""],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, "batch d_in"], Mapping[str, Tensor]]:
        """Return the sum (not the mean) over the prefixes of β_m FVU_m, e, and the named terms."""
        ends = self.config.prefix_sizes(self.num_latents)
        beta = self.config.multipliers or (1.0,) * len(ends)
        # The reconstruction of a prefix is the sum of the reconstructions of its groups of latents.
        divided = latents.divided(torch.tensor(ends, device=x.device))
        added = sparse_decode(divided, self.W_dec).view(len(x), len(ends), self.d_in)
        error = x - self.b_dec
        total = x.new_zeros(())
        parts = {}
        for level, (size, multiplier) in enumerate(zip(ends, beta, strict=True)):
            error = error - added[:, level]
            level_fvu = fvu(error.square().sum(), variance)
            parts["fvu" if level == len(ends) - 1 else f"fvu_{size}"] = level_fvu
            total = total + multiplier * level_fvu
        return total, error, parts
