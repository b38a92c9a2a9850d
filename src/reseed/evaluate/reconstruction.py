"""Reconstruction quality and firing of an SAE on held-out activations, and the mean and covariance
of these activations.

`Reconstruction` measures every run at the end of its training, `ReconstructionConfig` any SAE on a
given number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.moments import MomentSums
from reseed.activations.source import check_held_out
from reseed.config import setting
from reseed.evaluate.base import EvaluationConfig, EvaluationInput, LoadedRun, Metric, Result
from reseed.sae.base import SAE
from reseed.system.rounding import above_rounding

DENSE = 0.1
"""A latent that fires on a larger fraction of the tokens is dense."""
_BLOCK = 4_096
"""Number of activations encoded at once; it bounds the memory of dense latents."""
_BINS = np.linspace(-7, 0, 29)
"""Edges of the histogram of log10 density: quarters of a decade."""


@dataclass
class Reconstruction:
    """Sums over the evaluation set, from which `metrics` computes the measures at the end.

    The variance is taken around the mean of the whole evaluation set, because fractions averaged
    over batches would depend on the batch size. ``moments`` holds the moments of the activations if
    `measure` computed them; all SAEs of a hookpoint share one object.
    """

    sae: SAE
    moments: MomentSums | None = None
    tokens: int = 0
    squared_error: float = 0.0
    squared_norm: float = 0.0
    total: Float[Tensor, " d_in"] | None = None
    active: int = 0
    cosine: float = 0.0
    l1: float = 0.0
    norm_ratio: float = 0.0
    not_zero: int = 0
    output_square: float = 0.0
    output_product: float = 0.0
    firing: Int[Tensor, " num_latents"] = field(init=False)
    activation_sum: Float[Tensor, " num_latents"] = field(init=False)
    activation_square_sum: Float[Tensor, " num_latents"] = field(init=False)

    def __post_init__(self) -> None:
        zeros = {"size": (self.sae.num_latents,), "device": self.sae.W_dec.device}
        self.firing = torch.zeros(**zeros, dtype=torch.int64)
        self.activation_sum = torch.zeros(**zeros, dtype=torch.float64)
        self.activation_square_sum = torch.zeros(**zeros, dtype=torch.float64)

    @torch.inference_mode()
    def add(self, x: Float[Tensor, "tokens d_in"]) -> None:
        """Add the activations ``x`` to the sums."""
        for part in x.split(_BLOCK):
            part = part.to(self.sae.W_dec.device, torch.float32)
            output = self.sae(part)
            error = (part - output.reconstruction).double()
            exact = part.double()
            fired = output.latents != 0
            self.tokens += len(part)
            self.squared_error += float(error.square().sum())
            self.squared_norm += float(exact.square().sum())
            self.total = exact.sum(0) if self.total is None else self.total + exact.sum(0)
            self.active += int(fired.sum())
            self.firing += fired.sum(0)
            # A block is summed in float32: a float64 copy of dense latents would be large.
            self.activation_sum += output.latents.sum(0)
            self.activation_square_sum += torch.linalg.vector_norm(output.latents, dim=0) ** 2
            cosine = torch.cosine_similarity(part, output.reconstruction, dim=1)
            self.cosine += float(cosine.double().sum())
            self.l1 += float(output.latents.abs().sum(dtype=torch.float64))
            self._add_lengths(exact, output.reconstruction.double())

    def _add_lengths(
        self, x: Float[Tensor, "block d_in"], reconstruction: Float[Tensor, "block d_in"]
    ) -> None:
        length = x.norm(dim=1)
        there = length > 0
        self.norm_ratio += float((reconstruction.norm(dim=1)[there] / length[there]).sum())
        self.not_zero += int(there.sum())
        self.output_square += float(reconstruction.square().sum())
        self.output_product += float((reconstruction * x).sum())

    def metrics(self, live_at_least: int = 10) -> dict[str, Any]:
        """Return the measures over everything that was added.

        - ``fvu``: squared error / variance, NaN if the activations are equal up to rounding;
          ``explained_variance``: 1 − FVU;
          ``explained_variance_uncentred``: 1 − squared error / Σ‖x‖², nearly 1 if the activations
          have a large mean;
        - ``cosine`` of x and x̂, ``l0`` latents and ``l1`` Σ|f| per token;
        - ``shrinkage``: mean ‖x̂‖/‖x‖ over x ≠ 0; ``relative_bias``: E‖x̂‖² / E[x̂·x], below 1 where
          x̂ should be scaled up to be nearest to x (Rajamanoharan et al. 2024, 2404.16014);
        - ``live``: numbers of latents that fire at least 1, ``live_at_least`` and 100 times;
          ``live_fraction``, ``silent_fraction`` (never fire), ``dense_fraction`` (fire on more than
          a tenth of the tokens).
        """
        if self.tokens == 0 or self.total is None:
            raise ValueError("no activations were added: there is nothing to measure")
        variance = self.squared_norm - float(self.total.square().sum()) / self.tokens
        if not above_rounding(variance, self.squared_norm):
            variance = 0.0
        fired = self.firing
        return {
            "tokens": self.tokens,
            "fvu": self.squared_error / variance if variance > 0 else float("nan"),
            "explained_variance": 1 - self.squared_error / variance if variance > 0 else None,
            "l0": self.active / self.tokens,
            "cosine": self.cosine / self.tokens,
            "num_latents": len(fired),
            "live": {str(n): int((fired >= n).sum()) for n in (1, live_at_least, 100)},
            "live_fraction": float((fired >= live_at_least).double().mean()),
            "silent_fraction": float((fired == 0).double().mean()),
            "dense_fraction": float((fired > DENSE * self.tokens).double().mean()),
            "explained_variance_uncentred": _part(self.squared_error, self.squared_norm, less=True),
            "l1": self.l1 / self.tokens,
            "shrinkage": _part(self.norm_ratio, self.not_zero),
            "relative_bias": _part(self.output_square, self.output_product),
        }


def _part(part: float, whole: float, less: bool = False) -> float | None:
    """Return part/whole, or 1 − that if ``less``; None if the whole is 0."""
    if whole == 0:
        return None
    return 1 - part / whole if less else part / whole


def measure(
    saes: Mapping[str, tuple[Hookpoint, SAE]],
    chunks: Iterable[dict[Hookpoint, Float[Tensor, "tokens d_in"]]],
) -> dict[str, Reconstruction]:
    """Measure many SAEs in one pass over held-out activations; each reads its own hookpoint."""
    moments = {hookpoint: MomentSums() for hookpoint, _ in saes.values()}
    measured = {name: Reconstruction(sae, moments[hook]) for name, (hook, sae) in saes.items()}
    for chunk in chunks:
        for hookpoint, found in moments.items():
            found.add(chunk[hookpoint])
        for name, (hookpoint, _) in saes.items():
            measured[name].add(chunk[hookpoint])
    return measured


@dataclass(frozen=True)
class ReconstructionConfig(EvaluationConfig, name="reconstruction"):
    """Reconstruction quality of SAEs and firing of their latents."""

    with_untrained: ClassVar[bool] = False
    title = "What is lost of the activations?"
    metrics = (
        Metric("fvu", "FVU", "fraction of variance unexplained", interval=True,
               formula="Σ‖x − x̂‖² / Σ‖x − x̄‖², with the mean x̄ of all measured tokens",
               advice="It is `fvu`, measured on `evaluation.tokens` tokens."),
        Metric("explained_variance_uncentred", "EV\nuncentred",
               "fraction of the squared length of activations that is explained",
               formula="1 − Σ‖x − x̂‖² / Σ‖x‖²",
               advice="Use it to compare with results that do not subtract the mean. If "
               "activations have a large mean, it is near 1 for any SAE that reproduces the mean."),
        Metric("cosine", "cosine", "cosine of x and x̂, mean over tokens"),
        Metric("l0", "L0", "active latents per token", count=True),
        Metric("l1", "L1", "sum of the latents' absolute activations, mean over tokens", count=True,
               formula="Σ|f|", advice="It depends on the norms of the decoder rows."),
        Metric("silent_fraction", "never\nfired", "fraction of latents that fire on no token",
               advice="A latent that does not fire on a few tokens need not be dead."),
        Metric("dense_fraction", "dense", "fraction of latents that fire on more than a tenth of "
               "the tokens", source="Sun et al., [2506.15679](https://arxiv.org/abs/2506.15679)"),
        Metric("shrinkage", "‖x̂‖/‖x‖", "length of the reconstruction divided by that of the "
               "activation, mean over tokens with x ≠ 0",
               advice="It does not measure shrinkage alone. The less an SAE explains, the shorter "
               "x̂ is, so it is below 1 for any SAE that leaves something out."),
        Metric("relative_bias", "relative\nbias", "length of reconstructions divided by the best "
               "length: x̂/γ is nearest to x among all multiples of x̂",
               formula="γ = E‖x̂‖² / E[x̂·x]",
               source="Rajamanoharan et al., [2404.16014](https://arxiv.org/abs/2404.16014)",
               advice="Use it to measure shrinkage. It is 1 if reconstructions have the best "
               "length, whatever they leave out, and below 1 if they are too short."),
        Metric("explained_variance", help="fraction of variance explained", formula="1 − FVU"),
        Metric("tokens", help="held-out tokens that were measured"),
    )  # fmt: skip
    latents = (
        Metric("density", help="fraction of the tokens on which the latent fires"),
        Metric("mean_activation", help="mean activation over the tokens on which it fires; NaN if "
               "there are none"),
    )  # fmt: skip
    spare = ("l1", "relative_bias", "explained_variance_uncentred", "dense_fraction")
    footnotes = (
        "**FVU**: fraction of variance unexplained; **EV uncentred**: 1 − squared error / "
        "Σ‖x‖², which a large mean alone brings near 1. **cosine** of x and x̂. **L0**, **L1**: "
        "active latents per token, and the sum of their activations.",
        "**never fired**, **dense** (active on more than a tenth of the tokens): fractions of "
        "latents.",
        "**‖x̂‖/‖x‖**: mean over tokens, below 1 if reconstructions are too short. "
        "**relative bias**: E‖x̂‖²/E[x̂·x], below 1 if x̂ should be longer (Rajamanoharan et "
        "al.).",
    )

    tokens: int = setting(65_536, at_least=1)
    """Number of held-out activations to read; every SAE of one model reads the same ones."""

    def evaluate(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        check_held_out(inputs.source, self.tokens)
        saes = {run.id: (run.hook, run.sae) for run in runs}
        chunks = inputs.source.held_out([hook for hook, _ in saes.values()], self.tokens)
        for name, measured in measure(saes, chunks).items():
            yield name, _result(measured)


def _result(measured: Reconstruction) -> Result:
    metrics = measured.metrics()
    left_out = ("num_latents", "live", "live_fraction")  # the run's own metrics have them
    density = measured.firing.double().cpu().numpy() / measured.tokens
    sums, fired = measured.activation_sum.cpu().numpy(), measured.firing.cpu().numpy()
    mean = np.divide(sums, fired, out=np.full(len(sums), np.nan), where=fired > 0)
    return Result(
        metrics={name: value for name, value in metrics.items() if name not in left_out},
        tables={"density": density_table(density)},
        latents={
            "density": density.astype(np.float32),
            "mean_activation": mean.astype(np.float32),
        },
    )


def density_table(density: Float[np.ndarray, " num_latents"]) -> pd.DataFrame:
    """Return the histogram of log10 density: ``low``, ``high``, ``latents``. The first row, without
    edges, counts latents that never fired; the second includes densities below 10^-7."""
    fires = np.log10(density[density > 0])
    counts, _ = np.histogram(fires.clip(_BINS[0], _BINS[-1]), _BINS)
    never = int((density == 0).sum())
    return pd.DataFrame(
        {
            "low": [np.nan, *_BINS[:-1]],
            "high": [np.nan, *_BINS[1:]],
            "latents": [never, *counts.tolist()],
        }
    )
