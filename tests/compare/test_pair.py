import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reseed.compare.matching import match
from reseed.compare.pair import compare_pair

FRACTIONS = (
    "shared_fraction",
    "shared_fraction_live",
    "shared_fraction_not_dead",
    "shared_fraction_decoder",
    "index_agreement",
    "coverage",
    "coverage_live",
    "ceiling_live",
    "shared_fraction_joint",
    "shared_fraction_by_firing",
    "mutual_nearest",
    "mutual_nearest_decoder_live",
    "shared_fraction_at_0.9",
)
COSINES = (
    *("cosine_encoder", "cosine_decoder", "cosine_encoder_live", "cosine_decoder_live"),
    *("mmcs", "mmcs_live", "pw_mcc_signed", "pw_mcc_absolute"),
)


def noisy_copy(rng, a_rows, noise):
    """Make a permuted, noisy copy of encoder and decoder; the noise level differs between rows."""
    order = rng.permutation(a_rows.shape[1])
    size = rng.uniform(0, noise, (1, a_rows.shape[1], 1))
    return (a_rows + size * rng.standard_normal(a_rows.shape))[:, order]


@pytest.fixture
def noisy_pair(dictionary):
    rng = np.random.default_rng(3)
    a_rows = rng.standard_normal((2, 60, 16))
    b_rows = noisy_copy(rng, a_rows, 1.6)[:, :50]
    a = dictionary(*a_rows, seed="a", firing=rng.integers(0, 30, 60))
    return a, dictionary(*b_rows, seed="b", firing=rng.integers(0, 30, 50))


def test_a_permuted_copy_shares_everything(dictionary):
    rng = np.random.default_rng(0)
    rows, order = rng.standard_normal((2, 100, 24)), rng.permutation(100)
    firing = rng.integers(10, 99, 100)
    a = dictionary(*rows, firing=firing, seed="a")
    b = dictionary(*rows[:, order], firing=firing[order], seed="b")
    pair = compare_pair(a, b)
    assert {name: pair.measures[name] for name in FRACTIONS} == dict.fromkeys(FRACTIONS, 1.0)
    assert [pair.measures[name] for name in COSINES] == pytest.approx([1] * 8)
    assert np.array_equal(pair.a.partner_encoder, np.argsort(order))


def test_two_random_dictionaries_share_nothing(dictionary):
    rng = np.random.default_rng(0)
    a, b = (dictionary(*rng.standard_normal((2, 300, 64)), seed=s) for s in "ab")
    measures = compare_pair(a, b).measures
    assert measures["shared_latents"] == 0
    assert measures["coverage"] == 0
    for name in ("shared_fraction_joint", "mutual_nearest", "split_fraction"):
        assert measures[name] == 0
    # √(2 ln F/D) = .42 is an upper bound of the matched cosine.
    assert 0.2 < measures["cosine_encoder"] < 0.42


def test_the_strict_rule_agrees_with_its_definition(noisy_pair):
    a, b = noisy_pair
    by_encoder, by_decoder = match(a.encoder, b.encoder), match(a.decoder, b.decoder)
    shared, agrees, near, shared_live = 0, 0, 0, 0
    for i in range(60):
        j, k = by_encoder.assignment[i], by_decoder.assignment[i]
        agrees += j == k != -1
        near += k != -1 and by_decoder.cosines[i] >= 0.7
        if j == k != -1 and by_encoder.cosines[i] >= 0.7 and by_decoder.cosines[i] >= 0.7:
            shared += 1
            shared_live += a.firing[i] >= 10 and b.firing[j] >= 10
    measures = compare_pair(a, b).measures
    assert 5 < shared_live < shared < agrees, "the measures must differ in this example"
    assert measures["shared_latents"] == shared
    assert measures["shared_fraction"] == 2 * shared / 110
    assert measures["index_agreement"] == 2 * agrees / 110
    assert measures["shared_fraction_decoder"] == 2 * near / 110
    live = (a.firing >= 10).sum(), (b.firing >= 10).sum()
    assert measures["shared_fraction_live"] == 2 * shared_live / sum(live)
    assert measures["ceiling_live"] == 2 * min(live) / sum(live)


def test_coverage_agrees_with_its_definition(noisy_pair, monkeypatch):
    a, b = noisy_pair
    monkeypatch.setattr("reseed.compare.nearest.BLOCK_ENTRIES", 7 * 50)  # several blocks

    def cosine(x, y):
        return x @ y / np.linalg.norm(x) / np.linalg.norm(y)

    near = np.array([
        [
            min(cosine(a.encoder[i], b.encoder[j]), cosine(a.decoder[i], b.decoder[j])) >= 0.7
            for j in range(50)
        ]
        for i in range(60)
    ])  # fmt: skip
    live_a, live_b = a.firing >= 10, b.firing >= 10
    pair = compare_pair(a, b)
    assert pair.a.covered.tolist() == near.any(axis=1).tolist()
    assert pair.b.covered.tolist() == near.any(axis=0).tolist()
    assert pair.measures["coverage_a"] == near.any(axis=1).mean()
    near = near[np.ix_(live_a, live_b)]
    wanted = (near.any(axis=1).mean() + near.any(axis=0).mean()) / 2
    assert pair.measures["coverage_live"] == pytest.approx(wanted)


