"""BatchTopK against a dense formulation, and its running threshold."""

import pytest
import torch
from sae_examples import largest_of_batch, none_dead, perturbed
from sae_examples import uneven_batch_of as batch_of

from reseed.errors import ConfigError
from reseed.sae.base import Step
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.checkpoint import load_sae, save_sae
from reseed.sae.selection import select_in_batch
from reseed.sae.sparse import batch_topk_encode

STEP = Step(0, 10)


def make(num_latents=24, k=3, d_in=6, seed=0, dtype=torch.float64, **options):
    return perturbed(BatchTopKConfig(num_latents=num_latents, k=k, **options), d_in, seed, dtype)


def dense_loss(sae, x, dead):
    variance = (x - x.mean(0)).square().sum()
    error = x - (largest_of_batch(sae, x) @ sae.W_dec + sae.b_dec)
    loss = error.square().sum() / variance
    if dead.any():
        k_aux = sae.d_in // 2
        pre = (x - sae.b_dec.detach()) @ sae.W_enc.T + sae.b_enc
        pre = torch.where(dead, pre, -torch.inf)
        chosen = pre.topk(min(k_aux, int(dead.sum())), dim=1).indices
        e_hat = (torch.zeros_like(pre).scatter(1, chosen, 1.0) * pre.relu()) @ sae.W_dec
        e = error.detach()
        aux = (e_hat - e).square().sum() / (e - e.mean(0)).square().sum()
        loss = loss + sae.config.aux_alpha * min(int(dead.sum()) / k_aux, 1.0) * aux
    return loss


