"""What a comparison compares, and by which rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from reseed.config import Config, ConfigError, make, nearest, setting


@dataclass(frozen=True)
class ComparisonConfig(Config, family="comparison"):
    """A grid of runs, the axis whose values pair up, and the settings of the measures.

    The numbers of a comparison are made by its runs, which have signatures of their own, and by
    the signed settings here; what the comparison is called and how its runs were listed is not
    signed.

    Attributes:
        name: the comparison's name in folders and tables.
        grid: override key → values, as in ``{"sae": ["topk", "relu"], "seed": [0, 1, 2]}``.
        pair_by: the axis of the grid whose values are compared; the other axes make the cells.
        threshold: both cosines of a shared latent reach it (Paulo & Belrose: 0.7).
        live_at_least: a latent is live if it fires at least so many times in the held-out tokens.
        confidence: level of the intervals over seeds.
        null_seed, null_draws: seed and number of the simulated random dictionaries.
    """

    name: str = setting(signed=False)
    grid: Mapping[str, Any] = setting(signed=False)
    pair_by: str = setting("seed")
    threshold: float = setting(0.7, above=0, below=1)
    live_at_least: int = setting(10, at_least=1)
    confidence: float = setting(0.95, above=0, below=1)
    null_seed: int = setting(0, at_least=0)
    null_draws: int = setting(3, at_least=1)

    def validate(self) -> None:
        if not self.name or "/" in self.name:
            raise ConfigError(
                f"{{key}} must be a name that a folder can have; got {self.name!r}", "name"
            )
        if not self.grid:
            raise ConfigError("{key} must have at least one axis; it is empty", "grid")
        axes = {str(axis): _axis(str(axis), values) for axis, values in self.grid.items()}
        object.__setattr__(self, "grid", axes)
        if self.pair_by not in axes:
            raise ConfigError(
                f"{{key}} must be an axis of `grid` ({', '.join(axes)}); got {self.pair_by!r}."
                f"{nearest(self.pair_by, axes)}",
                "pair_by",
            )
        if len(axes[self.pair_by]) < 2:
            raise ConfigError(
                f"{{key}} is the axis that pairs up (`pair_by`) and must have at least 2 values; "
                f"got {list(axes[self.pair_by])}",
                f"grid.{self.pair_by}",
            )

    # `Config` records a member of an option group under its class's name. This class has no
    # members, and its `name` is the user's word, so it is a field like the others.

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


def _axis(axis: str, values: Any) -> tuple[Any, ...]:
    """The values of one axis, each once and at least one."""
    key = f"grid.{axis}"
    if isinstance(values, str | Mapping) or not hasattr(values, "__iter__"):
        raise ConfigError(f"{{key}} must be a list of values; got {values!r}", key)
    values = tuple(values)
    if not values:
        raise ConfigError("{key} must have at least one value; it is empty", key)
    for i, value in enumerate(values):
        if _word(value) in map(_word, values[:i]):
            raise ConfigError(f"{{key}} must not repeat a value; {value!r} is there twice", key)
    return values


def _word(value: Any) -> str:
    """What the value is as an override: 1, 1.0 and "1" are the same word, 1 and true are not."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
