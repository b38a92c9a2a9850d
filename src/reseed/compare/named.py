"""Latents that somebody names: do the other seeds have them?

A row per named latent, from what was measured of its cell: with how many of the others it is
shared and what that says of another seed, its partner in each of them, and what is to be expected
of a latent that was not named: one of the same dictionary that fires as often, and one of random
rows.
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
from scipy import special

from reseed.compare.cell import CellResult
from reseed.compare.rows import unit_rows
from reseed.compare.strata import DECILES
from reseed.config import ReseedError, nearest

COLUMNS = ("latent", "label", "run", "seed")
REPRODUCIBILITY = ("reproducibility", "reproducibility_low", "reproducibility_high")
BothRows = tuple[Float[np.ndarray, "num_latents d_in"], Float[np.ndarray, "num_latents d_in"]]
"""Encoder and decoder rows of a run."""


@dataclass(frozen=True)
class Named:
    """A latent as it was named.

    Attributes:
        latent: its index.
        where: file and line, or the option, for messages.
        label: what it is called; may be empty.
        run: the run that it is of; empty where none was named.
        seed: the seed of that run; empty where none was named.
    """

    latent: int
    where: str
    label: str = ""
    run: str = ""
    seed: str = ""


def read_named(path: Path | str) -> list[Named]:
    """Latents from a csv file with a column ``latent`` and, if need be, others of `COLUMNS`.

    Raises:
        ReseedError: no such file, nothing in it, a column that is not known, a latent that is no
            index.
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
        raise ReseedError(f"{path} is no csv file: {error}") from None
    if not names:
        raise ReseedError(f"{path} is empty: it must have a column `latent`")
    for name in names:
        if name not in COLUMNS:
            raise ReseedError(
                f"{path} has a column `{name}` that is not known.{nearest(name, COLUMNS)} "
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
    latent = index_of(words.pop("latent"), where)
    return Named(latent, where, **words)


def index_of(word: str, where: str) -> int:
    """The index that a word gives.

    Raises:
        ReseedError: it is none.
    """
    if not (word.isascii() and word.isdigit()):
        raise ReseedError(f"{where}: `latent` must be an integer, at least 0; got {word!r}")
    return int(word)


def replication(
    result: CellResult, named: Sequence[Named], rows: Callable[[str], BothRows]
) -> pd.DataFrame:
    """A row per named latent, in their order.

    Columns: what was named; ``firing`` in the held-out tokens, ``live``, ``dead``, ``zero``;
    ``shared_with`` of ``others``, and `REPRODUCIBILITY`; ``decile`` of firing among the live
    latents of its run (0 if not live), ``decile_shared`` and ``dictionary_shared``: how much a
    latent of that decile, and any, is shared on average; ``null_shared_fraction`` and
    ``null_cosine`` of random rows. Then for each other run with value v of the axis that pairs up:
    ``shared_v``; ``partner_v``, the decoder's match, the encoder's (``partner_encoder_v``), and
    both cosines to the former; ``best_v``, the latent whose smaller cosine is largest, taken or
    not, with its cosines. A partner of −1 is none.

    Args:
        named: with the run of each, all of them in the cell.
        rows: run → its rows; asked for one run at a time.

    Raises:
        ReseedError: a latent that the run does not have.
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
    # Of latents of several runs a row has no entries under its own.
    indices = [f"{name}_{value}" for value in seeds.values()
               for name in ("partner", "partner_encoder", "best")]  # fmt: skip
    return frame.astype({name: "Int64" for name in indices if name in list(frame)})


def _row(one: Named, seed: str, entry: dict[str, Any]) -> dict[str, Any]:
    plain = ("firing", "live", "dead", "zero", "shared_with", *REPRODUCIBILITY)
    own = {name: entry[name] for name in plain if name in entry}
    named = {"latent": one.latent, "label": one.label, "run": one.run, "seed": seed}
    return named | own | {"others": len(entry["others"]), "_lists": entry}


def _expected(result: CellResult, table: pd.DataFrame, run: str) -> dict[str, np.ndarray]:
    """What latents of a run that were not named show, for each latent."""
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
    """Decile of firing among the live latents, 1 the rarest; 0 for those that are not live.

    Latents that fire equally often are in one decile, the lowest that they reach.
    """
    decile = np.zeros(len(firing), dtype=np.int64)
    if live.any():
        among = np.sort(firing[live])
        below = np.searchsorted(among, firing[live], side="left")
        decile[live] = 1 + below * DECILES // len(among)
    return decile


def jeffreys(shared_with: int, others: int, confidence: float) -> tuple[float, float, float]:
    """How likely one more seed has a latent that ``shared_with`` of ``others`` have.

    (m + ½)/(n + 1) with the equal-tailed interval of Beta(m + ½, n − m + ½): Jeffreys' prior.
    """
    a, b = shared_with + 0.5, others - shared_with + 0.5
    tail = (1 - confidence) / 2
    low, high = special.betaincinv(a, b, [tail, 1 - tail])
    return a / (a + b), float(low), float(high)


def _add_reproducibility(found: list[dict[str, Any]], confidence: float) -> None:
    for row in found:
        values = jeffreys(row["shared_with"], row["others"], confidence)
        row |= dict(zip(REPRODUCIBILITY, values, strict=True))


def _add_partners(
    found: list[dict[str, Any]], by_run: dict[str, list[int]], seeds: dict[str, str],
    rows: Callable[[str], BothRows],
) -> None:  # fmt: skip
    """The columns of each other run, one of them in memory at a time beside the named rows."""
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
    """One named latent and one other run: cosines are those to each of its latents."""
    lists = row["_lists"]
    at = lists["others"].index(other)
    matched = lists["partner_decoder"][at]
    # A row without direction has cosines of 0, and no partner.
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
        f"best_{value}": best,
        **cosines("best_cosine", best),
    }
