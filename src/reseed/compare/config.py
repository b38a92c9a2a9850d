"""Configuration of a comparison: its grid of runs, its pairs and its rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from reseed.compare.registry import fractions
from reseed.config import Config, make, setting
from reseed.errors import ConfigError, did_you_mean

REPLICATES = ("seed", "dataset.order_seed", "dataset.subset_seed")
"""Axes whose values are random draws: runs that differ only in one of them are a sample, over which
intervals can be computed. The user chooses the values of all other axes."""
ALIGN = {
    "procrustes": "rows of one are mapped into the basis of the other by an orthogonal map, fitted "
    "on the activations of the same tokens",
    "identity": "you say that their bases are the same, as those of checkpoints or fine-tunes of "
    "one model are",
    "activations": "weights are not compared, only what the latents do on the same tokens",
}
"""Values of ``comparison.align``, each with its meaning."""
PairBy = str | tuple[str, ...]


def pair_axes(pair_by: PairBy) -> tuple[str, ...]:
    """Return the axes of ``pair_by`` as a tuple."""
    return (pair_by,) if isinstance(pair_by, str) else pair_by


def value_axes(pair_by: PairBy) -> tuple[str, ...]:
    """Return the paired axes that are not in `REPLICATES`; tables distinguish their values."""
    return tuple(axis for axis in pair_axes(pair_by) if axis not in REPLICATES)


@dataclass(frozen=True)
class Arm:
    """One variant of a comparison's grid.

    Attributes:
        name: as declared; empty for a comparison without arms.
        grid: axes of the comparison, some replaced or removed, and axes of the arm.
        pair_by: the axis, or axes, whose values are compared.
        fixed: overrides that all runs of the arm have.
    """

    name: str
    grid: Mapping[str, tuple[Any, ...]]
    pair_by: PairBy
    fixed: Mapping[str, Any] = field(default_factory=dict)

    @property
    def cell_axes(self) -> tuple[str, ...]:
        """Axes whose values define the cells: all axes of the grid that are not paired."""
        return tuple(axis for axis in self.grid if axis not in pair_axes(self.pair_by))


@dataclass(frozen=True)
class ComparisonConfig(Config, family="comparison"):
    """Grid of runs, the axis whose values are compared, and the settings of the measures.

    The numbers of a comparison depend on its runs, which have their own signatures, and on the
    signed settings here. ``name``, ``grid`` and ``primary`` are not signed.

    Attributes:
        name: the comparison's name in folders and tables.
        grid: override key → values, as in ``{"sae": ["topk", "relu"], "seed": [0, 1, 2]}``.
        pair_by: the axis of the grid whose values are compared, or several axes; then all runs that
            differ in any of them are compared. The other axes define the cells.
        arms: name → overrides: variants of the grid with some keys replaced or added. A list is an
            axis of the arm. A single value holds for all runs of the arm and removes an axis of
            that name. ``pair_by`` overrides that of the comparison. The cells of all arms are in
            one table.
        threshold: a latent is shared if both cosines reach it (Paulo & Belrose: 0.7).
        live_at_least: a latent is live if it fires at least this often in the held-out tokens.
        confidence: level of the intervals over seeds.
        primary: the main measure, one of `registry.fractions` (`check_primary`): it is reported
            first, and differences in it are tested. It changes no number.
        null_seed, null_draws: seed and number of the simulated random dictionaries.
        activation_tokens: number of held-out tokens on which activations of pairs are compared; at
            most the number on which every run was measured. 0 compares only the weights.
        align: what is done with pairs of runs of different language models, whose bases differ even
            at equal ``d_in``; one of `ALIGN`. None: such pairs are refused.
    """

    name: str = setting(signed=False)
    grid: Mapping[str, Any] = setting(signed=False)
    pair_by: str | tuple[str, ...] = setting("seed")
    arms: Mapping[str, Any] | None = setting(None, neutral=None)
    threshold: float = setting(0.7, above=0, below=1)
    live_at_least: int = setting(10, at_least=1)
    confidence: float = setting(0.95, above=0, below=1)
    primary: str = setting("shared_fraction", signed=False, neutral="shared_fraction")
    null_seed: int = setting(0, at_least=0)
    null_draws: int = setting(3, at_least=1, at_most=10_000)
    activation_tokens: int = setting(32_768, at_least=0, neutral=32_768)
    align: str | None = setting(None, choices=(None, *ALIGN), neutral=None)

    def validate(self) -> None:
        if not self.name or "/" in self.name:
            raise ConfigError(
                f"{{key}} must be a name that a folder can have; got {self.name!r}", "name"
            )
        if not self.grid:
            raise ConfigError("{key} must have at least one axis; it is empty", "grid")
        axes = {str(axis): _axis(f"grid.{axis}", values) for axis, values in self.grid.items()}
        object.__setattr__(self, "grid", axes)
        object.__setattr__(self, "pair_by", _pair_by(self.pair_by, "pair_by"))
        _check_pairs(axes, self.pair_by, "pair_by", "grid", "`grid`")
        if self.arms is not None:
            if not self.arms:
                raise ConfigError(
                    "{key} must have at least one arm or be null; it is empty", "arms"
                )
            arms = {str(name): _entries(str(name), values) for name, values in self.arms.items()}
            object.__setattr__(self, "arms", arms)
        for arm in self.each_arm() if self.arms else ():
            own = f"arms.{arm.name}"
            _check_pairs(arm.grid, arm.pair_by, f"{own}.pair_by", own, "the arm's grid")

    def check_primary(self) -> Self:
        """Check that ``primary`` is a declared fraction, and return the settings.

        This imports every measure, and with them PyTorch, so that `validate` does not do it.

        Raises:
            ConfigError: there is no such fraction.
        """
        known = fractions()
        if self.primary not in known:
            raise ConfigError(
                f"{{key}} must be one of the fractions {', '.join(known)}; got "
                f"{self.primary!r}.{did_you_mean(self.primary, known)}",
                "comparison.primary",
            )
        return self

    @property
    def pairs_are_a_sample(self) -> bool:
        """True if the runs of a cell are draws from one distribution, so that leaving one out
        estimates the error of their mean (jackknife)."""
        return isinstance(self.pair_by, str) and self.pair_by in REPLICATES

    @property
    def pair_words(self) -> str:
        """Names of the paired axes, joined by "and": ``layer``, ``sae and seed``."""
        return " and ".join(pair_axes(self.pair_by))

    def each_arm(self) -> tuple[Arm, ...]:
        """Return the arms; without arms, the grid as one arm with an empty name."""
        if self.arms is None:
            return (Arm("", self.grid, self.pair_by),)
        made = []
        for name, entries in self.arms.items():
            own = {key: value for key, value in entries.items() if key != "pair_by"}
            fixed = {key: value for key, value in own.items() if not isinstance(value, tuple)}
            axes = {key: value for key, value in own.items() if key not in fixed}
            grid = {key: value for key, value in self.grid.items() if key not in fixed} | axes
            made.append(Arm(name, grid, entries.get("pair_by", self.pair_by), fixed))
        return tuple(made)

    def of_arm(self, name: str) -> Self:
        """Return the settings of the cells of one arm.

        Raises:
            ConfigError: there is no such arm.
        """
        found = {arm.name: arm for arm in self.each_arm()}
        if name not in found:
            raise ConfigError(f"{{key}} has no arm {name!r}.{did_you_mean(name, found)}", "arms")
        return replace(self, grid=found[name].grid, pair_by=found[name].pair_by, arms=None)

    # `Config` records the type of a member of an option group. This class has no members, and its
    # `name` is chosen by the user, so it is a field like the others.

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        values.pop("type", None)
        return values

    def signed(self) -> dict[str, Any]:
        values = super().signed()
        values.pop("type", None)
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], key: str = "") -> Self:
        return make(cls, values, key)


def _pair_by(value: PairBy, key: str) -> PairBy:
    """Check that every axis is named once; a list of one axis becomes that axis."""
    named = pair_axes(value)
    if not named:
        raise ConfigError("{key} must name at least one axis; it is empty", key)
    twice = [axis for i, axis in enumerate(named) if axis in named[:i]]
    if twice:
        raise ConfigError(f"{{key}} must name every axis once; {twice[0]} occurs twice", key)
    return named[0] if len(named) == 1 else named


def _check_pairs(
    axes: Mapping[str, tuple[Any, ...]], pair_by: PairBy, key: str, grid_key: str, where: str
) -> None:
    """Check that the paired axes are in the grid and have at least two values each."""
    for axis in pair_axes(pair_by):
        if axis not in axes:
            raise ConfigError(
                f"{{key}} must be an axis of {where} ({', '.join(axes)}); got {axis!r}."
                f"{did_you_mean(axis, axes)}",
                key,
            )
        if len(axes[axis]) < 2:
            raise ConfigError(
                f"{{key}} is a paired axis (`pair_by`) and must have at least 2 values; "
                f"got {list(axes[axis])}",
                f"{grid_key}.{axis}",
            )


def _entries(name: str, values: Any) -> dict[str, Any]:
    """Check the overrides of one arm; lists, which are axes, become tuples."""
    if not name:
        raise ConfigError("{key} must give every arm a name; one is empty", "arms")
    if not isinstance(values, Mapping | None):
        raise ConfigError(f"{{key}} must map keys to values; got {values!r}", f"arms.{name}")
    entries = {}
    for key, value in (values or {}).items():
        full = f"arms.{name}.{key}"
        if isinstance(value, Mapping):
            raise ConfigError(f"{{key}} must be one value or a list; got {value!r}", full)
        group = str(key).partition(".")[0]
        if group in ("comparison", "runtime", "hydra"):
            raise ConfigError(
                f"{{key}} cannot differ between arms: it is not a setting of a run; got {value!r}",
                full,
            )
        if key == "pair_by":
            listed = value if isinstance(value, list | tuple) else [value]
            if not all(isinstance(axis, str) for axis in listed):
                rule = f"{{key}} must be the name of an axis, or a list of names; got {value!r}"
                raise ConfigError(rule, full)
            entries[key] = _pair_by(tuple(listed), full)
            continue
        entries[str(key)] = _axis(full, value) if isinstance(value, list | tuple) else value
    return entries


def _axis(key: str, values: Any) -> tuple[Any, ...]:
    """Check that an axis has at least one value and no value twice."""
    if isinstance(values, str | Mapping) or not hasattr(values, "__iter__"):
        raise ConfigError(f"{{key}} must be a list of values; got {values!r}", key)
    values = tuple(values)
    if not values:
        raise ConfigError("{key} must have at least one value; it is empty", key)
    for i, value in enumerate(values):
        if _word(value) in map(_word, values[:i]):
            raise ConfigError(f"{{key}} must not repeat a value; {value!r} occurs twice", key)
    return values


def _word(value: Any) -> str:
    """Write the value as an override: 1, 1.0 and "1" are the same text, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
