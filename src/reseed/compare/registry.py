"""Measures of a comparison, declared where they are computed.

    @measure("mmcs", scale="cosine", heading="MMCS", help="mean over latents of the largest decoder
             cosine")
    def mmcs(pair: Pair) -> float: ...

The declaration is all that a measure needs: its column is in ``pairs.csv``, its estimate with an
interval in ``summary.csv``, its heading and its explanation in the tables of ``summary.md`` and of
the report, and `scripts/write_measures_page` adds it to ``docs/measures.md``. A compared cell
records the versions of its measures, so that `reseed compare` computes new ones.

A package declares measures of its own in a module that it names in the entry-point group
``reseed.measures``. This file imports no numerical library until the measures are asked for.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, Self, TypeVar, get_args

from reseed.config import MEASURES, load_entry_points
from reseed.errors import did_you_mean

_MODULES = tuple(
    f"reseed.compare.{name}"
    for name in (
        "measures",
        "strata",
        "nulls",
        "subspaces",
        "tables",
        "sharing_profile",
        "truth",
        "activations.tables",
    )
)
"""Modules that declare measures, in the order of their columns."""

Function = TypeVar("Function", bound=Callable[..., Any])
Result = TypeVar("Result")
Level = Literal["pair", "run", "latent", "cell"]
Scale = Literal["fraction", "cosine", "number", "count", "mean"]
LEVELS, SCALES = get_args(Level), get_args(Scale)
_OF_RUNS = ("weights", "covariance", "variance", "truth")
NEEDS = {
    "pair": (*_OF_RUNS, "untrained", "cell", "map", "activations"),
    "run": _OF_RUNS,
    "latent": (*_OF_RUNS, "activations"),
    "cell": _OF_RUNS,
}
"""The needs that a measure of each level can have; "activations" alone or with "matched"."""
ESTIMATED = ("fraction", "cosine", "number", "count")
"""Scales of columns that have an estimate; see `Column`."""
LATER = ("cell", "map", "activations")
"""Needs of measures that are taken apart from the others: after all pairs of a cell have been
matched, or only in some cells; see `measure`."""
LIVE = ("", "_live")
"""Family of a measure over all latents and over live latents (`Pair.latents`)."""
SIDES = ("", "_a", "_b", "_live")
"""Family of a measure that is also shown for each side of a pair."""

ALIKE = 0.5
"""Correlation of activations from which a latent and its match count as alike on text."""
NOTE, TOKENS = "activation_note", "activation_tokens"
"""Extra columns of the pairs of a cell whose activations were to be compared: why they were not
(else empty), and the number of tokens."""
NOT_ASKED = "the comparison had comparison.activation_tokens=0"
"""Reason why the activations of a cell without these columns were not compared."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its uncertainty over seeds.

    Attributes:
        mean: the estimate.
        low, high: ends of the interval; None if there is none.
        standard_error: standard error on the scale of ``mean``; None if there is none.
        n: number of seeds.
        reason: why there is no interval; empty if there is one.
        freedom: degrees of freedom of the standard error; None for n − 1.
    """

    mean: float
    low: float | None
    high: float | None
    standard_error: float | None
    n: int
    reason: str = ""
    freedom: float | None = None

    @property
    def degrees_of_freedom(self) -> float:
        return self.n - 1 if self.freedom is None else self.freedom


@dataclass(frozen=True)
class Column:
    """A column of the tables, or a family of columns whose names have ``{}`` for the member.

    Attributes:
        name: the name in the files.
        help: definition, for readers of the tables: a phrase without a full stop.
        scale: "fraction" (the interval is computed on the logit scale), "cosine" or "number"
            (linear), "count" (a number of things per run), "mean" (mean without an interval), or
            None: a column without an estimate. One-sided columns (``_a``, ``_b``) have none either.
        heading: heading in tables; ``{}`` stands for the member. Without ``{}``, the words of the
            member follow. Without a heading the column is shown in no table.
        shown: members that have a column in the table. By default all if the heading has ``{}``,
            else the first.
        null: name of the column with the value by chance, which the table shows beside it.
        formula, source, advice: definition in letters, literature, and when to use the measure, for
            the documentation.
    """

    name: str
    help: str
    scale: Scale | None = None
    heading: str = ""
    shown: tuple[Any, ...] | None = None
    null: str = ""
    formula: str = ""
    source: str = ""
    advice: str = ""

    def of(self, member: Any) -> Column:
        """Return the column of one member of the family."""
        heading = self.heading
        if "{" in heading:
            heading = heading.format(member).replace("_", " ")
        elif heading:
            heading += str(member).replace("_", " ")
        name = self.name.format(member)
        scale = None if name.endswith(("_a", "_b")) else self.scale
        null = self.null.format(member)
        return replace(self, name=name, heading=heading, scale=scale, null=null)


class View:
    """Base of the objects that measures are computed from: `Pair`, `RunInCell`, `CellRuns`."""

    @property
    def known(self) -> frozenset[str]:
        """Names of the needs that the object meets; see `measure`."""
        return frozenset(["weights"])

    def once(self, work: Callable[[Self], Result]) -> Result:
        """Return ``work(self)``, computed only the first time: a pass that several measures use."""
        done: dict[Any, Any] = self.__dict__.setdefault("_once", {})
        if work not in done:
            done[work] = work(self)
        return done[work]


@dataclass(frozen=True, eq=False)
class Measure:
    """A declared function; see `measure` for the attributes."""

    columns: tuple[Column, ...]
    compute: Callable[..., Any]
    level: Level
    family: tuple[Any, ...]
    needs: frozenset[str]
    table: str
    version: int

    @property
    def key(self) -> str:
        """Name of the measure in the records of compared cells."""
        return f"{self.level}.{self.columns[0].name}"

    @property
    def members(self) -> tuple[tuple[Any, ...], ...]:
        """The arguments of each call after the view: a member of the family, or none."""
        return tuple((member,) for member in self.family) or ((),)

    @property
    def own(self) -> list[Column]:
        """The columns of every member, in the order of the tables."""
        return [c.of(*(m or ("",))) for m in self.members for c in self.columns]

    @property
    def shown(self) -> list[Column]:
        """The columns that have a place in a table."""
        return [column for columns in self._shown for column in columns]

    @property
    def _shown(self) -> list[list[Column]]:
        """For each of `columns`, those of its members that have a place in a table."""
        found = []
        for column in self.columns:
            members = self.members if "{" in column.heading else self.members[:1]
            if column.shown is not None:
                members = tuple(m for m in self.members if m and m[0] in column.shown)
            found.append([column.of(*(m or ("",))) for m in members if column.heading])
        return found

    @property
    def notes(self) -> list[str]:
        """An explanation of each heading: ``**PW-MCC**: mean matched …``."""
        found = []
        for column, shown in zip(self.columns, self._shown, strict=True):
            label = "**, **".join(one.heading for one in shown)
            if ", {" in column.heading or "{" not in column.heading:
                label = column.heading.partition(", {")[0]
            if shown:
                found.append(f"**{label}**: {column.help}.")
        return found

    def values(self, view: View) -> dict[str, Any]:
        """Return column → value; NaN if the view lacks what the measure needs."""
        found: dict[str, Any] = {}
        for member in self.members:
            names = [column.of(*(member or ("",))).name for column in self.columns]
            if not self.needs <= view.known:
                found |= dict.fromkeys(names, float("nan"))
            elif len(names) == 1:
                found[names[0]] = self.compute(view, *member)
            else:
                found |= zip(names, self.compute(view, *member), strict=True)
        return found


_declared: list[Measure] = []


def measures(
    *columns: Column,
    level: Level = "pair",
    family: Iterable[Any] = (),
    needs: str | Iterable[str] = "weights",
    table: str = "own",
    version: int = 1,
) -> Callable[[Function], Function]:
    """Declare several columns that one function computes together; it returns a value of each.

    Args:
        columns: the columns, in the order of the values.
        level, family, needs, table, version: see `measure`.
    """

    _check("level", [level], LEVELS)
    _check("scale", [c.scale for c in columns if c.scale], SCALES)
    needed = frozenset([needs] if isinstance(needs, str) else needs)
    possible = ["activations", "matched"] if "activations" in needed else NEEDS[level]
    _check("needs", needed, possible)

    def declare(compute: Function) -> Function:
        named = columns
        if table == "own":  # shown in a table even if no heading is declared
            named = tuple(
                replace(c, heading=c.heading or c.name.replace("_", " ")) for c in columns
            )
        own = Measure(named, compute, level, tuple(family), needed, table, version)
        taken = {c.name for m in _declared if m.level == level for c in m.own} & {
            c.name for c in own.own
        }
        if taken:
            raise ValueError(
                f"{compute.__module__} declares {min(taken)}, which is declared already"
            )
        _declared.append(own)
        return compute

    return declare


def _check(option: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(
                f"`{option}` must be one of {', '.join(known)}; got {name!r}."
                f"{did_you_mean(name, known)}"
            )


def measure(
    name: str,
    *,
    help: str,
    scale: Scale | None = None,
    heading: str = "",
    shown: tuple[Any, ...] | None = None,
    null: str = "",
    formula: str = "",
    source: str = "",
    advice: str = "",
    level: Level = "pair",
    family: Iterable[Any] = (),
    needs: str | Iterable[str] = "weights",
    table: str = "own",
    version: int = 1,
) -> Callable[[Function], Function]:
    """Declare the column, or the family of columns, that a function computes.

    Args:
        name, help, scale, heading, shown, null, formula, source, advice: see `Column`.
        level: the function's argument and result. "pair": a `Pair` → a number, a column of
            ``pairs.csv`` that is averaged over pairs. "run": a `RunInCell` → a number, averaged
            over runs. "latent": a `RunInCell` → a value per latent, or a row of values per latent
            with one for each other run: a column of ``latents.parquet``. "cell": a `CellRuns` → an
            `Interval`.
        family: values (thresholds, groups of latents) of which each has a column. The function gets
            the value as its second argument.
        needs: what must be known; where it is not, the column is empty. "weights": rows of one
            space; "covariance", "variance", "untrained": of both runs; "truth": labels of all
            runs; "cell": all pairs of the cell; "map": an orthogonal map between the models of the
            pair (``comparison.align=procrustes``); "activations": the pass over held-out tokens, in
            which the function gets a `PairOnTokens`, for a measure of pairs or of the latents of A;
            "matched": latents matched by their activations.
        table: the table that shows it, named as in `reseed.report.summary_tables` and in
            ``docs/measures.md``. "own": a table of measures of other packages, in which the words
            of the name are the heading if none is declared.
        version: to be increased when the function's values change; compared cells with an older
            version are computed again.

    Raises:
        ValueError: a column of this name is declared already; an unknown level, scale or need.
    """
    column = Column(name, help, scale, heading, shown, null, formula, source, advice)
    return measures(column, level=level, family=family, needs=needs, table=table, version=version)


@cache
def load_all() -> None:
    """Import every module that declares measures, of this package and of others."""
    for name in _MODULES:
        importlib.import_module(name)
    load_entry_points(MEASURES)


def declared(level: Level | None = None, later: str | None = None) -> list[Measure]:
    """Return the declared measures of a level, in the order of their columns.

    Args:
        later: only those that have this need of `LATER`; "" for those that have none.
    """
    load_all()
    ranks = {name: i for i, name in enumerate(_MODULES)}
    ordered = sorted(_declared, key=lambda m: ranks.get(m.compute.__module__, len(ranks)))
    return [
        m
        for m in ordered
        if level in (None, m.level)
        and (later is None or (later in m.needs if later else m.needs.isdisjoint(LATER)))
    ]


def columns(level: Level, later: str | None = None) -> dict[str, Column]:
    """Return name → column of the measures of a level, as `declared` orders them."""
    return {c.name: c for m in declared(level, later) for c in m.own}


def find(name: str) -> tuple[Measure, Column] | None:
    """Return a column that is averaged over pairs or runs, after its measure; None for another."""
    return next(
        ((m, c) for m in declared() for c in m.own if m.level != "latent" and c.name == name), None
    )


def evaluate(measures: Iterable[Measure], view: View) -> dict[str, Any]:
    """Return column → value of several measures."""
    found: dict[str, Any] = {}
    for one in measures:
        found |= one.values(view)
    return found


def fractions() -> list[str]:
    """Return the fractions of the weights of pairs, of which one is a comparison's main measure."""
    pairs = columns("pair", "") | columns("pair", "cell")
    return [name for name, column in pairs.items() if column.scale == "fraction"]


def versions() -> dict[str, int]:
    """Return key → version of every declared measure."""
    return {m.key: m.version for m in declared()}
