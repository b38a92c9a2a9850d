"""Overlap of the words that two SAEs absorb, for matched latents, compared with chance.

`absorbed_overlap` measures two SAEs; `with_overlaps` adds the measure to the pairs of each cell,
from the stored results of the runs and the matchings of the cell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import pyarrow.compute as pc
from jaxtyping import Int

from reseed.compare.cell import CellResult
from reseed.compare.pair import WEIGHTS_NOTE
from reseed.compare.pairing import without_intervals
from reseed.compare.registry import Interval
from reseed.compare.statistics import seed_interval
from reseed.compare.tables import lists
from reseed.report.cell_labels import Cell
from reseed.report.evaluation_results import OVERLAP, Runs

FREQUENCY_BINS = 4


@dataclass(frozen=True, eq=False)
class Overlap:
    """Agreement of two SAEs on the words they absorb, over the classes with matched main latents.

    Attributes:
        classes: number of classes with matched main latents.
        words: number of words in these classes that both probes classify correctly; the spellings
            of a word count as one.
        jaccard: number of words absorbed in both SAEs over the number absorbed in at least one;
            NaN if there are none.
        expected: mean Jaccard index over permutations.
        p: share of permutations with at least as many words absorbed in both (one-sided).
        by_class: a row per class: ``class``, ``matched``, ``words``, and the numbers of words
            absorbed in the ``first``, the ``second`` and ``both``.
    """

    classes: int
    words: int
    jaccard: float
    expected: float
    p: float
    by_class: pd.DataFrame = field(repr=False)


def absorbed_overlap(
    first: tuple[pd.DataFrame, pd.DataFrame],
    second: tuple[pd.DataFrame, pd.DataFrame],
    partner: Int[np.ndarray, " num_latents"],
    *,
    permutations: int = 1_000,
    seed: int = 0,
) -> Overlap:
    """Compare the words absorbed in two SAEs of the same model and hookpoint.

    A class counts if a main latent of the first SAE has a main latent of the second as its partner.
    A token is absorbed if its fraction is above 0 in at least half of its records, and a word if
    one of its spellings is. The null permutes the words absorbed in the second SAE among words of
    the same class, with as many spellings (with more, a word is absorbed more easily) and of
    similar frequency (quarters of these words): a hypergeometric draw in each of these strata. The
    spellings of a word stay together, because an SAE often absorbs all of them.

    Args:
        first, second: the tables ``letters`` and ``words`` of each SAE's absorption result.
        partner: latent of the second SAE matched to each latent of the first, −1 for none.
        seed: seed of the permutations.
    """
    matched = _matched_classes(first[0], second[0], partner)
    mine, theirs = _flags(first[1]), _flags(second[1])
    both = pd.merge(mine, theirs, left_index=True, right_index=True, suffixes=("_1", "_2"))
    by_class = _by_class(both, matched)
    kept = [name for name, there in matched.items() if there]
    used = both.loc[both.index.get_level_values("class").isin(kept)]
    a, b = (np.asarray(used[f"absorbed_{i}"], dtype=bool) for i in (1, 2))
    shared, either = int((a & b).sum()), int((a | b).sum())
    there = sum(matched.values())
    if not either:
        nan = float("nan")
        return Overlap(there, len(used), nan, nan, nan, by_class)
    drawn = _by_chance(used, permutations, np.random.default_rng([0x6F7665, seed]))
    jaccards = drawn / (a.sum() + b.sum() - drawn)
    p = (1 + int((drawn >= shared).sum())) / (1 + permutations)
    return Overlap(there, len(used), shared / either, float(jaccards.mean()), p, by_class)


def _matched_classes(
    first: pd.DataFrame, second: pd.DataFrame, partner: Int[np.ndarray, " num_latents"]
) -> dict[str, bool]:
    """Return, for each class that both SAEs can be evaluated on, whether two main latents match."""
    mains = [dict(zip(t["class"], t["main"], strict=True)) for t in (first, second)]
    good = [set(t.loc[t["reason"] == "", "class"]) for t in (first, second)]
    return {
        name: any(int(partner[j]) in usual(mains[1][name]) for j in usual(mains[0][name]))
        for name in sorted(good[0] & good[1])
    }


def usual(main: list[list[int]]) -> set[int]:
    """Return the latents that are main in at least half of the folds and repetitions."""
    counts = Counter(int(j) for each in main for j in each)
    return {j for j, count in counts.items() if 2 * count >= len(main)}


def _flags(words: pd.DataFrame) -> pd.DataFrame:
    """Return whether each word is absorbed, its number of spellings, and their frequency in all."""
    table = words.assign(
        absorbed=words["fraction"] > 0, word=words["text"].str.strip().str.lower()
    ).groupby(["class", "word", "token"])
    tokens = table.agg(absorbed=("absorbed", "mean"), frequency=("frequency", "first"))
    return (
        tokens.assign(absorbed=tokens["absorbed"] >= 0.5)
        .groupby(["class", "word"])
        .agg(absorbed=("absorbed", "any"), frequency=("frequency", "sum"),
             spellings=("absorbed", "size"))
    )  # fmt: skip


def _by_chance(
    used: pd.DataFrame, permutations: int, random: np.random.Generator
) -> Int[np.ndarray, " permutations"]:
    """Count the words absorbed in both, with the flags of the second SAE permuted in each
    stratum."""
    total = np.zeros(permutations, dtype=np.int64)
    for _, some in used.groupby(["class", "spellings_1"]):
        rank = some["frequency_1"].rank(method="average", pct=True)
        stratum = np.minimum((rank * FREQUENCY_BINS).astype(int), FREQUENCY_BINS - 1)
        for _, part in some.groupby(stratum):
            mine, theirs = (int(np.sum(part[f"absorbed_{i}"])) for i in (1, 2))
            total += random.hypergeometric(mine, len(part) - mine, theirs, permutations)
    return total


def _by_class(both: pd.DataFrame, matched: dict[str, bool]) -> pd.DataFrame:
    rows = []
    for name, there in matched.items():
        some = both.loc[both.index.get_level_values("class") == name]
        a, b = (np.asarray(some[f"absorbed_{i}"], dtype=bool) for i in (1, 2))
        counts = {"first": int(a.sum()), "second": int(b.sum()), "both": int((a & b).sum())}
        rows.append({"class": name, "matched": there, "words": len(some), **counts})
    names = ["class", "matched", "words", "first", "second", "both"]
    return pd.DataFrame(rows, columns=names)


_EVALUATION = "absorption"


def with_overlaps(cells: Sequence[Cell], runs: Runs) -> list[Cell]:
    """Add the overlap of absorbed words to the cells whose runs all have an absorption result.

    The pairs get the columns ``absorbed_overlap`` (Jaccard), ``…_expected`` (by chance),
    ``absorbed_p`` and ``absorbed_classes``; the cell gets estimates of the first two over its
    pairs.
    """
    return [(knobs, _with_overlaps(cell, runs)) for knobs, cell in cells]


def _with_overlaps(cell: CellResult, runs: Runs) -> CellResult:
    tables = {
        name: (of["letters"], of["words"])
        for name, run in runs.items()
        if _EVALUATION in run.results and (of := run.results[_EVALUATION].tables)
    }
    if WEIGHTS_NOTE in cell.pairs or not set(cell.runs["run"]) <= tables.keys():
        return cell
    found = {
        (a, b): absorbed_overlap(tables[a], tables[b], _partners(cell, a, b))
        for a, b in zip(cell.pairs["a"], cell.pairs["b"], strict=True)
    }
    return replace(
        cell,
        pairs=cell.pairs.assign(**_columns(list(found.values()))),
        estimates=cell.estimates
        | without_intervals(
            {
                OVERLAP: _estimate(cell, found, "jaccard"),
                f"{OVERLAP}_expected": _estimate(cell, found, "expected"),
            },
            cell.settings,
        ),
    )


def _partners(cell: CellResult, a: str, b: str) -> Int[np.ndarray, " num_latents"]:
    """Return the match by decoder in run ``b`` of each latent of run ``a``; −1 for none."""
    own = cell.latents.filter(pc.field("run") == a)
    return lists(own, "partner_decoder")[:, own["others"][0].as_py().index(b)].astype(np.int64)


def _columns(found: Sequence[Overlap]) -> dict[str, list[float]]:
    return {
        OVERLAP: [overlap.jaccard for overlap in found],
        f"{OVERLAP}_expected": [overlap.expected for overlap in found],
        "absorbed_p": [overlap.p for overlap in found],
        "absorbed_classes": [float(overlap.classes) for overlap in found],
    }


def _estimate(cell: CellResult, found: Mapping[tuple[str, str], Overlap], name: str) -> Interval:
    """Estimate an attribute of the overlaps over pairs of seeds; NaN if it is NaN for a pair."""
    place = {run: i for i, run in enumerate(cell.runs["run"])}
    values = np.zeros((len(place), len(place)))
    for (a, b), overlap in found.items():
        values[place[a], place[b]] = values[place[b], place[a]] = getattr(overlap, name)
    return seed_interval(values, cell.settings.confidence)
