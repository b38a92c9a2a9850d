"""Every architecture recovers planted features that are orthogonal, independent and sparse."""

import pytest
import torch

from reseed.sae.base import Step
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig
from reseed.train.optim import learning_rate
from reseed.train.optim.adam import SAEAdam

CONFIGS = {
    "topk": TopKConfig(num_latents=64, k=4),
    "topk, weighed, falling k": TopKConfig(
        num_latents=64,
        k=4,
        weigh_by_decoder_norm=True,
        unit_norm_decoder=False,
        k_anneal_fraction=0.1,
    ),
    "topk, multi": TopKConfig(num_latents=64, k=4, multi_topk=True),
    "batch_topk": BatchTopKConfig(num_latents=64, k=4),
    "batch_topk, a fraction": BatchTopKConfig(num_latents=64, k=3.2),
    "matryoshka": MatryoshkaConfig(num_latents=64, k=4),
    "jumprelu": JumpReLUConfig(
        num_latents=64,
        l0_coefficient=0.1,
        penalty="quadratic",
        target_l0=4,
        threshold_init=0.1,
        bandwidth=0.1,
    ),
    "jumprelu, tanh": JumpReLUConfig(
        num_latents=64, l0_coefficient=0.02, penalty="tanh", threshold_init=0.1, bandwidth=0.1
    ),
    "gated": GatedConfig(num_latents=64, l1_coefficient=1.0),
    "relu": ReLUConfig(num_latents=64, l1_coefficient=1.0),
    "relu, unit norm": ReLUConfig(
        num_latents=64,
        l1_coefficient=0.5,
        unit_norm_decoder=True,
        decoder_init_norm=1.0,
        l1_weighted_by_decoder_norm=False,
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_planted_features_are_recovered(name):
    generator = torch.Generator().manual_seed(0)
    truth = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    sae = CONFIGS[name].build(32, generator)
    optimizer = SAEAdam(sae, 3e-3)
    since_fired = torch.zeros(64, dtype=torch.int64)
    steps = 400
    for index in range(steps):
        active = torch.rand(256, 32, generator=generator) < 0.1
        x = (active * (1 + torch.rand(256, 32, generator=generator))) @ truth
        step = Step(index, steps)
        if index == 0:
            sae.initialise_b_dec(x.mean(0))
        optimizer.set_lr(learning_rate(step, 3e-3, warmup_steps=20))
        optimizer.zero_grad()
        loss = sae.training_loss(x, step, since_fired > 5_000)
        loss.total.backward()
        optimizer.step()
        since_fired = torch.where(loss.fired > 0, 0, since_fired + 256)
    cosine = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1) @ truth.T
    assert cosine.max(0).values.mean() > 0.95