@pytest.mark.parametrize("num_dead", [0, 2, 9])
@pytest.mark.parametrize(("k", "num_latents"), [(3, 24), (24, 24), (1, 24), (1, 1)])
def test_loss_and_gradients_are_those_of_the_dense_formulation(k, num_latents, num_dead):
    sae, x = make(num_latents, k, aux_alpha=0.3), batch_of()
    dead = none_dead(sae)
    dead[:num_dead] = True
    ours, theirs = sae.training_loss(x, STEP, dead).total, dense_loss(sae, x, dead)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for (name, p), b in zip(
        sae.named_parameters(), torch.autograd.grad(theirs, list(sae.parameters())), strict=True
    ):
        (a,) = torch.autograd.grad(ours, p, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_of_the_activations():
    sae, x = make(), batch_of().requires_grad_()
    latents = batch_topk_encode(x, sae.W_enc, sae.b_enc, 3, b_dec=sae.b_dec)
    (ours,) = torch.autograd.grad(latents.dense().pow(3).sum(), x)
    (theirs,) = torch.autograd.grad(largest_of_batch(sae, x).pow(3).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("k", [1, 5, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_choice_is_that_of_the_whole_batch(k, dtype):
    """One token takes nearly all latents, and the batch has several blocks of rows."""
    sae = make(num_latents=64, k=k, dtype=dtype)
    x = batch_of(700, dtype=dtype)
    x[5] *= 1e4
    values, tokens, latents = select_in_batch(x, sae.W_enc.detach(), sae.b_enc.detach(), k)
    pre = (x @ sae.W_enc.T + sae.b_enc).detach()
    expected = pre.flatten().topk(k * 700).values
    expected = expected[expected > 0]
    torch.testing.assert_close(values.sort(descending=True).values, expected)
    torch.testing.assert_close(values, pre[tokens, latents])
    keys = tokens * 64 + latents
    assert (keys.diff() > 0).all()  # sorted, without duplicates


def test_loss_reports_at_most_k_active_latents_per_token_on_average():
    sae, x = make(num_latents=64, k=5), batch_of(100)
    loss, latents = sae.training_loss(x, STEP, none_dead(sae)), largest_of_batch(sae, x)
    assert (latents > 0).sum() <= 500
    assert (latents > 0).sum(1).max() > 5
    assert torch.equal(loss.fired, (latents > 0).sum(0))
    assert loss.l0 == (latents > 0).sum() / 100
    error = x - sae.decode(latents)
    torch.testing.assert_close(loss.squared_error, error.detach().square().sum())


def test_fewer_than_k_latents_are_active_if_fewer_are_positive():
    sae = make()
    with torch.no_grad():
        sae.b_enc.fill_(-1e6)
    loss = sae.training_loss(batch_of(), STEP, none_dead(sae))
    loss.total.backward()
    assert loss.l0 == 0
    assert sae.threshold == 0  # no activation to set it from
    assert sae.W_enc.grad.abs().max() == 0


def test_threshold_starts_at_the_first_value_and_follows_by_a_hundredth():
    """In a public library it starts at 0 and is too low for hundreds of steps."""
    sae = make()
    assert sae.threshold == 0
    smallest = []
    for seed in range(3):
        x = batch_of(seed=seed)
        latents = largest_of_batch(sae, x)
        smallest.append(latents[latents > 0].min().item())
        sae.training_loss(x, STEP, none_dead(sae))
        if seed == 0:
            assert sae.threshold.item() == pytest.approx(smallest[0], rel=1e-12)
    expected = 0.99 * (0.99 * smallest[0] + 0.01 * smallest[1]) + 0.01 * smallest[2]
    assert sae.threshold.item() == pytest.approx(expected, rel=1e-12)
    assert not sae.threshold.requires_grad


def test_a_threshold_from_one_batch_reproduces_the_choice_in_that_batch():
    sae, x = make(num_latents=64, k=5), batch_of(100)
    sae.training_loss(x, STEP, none_dead(sae))
    found = sae.encode(x)
    expected = largest_of_batch(sae, x)
    # A latent is active strictly above θ, so the smallest of the batch is not.
    assert abs((found > 0).sum() - 500) <= 1
    same = expected > sae.threshold
    torch.testing.assert_close(found[same], expected[same])
    assert found[~same].abs().max() == 0
    # A token's latents then do not depend on the rest of the batch.
    torch.testing.assert_close(sae.encode(x[7]), found[7])


def test_folding_rescales_the_threshold():
    sae, x, scale = make(), batch_of() * 40, 0.037
    sae.training_loss(x * scale, STEP, none_dead(sae))
    trained, raw = sae(x * scale), sae.folded(scale)(x)
    assert (trained.latents > 0).any()
    assert ((trained.latents == 0) == (raw.latents == 0)).all()
    torch.testing.assert_close(raw.latents, trained.latents / scale)
    torch.testing.assert_close(raw.reconstruction, trained.reconstruction / scale)
    torch.testing.assert_close(sae.folded(scale).threshold, sae.threshold / scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threshold_is_saved_and_loaded(dtype, tmp_path):
    sae, x = make(dtype=torch.float32), batch_of(dtype=torch.float32)
    sae.training_loss(x, STEP, none_dead(sae))
    sae = sae.to(dtype)
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert sae.threshold > 0
    assert loaded.state_dict().keys() == sae.state_dict().keys()
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in sae.state_dict().items())
    assert loaded.threshold.dtype == dtype
    assert torch.equal(sae(x).latents, loaded(x).latents)


def test_a_resumed_run_continues_with_the_same_threshold():
    whole, other = make(), make(seed=5)
    for seed in range(4):
        if seed == 2:
            other.load_state_dict(whole.state_dict())
        for sae in (whole, other)[: 1 if seed < 2 else 2]:
            sae.training_loss(batch_of(seed=seed), STEP, none_dead(sae))
    assert torch.equal(whole.threshold, other.threshold)


def test_shapes_and_dtypes():
    sae = make(dtype=torch.float32)
    x = batch_of(12, dtype=torch.bfloat16)
    assert torch.equal(sae.encode(x), sae.encode(x.float()))
    assert sae(x.reshape(3, 4, 6)).latents.shape == (3, 4, 24)
    loss = sae.training_loss(x, STEP, none_dead(sae))
    assert loss.total.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_latents": 16, "k": 17}, r"`k` \(=17\) must not exceed `num_latents` \(=16\)"),
        ({"num_latents": 16, "k": 0}, "`k` must be a number, above 0; got 0"),
        ({"num_latents": 64, "threshold_rate": 0}, "`threshold_rate` must be .* above 0"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BatchTopKConfig(**options)


def test_k_out_of_range_is_refused():
    sae = make()
    with pytest.raises(ValueError, match=r"`k` \(=25\) must be above 0 and at most .* \(=24\)"):
        batch_topk_encode(batch_of(), sae.W_enc, sae.b_enc, 25, b_dec=sae.b_dec)


@pytest.mark.parametrize(
    "options", [{}, {"weigh_by_decoder_norm": True, "unit_norm_decoder": False}]
)
def test_a_threshold_from_activations_lets_k_of_them_through(options):
    sae, x = make(**options), batch_of()
    sae.initialise_threshold(x)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    weights = sae.W_dec.norm(dim=1) if options else torch.ones(sae.num_latents)
    chosen = (pre * weights).flatten().topk(3 * len(x)).indices
    assert set(chosen.tolist()) == set(sae.encode(x).flatten().nonzero()[:, 0].tolist())
    before = sae.threshold.clone()
    sae.initialise_threshold(2 * x)  # keeps a threshold that is set
    assert sae.threshold == before


def test_the_threshold_stays_zero_if_fewer_than_k_are_positive():
    sae, x = make(num_latents=4, k=4), batch_of()
    sae.initialise_threshold(x)
    assert sae.threshold == 0
