"""Options of the k-sparse architectures: choice by f‖d‖, annealed k, fractional k, window of θ."""

import pytest
import torch
from sae_examples import batch_of, first_dead, perturbed

from reseed.errors import ConfigError
from reseed.sae.base import Step
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.checkpoint import load_sae, save_sae
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.topk import TopKConfig

STEP = Step(0, 10)
PREFIXES = (0.25, 0.5, 1.0)
WEIGHED = {"weigh_by_decoder_norm": True, "unit_norm_decoder": False, "aux_alpha": 0.3}
KINDS = {
    "topk": (TopKConfig, {}),
    "multi": (TopKConfig, {"multi_topk": True}),
    "batch_topk": (BatchTopKConfig, {}),
    "matryoshka": (MatryoshkaConfig, {"prefixes": PREFIXES}),
}
BATCH_KINDS = ("batch_topk", "matryoshka")


def make(kind, num_latents=24, k=3, d_in=6, dtype=torch.float64, **options):
    cls, more = KINDS[kind]
    sae = perturbed(cls(num_latents=num_latents, k=k, **{**more, **options}), d_in, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        sae.W_dec *= 0.2 + 3 * torch.rand(num_latents, 1, generator=generator)
    return sae


def rescale(sae):
    """Multiply each decoder row by c and divide its encoder row and bias by c, c from ⅛ to 8."""
    generator = torch.Generator().manual_seed(3)
    c = 2 ** (6 * torch.rand(sae.num_latents, generator=generator, dtype=torch.float64) - 3)
    with torch.no_grad():
        sae.W_dec *= c[:, None]
        sae.W_enc /= c[:, None]
        sae.b_enc /= c
    return c


def mask_of(pre, keys, count):
    """Return 1 at the ``count`` largest keys: of each row (int), or, per token, of all (float)."""
    flat = keys if isinstance(count, int) else keys.reshape(1, -1)
    size = count if isinstance(count, int) else round(count * len(pre))
    chosen = flat.topk(size, dim=1).indices
    return torch.zeros_like(flat).scatter(1, chosen, 1.0).reshape(pre.shape)


def dense_loss(sae, x, dead):
    """Return the loss from masks over dense tensors, with choices by π‖d‖."""
    c = sae.config
    in_batch = isinstance(c, BatchTopKConfig)
    norms = sae.W_dec.detach().norm(dim=1)
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    variance = (x - x.mean(0)).square().sum()

    def fvu(k, m=sae.num_latents):
        f = pre.relu() * mask_of(pre, pre.relu() * norms, float(k) if in_batch else k)
        error = x - f[:, :m] @ sae.W_dec[:m] - sae.b_dec
        return error.square().sum() / variance, error.detach()

    loss, e = fvu(c.k)
    if isinstance(c, MatryoshkaConfig):
        loss = loss + fvu(c.k, 6)[0] + fvu(c.k, 12)[0]
    if isinstance(c, TopKConfig) and c.multi_topk:
        loss = loss + fvu(4 * c.k)[0] / 8
    pre_dead = (x - sae.b_dec.detach()) @ sae.W_enc.T + sae.b_enc
    keys = torch.where(dead, pre_dead * norms, -torch.inf)
    k_aux = sae.d_in // 2
    e_hat = (pre_dead.relu() * mask_of(pre, keys, k_aux)) @ sae.W_dec
    aux = (e_hat - e).square().sum() / (e - e.mean(0)).square().sum()
    return loss + c.aux_alpha * aux


@pytest.mark.parametrize("kind", KINDS)
def test_weighed_loss_and_gradients_are_those_of_the_dense_formulation(kind):
    sae, x = make(kind, **WEIGHED), batch_of()
    dead = first_dead(sae, 9)
    ours, theirs = sae.training_loss(x, STEP, dead).total, dense_loss(sae, x, dead)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for (name, p), b in zip(
        sae.named_parameters(), torch.autograd.grad(theirs, list(sae.parameters())), strict=True
    ):
        (a,) = torch.autograd.grad(ours, p, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_with_choices_by_decoder_norm_a_latents_scale_has_no_effect(kind):
    """Choice, reconstruction and loss stay, in training and after it; unweighed, they change."""
    x = batch_of(64)

    def look(sae, c):
        for theta in sae.buffers():
            theta.zero_()  # the next step sets it again
        loss = sae.training_loss(x, STEP, first_dead(sae, 9))
        for theta in sae.buffers():
            theta *= 0.999  # θ is the smallest chosen value itself: rounding would decide about it
        out = sae(x)
        return loss.total, loss.fired, out.reconstruction, out.latents * c

    sae, plain = make(kind, **WEIGHED), make(kind, unit_norm_decoder=False)
    fired_before = plain.training_loss(x, STEP, first_dead(plain, 9)).fired
    before = look(sae, 1.0)
    for a, b in zip(before, look(sae, rescale(sae)), strict=True):
        torch.testing.assert_close(a, b)
    rescale(plain)
    assert not torch.equal(plain.training_loss(x, STEP, first_dead(plain, 9)).fired, fired_before)


@pytest.mark.parametrize("kind", KINDS)
def test_weighed_choices_keep_pre_activations_as_values(kind):
    sae, x = make(kind, **WEIGHED), batch_of()
    sae.training_loss(x, STEP, first_dead(sae, 9))
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    found = sae.encode(x)
    torch.testing.assert_close(found, torch.where(found > 0, pre, 0.0))
    assert 0 < (found > 0).sum() <= 3 * len(x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_weighed_sae_is_folded_saved_and_loaded_exactly(kind, tmp_path):
    sae, x, scale = make(kind, **WEIGHED), batch_of() * 40, 0.037
    sae.training_loss(x * scale, STEP, first_dead(sae, 9))
    trained, raw = sae(x * scale), sae.folded(scale)(x)
    assert (trained.latents > 0).any()
    torch.testing.assert_close(raw.latents, trained.latents / scale)
    torch.testing.assert_close(raw.reconstruction, trained.reconstruction / scale)
    save_sae(sae, tmp_path)
    assert torch.equal(load_sae(tmp_path)(x).latents, sae(x).latents)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_row_of_zeros_is_not_chosen(kind):
    sae, x = make(kind, k=24, **WEIGHED), batch_of()
    with torch.no_grad():
        sae.W_dec[4] = 0
        sae.b_enc[4] = 100.0
    loss = sae.training_loss(x, STEP, first_dead(sae, 9))
    loss.total.backward()
    assert loss.fired[4] == 0
    assert all(torch.isfinite(p.grad).all() for p in sae.parameters())
    assert sae.encode(x)[:, 4].max() == 0


def test_choices_by_decoder_norm_need_a_free_decoder():
    with pytest.raises(
        ConfigError, match=r"`weigh_by_decoder_norm` needs `unit_norm_decoder=false`"
    ):
        TopKConfig(num_latents=8, k=2, weigh_by_decoder_norm=True)


# Annealed k


def open_all(sae):
    """Make all pre-activations positive, so that L0 is exactly k."""
    with torch.no_grad():
        sae.b_enc += 100


@pytest.mark.parametrize(
    ("kind", "k", "expected"),
    # k falls from min(D, F) = 6 over ½ of 8 steps, by a quarter of 6 − k each.
    [
        ("topk", 2, [6, 5, 4, 3, 2, 2, 2, 2]),
        ("topk", 3, [6, 5, 4, 4, 3, 3, 3, 3]),  # 5.25, 4.5 (to even), 3.75
        ("batch_topk", 2, [6, 5, 4, 3, 2, 2, 2, 2]),
        ("batch_topk", 1.8, [6, 79 / 16, 62 / 16, 46 / 16, *[29 / 16] * 4]),  # 79.2, 62.4, 45.6
        ("matryoshka", 2, [6, 5, 4, 3, 2, 2, 2, 2]),
    ],
)
def test_k_falls_linearly_over_the_first_steps(kind, k, expected):
    sae, x = make(kind, k=k, k_anneal_fraction=0.5), batch_of()
    open_all(sae)
    order = [5, 0, 7, 3, 1, 2, 6, 4]  # k depends only on the step
    found = {i: sae.training_loss(x, Step(i, 8), first_dead(sae, 9)).l0.item() for i in order}
    assert [found[i] for i in range(8)] == expected


@pytest.mark.parametrize(
    ("num_latents", "k", "start"), [(4, 2, 4), (24, 2, 6), (24, 6, 6), (24, 9, 9)]
)
def test_k_falls_from_d_in_or_the_width_and_never_rises(num_latents, k, start):
    config = TopKConfig(num_latents=num_latents, k=k, k_anneal_fraction=0.1)
    assert config.k_at(Step(0, 100), 6) == start
    assert config.k_at(Step(10, 100), 6) == config.k_at(Step(99, 100), 6) == k
    assert TopKConfig(num_latents=num_latents, k=k).k_at(Step(0, 100), 6) == k


def test_multi_topk_takes_4k_of_the_falling_k_within_the_width():
    sae, x = make("multi", num_latents=16, k=2, k_anneal_fraction=0.5), batch_of()
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    for index, more in ((0, 16), (2, 16), (3, 12), (4, 8)):
        f = pre.relu() * mask_of(pre, pre, more)
        error = x - f @ sae.W_dec - sae.b_dec
        expected = error.square().sum() / (x - x.mean(0)).square().sum()
        found = sae.training_loss(x, Step(index, 8), first_dead(sae, 9)).parts["multi_topk"]
        torch.testing.assert_close(found, expected.detach())


@pytest.mark.parametrize("kind", ["topk", "multi"])
def test_the_final_k_holds_after_training(kind):
    sae, x = make(kind, k=2, k_anneal_fraction=0.5), batch_of()
    open_all(sae)
    sae.training_loss(x, Step(0, 8), first_dead(sae, 9))
    assert ((sae.encode(x) > 0).sum(1) == 2).all()


@pytest.mark.parametrize("kind", BATCH_KINDS)
def test_the_threshold_is_averaged_only_after_k_has_fallen(kind):
    sae = make(kind, k=2, k_anneal_fraction=0.25)
    open_all(sae)

    def smallest(x, k):
        pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
        return pre.flatten().topk(k * len(x)).values.min().item()

    expected = None
    for index, k in enumerate((6, 4, 2, 2, 2)):  # 6 to 2 in 2 of 8 steps
        x = batch_of(seed=index)
        now = smallest(x, k)
        expected = now if k > 2 else expected + 0.01 * (now - expected)
        sae.training_loss(x, Step(index, 8), first_dead(sae, 9))
        assert sae.threshold.item() == pytest.approx(expected, rel=1e-9)


# Fractional k


@pytest.mark.parametrize("kind", BATCH_KINDS)
@pytest.mark.parametrize(
    ("k", "kept"), [(1.8, 18), (0.25, 2), (2.04, 20), (23.96, 240), (0.01, 1), (0.5, 5), (3, 30)]
)
def test_k_times_b_is_rounded(kind, k, kept):
    """A half of a latent in 10 tokens rounds to even, and at least one latent is chosen."""
    sae = make(kind, k=k)
    open_all(sae)
    assert sae.training_loss(batch_of(10), STEP, first_dead(sae, 9)).fired.sum() == kept


@pytest.mark.parametrize("kind", BATCH_KINDS)
def test_a_whole_k_is_stored_as_an_integer(kind):
    """8 and 8.0 are the same run, with the signature from before k could be a fraction."""
    cls, more = KINDS[kind]
    whole = cls(num_latents=24, k=8.0, **more)
    assert repr(whole.signed()["k"]) == repr(cls(num_latents=24, k=8, **more).signed()["k"]) == "8"
    assert cls(num_latents=24, k=1.8, **more).sparsity == "k=1.8"


def test_topk_refuses_a_fractional_k():
    with pytest.raises(ConfigError, match=r"`k` must be an integer, at least 1; got 1\.8"):
        TopKConfig(num_latents=24, k=1.8)


# θ


@pytest.mark.parametrize("kind", BATCH_KINDS)
@pytest.mark.parametrize("options", [{}, WEIGHED], ids=["plain", "weighed"])
@pytest.mark.parametrize("k", [1.8, 3])
def test_theta_from_one_batch_reproduces_the_mean_l0_of_that_batch(kind, options, k):
    """They agree within 1/B: the smallest chosen activation is not above itself."""
    sae, x = make(kind, k=k, **options), batch_of(50)
    loss = sae.training_loss(x, STEP, first_dead(sae, 9))
    assert loss.l0 == round(50 * k) / 50
    found = (sae.encode(x) > 0).sum() / 50
    assert abs(found - loss.l0) <= 1 / 50 + 1e-6


def test_theta_over_a_window_by_hand():
    sae = make("batch_topk", threshold_window=0.5)
    rates = {0: 1.0, 1: 1 / 1.5, 2: 1 / 2, 197: 1 / 99.5, 198: 0.01, 900: 0.01}
    expected = 0.0
    for index, rate in rates.items():
        x = batch_of(seed=index)
        pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
        expected += rate * (pre.flatten().topk(3 * len(x)).values.min().item() - expected)
        sae.training_loss(x, Step(index, 1000), first_dead(sae, 9))
        assert sae.threshold.item() == pytest.approx(expected, rel=1e-9)


def test_theta_over_a_window_follows_shrinking_activations():
    """Activations shrink in training. L0 of the next batch is k; with the plain mean it is far
    below k."""
    found = {}
    for window in (0.0, 0.05):
        sae = make("batch_topk", k=3, threshold_window=window)
        base = batch_of(256)
        for index in range(200):
            scale = 1 / (1 + index / 20)
            with torch.no_grad():
                sae.b_enc.zero_(), sae.b_dec.zero_()
            sae.training_loss(base * scale, Step(index, 200), first_dead(sae, 9))
        found[window] = ((sae.encode(base * scale) > 0).sum() / 256).item()
    assert found[0.0] < 2
    assert found[0.05] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k_anneal_fraction": 1.0}, "`k_anneal_fraction` must be .* below 1; got 1.0"),
        ({"k_anneal_fraction": -0.1}, "`k_anneal_fraction` must be .* at least 0 .*; got -0.1"),
        ({"threshold_window": 2}, "`threshold_window` must be .* at most 1; got 2"),
        ({"k": 24.5}, r"`k` \(=24.5\) must not exceed `num_latents` \(=24\)"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        BatchTopKConfig(num_latents=24, **{"k": 2, **options})
