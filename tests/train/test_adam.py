"""The optimiser agrees with torch's AdamW plus explicit constraints, in float64."""

import copy

import pytest
import torch

from reseed.sae.base import Step
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig
from reseed.train.optim import learning_rate
from reseed.train.optim.adam import SAEAdam

STEPS = 6


def make(d_in=5, num_latents=12, dtype=torch.float64, **options):
    config = TopKConfig(num_latents=num_latents, k=2, **options)
    return config.build(d_in, torch.Generator().manual_seed(0)).to(dtype)


def gradients(sae, index, scale=1.0):
    generator = torch.Generator().manual_seed(index)
    return {
        name: scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        for name, p in sae.named_parameters()
    }


def give(sae, grads):
    for name, p in sae.named_parameters():
        p.grad = grads[name].clone() if p.requires_grad else None


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize("max_grad_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize("decay", [(0.0, 0.0), (0.1, 0.02)])
@pytest.mark.parametrize("train_b_dec", [True, False])
def test_steps_equal_those_of_torch_with_explicit_constraints(
    unit_norm, max_grad_norm, decay, train_b_dec, monkeypatch
):
    monkeypatch.setattr(
        "reseed.train.optim.base.BLOCK_BYTES", 5 * 8 * 5
    )  # blocks of 5, 5 and 2 rows
    ours, theirs = make(), make()
    start = ours.b_dec.detach().clone()
    options = {"betas": (0.8, 0.95), "eps": 1e-6}
    optimizer = SAEAdam(
        ours,
        0.1,
        encoder_weight_decay=decay[0],
        decoder_weight_decay=decay[1],
        max_grad_norm=max_grad_norm,
        unit_norm_decoder=unit_norm,
        train_b_dec=train_b_dec,
        **options,
    )
    theirs.b_dec.requires_grad_(train_b_dec)
    named = {n: p for n, p in theirs.named_parameters() if p.requires_grad}
    oracle = torch.optim.AdamW(
        [
            {"params": [p], "weight_decay": {"W_enc": decay[0], "W_dec": decay[1]}.get(n, 0.0)}
            for n, p in named.items()
        ],
        lr=0.1,
        **options,
    )
    for index in range(STEPS):
        grads = gradients(ours, index, scale=10.0 if index % 2 else 0.01)
        give(ours, grads), give(theirs, grads)
        with torch.no_grad():
            W, g = theirs.W_dec, theirs.W_dec.grad
            if unit_norm:
                g -= (g * W).sum(1, keepdim=True) * W
        if max_grad_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(named.values(), max_grad_norm)
        optimizer.step()
        oracle.step()
        if unit_norm:
            with torch.no_grad():
                theirs.W_dec /= theirs.W_dec.norm(dim=1, keepdim=True)
        if max_grad_norm is not None:
            torch.testing.assert_close(optimizer.grad_norm, norm)
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, n=name: n + m)
    if not train_b_dec:
        assert torch.equal(ours.b_dec, start)


def test_unit_norm_defaults_to_the_config():
    assert SAEAdam(make(), 0.1).unit_norm_decoder
    sae = ReLUConfig(num_latents=4).build(3, torch.Generator())
    assert not SAEAdam(sae, 0.1).unit_norm_decoder


