"""One run, as training, planning and recording see it.

`reseed.experiment` resolves a declared experiment and describes it by a `RunSpec`. The package
`reseed.train` uses nothing else of an experiment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reseed.activations.cache import ActivationCache
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.source import ActivationSource, ResolvedData, ResolvedSource
from reseed.activations.synthetic.surrogate import flops_per_token, open_source
from reseed.sae.base import SAEConfig
from reseed.sae.pretrained import Pretrained
from reseed.store.runs import Run, RunStore
from reseed.train.config import TrainingConfig


@dataclass(frozen=True)
class RunSpec:
    """Everything that training, planning and recording of one run need.

    Attributes:
        signature: identifier of the run, and part of its folder's name.
        label: readable part of its folder's name.
        role: empty, or the role of a calibration run: ``steered``, ``calibration``.
        model: the source of the activations.
        model_label: name of the source for tables, with that of a surrogate.
        data: the data set, bound to the source.
        surrogate: the replacement of the source's activations (`SURROGATES`).
        stream: digest of everything that determines the activations and their order; runs with
            equal digests can train together.
        hookpoint: the hookpoint whose activations the SAE reads.
        d_in: width of these activations.
        sae: the architecture, with its calibrated penalty weight.
        num_latents: number of latents of the SAE.
        sparsity: the setting that controls the sparsity, for tables (``k=32``).
        training: the training options.
        tokens: number of training activations, in whole batches; 0 for a pretrained SAE.
        init_seed: seed of the initial weights.
        pretrained: the SAE that was trained elsewhere and is only measured, if any.
        waits_for: signature of the cell whose penalty weight must first be found by calibration.
        record: entries of run.json that are known before training.
        metadata: origin of the SAE for sae.json, except its input scale.
    """

    signature: str
    label: str
    role: str
    model: ResolvedSource
    model_label: str
    data: ResolvedData
    surrogate: str
    stream: str
    hookpoint: Hookpoint
    d_in: int
    sae: SAEConfig
    num_latents: int
    sparsity: str
    training: TrainingConfig
    tokens: int
    init_seed: int
    pretrained: Pretrained | None
    waits_for: str | None
    record: dict[str, Any] = field(compare=False, repr=False)
    metadata: dict[str, Any] = field(compare=False, repr=False)

    @property
    def needed(self) -> int:
        """Number of training activations for which the source is opened."""
        # Without an influence on the data, the budget stays as declared: the names of cached tokens
        # of streamed texts depend on it.
        return self.tokens if self.data.depends_on_budget else self.training.tokens

    def run(self, store: RunStore) -> Run:
        """Return the folder of this run in ``store``."""
        return store.run(self.signature, self.label)

    def open(
        self, device: torch.device, needed: int, cache: ActivationCache | None = None
    ) -> ActivationSource:
        """Open the source of the activations.

        Args:
            device: device of the activations.
            needed: number of training activations; a streamed text is read no further.
            cache: cache of activations on disk (`RuntimeConfig.open_cache`).
        """
        return open_source(self.data, self.surrogate, device, needed, cache)

    def source_flops(self, hookpoints: Sequence[Hookpoint]) -> float:
        """Estimate the source's operations per activation at all of the hookpoints together."""
        widths = [self.model.d_in(hookpoint) for hookpoint in hookpoints]
        return flops_per_token(self.data, self.surrogate, hookpoints, widths)
