"""AuxK against masks over dense tensors, and the parameters that it trains."""

import pytest
import torch
from sae_examples import batch_of, first_dead, perturbed

from reseed.sae import kernels
from reseed.sae.base import Step
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.losses import auxk_loss
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

STEP = Step(9, 10)
JUMP = {"threshold_init": 0.2, "bandwidth": 0.3}
SUMS = {
    "relu": (ReLUConfig, {}),
    "relu, centred": (ReLUConfig, {"subtract_b_dec": True}),
    "gated": (GatedConfig, {}),
    "jumprelu": (JumpReLUConfig, JUMP),
    "jumprelu, centred": (JumpReLUConfig, {"subtract_b_dec": True, **JUMP}),
}
ALL = SUMS | {
    "topk": (TopKConfig, {"k": 3}),
    "batch_topk": (BatchTopKConfig, {"k": 3}),
    "matryoshka": (MatryoshkaConfig, {"k": 3, "prefixes": (0.25, 1.0)}),
}


def make(name, num_latents=24, d_in=6, **options):
    cls, more = ALL[name]
    return perturbed(cls(num_latents=num_latents, **{**more, **options}), d_in, noise=0.2)


def reconstruction(name, sae, x):
    """Reconstruct x as in training: BatchTopK keeps the k·B largest latents of the batch."""
    if name not in ("batch_topk", "matryoshka"):
        return sae(x).reconstruction
    latents = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()
    least = latents.flatten().topk(sae.config.k * len(x)).values[-1]
    return torch.where(latents >= least, latents, 0.0) @ sae.W_dec + sae.b_dec


def dense_term(name, sae, x, dead, centred):
    """Return α · AuxK · variance per token, in the units of the loss."""
    c = sae.config
    k_aux = c.k_aux or sae.d_in // 2
    e = (x - reconstruction(name, sae, x)).detach()
    pre = (x - sae.b_dec.detach() * centred) @ sae.W_enc.T + sae.b_enc
    chosen = torch.where(dead, pre, -torch.inf).topk(min(k_aux, int(dead.sum())), dim=1).indices
    e_hat = (torch.zeros_like(pre).scatter(1, chosen, 1.0) * pre.relu()) @ sae.W_dec
    base = {"residual": e, "input": x}[c.aux_denominator]
    aux = (e_hat - e).square().sum() / (base - base.mean(0)).square().sum()
    per_token = 1.0  # the k-sparse losses are fractions of variance
    if name in SUMS:
        per_token = (x - x.mean(0)).square().sum(1).mean()
    if isinstance(c, JumpReLUConfig):
        per_token = per_token / sae.d_in
    factor = {"none": 1.0, "dead_fraction": min(int(dead.sum()) / k_aux, 1.0)}[c.aux_scale]
    return c.aux_alpha * factor * aux * per_token


