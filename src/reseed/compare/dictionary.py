"""A trained dictionary as the input of a comparison: rows of weights and firing counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from reseed.compare.truth import checked_labels


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Weight rows of one SAE, with its firing on held-out tokens.

    Attributes:
        id: run id, unique among the dictionaries compared.
        seed: value of the axis that pairs up (`ComparisonConfig.pair_by`).
        encoder, decoder: a row per latent; a row may be zero or NaN (see `zero`).
        firing: number of times that each latent fired in ``held_out_tokens`` tokens.
        held_out_tokens: number of tokens counted; 0 without a count (untrained weights).
        dead: latents that did not fire in the last ``dead_after_tokens`` tokens of training.
        metrics: metrics of the run for the tables (``fvu``, ``l0``, ``dead_fraction``).
        truth: label of each latent in a synthetic world with known features (index into
            `compare.truth.LABELS`); None if the truth is not known.
        covariance: covariance of the held-out activations; None if it was not stored.
        variance: variance of each latent's contribution to reconstructions, Var(a_i)·‖W_i‖² over
            the held-out tokens; None if it was not stored.

    Raises:
        ValueError: shapes that disagree, counts out of range.
    """

    id: str
    seed: str
    encoder: Float[np.ndarray, "num_latents d_in"]
    decoder: Float[np.ndarray, "num_latents d_in"]
    firing: Int[np.ndarray, " num_latents"]
    held_out_tokens: int
    dead: Bool[np.ndarray, " num_latents"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    truth: Int[np.ndarray, " num_latents"] | None = None
    covariance: Float[np.ndarray, "d_in d_in"] | None = None
    variance: Float[np.ndarray, " num_latents"] | None = None

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("`id` must not be empty")
        self._convert("encoder", np.float32)
        self._convert("decoder", np.float32)
        self._convert("firing", np.int64)
        self._convert("dead", np.bool_)
        object.__setattr__(self, "seed", str(self.seed))
        if self.encoder.ndim != 2 or 0 in self.encoder.shape:
            self._refuse("`encoder` must have shape [num_latents, d_in]", self.encoder.shape)
        if self.decoder.shape != self.encoder.shape:
            rule = f"`decoder` must have the shape of `encoder` {list(self.encoder.shape)}"
            self._refuse(rule, self.decoder.shape)
        for name in ("firing", "dead"):
            shape = getattr(self, name).shape
            if shape != (self.num_latents,):
                self._refuse(f"`{name}` must have one value per latent [{self.num_latents}]", shape)
        if self.variance is not None and self.variance.shape != (self.num_latents,):
            rule = f"`variance` must have one value per latent [{self.num_latents}]"
            self._refuse(rule, self.variance.shape)
        if self.truth is not None:
            object.__setattr__(self, "truth", checked_labels(self.truth, self.num_latents, self.id))
        if self.covariance is not None and self.covariance.shape != (self.d_in, self.d_in):
            rule = f"`covariance` must have shape [d_in, d_in] {[self.d_in, self.d_in]}"
            self._refuse(rule, self.covariance.shape)
        low, high = int(self.firing.min()), int(self.firing.max())
        if low < 0 or high > self.held_out_tokens:
            raise ValueError(
                f"{self.id}: `firing` must lie between 0 and `held_out_tokens` "
                f"(={self.held_out_tokens}); it runs from {low} to {high}"
            )

    def _convert(self, name: str, dtype: Any) -> None:
        value = np.asarray(getattr(self, name))
        if dtype == np.int64 and value.dtype.kind not in "iu":
            raise ValueError(f"{self.id}: `{name}` must be integers; got {value.dtype}")
        if dtype == np.bool_ and value.dtype.kind != "b":
            raise ValueError(f"{self.id}: `{name}` must be true or false; got {value.dtype}")
        object.__setattr__(self, name, np.ascontiguousarray(value, dtype=dtype))

    def _refuse(self, rule: str, shape: tuple[int, ...]) -> None:
        raise ValueError(f"{self.id}: {rule}; got {list(shape)}")

    @property
    def num_latents(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def density(self) -> Float[np.ndarray, " num_latents"]:
        """Fraction of the held-out tokens on which each latent fires; 0 if none were counted."""
        return self.firing / max(self.held_out_tokens, 1)

    @property
    def zero(self) -> Bool[np.ndarray, " num_latents"]:
        """Latents whose encoder or decoder row is zero or not finite; they are never matched."""
        return ~(_has_direction(self.encoder) & _has_direction(self.decoder))

    def live(self, at_least: int) -> Bool[np.ndarray, " num_latents"]:
        """Return the latents that fire at least ``at_least`` times in the held-out tokens."""
        return self.firing >= at_least


def root(covariance: Float[np.ndarray, "d_in d_in"]) -> Float[np.ndarray, "d_in d_in"]:
    """Return R with R·Rᵀ = ``covariance``: x·R and y·R have the scalar product xᵀ·covariance·y.

    All roots give the same products. This one is computed from eigenvalues; negative ones, which
    come from rounding, count as 0.
    """
    exact = np.ascontiguousarray(covariance, dtype=np.float64)
    return _root(exact.tobytes(), len(exact))


@lru_cache(maxsize=1)
def _root(covariance: bytes, d_in: int) -> Float[np.ndarray, "d_in d_in"]:
    """Compute and cache the root, because all pairs of a cell share one covariance."""
    values, vectors = np.linalg.eigh(np.frombuffer(covariance).reshape(d_in, d_in))
    found = vectors * np.sqrt(np.maximum(values, 0.0))
    found.flags.writeable = False
    return found


def _has_direction(rows: Float[np.ndarray, "n d_in"]) -> Bool[np.ndarray, " n"]:
    return np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)
