from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from reseed.evaluate.true_features import LABELS, TruthRules, measure_truth
from reseed.sae.relu import ReLUConfig

D = 8


@dataclass
class World:
    dictionary: Tensor
    groups: Tensor


@dataclass
class Sample:
    x: Tensor
    token: Tensor
    feature: Tensor
    value: Tensor
    group_active: Tensor


def world(features: int = D, groups: Tensor | None = None) -> World:
    none = torch.zeros(0, 2, D)
    return World(torch.eye(D)[:features], none if groups is None else groups)


def sample(activations: Tensor, of: World) -> Sample:
    """Make a sample from dense true activations [tokens, features]."""
    token, feature = activations.nonzero(as_tuple=True)
    x = activations @ of.dictionary
    flags = torch.zeros(len(x), len(of.groups), dtype=torch.bool)
    return Sample(x, token, feature, activations[token, feature], flags)


def drawn(tokens: int = 600, features: int = D, p: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(tokens, features, generator=generator) < p
    return fires * (0.5 + torch.rand(tokens, features, generator=generator))


def sae(encoder: Tensor, decoder: Tensor | None = None, bias: float = 0.0):
    made = ReLUConfig(num_latents=len(encoder)).build(encoder.shape[1], torch.Generator())
    with torch.no_grad():
        made.W_enc.copy_(encoder)
        made.W_dec.copy_(encoder if decoder is None else decoder)
        made.b_enc.fill_(bias)
    return made


def measured(encoder: Tensor, decoder: Tensor | None = None, a: Tensor | None = None, **more):
    of = world(**more)
    a = drawn(features=len(of.dictionary)) if a is None else a
    return measure_truth({"it": sae(encoder, decoder)}, of, [sample(a, of)])["it"]


def words(result) -> list[str]:
    return [LABELS[i] for i in result.latents["truth_label"].tolist()]


def test_the_true_dictionary_is_all_atoms() -> None:
    a = drawn()
    found = measured(torch.eye(D), a=a)
    # Everything but the true L0 is perfect.
    wanted = {
        **dict.fromkeys(["mcc", "precision", "recall", "f1", "uniqueness", "shrinkage"], 1),
        **dict.fromkeys(["atoms", "recall_energetic"], 1),
        **dict.fromkeys(["composites", "groups", "neither"], 0),
        "true_l0": int((a > 0).sum()) / len(a),
    }
    assert found.metrics == pytest.approx(wanted)
    assert words(found) == ["atom"] * D
    assert found.latents["truth_feature"].tolist() == list(range(D))
    dtypes = {name: values.dtype for name, values in found.latents.items()}
    assert dtypes == {
        "truth_label": torch.int8,
        "truth_feature": torch.int64,
        **{f"truth_{n}": torch.float32 for n in ("cosine", "precision", "recall", "f1")},
    }


def test_a_sum_is_a_composite_and_a_difference_is_neither() -> None:
    u = torch.eye(D)
    rows = torch.stack([u[0] + u[1], u[2] - u[3], u[4]])
    found = measured(rows)
    assert words(found) == ["composite", "neither", "atom"]
    assert found.latents["truth_cosine"].abs().tolist() == pytest.approx([0.7071, 0.7071, 1], 1e-4)
    assert found.metrics["mcc"] == pytest.approx((2 * 0.5**0.5 + 1) / 3)
    assert [found.metrics[n] for n in ("atoms", "composites", "neither")] == pytest.approx(
        [1 / 3] * 3
    )


def test_an_absorbed_feature_lowers_recall_and_f1_by_hand() -> None:
    """Latent 0 represents feature 0, but is silent on tokens with feature 1."""
    a = torch.zeros(100, D)
    a[:60, 0] = 1
    a[40:60, 1] = 1  # the child fires only with its parent
    u = torch.eye(D)
    found = measured(torch.stack([u[0] - u[1], u[1]]), torch.stack([u[0], u[0] + u[1]]), a)
    latents = found.latents
    # Latent 0 fires on tokens 0–39, feature 0 on 0–59: F1 = 2·40/(40 + 60) = .8 exactly.
    assert latents["truth_precision"][0] == 1
    assert latents["truth_recall"][0] == pytest.approx(40 / 60)
    assert latents["truth_f1"][0] == pytest.approx(0.8)
    assert words(found) == ["atom", "composite"]
    a[60:100, 0] = a[60:100, 1] = 1  # the child with its parent 60 times: F1 = 80/140
    found = measured(torch.stack([u[0] - u[1], u[1]]), torch.stack([u[0], u[0] + u[1]]), a)
    assert found.latents["truth_f1"][0] == pytest.approx(80 / 140)
    assert words(found) == ["composite", "composite"], "latent 0 does not detect its feature"


def test_shrinkage_excludes_tokens_of_zeros() -> None:
    a = torch.zeros(40, D)
    a[:20, 0] = 2.0
    found = measured(torch.eye(D) * 0.75, torch.eye(D), a)
    assert found.metrics["shrinkage"] == pytest.approx(0.75)
    assert found.metrics["true_l0"] == 0.5


def test_dead_latents_count_only_for_the_matched_cosine() -> None:
    a = drawn()
    a[:, 3] = 0
    a[:9, 3] = 1  # nine firings: one too few to be live
    found = measured(torch.eye(D), a=a)
    assert found.metrics["mcc"] == 1
    assert found.metrics["atoms"] == 1
    assert found.metrics["recall_energetic"] == pytest.approx(7 / 8)
    a[9, 3] = 1
    assert measured(torch.eye(D), a=a).metrics["recall_energetic"] == 1


def test_means_over_live_latents_are_nan_if_none_fires() -> None:
    metrics = measured(-torch.eye(D), torch.eye(D)).metrics
    assert metrics["mcc"] == 1
    assert (metrics["shrinkage"], metrics["recall_energetic"]) == (0, 0)
    unknown = [
        "precision",
        "recall",
        "f1",
        "uniqueness",
        "atoms",
        "composites",
        "groups",
        "neither",
    ]
    assert all(math.isnan(metrics[name]) for name in unknown)


def test_a_firing_latent_with_a_decoder_row_of_zeros_is_neither() -> None:
    u = torch.eye(D)
    found = measured(u[:2], torch.stack([u[0], torch.zeros(D)]))
    assert found.latents["truth_feature"].tolist() == [0, -1]
    assert found.latents["truth_precision"].tolist() == [1, 0]
    assert words(found) == ["atom", "neither"]
    assert (found.metrics["uniqueness"], found.metrics["mcc"]) == (0.5, 0.5)


def test_counts_with_more_latents_than_features_and_with_fewer() -> None:
    u = torch.eye(D)
    # Features 0 … 3; two latents each on 0, 1, 2, none on 3, one orthogonal to all features.
    rows = torch.stack([u[0], u[0], u[1], u[1], u[2], u[2], u[7]])
    many = measured(rows, features=4)
    assert many.metrics["mcc"] == pytest.approx(3 / 4)
    assert many.metrics["recall_energetic"] == pytest.approx(3 / 4)
    assert many.metrics["uniqueness"] == pytest.approx(3 / 6)
    # The two features of most energy are 5 and 1; one of two latents is on one of them.
    a = drawn()
    a[:, 5] *= 9
    a[:, 1] *= 5
    few = measured(torch.stack([u[5], u[2]]), a=a)
    assert few.metrics["mcc"] == 1
    assert few.metrics["recall_energetic"] == 0.5


def test_a_latent_within_a_groups_subspace_is_a_group() -> None:
    u = torch.eye(D)
    groups = torch.stack([u[6:8]])
    rows = torch.stack([u[0], 0.6 * u[6] - 0.8 * u[7], u[5] - u[6] - u[7]])
    a = torch.cat([drawn(features=6), torch.zeros(600, 2)], dim=1)
    a[:300, 6] = 1
    a[300:, 7] = -1  # activations within a group may be negative
    of = world(6, groups)
    x = a @ u
    truth = sample(a[:, :6], of)
    truth.x = x
    found = measure_truth({"it": sae(rows)}, of, [truth])["it"]
    # The last row's projection onto the group has norm √(2/3) = .816.
    assert words(found) == ["atom", "group", "neither"]
    assert found.metrics["groups"] == pytest.approx(1 / 3)


def test_a_latent_between_correlated_features_is_an_atom_of_the_one_it_detects() -> None:
    """Two features at cosine .8: a latent halfway has cosine .9487 with both, and detects one."""
    rows = torch.tensor([[1.0, 0], [0.8, 0.6]])
    between = (rows[0] + rows[1]) / (rows[0] + rows[1]).norm()
    of = World(rows, torch.zeros(0, 1, 2))
    a = torch.zeros(100, 2)
    a[:50, 0] = a[50:70, 1] = 1
    # It fires 70 times: 50 with feature 0, 20 with feature 1; F1 is .83 or .44.
    tilted = between + 1e-3 * torch.tensor([0.3, -0.9])
    found = measure_truth({"it": sae(tilted[None])}, of, [sample(a, of)])["it"]
    assert float(found.latents["truth_cosine"][0]) == pytest.approx(0.9487, abs=2e-3)
    assert float(found.latents["truth_f1"][0]) == pytest.approx(100 / 120)
    assert words(found) == ["atom"]


def test_results_do_not_depend_on_block_and_sample_sizes() -> None:
    of, a = world(), drawn(500)
    rows = torch.randn(20, D, generator=torch.Generator().manual_seed(3))
    one = sample(a, of)
    whole = measure_truth({"it": sae(rows)}, of, [one])["it"]
    parts = [sample(part, of) for part in a.split(93)]
    pieces = measure_truth({"it": sae(rows)}, of, parts, TruthRules(block=17))["it"]
    assert pieces.metrics == pytest.approx(whole.metrics, rel=1e-6)
    for name, values in whole.latents.items():
        assert torch.equal(pieces.latents[name], values), name


def test_counts_equal_those_of_a_plain_loop() -> None:
    of, a = world(), drawn(200)
    rows = torch.randn(10, D, generator=torch.Generator().manual_seed(4))
    made = sae(rows, bias=-0.5)
    found = measure_truth({"it": made}, of, [sample(a, of)], TruthRules(block=64))["it"].latents
    with torch.no_grad():
        fires = (made.encode(sample(a, of).x) > 0).tolist()
    for latent in range(10):
        feature = int(rows[latent].abs().argmax())
        both = sum(fires[t][latent] and a[t, feature] > 0 for t in range(200))
        alone = sum(fires[t][latent] for t in range(200))
        there = int((a[:, feature] > 0).sum())
        assert found["truth_feature"][latent] == feature
        assert found["truth_precision"][latent] == pytest.approx(both / alone)
        assert found["truth_recall"][latent] == pytest.approx(both / there)
        assert found["truth_f1"][latent] == pytest.approx(2 * both / (alone + there))


def test_results_do_not_depend_on_the_order_of_latents_and_features() -> None:
    of, a = world(), drawn()
    generator = torch.Generator().manual_seed(5)
    rows = torch.cat([torch.eye(D)[:5], torch.randn(9, D, generator=generator)])
    latents, features = (torch.randperm(n, generator=generator) for n in (14, D))
    first = measure_truth({"it": sae(rows)}, of, [sample(a, of)])["it"]
    other = World(of.dictionary[features], of.groups)
    again = measure_truth({"it": sae(rows[latents])}, other, [sample(a[:, features], other)])["it"]
    assert again.metrics == pytest.approx(first.metrics, rel=1e-6)
    assert torch.equal(again.latents["truth_label"], first.latents["truth_label"][latents])
    here = features[again.latents["truth_feature"]]
    assert torch.equal(here, first.latents["truth_feature"][latents])


def test_many_saes_at_once_equal_each_alone() -> None:
    of, a = world(), drawn()
    saes = {"eye": sae(torch.eye(D)), "two": sae(torch.eye(D)[:2] + 0.1)}
    together = measure_truth(saes, of, iter([sample(a, of)]))
    for name, one in saes.items():
        alone = measure_truth({name: one}, of, [sample(a, of)])[name]
        assert together[name].metrics == pytest.approx(alone.metrics, nan_ok=True)


def test_invalid_samples_and_worlds_are_refused() -> None:
    of = world()
    with pytest.raises(ValueError, match="no samples were given: there is nothing to measure"):
        measure_truth({"it": sae(torch.eye(D))}, of, [])
    one = sample(drawn(), of)
    one.token = one.token.flip(0)
    with pytest.raises(ValueError, match="`token` of a sample must be sorted; it is not"):
        measure_truth({"it": sae(torch.eye(D))}, of, [one])
    with pytest.raises(ValueError, match=r"it: `d_in` \(=4\) must be that of the world \(=8\)"):
        measure_truth({"it": sae(torch.eye(4))}, of, [sample(drawn(), of)])
    with pytest.raises(ValueError, match=r"`world\.dictionary` must have at least one feature"):
        measure_truth({}, World(torch.zeros(0, D), torch.eye(D)[None, :2]), [])
