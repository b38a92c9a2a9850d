"""Synthetic dictionaries with known results."""

import numpy as np
import pytest

from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary


def make_dictionary(encoder, decoder=None, *, seed="0", firing=100, tokens=1000, **more):
    """Make a dictionary of the given rows in which every latent fires ``firing`` times."""
    encoder = np.asarray(encoder, dtype=np.float32)
    decoder = encoder if decoder is None else np.asarray(decoder, dtype=np.float32)
    counts = np.broadcast_to(np.asarray(firing), len(encoder)).copy()
    values = {"dead": counts == 0, "id": f"run-{seed}"} | more
    return Dictionary(
        seed=seed,
        encoder=encoder,
        decoder=decoder,
        firing=counts,
        held_out_tokens=tokens,
        **values,
    )


@pytest.fixture(scope="session")
def dictionary():
    return make_dictionary


@pytest.fixture
def partly_shared():
    """``make(n, shared)`` makes n dictionaries that have ``shared`` latents in common."""

    def make(n, shared, num_latents=40, d_in=64):
        common = np.random.default_rng(7).standard_normal((2, num_latents, d_in))
        found = []
        for s in range(n):
            rng = np.random.default_rng(100 + s)
            rows = rng.standard_normal((2, num_latents, d_in))
            rows[:, :shared] = common[:, :shared]
            order = rng.permutation(num_latents)
            metrics = {"fvu": 0.1 + 0.01 * s, "l0": 8.0, "dead_fraction": 0.0}
            more = {"metrics": metrics, "covariance": np.diag(np.linspace(0.1, 1, d_in))}
            found.append(make_dictionary(rows[0, order], rows[1, order], seed=str(s), **more))
        return found

    return make


@pytest.fixture
def unit():
    """``unit(rows)`` returns rows of length 1, in float64."""

    def normalise(rows):
        rows = np.asarray(rows, dtype=np.float64)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    return normalise


@pytest.fixture
def load_as(monkeypatch):
    """``load_as(sae)`` makes every run have this SAE, trained and initial."""

    def patch(sae):
        monkeypatch.setattr("reseed.compare.dictionary.load_sae", lambda path: sae)
        monkeypatch.setattr("reseed.compare.dictionary.initial_sae", lambda run: sae)

    return patch


@pytest.fixture
def settings():
    return ComparisonConfig(name="trial", grid={"seed": [0, 1, 2]}, null_draws=1)
