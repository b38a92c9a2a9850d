"""Aligned training: E_j · d_j = 1 after every step, with every optimiser and decoder."""

import pytest
import torch

from reseed.activations.hookpoints import Hookpoint
from reseed.sae.gated import GatedConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig
from reseed.train.config import TrainingConfig
from reseed.train.optim.base import align_rows
from reseed.train.run_state import RunState

D, F = 12, 40


def run_state(config, **training):
    training = {"tokens": 640, "batch_size": 64, "aligned": True, "lr": 3e-3} | training
    made = RunState(
        "m", Hookpoint("resid_post", 0), config, TrainingConfig(**training), D, 7,
        torch.device("cpu"),
    )  # fmt: skip
    made.start(batch(99, 400))
    return made


def batch(seed, size=64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(size, D, generator=generator) + 1


def rows(sae):
    return sae.W_enc.detach().double(), sae.W_dec.detach().double()


def test_alignment_equals_a_hand_computed_case():
    E, d = torch.tensor([[3.0, 1.0], [2.0, 5.0]]), torch.tensor([[2.0, 0.0], [0.0, 0.0]])
    align_rows(E, d)
    # E·d = 6, so (1 − 6)/4 · d is added; the encoder row of a zero decoder row does not change.
    assert E.tolist() == [[0.5, 1.0], [2.0, 5.0]]


def test_alignment_keeps_the_component_orthogonal_to_the_decoder_row():
    generator = torch.Generator().manual_seed(0)
    before, d = torch.randn(2, F, D, generator=generator)
    after = before.clone()
    align_rows(after, d)
    unit = d / d.norm(dim=1, keepdim=True)

    def orthogonal(E):
        return E - (E * unit).sum(1, keepdim=True) * unit

    assert not torch.allclose(before, after, atol=0.1)
    torch.testing.assert_close(orthogonal(after), orthogonal(before), rtol=0, atol=1e-5)
    torch.testing.assert_close((after * d).sum(1), torch.ones(F), rtol=0, atol=1e-5)


@pytest.mark.parametrize("optimizer", ["adam", "sign_sgd", "muon"])
@pytest.mark.parametrize(
    "config",
    [
        TopKConfig(num_latents=F, k=4, encoder_init_scale=0.3),
        ReLUConfig(num_latents=F, l1_coefficient=0.1),
        GatedConfig(num_latents=F, l1_coefficient=0.1),
    ],
    ids=lambda c: c.name,
)
def test_alignment_holds_at_the_start_and_after_every_step(config, optimizer):
    decay = 0.0 if optimizer == "sign_sgd" else 0.2
    m = run_state(config, optimizer=optimizer, encoder_weight_decay=0.1, decay_fraction=decay)
    assert not m.training.start_is_drawn
    start = [p.clone() for p in rows(m.sae)]
    for index in range(m.training.steps):
        E, d = rows(m.sae)
        torch.testing.assert_close((E * d).sum(1), torch.ones(F).double(), rtol=0, atol=1e-5)
        if config.unit_norm_decoder:
            torch.testing.assert_close(d.norm(dim=1), torch.ones(F).double(), rtol=0, atol=1e-5)
        m.train(batch(index), m.optimizer)
    E, d = rows(m.trained_sae())
    torch.testing.assert_close((E * d).sum(1), torch.ones(F).double(), rtol=0, atol=1e-5)
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(start, (E, d), strict=True))


def test_the_aligned_encoder_starts_as_the_decoder_over_its_squared_norm():
    config = ReLUConfig(num_latents=F, decoder_init_norm=0.1, encoder_init_scale=0.3)
    E, d = rows(run_state(config).sae)
    torch.testing.assert_close(E, d / 0.01, rtol=1e-5, atol=1e-5)


def test_frozen_b_dec_stays_at_its_start_and_learned_b_dec_moves():
    x = batch(99, 400)
    for optimizer in ("adam", "sign_sgd", "muon"):
        for b_dec in ("frozen", "learned"):
            m = run_state(
                TopKConfig(num_latents=F, k=4), b_dec=b_dec, optimizer=optimizer,
                decay_fraction=0.0, aligned=False,
            )  # fmt: skip
            for index in range(5):
                m.train(batch(index), m.optimizer)
            found = m.trained_sae().b_dec.detach()
            assert torch.allclose(found, x.mean(0), atol=1e-5) == (b_dec == "frozen")
