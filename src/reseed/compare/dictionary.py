"""A trained dictionary as the input of a comparison: rows of weights and firing counts.

`Dictionary` holds one run, `Rows` those of its rows that are compared; `row_cosines` gives exact
cosines of chosen pairs. `load_dictionaries` loads the trained and the initial weights of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file

from reseed.compare.alignment import mapped_rows
from reseed.compare.matching.rows import scaled_rows
from reseed.sae import load_all
from reseed.sae.base import SAE, SAEConfig
from reseed.sae.checkpoint import load_sae, read_metadata
from reseed.store.runs import INITIAL_FILE, Run, RunError
from reseed.system.integrity import read_tensors

LABELS = ("neither", "composite", "atom", "group")
"""Labels of latents where the true features are known; ``truth_label`` is an index into them."""
TRUTH_PREFIX = "truth_"
"""Prefix of the names of estimates, and of metrics of runs, that need known true features."""
_BLOCK_ENTRIES = 1 << 20
"""Number of matrix entries that are converted to float64 at a time: 8 MB."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Weight rows of one SAE, with its firing on held-out tokens.

    Attributes:
        id: run id, unique among the dictionaries compared.
        seed: value of the paired axis (`ComparisonConfig.pair_by`).
        encoder, decoder: a row per latent; a row may be zero or NaN (see `zero`).
        firing: number of times that each latent fired in ``held_out_tokens`` tokens.
        held_out_tokens: number of tokens counted; 0 without a count (untrained weights).
        dead: latents that did not fire in the last ``dead_after_tokens`` tokens of training.
        metrics: metrics of the run for the tables (``fvu``, ``l0``, ``dead_fraction``).
        truth: label of each latent in a synthetic world with known features (index into
            `LABELS`); None if the truth is not known.
        covariance: covariance of the held-out activations; None if it was not stored.
        variance: variance of each latent's contribution to reconstructions, Var(a_i)·‖W_i‖² over
            the held-out tokens; None if it was not stored.
        basis: names the space of the rows: rows of two bases have no cosine, even if ``d_in`` is
            equal. By default all dictionaries have one basis.
        incompatible: the reason that is given for pairs of two bases.

    Raises:
        ValueError: shapes that disagree, counts out of range.
    """

    id: str
    seed: str
    encoder: Float[np.ndarray, "num_latents d_in"]
    decoder: Float[np.ndarray, "num_latents d_in"]
    firing: Int[np.ndarray, " num_latents"]
    held_out_tokens: int
    dead: Bool[np.ndarray, " num_latents"]
    metrics: Mapping[str, float] = field(default_factory=dict)
    truth: Int[np.ndarray, " num_latents"] | None = None
    covariance: Float[np.ndarray, "d_in d_in"] | None = None
    variance: Float[np.ndarray, " num_latents"] | None = None
    basis: str = ""
    incompatible: str = "runs of different language models have no common basis"

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("`id` must not be empty")
        self._convert("encoder", np.float32)
        self._convert("decoder", np.float32)
        self._convert("firing", np.int64)
        self._convert("dead", np.bool_)
        object.__setattr__(self, "seed", str(self.seed))
        if self.encoder.ndim != 2 or 0 in self.encoder.shape:
            self._refuse("`encoder` must have shape [num_latents, d_in]", self.encoder.shape)
        if self.decoder.shape != self.encoder.shape:
            rule = f"`decoder` must have the shape of `encoder` {list(self.encoder.shape)}"
            self._refuse(rule, self.decoder.shape)
        for name in ("firing", "dead"):
            shape = getattr(self, name).shape
            if shape != (self.num_latents,):
                self._refuse(f"`{name}` must have one value per latent [{self.num_latents}]", shape)
        if self.variance is not None and self.variance.shape != (self.num_latents,):
            rule = f"`variance` must have one value per latent [{self.num_latents}]"
            self._refuse(rule, self.variance.shape)
        if self.truth is not None:
            object.__setattr__(self, "truth", checked_labels(self.truth, self.num_latents, self.id))
        if self.covariance is not None and self.covariance.shape != (self.d_in, self.d_in):
            rule = f"`covariance` must have shape [d_in, d_in] {[self.d_in, self.d_in]}"
            self._refuse(rule, self.covariance.shape)
        low, high = int(self.firing.min()), int(self.firing.max())
        if low < 0 or high > self.held_out_tokens:
            raise ValueError(
                f"{self.id}: `firing` must lie between 0 and `held_out_tokens` "
                f"(={self.held_out_tokens}); its values are {low} to {high}"
            )

    def _convert(self, name: str, dtype: Any) -> None:
        value = np.asarray(getattr(self, name))
        if dtype == np.int64 and value.dtype.kind not in "iu":
            raise ValueError(f"{self.id}: `{name}` must be integers; got {value.dtype}")
        if dtype == np.bool_ and value.dtype.kind != "b":
            raise ValueError(f"{self.id}: `{name}` must be true or false; got {value.dtype}")
        object.__setattr__(self, name, np.ascontiguousarray(value, dtype=dtype))

    def _refuse(self, rule: str, shape: tuple[int, ...]) -> None:
        raise ValueError(f"{self.id}: {rule}; got {list(shape)}")

    @property
    def num_latents(self) -> int:
        return self.encoder.shape[0]

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def density(self) -> Float[np.ndarray, " num_latents"]:
        """Fraction of the held-out tokens on which each latent fires; 0 if none were counted."""
        return self.firing / max(self.held_out_tokens, 1)

    @property
    def zero(self) -> Bool[np.ndarray, " num_latents"]:
        """Latents whose encoder or decoder row is zero or not finite; they are never matched."""
        return ~(_has_direction(self.encoder) & _has_direction(self.decoder))

    def live(self, at_least: int) -> Bool[np.ndarray, " num_latents"]:
        """Return the latents that fire at least ``at_least`` times in the held-out tokens."""
        return self.firing >= at_least


def checked_labels(
    labels: Int[np.ndarray, " num_latents"], num_latents: int, run: str
) -> Int[np.ndarray, " num_latents"]:
    """Return the labels as int8.

    Raises:
        ValueError: the labels are not one index into `LABELS` per latent.
    """
    values = np.asarray(labels)
    if values.dtype.kind not in "iu":
        raise ValueError(f"{run}: `truth` must be integers; got {values.dtype}")
    if values.shape != (num_latents,):
        raise ValueError(
            f"{run}: `truth` must have one value per latent [{num_latents}]; got "
            f"{list(values.shape)}"
        )
    if values.min() < 0 or values.max() >= len(LABELS):
        raise ValueError(
            f"{run}: `truth` must lie between 0 and {len(LABELS) - 1} ({', '.join(LABELS)}); got "
            f"{values.min()} to {values.max()}"
        )
    return np.ascontiguousarray(values, dtype=np.int8)


def incompatible(a: Dictionary, b: Dictionary) -> bool:
    """Return True if the dictionaries differ in ``d_in`` or basis: their rows have no cosine."""
    return (a.d_in, a.basis) != (b.d_in, b.basis)


def any_incompatible(trained: Sequence[Dictionary]) -> bool:
    """Return True if any two of the dictionaries are incompatible."""
    return any(incompatible(trained[0], x) for x in trained)


DIFFERENT_WIDTHS = "runs of different `d_in` have no common space"
DIFFERENT_MODELS = Dictionary.incompatible


def no_common_space(trained: Sequence[Dictionary]) -> str:
    """Return the reason why the weights of some of the runs are not compared; "" if they are."""
    if not any_incompatible(trained):
        return ""
    return DIFFERENT_WIDTHS if len({x.d_in for x in trained}) > 1 else trained[0].incompatible


def root(covariance: Float[np.ndarray, "d_in d_in"]) -> Float[np.ndarray, "d_in d_in"]:
    """Return R with R·Rᵀ = ``covariance``: x·R and y·R have the scalar product xᵀ·covariance·y.

    All roots give the same products. This one is computed from eigenvalues; negative ones, which
    come from rounding, count as 0.
    """
    exact = np.ascontiguousarray(covariance, dtype=np.float64)
    return _root(exact.tobytes(), len(exact))


@lru_cache(maxsize=1)
def _root(covariance: bytes, d_in: int) -> Float[np.ndarray, "d_in d_in"]:
    """Compute and cache the root, because all pairs of a cell share one covariance."""
    values, vectors = np.linalg.eigh(np.frombuffer(covariance).reshape(d_in, d_in))
    found = vectors * np.sqrt(np.maximum(values, 0.0))
    found.flags.writeable = False
    return found


def _has_direction(rows: Float[np.ndarray, "n d_in"]) -> Bool[np.ndarray, " n"]:
    return np.isfinite(rows).all(axis=1) & (rows != 0).any(axis=1)


@dataclass(frozen=True, eq=False)
class Rows:
    """Encoder and decoder rows; both are zero where one of them has no direction.

    The rows keep their trained lengths, and the caller normalises them. No normalised copy is
    stored, because at 131,072 × 4,096 it would take 4.3 GB in float64.
    """

    encoder: Float[np.ndarray, "n d_in"]
    decoder: Float[np.ndarray, "n d_in"]

    @classmethod
    def of(cls, x: Dictionary) -> Rows:
        zero = x.zero
        encoder = _without(x.encoder, zero)
        if x.decoder is x.encoder or np.array_equal(x.encoder, x.decoder):
            return cls(encoder, encoder)
        return cls(encoder, _without(x.decoder, zero))

    def __len__(self) -> int:
        return len(self.encoder)

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def tied(self) -> bool:
        """True if encoder and decoder are the same rows; then one matching serves for both."""
        return self.encoder is self.decoder

    def mapped(self, rotation: Float[np.ndarray, "d_in d_in"]) -> Rows:
        """Return the rows in the basis to which an orthogonal matrix maps them."""
        encoder = mapped_rows(self.encoder, rotation)
        return Rows(encoder, encoder if self.tied else mapped_rows(self.decoder, rotation))

    def joint(self) -> Float[np.ndarray, "n 2*d_in"]:
        """Return [E, W]/√2 of unit rows, float32; their cosine is the mean of both cosines."""
        halves = [unit32(self.encoder), unit32(self.decoder)]
        return np.concatenate(halves, axis=1) / np.float32(np.sqrt(2))


def _without(rows: Float[np.ndarray, "n d_in"], zero: np.ndarray) -> Float[np.ndarray, "n d_in"]:
    return np.where(zero[:, None], np.float32(0), rows) if zero.any() else rows


def unit_rows(rows: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "n d_in"]:
    """Normalise rows to length 1 in float64; a row that is zero or not finite becomes zero."""
    rows = scaled_rows(rows)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)


def unit32(rows: Float[np.ndarray, "n d_in"]) -> Float[np.ndarray, "n d_in"]:
    """Return `unit_rows` in float32, computed block by block."""
    out = np.empty(rows.shape, dtype=np.float32)
    step = max(1, _BLOCK_ENTRIES // rows.shape[1])
    for start in range(0, len(rows), step):
        block = slice(start, start + step)
        out[block] = unit_rows(rows[block])
    return out


def row_cosines(
    a: Float[np.ndarray, "n d_in"],
    b: Float[np.ndarray, "m d_in"],
    i: Int[np.ndarray, " pairs"],
    j: Int[np.ndarray, " pairs"],
) -> Float[np.ndarray, " pairs"]:
    """Return the cosines of rows ``i`` of ``a`` with rows ``j`` of ``b``, pairwise in float64."""
    out = np.empty(len(i))
    step = max(1, _BLOCK_ENTRIES // a.shape[1])
    for start in range(0, len(i), step):
        block = slice(start, start + step)
        products = np.einsum("pd,pd->p", unit_rows(a[i[block]]), unit_rows(b[j[block]]))
        out[block] = np.clip(products, -1.0, 1.0)
    return out


def both_cosines(
    a: Rows, b: Rows, i: Int[np.ndarray, " pairs"], j: Int[np.ndarray, " pairs"]
) -> Float[np.ndarray, " pairs"]:
    """Return min(c_enc, c_dec) of pairs of latents, in float64."""
    by_encoder = row_cosines(a.encoder, b.encoder, i, j)
    if a.tied and b.tied:
        return by_encoder
    return np.minimum(by_encoder, row_cosines(a.decoder, b.decoder, i, j))


def load_dictionaries(run: Run, value: str) -> tuple[Dictionary, Dictionary | None]:
    """Load the trained and the initial weights of a finished run, each as a dictionary.

    A pretrained run has no initial weights; the second result is then None.

    Args:
        run: the run.
        value: the run's value of the paired axis.
    """
    record, metrics, latents, sae = run.record, run.metrics, run.latents(), load_sae(run.path)
    held_out = run.activations()
    trained = Dictionary(
        id=run.id,
        seed=value,
        encoder=sae.W_enc.detach().numpy(),
        decoder=sae.W_dec.detach().numpy(),
        firing=latents["firing"],
        held_out_tokens=metrics["tokens"],
        dead=latents["tokens_since_fired"] >= record["dead_after_tokens"],
        metrics=numbers({name: metrics[name] for name in ("fvu", "l0", "cosine", "dead_fraction")})
        | {"steps": record["steps"]}
        | truth_metrics(metrics),
        truth=latents.get("truth_label"),
        covariance=None if held_out is None else held_out["covariance"],
        variance=_variance(latents, sae.W_dec.detach().numpy(), metrics["tokens"]),
    )
    if record.get("pretrained"):
        return trained, None
    start = initial_sae(run)
    rows = {"encoder": start.W_enc.detach().numpy(), "decoder": start.W_dec.detach().numpy()}
    # No table shows measures of untrained weights that need a covariance or labels.
    return trained, replace(trained, truth=None, covariance=None, variance=None, **rows)


def _variance(
    latents: Mapping[str, np.ndarray], decoder: Float[np.ndarray, "num_latents d_in"], tokens: int
) -> Float[np.ndarray, " num_latents"] | None:
    """Return Var(a_i)·‖W_i‖²; None for an older run, which did not store the required sums."""
    if "activation_sum" not in latents or "activation_square_sum" not in latents or not tokens:
        return None
    mean = latents["activation_sum"] / tokens
    variance = np.maximum(latents["activation_square_sum"] / tokens - mean**2, 0.0)
    return variance * np.linalg.norm(decoder, axis=1).astype(np.float64) ** 2


def numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics with null (undefined) as NaN."""
    return {name: float("nan") if value is None else value for name, value in metrics.items()}