def test_mean_cosines_are_over_matched_latents(dictionary):
    # Latent 1 of a and latent 2 of b are not live.
    a = dictionary([[1, 0, 0], [0, 1, 0], [0, 0, 1]], firing=[10, 9, 10])
    b = dictionary([[1, 0, 0], [0, 0.6, 0.8], [0, 0, 0]], firing=[10, 10, 9], seed="1")
    measures = compare_pair(a, b).measures
    # The zero row leaves two rows to match, and row 2 of a (.8) is nearer than row 1 (.6).
    assert measures["cosine_encoder"] == pytest.approx((1 + 0.8) / 2)
    assert measures["cosine_encoder_live"] == pytest.approx((1 + 0.8) / 2)
    assert measures["zero_b"] == 1


@given(n=st.integers(1, 25), m=st.integers(1, 25), d=st.integers(2, 6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_both_orders_of_a_pair_give_the_same_measures(dictionary, n, m, d, seed):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((2, max(n, m), d))
    firing = rng.integers(0, 20, max(n, m))
    a = dictionary(*rows[:, :n], seed="a", firing=firing[:n])
    b = dictionary(*noisy_copy(rng, rows, 0.5)[:, :m], seed="b", firing=firing[:m])
    there, back = compare_pair(a, b), compare_pair(b, a)
    swapped = {"_a": "_b", "_b": "_a"}
    for name, value in there.measures.items():
        other = name[:-2] + swapped.get(name[-2:], name[-2:])
        assert value == pytest.approx(back.measures[other], nan_ok=True, abs=1e-6), name
    assert there.a.shared.sum() == there.b.shared.sum() == there.measures["shared_latents"]
    assert np.array_equal(there.a.shared, back.b.shared)
    # A latent that is shared is covered, and its partner points back.
    assert not (there.a.shared & ~there.a.covered).any()
    i = np.flatnonzero(there.a.shared)
    assert np.array_equal(there.b.partner_encoder[there.a.partner_encoder[i]], i)


@pytest.mark.parametrize("broken", [0.0, np.nan])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_a_latent_without_direction_in_encoder_or_decoder_is_not_shared(dictionary, broken, side):
    rows = np.random.default_rng(0).standard_normal((2, 10, 8))
    other = rows.copy()
    other[["encoder", "decoder"].index(side), 4] = broken
    pair = compare_pair(dictionary(*rows), dictionary(*other, seed="1"))
    assert pair.measures["shared_latents"] == 9
    assert pair.measures["shared_fraction"] == 0.9
    assert pair.measures["coverage"] == 0.9
    assert pair.measures["cosine_encoder"] == pytest.approx(1)
    assert pair.b.partner_encoder[4] == pair.b.partner_decoder[4] == -1
    assert not pair.b.agrees[4]


def test_untrained_tied_weights_agree_by_construction_and_are_not_counted(dictionary):
    rng = np.random.default_rng(0)
    # In two dimensions random rows are near to each other, so untrained latents are "shared".
    a, b = (dictionary(rng.standard_normal((100, 2)), firing=0, seed=s) for s in "ab")
    measures = compare_pair(a, b).measures
    assert measures["index_agreement"] == 1
    assert measures["shared_fraction"] > 0.9
    assert np.isnan(measures["shared_fraction_live"]), "no latent is live"
    assert np.isnan(measures["shared_fraction_not_dead"])

    trained = rng.standard_normal((100, 2))
    trained[50:] = a.encoder[50:]
    half = np.arange(100) < 50
    one = dictionary(trained, firing=np.where(half, 50, 0), seed="a")
    two = dictionary(trained[::-1], firing=np.where(half, 50, 0)[::-1], seed="b")
    measures = compare_pair(one, two).measures
    assert measures["shared_latents"] == 100
    assert measures["shared_fraction_live"] == 1
    assert measures["live_a"] == 50


def test_repeated_latents_are_covered_but_matched_once(dictionary):
    base = np.eye(4, 6)
    a = dictionary(np.repeat(base, 3, axis=0))
    measures = compare_pair(a, dictionary(base, seed="1")).measures
    assert measures["coverage_a"] == measures["coverage_b"] == 1
    assert measures["shared_latents"] <= 4
    assert measures["index_agreement"] == 2 * 4 / 16


def test_dictionaries_of_one_latent_are_compared(dictionary):
    pair = compare_pair(dictionary([[1.0, 2]]), dictionary([[2.0, 4]], seed="1"))
    assert pair.measures["shared_fraction"] == 1
    assert pair.row()["seed_b"] == "1"


def test_different_d_in_is_refused(dictionary):
    with pytest.raises(ValueError, match="run-0 has 2, run-1 has 3"):
        compare_pair(dictionary(np.ones((2, 2))), dictionary(np.ones((2, 3)), seed="1"))


def test_a_released_pair_keeps_its_sides_and_computes_the_rest_again(noisy_pair):
    pair = compare_pair(*noisy_pair)
    before, side = pair.measures, pair.a
    pair.release()
    assert not {"scan", "by_encoder", "rows", "measures"} & set(vars(pair))
    assert pair.a is side
    assert repr(pair.measures) == repr(before)  # NaN is not equal to itself
