"""Declaration of a world, and the quantities derived from it: probabilities, parents, levels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from reseed.config import Config, setting
from reseed.errors import ConfigError

NO_PARENT = -1


@dataclass(frozen=True, kw_only=True)
class WorldSettings(Config):
    """A world of known features: unit directions, when they fire, and how strongly.

    x = Σ_i a_i g_i (+ groups), a_i = relu(μ + σε) where feature i fires, else 0.

    Feature i *would* fire where z_i < Φ⁻¹(p_i); z is standard normal for each feature, correlated
    as declared (a Gaussian copula). A child fires where it would and its parent fires, so its p is
    *conditional* on the parent. With ``child_firing=marginal`` the declared p is over all tokens,
    and is divided by the parent's. Both statements hold only before mutual exclusion, which keeps
    one of the siblings that would fire together, and only if the copula does not also correlate
    parent and child (with common factors of scale 0.1, a child's p of .01 becomes .009 to .012).
    A feature, or a parent, whose sampled magnitude is below 0 does not fire: this never happens at
    σ = .15 μ, and often at σ ≈ μ.
    """

    label: str = setting("world", signed=False)
    """Name for folders and tables."""
    d_in: int = setting(at_least=1)
    num_features: int = setting(at_least=1)
    seed: int = setting(0, at_least=0)
    """Seed of the directions, the groups and the factors; samples have their own seeds."""
    dictionary: str = setting("orthogonal", choices=("orthogonal", "random"))
    """Rows of the dictionary: orthonormal (num_features ≤ d_in), or independent unit vectors."""
    firing: tuple[float, ...] | None = None
    """Probability of each feature; null: the Zipf law."""
    zipf_max: float = setting(0.4, above=0, at_most=1)
    zipf_min: float = setting(5e-4, at_least=0, at_most=1)
    zipf_exponent: float = setting(0.5, at_least=0)
    """Feature i has p = max(zipf_min, zipf_max · (i + 1)^-zipf_exponent)."""
    child_firing: str = setting("conditional", choices=("conditional", "marginal"))
    """Meaning of a child's probability: given that its parent fires, or over all tokens."""
    parents: tuple[int | None, ...] | None = None
    """Parent of each feature, which must have a smaller index; null for none."""
    roots: int = setting(0, at_least=0)
    """Number of trees of a generated forest; 0: no forest. Features are numbered level by level:
    all roots, then all their children, …; features beyond the forest have no parent."""
    branching: int = setting(1, at_least=1)
    """Number of children of each feature of the forest that is not a leaf."""
    depth: int = setting(0, at_least=0)
    """Number of levels below the roots."""
    mutually_exclusive_children: bool = False
    """If several siblings would fire together, let only one fire, chosen uniformly."""
    magnitude_mean: float = setting(1.0, above=0)
    magnitude_std: float = setting(0.0, at_least=0)
    correlations: tuple[tuple[float, ...], ...] = ()
    """[i, j, ρ]: correlation of z_i and z_j; 0 for pairs that are not listed."""
    copula_rank: int = setting(0, at_least=0)
    """Number of common factors u of all z: z_i ∝ ε_i + f_i·u with f_i ~ N(0, copula_scale²)."""
    copula_scale: float = setting(0.0, at_least=0)
    groups: int = setting(0, at_least=0)
    """Number of random subspaces. A group that fires adds a vector of random magnitude, whose
    direction is uniform within the subspace: structure without features."""
    group_rank: int = setting(1, at_least=1)
    group_probability: float = setting(0.0, at_least=0, at_most=1)

    def validate(self) -> None:
        if self.dictionary == "orthogonal" and self.num_features > self.d_in:
            raise ConfigError(
                f"{{key}} (={self.num_features}) must not exceed d_in (={self.d_in}) if the "
                "dictionary is orthogonal; dictionary=random allows it",
                "num_features",
            )
        if self.group_rank > self.d_in:
            raise ConfigError(
                f"{{key}} (={self.group_rank}) must not exceed d_in (={self.d_in})", "group_rank"
            )
        self._check_firing()
        self._check_parents()
        if self.correlations and self.copula_rank:
            raise ConfigError(
                f"{{key}} must be 0 if correlations are listed; got {self.copula_rank}",
                "copula_rank",
            )
        correlation_root(self)

    def _check_firing(self) -> None:
        if self.firing is None:
            if self.zipf_min > self.zipf_max:
                raise ConfigError(
                    f"{{key}} must not exceed zipf_max (={self.zipf_max:g}); got {self.zipf_min:g}",
                    "zipf_min",
                )
            return
        self._check_count("firing", len(self.firing))
        wrong = [p for p in self.firing if not 0 <= p <= 1]
        if wrong:
            raise ConfigError(f"{{key}} must be probabilities, 0 to 1; got {wrong[0]:g}", "firing")

    def _check_parents(self) -> None:
        if self.roots and self.parents is not None:
            raise ConfigError(f"{{key}} must be 0 if parents are listed; got {self.roots}", "roots")
        size = sum(self.roots * self.branching**level for level in range(self.depth + 1))
        if size > self.num_features:
            raise ConfigError(
                f"{{key}} (={self.num_features:,}) must hold the forest of {size:,} features "
                f"(roots={self.roots}, branching={self.branching}, depth={self.depth})",
                "num_features",
            )
        if self.parents is not None:
            self._check_count("parents", len(self.parents))
            for i, parent in enumerate(self.parents):
                if parent is not None and not 0 <= parent < i:
                    raise ConfigError(
                        f"{{key}}: a parent must have a smaller index than its child; feature {i} "
                        f"has parent {parent}",
                        "parents",
                    )
        parent, p = parents_of(self), declared_firing(self)
        above = np.where(parent == NO_PARENT, 1.0, p[parent])
        if self.child_firing == "marginal" and (p > above).any():
            i = int(np.argmax(p > above))
            raise ConfigError(
                f"{{key}}=marginal: a child must not fire more often than its parent; feature {i} "
                f"has {p[i]:g}, its parent {above[i]:g}",
                "child_firing",
            )

    def _check_count(self, key: str, count: int) -> None:
        if count != self.num_features:
            raise ConfigError(
                f"{{key}} must have one entry for each of num_features (={self.num_features}); "
                f"got {count}",
                key,
            )


def declared_firing(config: WorldSettings) -> Float[np.ndarray, " features"]:
    """Return the declared probability of each feature."""
    if config.firing is not None:
        return np.array(config.firing)
    rank = np.arange(1, config.num_features + 1, dtype=np.float64)
    return np.maximum(config.zipf_min, config.zipf_max * rank**-config.zipf_exponent)


def firing_given_parent(config: WorldSettings) -> Float[np.ndarray, " features"]:
    """Return the probability that each feature fires given that its parent does."""
    p, parent = declared_firing(config), parents_of(config)
    if config.child_firing == "conditional":
        return p
    above = np.where(parent == NO_PARENT, 1.0, p[parent])
    return np.divide(p, above, out=np.zeros_like(p), where=above > 0)


def parents_of(config: WorldSettings) -> Int[np.ndarray, " features"]:
    """Return the parent of each feature, NO_PARENT for none; parents come before children."""
    parent = np.full(config.num_features, NO_PARENT)
    if config.parents is not None:
        return np.array([NO_PARENT if p is None else p for p in config.parents])
    above, width = 0, config.roots
    for _ in range(config.depth):
        first = above + width
        children = np.arange(width * config.branching)
        parent[first : first + len(children)] = above + children // config.branching
        above, width = first, len(children)
    return parent


def levels_of(parent: Int[np.ndarray, " features"]) -> list[Int[np.ndarray, " some"]]:
    """Return the features of each level below the roots, from the top."""
    level = np.zeros(len(parent), dtype=np.int64)
    for i, above in enumerate(parent.tolist()):
        if above != NO_PARENT:
            level[i] = level[above] + 1
    return [np.flatnonzero(level == depth) for depth in range(1, int(level.max()) + 1)]


def correlation_root(
    config: WorldSettings,
) -> tuple[Int[np.ndarray, " some"], Float[np.ndarray, "some some"]]:
    """Return the features with a listed correlation, and the Cholesky factor of their matrix.

    Raises:
        ConfigError: an entry is not a pair of features with a correlation, a pair is listed twice,
            or the matrix is not positive definite.
    """
    pairs: dict[tuple[int, int], float] = {}
    for row in config.correlations:
        whole = len(row) == 3 and all(
            v.is_integer() and 0 <= v < config.num_features for v in row[:2]
        )
        if not whole or row[0] == row[1] or not -1 < row[2] < 1:
            raise ConfigError(
                "{key} must be triples [feature, other feature, correlation above -1 and below 1];"
                f" got {list(row)}",
                "correlations",
            )
        pair = (int(min(row[:2])), int(max(row[:2])))
        if pair in pairs:
            raise ConfigError(f"{{key}} must list a pair once; got {list(pair)} twice",
                              "correlations")  # fmt: skip
        pairs[pair] = row[2]
    involved = sorted({i for pair in pairs for i in pair})
    place = {i: n for n, i in enumerate(involved)}
    matrix = np.eye(len(involved))
    for (i, j), rho in pairs.items():
        matrix[place[i], place[j]] = matrix[place[j], place[i]] = rho
    try:
        root = np.linalg.cholesky(matrix)
    except np.linalg.LinAlgError:
        least = float(np.linalg.eigvalsh(matrix)[0])
        raise ConfigError(
            f"{{key}} must form a positive definite matrix; its smallest eigenvalue is {least:.3g}",
            "correlations",
        ) from None
    return np.array(involved, dtype=np.int64), root
