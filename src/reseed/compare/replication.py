"""Replication of latents that the user names: whether other seeds have them.

`replication_table` makes a row per named latent from the comparison of its cell: the number of
other seeds that share the latent, the probability that one more seed shares it, its partner in each
seed, and baselines: latents of the same dictionary that fire as often, and random rows.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Float, Int

from reseed.compare.cell import CellResult
from reseed.compare.dictionary import unit_rows
from reseed.compare.sharing_profile import JEFFREYS, posterior
from reseed.compare.strata import DECILES
from reseed.errors import ReseedError, did_you_mean

COLUMNS = ("latent", "label", "run", "seed")
REPRODUCIBILITY = ("reproducibility", "reproducibility_low", "reproducibility_high")
BothRows = tuple[Float[np.ndarray, "num_latents d_in"], Float[np.ndarray, "num_latents d_in"]]
"""Encoder and decoder rows of a run."""


@dataclass(frozen=True)
class Named:
    """A latent that the user named.

    Attributes:
        latent: its index.
        where: file and line, or the option, for messages.
        label: its label; may be empty.
        run: its run; empty if not given.
        seed: the seed of its run; empty if not given.
    """

    latent: int
    where: str
    label: str = ""
    run: str = ""
    seed: str = ""


def read_named(path: Path | str) -> list[Named]:
    """Read latents from a csv file with a column ``latent`` and optionally others of `COLUMNS`.

    Raises:
        ReseedError: the file is missing or empty, a column is unknown, or an index is not valid.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, restkey="", skipinitialspace=True)
            names = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = names
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise ReseedError(f"there is no file {path}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise ReseedError(f"{path} is not a csv file: {error}") from None
    if not names:
        raise ReseedError(f"{path} is empty: it must have a column `latent`")
    for name in names:
        if name not in COLUMNS:
            raise ReseedError(
                f"{path} has an unknown column `{name}`.{did_you_mean(name, COLUMNS)} "
                f"Columns: {', '.join(COLUMNS)}."
            )
    if "latent" not in names:
        raise ReseedError(f"{path} must have a column `latent`; its columns are {', '.join(names)}")
    if not rows:
        raise ReseedError(f"{path} names no latents: there is nothing below its header")
    return [_named(row, f"{path}, line {number}") for number, row in rows]


def _named(row: dict[str, Any], where: str) -> Named:
    if "" in row:
        raise ReseedError(f"{where} has more entries than there are columns: {row['']}")
    words = {name: (value or "").strip() for name, value in row.items()}
    latent = parse_index(words.pop("latent"), where)
    return Named(latent, where, **words)


_DIGITS = 18  # a number of fewer digits fits any integer type


def parse_index(word: str, where: str) -> int:
    """Parse an index.

    Raises:
        ReseedError: the text is not an integer ≥ 0.
    """
    if not (word.isascii() and word.isdigit() and len(word) < _DIGITS):
        raise ReseedError(f"{where}: `latent` must be an integer, at least 0; got {word[:80]!r}")
    return int(word)


def replication_table(
    result: CellResult, named: Sequence[Named], rows: Callable[[str], BothRows]
) -> pd.DataFrame:
    """Return a row per named latent, in the given order.

    Columns: those given by the user; ``firing`` in the held-out tokens, ``live``, ``dead``,
    ``zero``; ``shared_with`` of ``others``, and `REPRODUCIBILITY`; ``decile`` of firing among the
    live latents of its run (0 if not live); ``decile_shared`` and ``dictionary_shared``, the mean
    shared fraction of latents in that decile and of all; ``null_shared_fraction`` and
    ``null_cosine`` of random rows. Then, for each other run with value v of the paired axis:
    ``shared_v``; ``partner_v``, the decoder's match, with both cosines, and ``pearson_v`` and
    ``jaccard_v`` of the activations, NaN if not compared or undefined; ``partner_encoder_v``, the
    encoder's match; ``best_v``, the latent whose smaller cosine is largest, matched or not, with
    its cosines. A partner of −1 means none.

    Args:
        named: latents with their runs, all of them in the cell.
        rows: run → its rows; called for one run at a time.

    Raises:
        ReseedError: an index is not below the number of latents of its run.
    """
    seeds = dict(zip(result.runs["run"], result.runs["seed"].astype(str), strict=True))
    by_run: dict[str, list[int]] = {}
    for i, one in enumerate(named):
        by_run.setdefault(one.run, []).append(i)
    found: list[dict[str, Any]] = [{} for _ in named]
    for run, places in by_run.items():
        names = result.latents["run"].to_numpy(zero_copy_only=False)
        table = result.latents.filter(pa.array(names == run))
        for i in places:
            if named[i].latent >= len(table):
                raise ReseedError(
                    f"{named[i].where}: `latent` must be from 0 to {len(table) - 1:,}: {run} has "
                    f"{len(table):,} latents; got {named[i].latent:,}"
                )
        chosen = table.take([named[i].latent for i in places]).to_pylist()
        expected = _expected(result, table.to_pandas(), run)
        for i, entry in zip(places, chosen, strict=True):
            found[i] = _row(named[i], seeds[run], entry) | {
                name: values[named[i].latent] for name, values in expected.items()
            }
    if any(name not in row for row in found for name in REPRODUCIBILITY):
        _add_reproducibility(found, result.settings.confidence)
    _add_partners(found, by_run, seeds, rows)
    frame = pd.DataFrame(found).drop(columns=["_lists"])
    # With named latents of several runs, a row is empty in the columns of its own run.
    indices = [f"{name}_{value}" for value in seeds.values()
               for name in ("partner", "partner_encoder", "best")]  # fmt: skip
    return frame.astype({name: "Int64" for name in indices if name in list(frame)})


def _row(one: Named, seed: str, entry: dict[str, Any]) -> dict[str, Any]:
    plain = ("firing", "live", "dead", "zero", "shared_with", *REPRODUCIBILITY)
    own = {name: entry[name] for name in plain if name in entry}
    named = {"latent": one.latent, "label": one.label, "run": one.run, "seed": seed}
    return named | own | {"others": len(entry["others"]), "_lists": entry}


def _expected(result: CellResult, table: pd.DataFrame, run: str) -> dict[str, np.ndarray]:
    """Return, per latent of a run, the baselines: means of its decile and of all; the null."""
    fraction = table["shared_with"].to_numpy() / (result.n_seeds - 1)
    live, firing = table["live"].to_numpy(dtype=bool), table["firing"].to_numpy()
    decile = firing_decile(firing, live)
    means = np.array([
        fraction[decile == d].mean() if (decile == d).any() else np.nan for d in range(DECILES + 1)
    ])  # fmt: skip
    of_it = [run in pair for pair in zip(result.pairs["a"], result.pairs["b"], strict=True)]
    nulls = {
        name: np.full(len(table), result.pairs[name].to_numpy(dtype=np.float64)[of_it].mean())
        for name in ("null_shared_fraction", "null_cosine")
    }
    return {
        "decile": decile,
        "decile_shared": means[decile],
        "dictionary_shared": np.full(len(table), fraction.mean()),
        **nulls,
    }


def firing_decile(
    firing: Int[np.ndarray, " num_latents"], live: np.ndarray
) -> Int[np.ndarray, " num_latents"]:
    """Return the decile of firing among the live latents, 1 the rarest; 0 for other latents.

    Latents that fire equally often share one decile, the lowest that they reach.
    """
    decile = np.zeros(len(firing), dtype=np.int64)
    if live.any():
        among = np.sort(firing[live])
        below = np.searchsorted(among, firing[live], side="left")
        decile[live] = 1 + below * DECILES // len(among)
    return decile


def _add_reproducibility(found: list[dict[str, Any]], confidence: float) -> None:
    """Add estimates by Jeffreys' prior, for cells that were compared without reproducibility."""
    for row in found:
        values = posterior(row["shared_with"], row["others"], JEFFREYS, confidence)
        row |= dict(zip(REPRODUCIBILITY, values, strict=True))


def _add_partners(
    found: list[dict[str, Any]], by_run: dict[str, list[int]], seeds: dict[str, str],
    rows: Callable[[str], BothRows],
) -> None:  # fmt: skip
    """Add the columns of each other run, holding the rows of one run at a time."""
    mine: dict[str, BothRows] = {}
    for run, places in by_run.items():
        latents = [found[i]["latent"] for i in places]
        encoder, decoder = rows(run)
        mine[run] = unit_rows(encoder[latents]), unit_rows(decoder[latents])
    for other, value in seeds.items():
        asked = {run: places for run, places in by_run.items() if run != other}
        if not asked:
            continue
        theirs = tuple(unit_rows(part) for part in rows(other))
        for run, places in asked.items():
            encoder, decoder = (a @ b.T for a, b in zip(mine[run], theirs, strict=True))
            for k, i in enumerate(places):
                found[i] |= _partner(found[i], other, value, encoder[k], decoder[k])


def _partner(
    row: dict[str, Any], other: str, value: str, encoder: np.ndarray, decoder: np.ndarray
) -> dict[str, Any]:
    """Return the columns of one named latent and one other run.

    ``encoder`` and ``decoder`` are the cosines to each latent of that run.
    """
    lists = row["_lists"]
    at = lists["others"].index(other)
    matched = lists["partner_decoder"][at]
    # A zero row has cosines of 0, and no partner.
    best = -1 if row["zero"] else int(np.minimum(encoder, decoder).argmax())

    def cosines(name: str, latent: int) -> dict[str, float]:
        both = (encoder[latent], decoder[latent]) if latent >= 0 else (np.nan, np.nan)
        kinds = ("encoder", "decoder")
        return {f"{name}_{k}_{value}": float(c) for k, c in zip(kinds, both, strict=True)}

    return {
        f"shared_{value}": lists["shared"][at],
        f"partner_{value}": matched,
        f"partner_encoder_{value}": lists["partner_encoder"][at],
        **cosines("cosine", matched),
        **{f"{name}_{value}": _number(lists.get(name), at) for name in ("pearson", "jaccard")},
        f"best_{value}": best,
        **cosines("best_cosine", best),
    }


def _number(values: Sequence[float | None] | None, at: int) -> float:
    """Return an entry of a list column; NaN for null, or if the cell has no such column."""
    found = None if values is None else values[at]
    return np.nan if found is None else found
