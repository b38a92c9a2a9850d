"""Archetypal decoders: rows that are mixtures of k-means centroids of the activations.

Fel et al. 2025, *Archetypal SAE*, 2502.12892, the relaxed variant (RA-SAE): D = W C + Λ, with C the
centroids, W ≥ 0 with rows that sum to 1, and ‖Λ_j‖ ≤ δ. Then each row is normalised or, if the
architecture has no unit-norm decoder, multiplied by its own positive scale (the authors use one
scale for all rows).

Three choices differ from the paper's, because its setting differs from ours:

- Their SAE has no b_dec, so the convex hull of their centroids lies in that of the activations.
  Here the latents reconstruct x − b_dec, so the centroids are those of the first chunk minus the
  initial b_dec (with ``b_dec_init=zeros``, of the activations themselves).
- They start from W = 1 with a random encoder. Here the encoder starts as the transpose of the
  decoder, and W is drawn from the seed of the weights: each row lies between two centroids, nearer
  to the first of them, and every centroid is the first equally often. With shared archetypes and
  W = 1 all seeds would give the same run.
- W is projected back to the simplex after each step as in their code: negative weights are set to
  0, then rows are divided by their sum.

The rows cost a product of F × K × D and its gradient in every step (aligned training also needs the
rows after the step, which is another product). W and its moments take 16·F·K bytes: with as many
archetypes K as latents F, more than the other state of a wide SAE.

The centroids are found by Lloyd's k-means in float32, with a maximum number of rounds and the same
result at every call. scipy's ``kmeans2`` is not used: it holds all points × k distances at once
(with 20,000 points in 16 dimensions and 8,000 centres its memory grew by 610 MiB) and runs only on
the CPU.

The file defines the parametrisation of W_dec, its initialisation from the first activations, and
k-means.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.nn import functional as nn_functional
from torch.nn.utils import parametrize

from reseed.errors import ConfigError
from reseed.sae.base import SAE

ROUNDS = 25
BLOCK_DISTANCES = 2**24
"""Maximum number of distances in memory at a time: 64 MiB."""
_PREFIX = "parametrizations.W_dec"
_RELAXATION, _WEIGHTS, _SCALE = f"{_PREFIX}.original", f"{_PREFIX}.0.weights", f"{_PREFIX}.0.scale"


class ArchetypalDecoder(nn.Module):
    """A parametrisation of W_dec, whose own parameter is Λ.

    Args:
        num_archetypes: K.
        relaxation: δ, in units of the (scaled) activations.
        unit_norm: rows have norm 1; otherwise each row has a scale.

    Attributes:
        archetypes: C, fixed.
        weights: W.
        scale: the logarithm of each row's scale; None if rows have norm 1.
    """

    archetypes: Float[Tensor, "num_archetypes d_in"]

    def __init__(
        self, num_latents: int, d_in: int, num_archetypes: int, relaxation: float, unit_norm: bool
    ) -> None:
        super().__init__()
        self.relaxation = relaxation
        self.register_buffer("archetypes", torch.zeros(num_archetypes, d_in))
        self.weights = nn.Parameter(torch.zeros(num_latents, num_archetypes))
        self.scale = None if unit_norm else nn.Parameter(torch.zeros(num_latents))

    def forward(self, relaxation: Float[Tensor, "num_latents d_in"]) -> Tensor:
        """Return the decoder [num_latents, d_in] for a relaxation Λ and the current weights."""
        return self._rows(self.weights, relaxation, self.scale)

    def decoder(self, weights: Mapping[str, Tensor]) -> Float[Tensor, "num_latents d_in"]:
        """Return the decoder for other weights, given by their parameter names in the SAE."""
        return self._rows(weights[_WEIGHTS], weights[_RELAXATION], weights.get(_SCALE))

    def project(self, weights: Mapping[str, Tensor]) -> None:
        """Project W back to the simplex and Λ into its ball, in place."""
        mixture, relaxation = weights[_WEIGHTS], weights[_RELAXATION]
        mixture.clamp_min_(0)
        totals = mixture.sum(1, keepdim=True)
        mixture.div_(totals)
        # A row without a positive weight becomes the mean of all archetypes.
        mixture.masked_fill_(totals == 0, 1 / mixture.shape[1])
        norms = torch.linalg.vector_norm(relaxation, dim=1, keepdim=True)
        tiny = torch.finfo(norms.dtype).tiny
        relaxation.mul_((self.relaxation / norms.clamp_min(tiny)).clamp_max(1))

    def _rows(self, weights: Tensor, relaxation: Tensor, scale: Tensor | None) -> Tensor:
        # Parameters are float32, whatever the precision of the SAE's own products.
        with torch.autocast(weights.device.type, enabled=False):
            rows = weights @ self.archetypes + relaxation
        if scale is None:
            return nn_functional.normalize(rows, dim=1)
        return rows * scale.exp()[:, None]


def make_archetypal(sae: SAE, num_archetypes: int, relaxation: float) -> None:
    """Replace W_dec by an `ArchetypalDecoder`.

    The decoder is zero until `initialise_archetypes` or a checkpoint fills it.
    """
    with torch.no_grad():
        sae.W_dec.zero_()
    unit_norm = sae.config.unit_norm_decoder
    decoder = ArchetypalDecoder(sae.num_latents, sae.d_in, num_archetypes, relaxation, unit_norm)
    parametrize.register_parametrization(sae, "W_dec", decoder.to(sae.b_dec.device))


def archetypal_decoder(sae: SAE) -> ArchetypalDecoder | None:
    """Return the parametrisation of W_dec, or None."""
    if not parametrize.is_parametrized(sae, "W_dec"):
        return None
    (decoder,) = sae.get_submodule(_PREFIX).children()
    assert isinstance(decoder, ArchetypalDecoder)
    return decoder


@torch.no_grad()
def initialise_archetypes(
    sae: SAE, x: Float[Tensor, "tokens d_in"], *, archetypes: Generator, weights: Generator
) -> None:
    """Set archetypes, weights and the tied encoder from scaled activations.

    b_dec must be initialised already.

    Args:
        archetypes: generator for k-means.
        weights: generator for W.
    """
    decoder = archetypal_decoder(sae)
    assert decoder is not None
    num_archetypes = len(decoder.archetypes)
    decoder.archetypes.copy_(kmeans(x - sae.b_dec, num_archetypes, archetypes))
    decoder.weights.copy_(start_weights(sae.num_latents, num_archetypes, weights))
    if decoder.scale is not None:
        norms = torch.linalg.vector_norm(sae.W_dec, dim=1)
        decoder.scale.copy_((sae.config.decoder_init_norm / norms).log())
    sae.W_enc.copy_(sae.W_dec * sae.config.encoder_init_scale)


def start_weights(
    num_latents: int, num_archetypes: int, generator: Generator
) -> Float[Tensor, "num_latents num_archetypes"]:
    """Draw rows with a weight in (½, 1) on one archetype and the rest on another, on the CPU."""
    if num_archetypes < 2:
        raise ConfigError(f"{{key}} must be at least 2; got {num_archetypes}", "archetypes")
    rounds = -(-num_latents // num_archetypes)
    turns = [torch.randperm(num_archetypes, generator=generator) for _ in range(rounds)]
    leading = torch.cat(turns)[:num_latents]
    away = torch.randint(1, num_archetypes, (num_latents,), generator=generator)
    other = (leading + away) % num_archetypes
    share = 0.5 + 0.5 * torch.rand(num_latents, generator=generator)
    rows = torch.arange(num_latents)
    weights = torch.zeros(num_latents, num_archetypes)
    weights[rows, leading] = share
    weights[rows, other] = 1 - share
    return weights


@torch.no_grad()
def with_plain_decoder(sae: SAE, weights: Mapping[str, Tensor]) -> SAE:
    """Return a copy of the SAE that has ``weights``, with W_dec as a plain parameter.

    The copy is built anew because removing a parametrisation would change the class of all copies.
    """
    state = {**sae.state_dict(), **weights}
    decoder = archetypal_decoder(sae)
    if decoder is not None:
        rows = decoder.decoder(state)
        state = {name: t for name, t in state.items() if not name.startswith(_PREFIX)}
        state["W_dec"] = rows
    bare = sae.config.empty(sae.d_in).to(sae.b_dec)
    bare.load_state_dict(state)
    return bare


@torch.no_grad()
def kmeans(
    points: Float[Tensor, "points d_in"], k: int, generator: Generator, rounds: int = ROUNDS
) -> Float[Tensor, "k d_in"]:
    """Return the centroids after ``rounds`` rounds, or once no point changes its cluster.

    The initial centroids are k distinct points chosen at random. A cluster that has lost all its
    points restarts at a point that is farthest from its own centroid.

    Args:
        generator: a CPU generator, so that the choice is the same for every device.

    Raises:
        ConfigError: there are more clusters than points.
    """
    if not 1 <= k <= len(points):
        raise ConfigError(
            f"{{key}} (={k:,}; null: num_latents) must not exceed the number of activations in the "
            f"first chunk (={len(points):,}). Lower it, or raise dataset.chunk_tokens.",
            "training.archetypes",
        )
    chosen = torch.randperm(len(points), generator=generator)[:k]
    centroids = points[chosen.to(points.device)].clone()
    before = None
    for _ in range(rounds):
        nearest, distances = assign(points, centroids)
        if before is not None and torch.equal(nearest, before):
            break
        centroids = _means(points, nearest, distances, k)
        before = nearest
    return centroids


def assign(
    points: Float[Tensor, "points d_in"], centroids: Float[Tensor, "k d_in"]
) -> tuple[Int[Tensor, " points"], Float[Tensor, " points"]]:
    """Return each point's nearest centroid (the first of ties) and the squared distance to it."""
    nearest, distances = [], []
    squares = centroids.square().sum(1)
    for block in points.split(max(1, BLOCK_DISTANCES // len(centroids))):
        least = torch.addmm(squares, block, centroids.t(), alpha=-2).min(1)
        nearest.append(least.indices)
        distances.append((least.values + block.square().sum(1)).clamp_min_(0))
    return torch.cat(nearest), torch.cat(distances)


def _means(points: Tensor, nearest: Tensor, distances: Tensor, k: int) -> Tensor:
    """Return each cluster's mean; for an empty one, a point farthest from its own centroid."""
    # Sort, then sum by bags, because a scattered sum is not deterministic on a GPU.
    counts = torch.bincount(nearest, minlength=k)
    order = torch.sort(nearest, stable=True).indices
    means = nn_functional.embedding_bag(order, points, counts.cumsum(0) - counts, mode="mean")
    empty = (counts == 0).nonzero().squeeze(1)
    if len(empty):
        means[empty] = points[distances.topk(len(empty)).indices]
    return means
