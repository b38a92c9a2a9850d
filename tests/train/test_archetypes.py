"""Archetypal decoders: rows in the hull, a plain W_dec when stored, different seeds; k-means."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2
from torch.nn.utils import parametrize

from reseed.activations.hookpoints import Hookpoint
from reseed.errors import ConfigError
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLUConfig
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopK, TopKConfig
from reseed.train.archetypes import (
    ArchetypalDecoder,
    archetypal_decoder,
    assign,
    kmeans,
    start_weights,
)
from reseed.train.config import TrainingConfig
from reseed.train.run_state import RunState

D, F, K = 10, 24, 16
CONFIGS = [
    TopKConfig(num_latents=F, k=4),
    BatchTopKConfig(num_latents=F, k=4),
    MatryoshkaConfig(num_latents=F, k=4),
    ReLUConfig(num_latents=F, l1_coefficient=0.1),
    GatedConfig(num_latents=F, l1_coefficient=0.1),
    JumpReLUConfig(num_latents=F, l0_coefficient=0.1, threshold_init=0.1, bandwidth=0.1),
]
STATES = ["adam", "sign_sgd", "muon"]


def run_state(config=CONFIGS[0], seed=7, start=True, **training):
    training = {
        "tokens": 640, "batch_size": 64, "lr": 1e-2, "decoder": "archetypal", "archetypes": K,
        "archetype_relaxation": 0.5, "decay_fraction": 0.0,
    } | training  # fmt: skip
    made = RunState(
        "m", Hookpoint("resid_post", 0), config, TrainingConfig(**training), D, seed,
        torch.device("cpu"),
    )  # fmt: skip
    if start:
        made.start(batch(99, 400))
    return made


def batch(seed, size=64):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(size, D, generator=generator) + 1


def parts(m):
    decoder = archetypal_decoder(m.sae)
    assert decoder is not None
    relaxation = m.sae.get_parameter("parametrizations.W_dec.original")
    return decoder, decoder.weights.detach(), relaxation.detach()


@pytest.mark.parametrize("optimizer", STATES)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.name)
def test_weights_stay_in_the_simplex_and_the_relaxation_in_its_ball(config, optimizer):
    m = run_state(config, optimizer=optimizer, archetype_relaxation=0.05, lr_law="width")
    before = parts(m)[1].clone()
    for index in range(m.training.steps):
        m.train(batch(index), m.optimizer)
        decoder, weights, relaxation = parts(m)
        assert weights.min() >= 0
        torch.testing.assert_close(weights.sum(1), torch.ones(F), rtol=0, atol=1e-5)
        assert relaxation.norm(dim=1).max() <= 0.05 * (1 + 1e-5)
    assert not torch.allclose(weights, before, atol=1e-3)
    assert relaxation.norm(dim=1).max() > 0.01
    rows = weights @ decoder.archetypes + relaxation
    if config.unit_norm_decoder:
        rows = rows / rows.norm(dim=1, keepdim=True)
    else:
        rows = rows * decoder.scale.detach().exp()[:, None]
    torch.testing.assert_close(m.sae.W_dec.detach(), rows)


def test_without_relaxation_rows_are_mixtures_of_centroids():
    m = run_state(archetype_relaxation=0.0)
    for index in range(4):
        m.train(batch(index), m.optimizer)
    decoder, weights, relaxation = parts(m)
    assert relaxation.count_nonzero() == 0
    mixed = weights @ decoder.archetypes
    cosine = torch.nn.functional.cosine_similarity(m.trained_sae().W_dec, mixed)
    torch.testing.assert_close(cosine.detach(), torch.ones(F))


def test_the_gradient_is_that_of_the_rows_written_out():
    decoder = ArchetypalDecoder(4, 3, 5, 1.0, unit_norm=False).double()
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    decoder.archetypes = draw(5, 3)
    with torch.no_grad():
        decoder.weights.copy_(draw(4, 5)), decoder.scale.copy_(draw(4))
    relaxation, toward = draw(4, 3).requires_grad_(), draw(4, 3)
    (decoder(relaxation) * toward).sum().backward()
    size = decoder.scale.detach().exp()[:, None]
    torch.testing.assert_close(relaxation.grad, toward * size)
    torch.testing.assert_close(decoder.weights.grad, (toward * size) @ decoder.archetypes.t())
    rows = decoder.weights @ decoder.archetypes + relaxation
    torch.testing.assert_close(decoder.scale.grad, (toward * rows * size).sum(1))


def test_a_row_without_a_positive_weight_becomes_the_mean_of_the_archetypes():
    decoder = ArchetypalDecoder(2, 3, 4, 1.0, unit_norm=True)
    weights = {
        "parametrizations.W_dec.0.weights": torch.tensor([[-1.0, -1, -2, 0], [3.0, -1, 1, 0]]),
        "parametrizations.W_dec.original": torch.tensor([[3.0, 0, 4], [0.3, 0, 0]]),
    }
    decoder.project(weights)
    mixture, relaxation = weights.values()
    torch.testing.assert_close(mixture, torch.tensor([[0.25] * 4, [0.75, 0, 0.25, 0]]))
    torch.testing.assert_close(relaxation, torch.tensor([[0.6, 0, 0.8], [0.3, 0, 0]]))


def test_the_encoder_starts_tied_and_rows_start_with_the_configured_norm():
    unit = run_state(TopKConfig(num_latents=F, k=4, encoder_init_scale=0.5)).sae
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(F))
    assert torch.equal(unit.W_enc, unit.W_dec * 0.5)
    free = run_state(ReLUConfig(num_latents=F)).sae
    torch.testing.assert_close(free.W_dec.norm(dim=1), torch.full((F,), 0.1))
    assert torch.equal(free.W_enc, free.W_dec)


def test_archetypes_are_centroids_of_the_centred_scaled_activations():
    x = batch(99, 400)
    m = run_state()
    points = x * m.scale - m.sae.b_dec.detach()
    decoder = parts(m)[0]
    nearest = torch.cdist(points.double(), decoder.archetypes.double()).argmin(1)
    # A centroid is the mean of its points, so the weighted mean of all centroids is 0.
    counts = torch.bincount(nearest, minlength=K).float()
    middle = counts @ decoder.archetypes / len(points)
    spread = float(points.norm(dim=1).mean())
    assert middle.norm() < 0.1 * spread
    raw = parts(run_state(b_dec_init="zeros"))[0]
    assert raw.archetypes.mean(0).norm() > 0.2 * spread


def test_shared_archetypes_are_equal_across_seeds_and_own_archetypes_are_not():
    def archetypes(seed, **training):
        return parts(run_state(seed=seed, **training))[0].archetypes

    assert torch.equal(archetypes(1), archetypes(2))
    assert not torch.equal(archetypes(1, archetype_seed="own"), archetypes(2, archetype_seed="own"))
    # With the same archetypes, seeds still give different initial weights.
    one, two, again = (run_state(seed=s, archetypes=None).sae.W_dec.detach() for s in (1, 2, 1))
    assert torch.equal(one, again)
    assert not torch.allclose(one, two, atol=0.1)


@pytest.mark.parametrize(("num_latents", "num_archetypes"), [(24, 16), (16, 16), (8, 20)])
def test_start_weights_lie_between_two_archetypes(num_latents, num_archetypes):
    weights = start_weights(num_latents, num_archetypes, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.sum(1), torch.ones(num_latents))
    assert (weights > 0).sum(1).max() == 2
    assert weights.max(1).values.min() >= 0.5
    led = torch.bincount(weights.argmax(1), minlength=num_archetypes)
    assert led.max() - led.min() <= 1
    assert len(torch.unique(weights, dim=0)) == num_latents


def test_the_stored_sae_is_plain_and_computes_what_was_trained():
    m = run_state()
    for index in range(3):
        m.train(batch(index), m.optimizer)
    stored, x = m.trained_sae(), batch(50)
    assert type(stored) is TopK
    assert not parametrize.is_parametrized(stored)
    assert set(stored.state_dict()) == {"W_enc", "b_enc", "W_dec", "b_dec"}
    with torch.no_grad():
        scaled = m.sae(x * m.scale).reconstruction / m.scale
        torch.testing.assert_close(stored(x).reconstruction, scaled, rtol=1e-4, atol=1e-4)
    assert parametrize.is_parametrized(m.sae)


def test_the_decoder_is_computed_once_for_a_loss_and_its_gradient(monkeypatch):
    m, calls = run_state(TopKConfig(num_latents=F, k=4, multi_topk=True)), []
    original = ArchetypalDecoder.forward
    monkeypatch.setattr(
        ArchetypalDecoder, "forward", lambda self, r: calls.append(1) or original(self, r)
    )
    m.train(batch(0), m.optimizer)
    assert len(calls) == 1


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("optimizer", STATES)
def test_resume_is_exact(optimizer, aligned, tmp_path):
    straight = run_state(optimizer=optimizer, aligned=aligned)
    for index in range(6):
        straight.train(batch(index), straight.optimizer)
        if index == 2:
            straight.save(tmp_path / "checkpoint.pt", 0.0)
    again = run_state(optimizer=optimizer, aligned=aligned, start=False)
    again.load(tmp_path / "checkpoint.pt")
    for index in range(3, 6):
        again.train(batch(index), again.optimizer)
    expected, found = straight.trained_sae().state_dict(), again.trained_sae().state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    if aligned:
        product = (found["W_enc"] * found["W_dec"]).sum(1)
        torch.testing.assert_close(product, torch.ones(F), rtol=0, atol=1e-5)


def test_training_lowers_the_reconstruction_error():
    m = run_state(TopKConfig(num_latents=F, k=4), tokens=64 * 60)
    for index in range(60):
        m.train(batch(index), m.optimizer)
    x = batch(77, 1000)

    def error(sae):
        return (x - sae(x).reconstruction).square().sum().item()

    assert error(m.trained_sae()) < 0.8 * error(run_state().trained_sae())


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"decoder_weight_decay": 0.1}, "`decoder_weight_decay` must be 0 with `decoder=archety"),
        ({"archetypes": 1}, "`archetypes` must be an integer or null, at least 2; got 1"),
        ({"decoder": "convex"}, "`decoder` must be one of free, archetypal; got 'convex'"),
    ],
)
def test_impossible_options_are_refused(training, message):
    with pytest.raises(ConfigError, match=message):
        run_state(**training)


def test_a_single_archetype_is_refused():
    with pytest.raises(ConfigError, match="`archetypes` must be at least 2; got 1"):
        run_state(TopKConfig(num_latents=1, k=1), archetypes=None)


def test_kmeans_equals_scipys():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(500, 4, generator=generator)
    found = kmeans(x, 12, torch.Generator().manual_seed(5), rounds=8)
    start = x[torch.randperm(500, generator=torch.Generator().manual_seed(5))[:12]]
    # scipy's last round moves the centroids after its last assignment, as ours does.
    expected, _ = kmeans2(x.double().numpy(), start.double().numpy(), iter=8, minit="matrix")
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_each_final_centroid_is_the_mean_of_its_nearest_points():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    centroids = kmeans(x, 5, torch.Generator().manual_seed(0), rounds=1000)
    nearest = torch.cdist(x.double(), centroids.double()).argmin(1)
    assert torch.equal(assign(x, centroids)[0], nearest)
    for index in range(5):
        torch.testing.assert_close(centroids[index], x[nearest == index].mean(0))


def test_assignment_in_blocks_equals_that_of_all_distances(monkeypatch):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    distances = torch.cdist(x.double(), x[:7].double()).square()
    monkeypatch.setattr("reseed.train.archetypes.BLOCK_DISTANCES", 20)
    nearest, least = assign(x, x[:7])
    assert torch.equal(nearest, distances.argmin(1))
    torch.testing.assert_close(least.double(), distances.min(1).values, rtol=0, atol=1e-5)


def test_an_empty_cluster_restarts_at_the_farthest_point():
    """The centroids start at 0, 0, 0.1. By hand: the second wins no point and moves to 9.5; the
    third moves to 6.2, the mean of 0.1, 9 and 9.5, loses 9 to 9.5 and, being empty, moves to 9. The
    first keeps the rest.
    """
    x = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.1, 0.0], [9.0, 0.0], [9.5, 0.0]])
    seeds = [s for s in range(50) if _starts(s) == {0, 1, 2}]
    assert seeds
    found = kmeans(x, 3, torch.Generator().manual_seed(seeds[0]))
    assert sorted(float(c[0]) for c in found) == pytest.approx([1 / 30, 9.0, 9.5])


def _starts(seed: int) -> set[int]:
    return set(torch.randperm(5, generator=torch.Generator().manual_seed(seed))[:3].tolist())


def test_kmeans_depends_only_on_points_and_seed():
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
    a, b, c = (kmeans(x, 20, torch.Generator().manual_seed(s), rounds=3) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_more_clusters_than_points_are_refused():
    with pytest.raises(ConfigError, match=r"`training.archetypes` \(=9; null: num_latents\) must"):
        kmeans(torch.zeros(8, 2), 9, torch.Generator())