def truth_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a run's ``truth`` entry, named ``truth_…``; null (undefined) as NaN."""
    return numbers({TRUTH_PREFIX + k: v for k, v in (metrics.get("truth") or {}).items()})


def initial_sae(run: Run) -> SAE:
    """Return the run's SAE with its initial weights, read if stored, else drawn from the seed.

    A drawn SAE has no b_dec and is for scaled activations; a stored one has its initial b_dec and
    is for raw activations. The rows are the same for both.

    Raises:
        RunError: the initial weights depend on more than the seed and their file is missing, or
            the run is pretrained.
    """
    load_all()
    record = run.record
    if record.get("pretrained"):
        raise RunError(f"{run.path} is a pretrained SAE: its initial weights are unknown")
    config = SAEConfig.from_dict(record["experiment"]["sae"], "sae")
    sae = config.build(record["d_in"], torch.Generator().manual_seed(record["init_seed"]))
    stored = run.file(INITIAL_FILE)
    if stored.is_file():
        sae.load_state_dict(read_tensors(stored, load_file))
    elif not record.get("start_is_drawn", _was_drawn(record["experiment"]["training"])):
        raise RunError(
            f"{run.path}: {INITIAL_FILE} is missing, and the seed alone does not give the weights "
            "that this run started from"
        )
    return sae


def untrained_sae(run: Run) -> SAE | None:
    """Return the SAE before training, for raw activations; None if its weights are not known."""
    if not run.exists:
        return None
    try:
        sae = initial_sae(run)
    except RunError:
        return None
    if (run.path / INITIAL_FILE).is_file():  # stored weights are for raw activations already
        return sae
    record, moments = run.record, run.activations()
    scale: Mapping[str, Any] = read_metadata(run.path)
    sae = sae.folded(scale["input_scale"])
    if moments is not None and record["experiment"]["training"]["b_dec_init"] != "zeros":
        sae.initialise_b_dec(torch.from_numpy(moments["mean"]))
    return sae


def _was_drawn(training: Mapping[str, Any]) -> bool:
    """Return ``start_is_drawn`` for an older record, which lacks it."""
    moved = training.get("aligned") or training.get("decoder", "free") != "free"
    return not moved and training.get("start", "random") == "random"
