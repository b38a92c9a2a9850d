"""The optimiser that the training options ask for, and its learning rate.

``base.py`` defines the order of a step; ``adam.py``, ``muon.py`` and ``sign_sgd.py`` the updates.
"""

from __future__ import annotations

import math
from typing import Any

from reseed.sae.base import SAE, SAEConfig, Step
from reseed.train.config import Adam, Muon, SignSGD, TrainingConfig
from reseed.train.optim.adam import SAEAdam
from reseed.train.optim.base import SAEOptimizer
from reseed.train.optim.muon import SAEMuon
from reseed.train.optim.sign_sgd import SAESignSGD


def make_optimizer(sae: SAE, training: TrainingConfig) -> SAEOptimizer:
    """Make the optimiser that the training options ask for."""
    lr = peak_lr(training, sae.config, sae.num_latents)
    options: dict[str, Any] = {
        "encoder_weight_decay": training.encoder_weight_decay,
        "decoder_weight_decay": training.decoder_weight_decay,
        "max_grad_norm": training.gradient_clip,
        "train_b_dec": training.b_dec == "learned",
        "aligned": training.aligned,
    }
    match training.optimizer_options:
        case SignSGD(momentum=momentum):
            return SAESignSGD(sae, lr, momentum=momentum, **options)
        case Muon(momentum=momentum, adam=adam):
            adam_lr = _adam_lr(training, sae.config, sae.num_latents)
            return SAEMuon(
                sae, lr, adam_lr=adam_lr, momentum=momentum, **_adam_options(adam), **options
            )
        case Adam() as adam:
            return SAEAdam(sae, lr, **_adam_options(adam), **options)


def _adam_options(adam: Adam) -> dict[str, Any]:
    return {"betas": (adam.beta1, adam.beta2), "eps": adam.eps}


def peak_lr(training: TrainingConfig, sae: SAEConfig, num_latents: int) -> float:
    """Return the learning rate after warm-up; for muon, that of the matrices.

    sign_sgd: 5e-3 / √(F / 2¹⁴), muon: 2e-3 at every width, both as in sparsify's trainer.
    """
    if training.lr is not None:
        return training.lr
    match training.optimizer_options:
        case SignSGD():
            return training.lr_scale * 5e-3 / math.sqrt(num_latents / 2**14)
        case Muon():
            return training.lr_scale * 2e-3
        case Adam():
            return _adam_lr(training, sae, num_latents)


def _adam_lr(training: TrainingConfig, sae: SAEConfig, num_latents: int) -> float:
    """Return Adam's learning rate; muon's biases follow it too, even if ``lr`` is set."""
    law = 2e-4 / math.sqrt(num_latents / 2**14)
    published = sae.published_lr(num_latents)
    return training.lr_scale * (law if training.lr_law == "width" else published)


def learning_rate(
    step: Step, peak: float, *, warmup_steps: int = 0, decay_fraction: float = 0.2
) -> float:
    """Return the rate of a step: linear warm-up, constant, linear decay to 0.

    It is a pure function of the step.

    Args:
        peak: the constant.
        warmup_steps: the rate of step i < warmup_steps is peak · (i + 1) / warmup_steps.
        decay_fraction: the rate falls over this last fraction of the steps. It would reach 0 at
            step ``total``, so every step has a positive rate.
    """
    rising = (step.index + 1) / warmup_steps if step.index < warmup_steps else 1.0
    decay_steps = decay_fraction * step.total
    left = step.total - step.index
    falling = left / decay_steps if left < decay_steps else 1.0
    return peak * min(rising, 1.0) * falling
