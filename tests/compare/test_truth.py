import dataclasses
import re
from math import exp, log, sqrt
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.special import expit, logit

import reseed.evaluate.true_features as evaluation
from reseed.compare.cell import CellResult, compare_cell
from reseed.compare.dictionary import LABELS, load_dictionaries, truth_metrics
from reseed.compare.truth import truth_estimates
from reseed.sae.relu import ReLUConfig

ATOM, NEITHER = LABELS.index("atom"), LABELS.index("neither")


def one_sided(*strata):
    """Return the estimates of two seeds from given counts; only the first has live latents.

    Each stratum is (firing, shared atoms, shared others, orphan atoms, orphan others).
    """
    label, firing, shared = [], [], []
    for fires, *counts in strata:
        label += np.repeat([ATOM, NEITHER, ATOM, NEITHER], counts).tolist()
        shared += np.repeat([True, True, False, False], counts).tolist()
        firing += [fires] * sum(counts)
    n = len(label)
    flags = {(0, 1): np.array(shared), (1, 0): np.ones(n, bool)}
    live = [np.ones(n, bool), np.zeros(n, bool)]
    found = truth_estimates([np.array(label)] * 2, [np.array(firing)] * 2, live, flags)
    return {name.removeprefix("truth_"): value for name, value in found.items()}


def test_estimates_of_two_strata_equal_hand_computed_ones():
    found = one_sided((10, 4, 6, 6, 24), (1000, 30, 10, 10, 10))
    wanted = {
        "atom_given_shared": 34 / 50,
        "atom_given_orphan": 16 / 50,
        "difference": 18 / 50,
        # (4·30 − 6·10)/40 + (30·20 − 10·40)/60, over 10·30/40 + 40·20/60.
        "difference_adjusted": (1.5 + 10 / 3) / (7.5 + 40 / 3),
        "likelihood_ratio": (34 / 50) / (16 / 50),
        # Atoms 10 and 40, others 30 and 20: (4·30/40 + 30·20/60)/(6·10/40 + 10·40/60).
        "likelihood_ratio_adjusted": (3 + 10) / (1.5 + 20 / 3),
        "shared_given_atom": 34 / 50,
        "shared_given_neither": 16 / 50,
    }
    assert {name: found[name].mean for name in wanted} == pytest.approx(wanted)
    reasons = {value.reason for name, value in found.items() if name in wanted}
    assert reasons == {"fewer than 3 seeds: no interval"}


def test_adjusted_estimates_remove_the_effect_of_firing():
    """Simpson's paradox: within each decile shared latents are atoms less often than orphans."""
    found = one_sided((1000, 80, 10, 10, 0), (10, 0, 10, 9, 81))
    assert found["difference"].mean == pytest.approx(0.80 - 0.19)
    # ((80·10 − 10·90)/100 + (0·90 − 9·10)/100) / (9 + 9)
    assert found["difference_adjusted"].mean == pytest.approx(-1.9 / 18)
    assert found["likelihood_ratio"].mean == pytest.approx((80 / 99) / (20 / 101))
    # Atoms 90 and 9, others 10 and 91, of 100 each.
    adjusted = (80 * 10 + 0 * 91) / (10 * 90 + 10 * 9)
    assert found["likelihood_ratio_adjusted"].mean == pytest.approx(adjusted)


def test_deciles_pool_the_live_latents_of_all_seeds():
    """Twenty firing counts make deciles of two; the only informative decile is 19 with 20."""
    firing = [np.arange(1, 20, 2), np.arange(2, 21, 2)]
    labels = [np.full(10, NEITHER), np.full(10, NEITHER)]
    labels[0][9], shared = ATOM, np.zeros(10, bool)
    shared[9] = True
    live = [np.ones(10, bool)] * 2
    flags = {(0, 1): shared, (1, 0): np.zeros(10, bool)}
    found = truth_estimates(labels, firing, live, flags)["truth_difference_adjusted"]
    # Only the last decile has a shared latent (19, an atom) and an orphan (20, not an atom).
    assert found.mean == 1
    # If seed 1 fires more often than all of seed 0, the fifth decile holds 17 and 19.
    far = [firing[0], np.arange(21, 41, 2)]
    labels[0][8] = ATOM
    found = truth_estimates(labels, far, live, flags)["truth_difference_adjusted"]
    assert found.mean == 0, "17 (orphan) and 19 (shared) are both atoms"


