"""Comparison of an SAE with a world whose true features are known.

Measures: mean matched cosine, precision and recall of each latent as a detector of its feature,
uniqueness, shrinkage (as in the synthetic benchmarks of SAEs; Chanin et al. 2025, arXiv
2508.16560), and a label per latent. The cosine alone does not suffice: it would take u0 + u1 for a
copy of u0 (cos .7071), and it does not tell whether a latent that points along a feature fires with
it.

Letters: F latents, N true features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.synthetic.worlds import Sample, World
from reseed.evaluate.true_directions import DirectionMatch, match_directions
from reseed.sae.base import SAE

LABELS = ("neither", "composite", "atom", "group")
"""Labels in the order of their numbers in ``truth_label``, from 0."""


@dataclass(frozen=True)
class TruthRules:
    """Thresholds of the labels.

    Attributes:
        cosine: minimum cosine of an atom or composite; for a group, minimum norm of the projection.
        f1: minimum F1 of an atom's firing as a detector of its feature.
        live_at_least: a latent is live if it fires at least this often in the samples.
        candidates: number of features tried for composites, see
            `true_directions.nonnegative_cosine`.
        block: number of tokens that are encoded at once.
    """

    cosine: float = 0.9
    f1: float = 0.8
    live_at_least: int = 10
    candidates: int = 12
    block: int = 4_096


@dataclass(frozen=True, eq=False)
class TruthResult:
    """The comparison of one SAE with the truth.

    Attributes:
        metrics: numbers about the SAE; those over live latents are NaN if no latent is live.

            - ``mcc``: mean |cos| of decoder rows and true features under the assignment that
              maximises it, over min(F, N) pairs, dead latents included.
            - ``precision``, ``recall``, ``f1``: means over live latents of how well "the latent
              fires" detects "its feature is active"; a latent's feature is that with the largest
              |cos|.
            - ``uniqueness``: distinct features of live latents / live latents; 1 if no two latents
              share a feature.
            - ``shrinkage``: mean ‖x̂‖/‖x‖ over tokens with x ≠ 0; below 1 the reconstruction is
              shorter than the activation.
            - ``true_l0``: true features (of the dictionary, not of groups) active per token.
            - ``atoms``, ``composites``, ``groups``, ``neither``: fractions of live latents.
            - ``recall_energetic``: of the min(F, N) features with the largest mean a² (those that F
              perfect latents would find), the fraction with a live atom.
        latents: a value per latent, for ``latents.safetensors``: ``truth_label`` (int8, index into
            `LABELS`), ``truth_feature`` (int64, −1 for a row without direction), ``truth_cosine``
            (signed, with that feature), ``truth_precision``, ``truth_recall``, ``truth_f1``
            (float32, 0 where undefined). Every latent has a label; a latent that never fires
            is not an atom.
    """

    metrics: dict[str, float]
    latents: dict[str, Tensor]


def measure_truth(
    saes: Mapping[str, SAE],
    world: World,
    samples: Iterable[Sample],
    rules: TruthRules | None = None,
) -> dict[str, TruthResult]:
    """Measure many SAEs in one pass over samples of a world.

    A latent gets the first label that holds: **atom**: |cos| ≥ .9 with one true feature and F1 ≥ .8
    as its detector; **composite**: cos ≥ .9 with a non-negative sum of at most 3 features (also
    with a single feature, if the latent does not fire with it); **group**: its projection onto one
    group's subspace has norm ≥ .9; else **neither**.

    Args:
        saes: SAEs for raw activations of the world.
        world: the true directions.
        samples: activations with their true features.
        rules: thresholds.

    Raises:
        ValueError: there is no true feature or no sample, a sample's pairs are not sorted by
            token, or an SAE has another `d_in`.
    """
    rules = rules or TruthRules()
    if len(world.dictionary) == 0:
        raise ValueError("`world.dictionary` must have at least one feature; it has none")
    counts: dict[str, _Counts] = {}
    for name, sae in saes.items():
        if sae.d_in != world.dictionary.shape[1]:
            raise ValueError(
                f"{name}: `d_in` (={sae.d_in}) must be that of the world "
                f"(={world.dictionary.shape[1]})"
            )
        found = match_directions(sae.W_dec, world.dictionary, world.groups, rules.candidates)
        counts[name] = _Counts(sae, found)
    truth = _Truth.of(len(world.dictionary))
    for block in _blocks(samples, rules.block):
        truth.add(block)
        active = block.active(len(world.dictionary))
        for count in counts.values():
            count.add(block.x, active)
    if truth.tokens == 0:
        raise ValueError("no samples were given: there is nothing to measure")
    return {name: _result(count, truth, rules) for name, count in counts.items()}


class _Block(NamedTuple):
    """A block of tokens and its active (token, feature) pairs; tokens count from 0."""

    x: Float[Tensor, "tokens d_in"]
    token: Int[Tensor, " pairs"]
    feature: Int[Tensor, " pairs"]
    value: Float[Tensor, " pairs"]

    def active(self, features: int) -> Bool[Tensor, "tokens features"]:
        flags = torch.zeros(len(self.x), features, dtype=torch.bool)
        flags[self.token, self.feature] = True
        return flags


def _blocks(samples: Iterable[Sample], size: int) -> Iterator[_Block]:
    for sample in samples:
        starts = torch.arange(0, len(sample.x) + size, size)
        token, feature, value = (t.cpu() for t in (sample.token, sample.feature, sample.value))
        if (token[1:] < token[:-1]).any():
            raise ValueError("`token` of a sample must be sorted; it is not")
        borders = torch.searchsorted(token, starts)
        for i, part in enumerate(sample.x.split(size)):
            pairs = slice(int(borders[i]), int(borders[i + 1]))
            if len(part):
                yield _Block(part, token[pairs] - starts[i], feature[pairs], value[pairs])


@dataclass
class _Truth:
    """Firing counts and energies of the true features over all samples."""

    fired: Int[Tensor, " N"]
    energy: Float[Tensor, " N"]
    tokens: int = 0

    @classmethod
    def of(cls, features: int) -> _Truth:
        zeros = torch.zeros(features, dtype=torch.float64)
        return cls(zeros.to(torch.int64), zeros)

    def add(self, block: _Block) -> None:
        features = len(self.fired)
        self.tokens += len(block.x)
        self.fired += torch.bincount(block.feature, minlength=features)
        squares = block.value.double().square()
        self.energy += torch.bincount(block.feature, weights=squares, minlength=features)


@dataclass
class _Counts:
    """Counts of one SAE over all samples.

    The weights determine each latent's feature, so joint firing needs F counts, not F × N.
    """

    sae: SAE
    found: DirectionMatch
    fired: Int[Tensor, " F"] = field(init=False)
    joint: Int[Tensor, " F"] = field(init=False)
    ratio: float = 0.0
    not_zero: int = 0

    def __post_init__(self) -> None:
        self.fired = torch.zeros(self.sae.num_latents, dtype=torch.int64)
        self.joint = torch.zeros_like(self.fired)

    @torch.inference_mode()
    def add(self, x: Float[Tensor, "tokens d_in"], active: Bool[Tensor, "tokens N"]) -> None:
        device = self.sae.W_dec.device
        x = x.to(device, torch.float32)
        output = self.sae(x)
        fired = output.latents != 0
        with_feature = active.to(device)[:, self.found.feature.clamp(min=0).to(device)]
        self.fired += fired.sum(0).cpu()
        self.joint += (fired & with_feature).sum(0).cpu()
        length = x.double().norm(dim=1)
        there = length > 0
        lengths = output.reconstruction.double().norm(dim=1)
        self.ratio += float((lengths[there] / length[there]).sum())
        self.not_zero += int(there.sum())


def _result(counts: _Counts, truth: _Truth, rules: TruthRules) -> TruthResult:
    found, fired = counts.found, counts.fired
    directed = found.feature >= 0
    joint = torch.where(directed, counts.joint, 0)
    of_feature = torch.where(directed, truth.fired[found.feature.clamp(min=0)], 0)
    precision, recall = _ratio(joint, fired), _ratio(joint, of_feature)
    f1 = _ratio(2 * joint, fired + of_feature)
    label = _labels(found, f1, rules)
    latents = {
        "truth_label": label,
        "truth_feature": found.feature,
        "truth_cosine": found.cosine,
        "truth_precision": precision.float(),
        "truth_recall": recall.float(),
        "truth_f1": f1.float(),
    }
    live = fired >= rules.live_at_least
    atoms = found.feature[live & (label == LABELS.index("atom"))]
    size = min(len(fired), len(truth.fired))
    energetic = truth.energy.argsort(descending=True, stable=True)[:size]
    distinct = found.feature[live & directed].unique().numel()
    fractions = {
        name: _mean((label[live] == LABELS.index(word)).double())
        for name, word in _FRACTIONS.items()
    }
    metrics = {
        "mcc": found.mcc,
        "precision": _mean(precision[live]),
        "recall": _mean(recall[live]),
        "f1": _mean(f1[live]),
        "uniqueness": distinct / int(live.sum()) if live.any() else float("nan"),
        "shrinkage": counts.ratio / counts.not_zero if counts.not_zero else float("nan"),
        "true_l0": int(truth.fired.sum()) / truth.tokens,
        **fractions,
        "recall_energetic": _mean(torch.isin(energetic, atoms).double()),
    }
    return TruthResult(metrics, latents)


_FRACTIONS = {"atoms": "atom", "composites": "composite", "groups": "group", "neither": "neither"}


def _labels(found: DirectionMatch, f1: Float[Tensor, " F"], rules: TruthRules) -> Int[Tensor, " F"]:
    """Assign the weakest label first; each stronger label that holds replaces it."""
    label = torch.full(found.feature.shape, LABELS.index("neither"), dtype=torch.int8)
    label[found.group >= rules.cosine] = LABELS.index("group")
    label[found.composite >= rules.cosine] = LABELS.index("composite")
    label[(found.cosine.abs() >= rules.cosine) & (f1 >= rules.f1)] = LABELS.index("atom")
    return label


def _ratio(part: Int[Tensor, " F"], whole: Int[Tensor, " F"]) -> Float[Tensor, " F"]:
    """Return part / whole; 0 if the whole is 0."""
    return part.double() / whole.clamp(min=1)


def _mean(values: Float[Tensor, " n"]) -> float:
    return float(values.mean()) if len(values) else float("nan")
