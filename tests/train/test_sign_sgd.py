"""Schedule-free sign descent: a hand-computed case, and the published algebra in float64."""

import copy

import pytest
import torch

from reseed.sae.base import SAE, Step
from reseed.sae.topk import TopKConfig
from reseed.train.optim.sign_sgd import SAESignSGD


def make(dtype=torch.float64, unit_norm=True, d_in=5) -> SAE:
    config = TopKConfig(num_latents=12, k=2, unit_norm_decoder=unit_norm)
    return config.build(d_in, torch.Generator().manual_seed(0)).to(dtype)


def give(sae, index):
    generator = torch.Generator().manual_seed(index)
    for p in sae.parameters():
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def test_three_steps_equal_a_hand_computed_case():
    """One weight, w₀ = 1, rate 0.1, β = ¾; gradient signs +, −, −.

    z: 1 → 0.9 → 1.0 → 1.1;  x, the mean of z₁ … z_t: 0.9, 0.95, 1.0;  y = z/4 + 3x/4.
    """
    sae = make(unit_norm=False)
    optimizer = SAESignSGD(sae, 0.1, momentum=0.75, max_grad_norm=None)
    with torch.no_grad():
        sae.b_dec[0] = 1.0
    found = []
    for sign in (+1.0, -1.0, -1.0):
        sae.b_dec.grad = torch.full((5,), sign * 7, dtype=torch.float64)
        optimizer.step()
        state = optimizer.state[sae.b_dec]
        found.append([t[0].item() for t in (state["z"], state["x"], sae.b_dec)])
    assert found[0] == pytest.approx([0.9, 0.9, 0.9])
    assert found[1] == pytest.approx([1.0, 0.95, 0.9625])
    assert found[2] == pytest.approx([1.1, 1.0, 1.025])
    assert float(optimizer.evaluation_weights()["b_dec"][0]) == pytest.approx(1.0)


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_steps_equal_the_published_algebra(decay):
    """The published wrapper stores only y and z and derives x = z + (y − z)/β."""
    sae, beta = make(unit_norm=False), 0.95
    optimizer = SAESignSGD(sae, 1.0, encoder_weight_decay=decay, max_grad_norm=None, momentum=beta)
    y = {n: p.detach().clone() for n, p in sae.named_parameters()}
    z = copy.deepcopy(y)
    highest = total = 0.0
    for index, rate in enumerate([0.01, 0.02, 0.03, 0.03, 0.03, 0.03]):
        give(sae, index)
        grads = {n: p.grad.clone() for n, p in sae.named_parameters()}
        optimizer.set_lr(rate)
        optimizer.step()
        highest = max(highest, rate)
        total += highest**2
        c = highest**2 / total
        for name in y:
            x = z[name] + (y[name] - z[name]) / beta
            shrink = decay if name == "W_enc" else 0.0
            z[name] = z[name] - rate * (grads[name].sign() + shrink * y[name])
            x = (1 - c) * x + c * z[name]
            y[name] = beta * x + (1 - beta) * z[name]
            torch.testing.assert_close(sae.get_parameter(name), y[name], rtol=0, atol=1e-12)
            torch.testing.assert_close(optimizer.evaluation_weights()[name], x, rtol=0, atol=1e-12)


def test_all_three_sets_of_weights_keep_the_constraints():
    sae = make()
    optimizer = SAESignSGD(sae, 0.05, aligned=True)
    for index in range(4):
        give(sae, index)
        optimizer.step()
        for which in ("z", "x", "y"):
            E, D = (
                p.detach() if which == "y" else optimizer.state[p][which]
                for p in (sae.W_enc, sae.W_dec)
            )
            torch.testing.assert_close(D.norm(dim=1), torch.ones(12, dtype=torch.float64))
            torch.testing.assert_close((E * D).sum(1), torch.ones(12, dtype=torch.float64))


def test_clipping_has_no_effect():
    clipped, free = make(), make()
    for sae, bound in ((clipped, 1e-3), (free, None)):
        optimizer = SAESignSGD(sae, 0.1, max_grad_norm=bound)
        give(sae, 0)
        optimizer.step()
    for a, b in zip(clipped.parameters(), free.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resume_is_exact(dtype, tmp_path):
    def run(sae, optimizer, first, last):
        for index in range(first, last):
            optimizer.set_lr(0.1 * min(1, (1 + index) / 4))
            give(sae, index)
            optimizer.step()

    straight = make(dtype)
    reference = SAESignSGD(straight, 0.1)
    run(straight, reference, 0, 6)
    broken = make(dtype)
    before = SAESignSGD(broken, 0.1)
    run(broken, before, 0, 3)
    torch.save((broken.state_dict(), before.state_dict()), tmp_path / "state.pt")
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True)
    again = make(dtype)
    again.load_state_dict(weights)
    after = SAESignSGD(again, 0.1)
    after.load_state_dict(state)
    run(again, after, 3, 6)
    for a, b in zip(straight.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    found, expected = after.evaluation_weights(), reference.evaluation_weights()
    assert found.keys() == expected.keys() == dict(straight.named_parameters()).keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_mean_weights_reach_a_lower_loss_than_the_start():
    sae = make(torch.float32, d_in=8)
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1))
    nobody = torch.zeros(12, dtype=torch.bool)

    def loss(sae):
        return sae.training_loss(x, Step(0, 1), nobody).total

    start = loss(sae).item()
    optimizer = SAESignSGD(sae, 3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        loss(sae).backward()
        optimizer.step()
    with torch.no_grad():
        for name, mean in optimizer.evaluation_weights().items():
            sae.get_parameter(name).copy_(mean)
    assert loss(sae).item() < 0.9 * start


def test_a_momentum_of_one_is_refused():
    with pytest.raises(ValueError, match=r"`momentum` must be in \[0, 1\), got 1.0"):
        SAESignSGD(make(), 0.1, momentum=1.0)