def test_rows_stay_unit_and_a_zero_row_stays_zero():
    sae = make()
    with torch.no_grad():
        sae.W_dec[3] = 0
    optimizer = SAEAdam(sae, 0.1)
    for index in range(STEPS):
        grads = gradients(sae, index)
        grads["W_dec"][3] = 0
        give(sae, grads)
        optimizer.step()
    norms = sae.W_dec.norm(dim=1)
    assert norms[3] == 0
    norms = norms[torch.arange(12) != 3]
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_clipping_of_one_sae_ignores_the_gradients_of_others():
    alone, beside, loud = make(), make(), make()
    optimizers = [SAEAdam(sae, 0.1) for sae in (alone, beside, loud)]
    give(alone, gradients(alone, 0)), give(beside, gradients(beside, 0))
    give(loud, gradients(loud, 0, scale=1e9))
    for optimizer in reversed(optimizers):
        optimizer.step()
    assert equal(alone, beside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_exact(dtype):
    def run(sae, optimizer, first, last):
        for index in range(first, last):
            optimizer.set_lr(0.1 / (1 + index))
            give(sae, gradients(sae, index))
            optimizer.step()

    straight = make(dtype=dtype)
    run(straight, SAEAdam(straight, 0.1, encoder_weight_decay=0.1), 0, STEPS)

    broken = make(dtype=dtype)
    before = SAEAdam(broken, 0.1, encoder_weight_decay=0.1)
    run(broken, before, 0, 3)
    state = copy.deepcopy(before.state_dict())
    weights = copy.deepcopy(broken.state_dict())

    again = make(dtype=dtype)
    again.load_state_dict(weights)
    after = SAEAdam(again, 0.1, encoder_weight_decay=0.1)
    after.load_state_dict(state)
    run(again, after, 3, STEPS)
    assert equal(straight, again)
    counts = [s["step"] for s in after.state.values()]
    assert all(int(count) == STEPS for count in counts)


def test_state_survives_a_file(tmp_path):
    sae = make()
    optimizer = SAEAdam(sae, 0.1)
    give(sae, gradients(sae, 0))
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    other = SAEAdam(make(), 0.1)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    a, b = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[i][key], b[i][key]) for i in a for key in a[i])


def test_training_repeats_bit_for_bit():
    def run():
        sae = make(dtype=torch.float32, num_latents=256, d_in=16)
        optimizer = SAEAdam(sae, 1e-2)
        for index in range(5):
            x = torch.randn(600, 16, generator=torch.Generator().manual_seed(index))
            optimizer.zero_grad(set_to_none=True)
            dead = torch.arange(256) % 3 == 0
            sae.training_loss(x, Step(index, 5), dead).total.backward()
            optimizer.step()
        return sae

    assert equal(run(), run())


def test_a_closure_is_called_with_gradients_enabled():
    sae = make()
    optimizer = SAEAdam(sae, 0.1)
    x = torch.randn(8, 5, dtype=torch.float64)

    def closure():
        loss = sae.training_loss(x, Step(0, 1), torch.zeros(12, dtype=torch.bool)).total
        loss.backward()
        return loss

    with torch.no_grad():
        assert optimizer.step(closure).requires_grad


def test_parameters_without_a_gradient_do_not_change():
    sae = make()
    before = copy.deepcopy(sae)
    SAEAdam(sae, 0.1).step()
    assert equal(sae, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "`lr` must be at least 0, got -1.0"),
        ({"lr": float("nan")}, "`lr` must be at least 0, got nan"),
        ({"lr": 0.1, "betas": (0.9, 1.0)}, r"`betas` must be in \[0, 1\), got \(0.9, 1.0\)"),
        ({"lr": 0.1, "max_grad_norm": 0.0}, "`max_grad_norm` must be above 0 or None, got 0.0"),
        ({"lr": 0.1, "encoder_weight_decay": -1.0}, "`encoder_weight_decay` must be at least 0"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SAEAdam(make(), **options)


def test_the_learning_rate_equals_hand_computed_cases():
    rates = [learning_rate(Step(i, 10), 8.0, warmup_steps=4, decay_fraction=0.4) for i in range(10)]
    assert rates == pytest.approx([2, 4, 6, 8, 8, 8, 8, 6, 4, 2])
    plain = [learning_rate(Step(i, 3), 8.0, warmup_steps=0, decay_fraction=0.0) for i in range(3)]
    assert plain == [8.0, 8.0, 8.0]


def test_the_learning_rate_is_positive_where_warmup_and_decay_overlap():
    rates = [learning_rate(Step(i, 4), 1.0, warmup_steps=100, decay_fraction=1.0) for i in range(4)]
    assert all(0 < rate <= 1 for rate in rates)