def drawn(rng, n, size, given_atom, given_other, atoms=0.3, seed_sd=0.0):
    """Draw labels and sharing of n seeds: logit P(shared) = logit p_label + u_s + u_t."""
    labels = [np.where(rng.random(size) < atoms, ATOM, NEITHER) for _ in range(n)]
    effect = seed_sd * rng.standard_normal(n)
    shared = {}
    for s in range(n):
        p = logit(np.where(labels[s] == ATOM, given_atom, given_other))
        for t in range(n):
            if t != s:
                shared[s, t] = rng.random(size) < expit(p + effect[s] + effect[t])
    firing = [rng.integers(10, 1000, size) for _ in range(n)]
    return labels, firing, [np.ones(size, bool)] * n, shared


def test_known_probabilities_are_recovered():
    found = truth_estimates(*drawn(np.random.default_rng(0), 5, 5000, 0.8, 0.25))
    # 5·4·5000 = 100,000 latents give a standard error of .003 at most.
    assert found["truth_shared_given_atom"].mean == pytest.approx(0.8, abs=0.012)
    assert found["truth_shared_given_neither"].mean == pytest.approx(0.25, abs=0.012)
    ratio = found["truth_likelihood_ratio"]
    assert ratio.mean == pytest.approx(3.2, rel=0.04)
    # Firing is independent of the rest here, so adjusting for it changes nothing.
    assert found["truth_likelihood_ratio_adjusted"].mean == pytest.approx(ratio.mean, rel=0.01)
    shared, orphan = 0.3 * 0.8 / (0.3 * 0.8 + 0.7 * 0.25), 0.3 * 0.2 / (0.3 * 0.2 + 0.7 * 0.75)
    assert found["truth_atom_given_shared"].mean == pytest.approx(shared, abs=0.015)
    assert found["truth_difference"].mean == pytest.approx(shared - orphan, abs=0.02)
    adjusted = found["truth_difference_adjusted"]
    assert adjusted.mean == pytest.approx(shared - orphan, abs=0.02)
    assert adjusted.low < adjusted.mean < adjusted.high


def test_unrelated_sharing_and_truth_show_no_association():
    found = truth_estimates(*drawn(np.random.default_rng(1), 5, 5000, 0.4, 0.4))
    assert found["truth_difference"].mean == pytest.approx(0, abs=0.012)
    assert found["truth_likelihood_ratio"].mean == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_cover_the_truth_at_their_confidence(n):
    rng, sd = np.random.default_rng(n), 0.3
    # The effects of two seeds add up to a normal of standard deviation √2·sd.
    u = sqrt(2) * sd * stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    atom, other = (float(expit(logit(p) + u).mean()) for p in (0.7, 0.2))
    shared, orphan = 0.3 * atom + 0.7 * other, 0.3 * (1 - atom) + 0.7 * (1 - other)
    truth = {
        "truth_likelihood_ratio": atom / other,
        "truth_difference": 0.3 * atom / shared - 0.3 * (1 - atom) / orphan,
        "truth_shared_given_atom": atom,
    }
    covered = dict.fromkeys(truth, 0)
    for _ in range(400):
        found = truth_estimates(*drawn(rng, n, 200, 0.7, 0.2, seed_sd=sd))
        for name, value in truth.items():
            covered[name] += found[name].low <= value <= found[name].high
    # 400 trials give a standard error of .011 at .95.
    assert all(0.91 <= count / 400 <= 1 for count in covered.values()), covered


def test_intervals_leave_one_seed_out_at_a_time():
    labels, firing, live, shared = drawn(np.random.default_rng(2), 4, 60, 0.7, 0.3)
    found = truth_estimates(labels, firing, live, shared)
    names = ["truth_likelihood_ratio", "truth_difference", "truth_atom_given_shared"]
    without = {name: [] for name in names}
    for s in range(4):
        kept = [t for t in range(4) if t != s]
        flags = {(i, j): shared[a, b] for i, a in enumerate(kept) for j, b in enumerate(kept)
                 if a != b}  # fmt: skip
        some = truth_estimates(*([x[t] for t in kept] for x in (labels, firing, live)), flags)
        for name in names:
            without[name].append(some[name].mean)
    t = stats.t.ppf(0.975, 3)

    def error(values):
        return sqrt(3 / 4 * np.square(values - np.mean(values)).sum())

    ratio = found["truth_likelihood_ratio"]
    on_log = error(np.log(without["truth_likelihood_ratio"]))
    assert ratio.low == pytest.approx(exp(log(ratio.mean) - t * on_log))
    assert ratio.high == pytest.approx(exp(log(ratio.mean) + t * on_log))
    linear = found["truth_difference"]
    assert linear.high == pytest.approx(linear.mean + t * error(without["truth_difference"]))
    p = found["truth_atom_given_shared"]
    reach = t * error(without["truth_atom_given_shared"]) / (p.mean * (1 - p.mean))
    assert p.low == pytest.approx(expit(logit(p.mean) - reach))


