import numpy as np
import pytest

from reseed.compare.matching import MatchingCache, exact, match


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return rng.standard_normal((40, 6)).astype(np.float32), rng.standard_normal((50, 6))


def same(one, other):
    for name in ("assignment", "cosines", "row_prices", "column_prices"):
        assert np.array_equal(getattr(one, name), getattr(other, name), equal_nan=True), name
    assert (one.gap, one.ambiguous) == (other.gap, other.ambiguous)


@pytest.fixture
def calls(monkeypatch):
    made = []

    def counted(*arguments, **options):
        made.append(options["absolute"])
        return match(*arguments, **options)

    monkeypatch.setattr(exact, "match", counted)
    return made


def test_a_matching_is_computed_once_for_both_orders_of_its_sides(rows, tmp_path, calls):
    a, b = rows
    a[3] = np.nan
    store = MatchingCache(tmp_path / "there", least=0)
    first = store(a, b)
    same(first, match(a, b))
    same(MatchingCache(tmp_path / "there", least=0)(a, b), first)
    same(store(b, a), first.inverse())
    assert calls == [False]
    assert len(list((tmp_path / "there").glob("*.safetensors"))) == 1


def test_different_rows_or_absolute_cosines_are_separate_matchings(rows, tmp_path, calls):
    a, b = rows
    store = MatchingCache(tmp_path, least=0)
    store(a, b)
    store(a, b, absolute=True)
    store(a, b * np.float64(2))  # the same directions, but the digest is of the rows
    assert calls == [False, True, False]


def test_small_matchings_are_not_stored(rows, tmp_path):
    MatchingCache(tmp_path / "none", least=2001)(*rows)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_file_is_computed_again(rows, tmp_path, content):
    store = MatchingCache(tmp_path, least=0)
    first = store(*rows)
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(content)
    same(store(*rows), first)
    same(store(*rows), first)
    assert path.stat().st_size > 1000
