"""TopK with activation=groupmax: the largest latent of every group is active."""

import pytest
import torch
from sae_examples import batch_of, none_dead, perturbed

from reseed.errors import ConfigError
from reseed.sae.base import Step
from reseed.sae.topk import TopKConfig

CONFIG = TopKConfig(num_latents=12, k=3, activation="groupmax", aux_alpha=0.0)


def dense(sae, x):
    """Return latents and FVU, computed with dense products."""
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu().view(len(x), 3, 4)
    largest = torch.zeros_like(pre).scatter(2, pre.argmax(2, keepdim=True), 1.0)
    latents = (pre * largest).reshape(len(x), 12)
    error = x - (latents @ sae.W_dec + sae.b_dec)
    return latents, error.square().sum() / (x - x.mean(0)).square().sum()


def test_one_latent_of_every_group_is_active():
    sae, x = perturbed(CONFIG), batch_of()
    latents, _ = dense(sae, x)
    torch.testing.assert_close(sae.encode(x), latents)
    torch.testing.assert_close(sae(x).reconstruction, sae.decode(latents))
    assert int((sae.encode(x).view(len(x), 3, 4) > 0).sum(2).max()) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_dense_formulation(dtype):
    sae, x = perturbed(CONFIG, dtype=dtype), batch_of(dtype=dtype)
    loss = sae.training_loss(x, Step(0, 10), none_dead(sae))
    loss.total.backward()
    ours = {name: p.grad.clone() for name, p in sae.named_parameters()}
    sae.zero_grad()
    latents, total = dense(sae, x)
    total.backward()
    torch.testing.assert_close(loss.total, total)
    assert torch.equal(loss.fired, (latents > 0).sum(0))
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, **tolerance)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 5}, r"`k` \(=5\) must divide `num_latents` \(=12\) with `activation=groupmax`"),
        ({"multi_topk": True}, "`multi_topk` applies only to `activation=topk`; got True"),
        (
            {"k_anneal_fraction": 0.1},
            "`k_anneal_fraction` applies only to `activation=topk`; got 0.1",
        ),
        (
            {"weigh_by_decoder_norm": True, "unit_norm_decoder": False},
            "`weigh_by_decoder_norm` applies only to `activation=topk`",
        ),
    ],
)
def test_options_without_effect_on_groups_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TopKConfig(**{"num_latents": 12, "k": 3, "activation": "groupmax"} | options)


def test_the_activation_is_signed_only_if_it_is_groupmax():
    assert "activation" not in TopKConfig(num_latents=12, k=3).signed()
    assert CONFIG.signed()["activation"] == "groupmax"