@pytest.mark.parametrize(
    ("counts", "reasons"),
    [
        (
            (0, 0, 5, 5),
            {
                "atom_given_shared": "no live latent is shared",
                "difference": "no live latent is shared",
                "difference_adjusted": "no live latent is shared",
                "likelihood_ratio": "no live latent is shared",
                "likelihood_ratio_adjusted": "no live latent is shared",
            },
        ),
        (
            (5, 5, 0, 0),
            {
                "atom_given_orphan": "every live latent is shared",
                "difference": "every live latent is shared",
                "difference_adjusted": "every live latent is shared",
            },
        ),
        (
            (0, 5, 0, 5),
            {
                "likelihood_ratio": "no live latent is an atom",
                "likelihood_ratio_adjusted": "no live latent is an atom",
                "shared_given_atom": "no live latent is labelled atom",
            },
        ),
        (
            (5, 0, 5, 0),
            {
                "likelihood_ratio": "every live latent is an atom",
                "likelihood_ratio_adjusted": "every live latent is an atom",
                "shared_given_neither": "no live latent is labelled neither",
            },
        ),
        (
            (5, 0, 0, 5),
            dict.fromkeys(
                ["likelihood_ratio", "likelihood_ratio_adjusted"],
                "only atoms are shared: the likelihood ratio is infinite",
            ),
        ),
    ],
)
def test_undefined_estimates_have_a_reason(counts, reasons):
    found = one_sided((100, *counts))
    absent = ("shared_given_composite", "shared_given_group")
    undefined = {k: v.reason for k, v in found.items() if np.isnan(v.mean) and k not in absent}
    assert undefined == reasons


def test_adjusted_estimates_need_strata_that_overlap():
    found = one_sided((10, 0, 0, 3, 7), (1000, 6, 4, 0, 0))
    assert found["difference"].mean == pytest.approx(0.3)
    reason = "no firing decile has both shared latents and others"
    assert found["difference_adjusted"].reason == reason
    found = one_sided((10, 0, 5, 0, 5), (1000, 6, 0, 4, 0))
    reason = "no firing decile has both atoms and shared latents that are not atoms"
    assert found["likelihood_ratio_adjusted"].reason == reason


def test_without_live_latents_all_estimates_are_nan():
    none = [np.zeros(3, int)] * 3
    pairs = {(s, t): np.zeros(3, bool) for s in range(3) for t in range(3) if s != t}
    found = truth_estimates(none, none, [np.zeros(3, bool)] * 3, pairs)
    assert all(np.isnan(value.mean) for value in found.values())
    assert {value.reason for value in found.values()} == {"no latent is live"}


def test_an_estimate_undefined_without_one_seed_has_no_interval():
    """Seeds 0 and 1 share only with each other; without either, nothing is shared."""
    labels = [np.array([ATOM, NEITHER])] * 3
    shared = {(s, t): np.full(2, {s, t} == {0, 1}) for s in range(3) for t in range(3) if s != t}
    found = truth_estimates(labels, [np.array([50, 50])] * 3, [np.ones(2, bool)] * 3, shared)
    atoms = found["truth_atom_given_shared"]
    assert (atoms.mean, atoms.low, atoms.reason) == (
        0.5,
        None,
        "undefined without one of the seeds",
    )
    assert found["truth_shared_given_atom"].mean == pytest.approx(1 / 3)
    assert found["truth_shared_given_atom"].low is not None


def test_a_ratio_of_0_has_no_interval_on_the_log_scale():
    labels = [np.array([ATOM, NEITHER])] * 3
    shared = {(s, t): np.array([False, True]) for s in range(3) for t in range(3) if s != t}
    found = truth_estimates(labels, [np.array([50, 50])] * 3, [np.ones(2, bool)] * 3, shared)
    ratio = found["truth_likelihood_ratio"]
    assert (ratio.mean, ratio.reason) == (0, "0: no interval on the log scale")


@pytest.fixture
def labelled(dictionary):
    """Return three seeds that share latents 0 … 11 of 40; atoms are 0 … 7 and 20 … 23."""
    common = np.random.default_rng(7).standard_normal((2, 12, 64))
    truth = np.full(40, LABELS.index("composite"))
    truth[[*range(8), *range(20, 24)]] = ATOM
    runs = []
    for s in range(3):
        rows = np.random.default_rng(s).standard_normal((2, 40, 64))
        rows[:, :12] = common
        firing = np.full(40, 100)
        if s == 1:
            firing[0] = 3  # a shared atom that is not live
        runs.append(dictionary(*rows, seed=str(s), firing=firing, truth=truth))
    return runs