@pytest.mark.parametrize("k_aux", [None, 5])
@pytest.mark.parametrize("num_dead", [2, 9])
@pytest.mark.parametrize("scale", ["dead_fraction", "none"])
@pytest.mark.parametrize("denominator", ["residual", "input"])
@pytest.mark.parametrize("name", ALL)
def test_the_auxk_term_equals_the_dense_formulation(name, num_dead, k_aux, scale, denominator):
    options = {"aux_scale": scale, "aux_denominator": denominator}
    sae, x = make(name, aux_alpha=0.3, k_aux=k_aux, **options), batch_of(32)
    dead = first_dead(sae, num_dead)
    with_aux, without = (sae.training_loss(x, STEP, d) for d in (dead, first_dead(sae, 0)))
    centred = name not in ("relu", "jumprelu")
    theirs = dense_term(name, sae, x, dead, centred)
    torch.testing.assert_close(with_aux.total - without.total, theirs)
    part = "auxk" if name in SUMS else "aux"
    assert with_aux.parts[part] > 0 == without.parts[part]
    parameters = dict(sae.named_parameters())
    ours = torch.autograd.grad(with_aux.total - without.total, parameters.values())
    expected = torch.autograd.grad(theirs, parameters.values(), allow_unused=True)
    for n, a, b in zip(parameters, ours, expected, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize(
    ("scale", "denominator", "expected"),
    [
        ("dead_fraction", "residual", 1 / 8),
        ("none", "residual", 1 / 2),
        ("dead_fraction", "input", 1 / 32),
        ("none", "input", 1 / 8),
    ],
)
def test_auxk_of_one_dead_latent_worked_by_hand(scale, denominator, expected):
    """x is 4 and 0, e is 2 and 0, ê is 1 and 0. ‖ê − e‖² is 1, the variance of e 2 and that of x 8;
    one latent of k_aux = 4 is dead."""
    sae = make("topk", num_latents=4, d_in=1, k=1, k_aux=4, aux_scale=scale,
               aux_denominator=denominator)  # fmt: skip
    with torch.no_grad():
        sae.W_enc[0], sae.W_dec[0], sae.b_enc[0], sae.b_dec[0] = 1.0, 0.25, 0.0, 0.0
    x, error = (torch.tensor([[a], [0.0]], dtype=torch.float64) for a in (4, 2))
    loss = auxk_loss(sae, x, error, first_dead(sae, 1))
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    (grad,) = torch.autograd.grad(loss, sae.W_dec)  # d/dw (4w − 2)² = 8 (4w − 2) = −8 at w = 1/4
    assert grad[0].item() == pytest.approx(-8 * expected, rel=1e-12)


@pytest.mark.parametrize("scale", ["dead_fraction", "none"])
@pytest.mark.parametrize("denominator", ["residual", "input"])
@pytest.mark.parametrize("name", ALL)
def test_the_options_of_auxk_give_the_same_in_compiled_loops(name, scale, denominator):
    options = {"aux_scale": scale, "aux_denominator": denominator}
    sae, x = make(name, aux_alpha=0.3, k_aux=5, **options).float(), batch_of(32).float()
    found = []
    for on in (False, True):
        with kernels.override_enabled(on):
            loss = sae.training_loss(x, STEP, first_dead(sae, 4)).total
            found.append([loss, *torch.autograd.grad(loss, list(sae.parameters()))])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_auxk_trains_the_rows_of_dead_latents_and_no_others(name):
    """A public library loses the gradient of the encoder."""
    sae, x = make(name, aux_alpha=1.0), batch_of(32)
    rows = [sae.W_enc, sae.b_enc, sae.W_dec]

    def gradients(dead):
        total = sae.training_loss(x, STEP, dead).total
        return torch.autograd.grad(total, [*rows, sae.b_dec])

    *differences, of_b_dec = (
        a - b
        for a, b in zip(gradients(first_dead(sae, 5)), gradients(first_dead(sae, 0)), strict=True)
    )
    for difference in differences:
        moved = difference.abs().reshape(sae.num_latents, -1).sum(1)
        assert (moved[:5] > 1e-6).all()
        assert moved[5:].max() < 1e-12
    assert of_b_dec.abs().max() < 1e-12  # AuxK detaches the error and the b_dec that it subtracts


@pytest.mark.parametrize("name", ["relu", "gated", "jumprelu"])
def test_auxk_trains_a_silent_latent_only_with_a_positive_pre_activation(name):
    """JumpReLU has such latents, between 0 and θ. A closed ReLU or gate gets no gradient."""
    sae, x = make(name, aux_alpha=1.0), batch_of(32)
    with torch.no_grad():
        if name == "jumprelu":
            sae.log_threshold[0] = 5.0
        else:
            sae.b_enc[0] = -100.0
    loss = sae.training_loss(x, STEP, first_dead(sae, 1))
    assert loss.fired[0] == 0
    (grad,) = torch.autograd.grad(loss.total, sae.W_enc)
    assert (grad[0].abs().max() > 0) == (name == "jumprelu")


@pytest.mark.parametrize("name", SUMS)
def test_auxk_is_off_by_default(name):
    sae, x = make(name), batch_of(32)
    a, b = (sae.training_loss(x, STEP, first_dead(sae, n)) for n in (0, 9))
    assert sae.config.aux_alpha == 0
    assert a.total == b.total
    assert "auxk" not in a.parts


@pytest.mark.parametrize("name", SUMS)
def test_auxk_relative_to_mse_does_not_depend_on_the_scale_of_the_inputs(name):
    """The ratio of the two terms is the same for inputs and SAE scaled by 10."""
    sae, x = make(name, aux_alpha=0.3), batch_of(32)
    big = sae.folded(0.1)
    shares = []
    for s, y in ((sae, x), (big, 10 * x)):
        with_aux, without = (s.training_loss(y, STEP, first_dead(s, n)) for n in (9, 0))
        shares.append((with_aux.total - without.total) / without.parts["mse"])
    torch.testing.assert_close(*shares)


@pytest.mark.parametrize("name", SUMS)
def test_auxk_of_a_batch_without_variance_is_zero(name):
    sae = make(name, aux_alpha=1.0)
    loss = sae.training_loss(batch_of(1), STEP, first_dead(sae, 9))
    loss.total.backward()
    assert loss.parts["auxk"] == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in sae.parameters())


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("count", [2, 9])
@pytest.mark.parametrize("weighed", [False, True])
def test_dense_products_and_pairs_give_the_same_auxk(name, count, weighed, monkeypatch):
    """Value and gradients agree, for k_aux = 3 and 2 or 9 dead latents."""
    sae, x = make(name, aux_alpha=1.0, k_aux=3), batch_of(32)
    weights = sae.W_dec.detach().norm(dim=1) if weighed else None
    found = []
    for bound in (0, 10):
        monkeypatch.setattr("reseed.sae.losses.DENSE_UP_TO", bound)
        sae.zero_grad()
        loss = auxk_loss(sae, x, x.sin(), first_dead(sae, count), weights=weights)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in (sae.W_enc, sae.b_enc, sae.W_dec))])
    for pairs, products in zip(*found, strict=True):
        torch.testing.assert_close(pairs, products, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gated", {}), ("jumprelu", {}), ("jumprelu, centred", {}), ("jumprelu", {"penalty": "tanh"})],
)
def test_auxk_gets_the_error_of_the_loss_without_encoding_again(name, options, monkeypatch):
    """Tokens pass in blocks of 5; the last block is not full."""
    monkeypatch.setattr("reseed.sae.pairs.CPU_ROWS", 5)
    sae, x = make(name, aux_alpha=1.0, **options), batch_of(32)
    expected, seen = x - sae(x).reconstruction, []

    def auxk_loss(sae, x, error, dead, *, centred):
        seen.append(error)
        return error.new_zeros(())

    def encode(x):
        raise AssertionError("encoded once more")

    monkeypatch.setattr("reseed.sae.losses.auxk_loss", auxk_loss)
    monkeypatch.setattr(sae, "encode", encode)
    sae.training_loss(x, STEP, first_dead(sae, 3)).total.backward()
    (error,) = seen
    assert not error.requires_grad
    torch.testing.assert_close(error, expected.detach(), rtol=1e-12, atol=1e-12)