def test_truth_estimates_of_a_cell_equal_hand_computed_ones(labelled, settings):
    found = compare_cell(labelled, [], settings).estimates
    # Seeds 0 and 2: 12 shared, 8 of them atoms; 28 orphans, 4 of them atoms. With seed 1, from
    # either side: 11 shared, 7 atoms. Orphans: 29 (5 atoms) from seed 0 or 2, 28 (4) from 1.
    assert found["truth_atom_given_shared"].mean == pytest.approx(
        (2 * 8 + 4 * 7) / (2 * 12 + 4 * 11)
    )
    orphan = (2 * 4 + 2 * 5 + 2 * 4) / (2 * 28 + 2 * 29 + 2 * 28)
    assert found["truth_atom_given_orphan"].mean == pytest.approx(orphan)
    assert found["truth_shared_given_composite"].mean == pytest.approx(4 / 28)
    assert np.isnan(found["truth_shared_given_group"].mean)


def test_labels_are_a_column_of_words_and_are_read_as_written(labelled, settings, tmp_path):
    cell = compare_cell(labelled, [], settings)
    words = cell.latents["truth"].to_pylist()
    assert words[:8] == ["atom"] * 8
    assert words[40:] == 2 * words[:40]
    assert set(words[8:20]) == {"composite"}
    cell.write(tmp_path)
    again = CellResult.read(tmp_path)
    assert again.latents.equals(cell.latents)
    for name, value in cell.estimates.items():
        kept = again.estimates[name]
        assert dataclasses.astuple(kept) == pytest.approx(dataclasses.astuple(value), nan_ok=True)


def test_a_cell_has_truth_estimates_only_if_all_runs_have_labels(labelled, settings):
    full = compare_cell(labelled, [], settings)
    part = compare_cell([*labelled[:2], dataclasses.replace(labelled[2], truth=None)], [], settings)
    assert part.latents.equals(full.latents.drop_columns("truth"))
    kept = {k: v for k, v in full.estimates.items() if not k.startswith("truth_")}
    assert part.estimates.keys() == kept.keys()
    for name, value in part.estimates.items():
        expected = dataclasses.astuple(kept[name])
        assert dataclasses.astuple(value) == pytest.approx(expected, nan_ok=True)
    assert set(full.estimates) > set(part.estimates)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        (np.zeros(4), "run-0: `truth` must be integers; got float64"),
        (np.zeros(3, int), "run-0: `truth` must have one value per latent [4]; got [3]"),
        (
            np.array([0, 1, 2, 4]),
            "must lie between 0 and 3 (neither, composite, atom, group); got 0 to 4",
        ),
    ],
)
def test_impossible_labels_are_refused(dictionary, truth, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        dictionary(np.ones((4, 3)), truth=truth)


def test_labels_are_numbered_as_in_the_evaluation():
    assert LABELS == evaluation.LABELS


def stored(latents, metrics):
    counts = {"firing": np.array([0, 5, 9]), "tokens_since_fired": np.array([99, 0, 0])}
    base = {"tokens": 50, "fvu": 0.1, "l0": 2.0, "cosine": 0.9, "dead_fraction": 0.0}
    return SimpleNamespace(
        id="it",
        record={"dead_after_tokens": 10, "steps": 7},
        metrics=base | metrics,
        latents=lambda: counts | latents,
        path=None,
        activations=lambda: None,
    )


def test_loading_a_run_with_and_without_truth(load_as):
    load_as(ReLUConfig(num_latents=3).build(4, torch.Generator()))
    labels = np.array([0, 2, 1], dtype=np.int8)
    metrics = {"truth": {"mcc": 0.8, "f1": None}}
    trained, untrained = load_dictionaries(stored({"truth_label": labels}, metrics), "0")
    assert trained.truth is not None
    assert trained.truth.tolist() == [0, 2, 1]
    assert untrained.truth is None, "labels are of the trained weights"
    assert trained.metrics["truth_mcc"] == 0.8
    assert np.isnan(trained.metrics["truth_f1"])
    plain, _ = load_dictionaries(stored({}, {}), "0")
    assert plain.truth is None
    assert list(plain.metrics) == ["fvu", "l0", "cosine", "dead_fraction", "steps"]
    assert truth_metrics({"truth": None}) == {}
