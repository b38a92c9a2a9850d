"""Data of the latent browser: JavaScript files, because a page on disk cannot fetch other files.

Each file is one call, ``reseed.data(key, value)``, and is loaded when it is first needed:

    latents/runs.js            list of the runs, with their metadata
    latents/<run>.js           arrays of one run, with an entry per latent
    latents/<run>/<shard>.js   contexts of `SHARD` latents, if contexts were evaluated
    latents/tokens-<i>.js      token texts of the runs with one tokenizer

``<run>`` is the run's index in ``runs.js``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from reseed.compare.cell import CellResult
from reseed.compare.registry import ALIKE
from reseed.compare.tables import lists
from reseed.report.cell_labels import Cell, activations_of, label, pair_axis_name
from reseed.report.evaluation_results import LETTERS, EvaluatedRun, Runs
from reseed.store.contexts import LATENTS_PER_GROUP, Context, Contexts, LatentContexts

SHARD = LATENTS_PER_GROUP
"""Number of latents whose contexts are in one file: the group that `Contexts` reads together."""
CONTEXT_TOKENS = 8
"""Number of tokens that the list shows on each side of a latent's peak token."""
_DIGITS = 4
_OF_OTHERS = ("partner_encoder", "partner_decoder", "cosine_encoder", "cosine_decoder", "shared")
_ON_TOKENS = ("pearson", "jaccard")


@dataclass(frozen=True, eq=False)
class Entry:
    """A run in a cell. A run in two cells has two entries, with different partners.

    Attributes:
        name: its display name, unique among all entries.
        cell: index of the cell.
        tokens: number of held-out tokens.
        activations: number of tokens on which activations were compared, and why they were not.
        rows: the run's rows of the cell's latent table.
    """

    run: str
    name: str
    cell: int
    tokens: int
    activations: tuple[int, str]
    rows: pa.Table


def entries(cells: Sequence[Cell]) -> list[Entry]:
    """Return the runs of all cells, in order."""
    found = []
    for number, (knobs, cell) in enumerate(cells):
        for run in cell.runs.to_dict("records"):
            rows = cell.latents.filter(pc.field("run") == run["run"])
            what = label(cells, knobs)
            name = f"{what}, {_place(cell, str(run['seed']), cells)}"
            tokens = int(run["held_out_tokens"])
            found.append(Entry(run["run"], name, number, tokens, activations_of(cell), rows))
    return found


def write_browser(
    cells: Sequence[Cell], runs: Runs, contexts: Mapping[str, Contexts], folder: Path
) -> None:
    """Write the browser's data files under ``folder / "latents"``.

    Args:
        contexts: run id → its contexts, for the runs whose contexts were evaluated.
    """
    found = entries(cells)
    root = folder / "latents"
    root.mkdir(parents=True)
    vocabularies = _Vocabularies()
    listed = []
    for i, entry in enumerate(found):
        own = contexts.get(entry.run)
        seen: dict[str, Any] = {}
        if own is not None:
            seen = _write_contexts(root / str(i), i, own, vocabularies)
        _write(root / f"{i}.js", f"run/{i}", latent_columns(entry.rows) | seen.pop("columns", {}))
        listed.append(_about(entry, found) | _classes(runs.get(entry.run)) | seen)
    for i, texts in enumerate(vocabularies.texts):
        _write(root / f"tokens-{i}.js", f"tokens/{i}", texts)
    _write(root / "runs.js", "runs", {"shard": SHARD, "runs": listed})


def latent_columns(rows: pa.Table) -> dict[str, Any]:
    """Return the columns of a run: name → a value per latent, or, for the columns in `_OF_OTHERS`
    and `_ON_TOKENS`, a list of such values for each other run."""
    found: dict[str, Any] = {
        "firing": rows["firing"].to_pylist(),
        "shared_with": rows["shared_with"].to_pylist(),
        "live": rounded(rows["live"]),
        "dead": rounded(rows["dead"]),
    }
    for name in ("reproducibility", "reproducibility_low", "reproducibility_high"):
        found[name] = rounded(rows[name])
    there = [name for name in _ON_TOKENS if name in rows.column_names]
    for name in (*_OF_OTHERS, *there):
        found[name] = [_numbers(own) for own in lists(rows, name).T]
    best = _best_match(lists(rows, "cosine_encoder"), lists(rows, "cosine_decoder"))
    for name in ("cosine_encoder", "cosine_decoder", *there):
        found[f"best_{name}"] = _numbers(_taken(lists(rows, name), best))
    for name in _evaluated(rows):
        found[name] = rounded(rows[name])
    return found


def _about(entry: Entry, among: Sequence[Entry]) -> dict[str, Any]:
    """Return the entry for ``runs.js``; ``others`` are the indices of the runs it is matched
    with."""
    place = {(e.cell, e.run): i for i, e in enumerate(among)}
    others = entry.rows["others"][0].as_py() if len(entry.rows) else []
    tokens, reason = entry.activations
    return {
        "id": entry.run,
        "name": entry.name,
        "tokens": entry.tokens,
        "latents": len(entry.rows),
        "others": [place[entry.cell, other] for other in others],
        "activations": {"tokens": tokens, "reason": reason, "alike": ALIKE},
    }


def _classes(run: EvaluatedRun | None) -> dict[str, list[str]]:
    """Return the letters that ``absorption_class`` indexes, where absorption was evaluated."""
    found = run.results.get("absorption") if run else None
    return {"classes": found.tables[LETTERS]["class"].tolist()} if found else {}


def _evaluated(rows: pa.Table) -> list[str]:
    """Return the columns that the absorption evaluation added."""
    known = ("absorption_class", "absorption_is_absorber", "absorption_words")
    return [name for name in known if name in rows.column_names and rows[name].null_count == 0]


def _place(cell: CellResult, seed: str, cells: Sequence[Cell]) -> str:
    """Return ``seed 0``; labels of other pairings (``topk, 0``) need no prefix."""
    what = pair_axis_name(cells, plural=False)
    return f"{what} {seed}" if what == "seed" else seed


def _best_match(encoder: np.ndarray, decoder: np.ndarray) -> np.ndarray:
    """Return, for each latent, the index of the other run in which the smaller of both cosines is
    largest; 0 where none has cosines."""
    smaller = np.minimum(encoder, decoder)
    return np.where(np.isnan(smaller), -np.inf, smaller).argmax(axis=1)


def _taken(values: np.ndarray, at: np.ndarray) -> np.ndarray:
    return np.take_along_axis(values, at[:, None], axis=1)[:, 0]


def rounded(column: pa.ChunkedArray) -> list[Any]:
    """Return a column as JSON values, as `_numbers` does."""
    return _numbers(column.to_numpy(zero_copy_only=False))


def _numbers(values: np.ndarray) -> list[Any]:
    """Convert to JSON values: floats with `_DIGITS` digits, NaN as None, booleans as 0 and 1."""
    if values.dtype.kind == "b":
        return values.astype(int).tolist()
    if values.dtype.kind != "f":
        return values.tolist()
    return [None if value != value else float(f"{value:.{_DIGITS}g}") for value in values.tolist()]


class _Vocabularies:
    """Token texts; runs with one tokenizer share a vocabulary."""

    def __init__(self) -> None:
        self.texts: list[dict[int, str]] = []

    def add(self, contexts: Contexts, ids: Sequence[int]) -> int:
        """Add the texts of ``ids`` to the first vocabulary that agrees with them, or a new one, and
        return its index."""
        own = dict(zip(ids, contexts.text(ids), strict=True))
        for i, texts in enumerate(self.texts):
            if all(texts.get(token, text) == text for token, text in own.items()):
                texts.update(own)
                return i
        self.texts.append(own)
        return len(self.texts) - 1


def _write_contexts(
    folder: Path, place: int, contexts: Contexts, vocabularies: _Vocabularies
) -> dict[str, Any]:
    """Write the shards of a run.

    Returns:
        ``vocabulary`` for its entry in ``runs.js``, and more columns of its list: ``peak``,
        ``before`` and ``after`` of each latent's best context.
    """
    folder.mkdir()
    used: set[int] = set()
    best: list[Context | None] = []
    for begin in range(0, contexts.num_latents, SHARD):
        shard = []
        for found in contexts.latents(begin, min(begin + SHARD, contexts.num_latents)):
            shard.append(_packed(found))
            best.append(found.contexts[0] if found.contexts else None)
            used |= _tokens_of(found)
        _write(folder / f"{begin // SHARD}.js", f"contexts/{place}/{begin // SHARD}", shard)
    ids = sorted(used)
    vocabulary = vocabularies.add(contexts, ids)
    text = vocabularies.texts[vocabulary]
    parts = [_around(context, text) for context in best]
    listed = zip(("before", "peak", "after"), zip(*parts, strict=True), strict=True)
    return {"columns": {name: list(values) for name, values in listed}, "vocabulary": vocabulary}


def _packed(found: LatentContexts) -> dict[str, Any]:
    """Return the data of a latent's page, with short keys to keep the files small."""
    return {
        "max": _short(found.largest),
        "mean": _short(found.mean),
        "up": _pairs(found.promoted),
        "down": _pairs(found.suppressed),
        "near": _pairs(found.neighbours),
        "c": [_packed_context(context) for context in found.contexts],
    }


def _packed_context(context: Context) -> list[Any]:
    """Return [quantile or null, index of the peak, position in the text, ids, activations]. The
    last is a flat list of the nonzero activations: index, value, index, …"""
    pairs = zip(context.active.tolist(), context.values.tolist(), strict=True)
    flat = [part for at, value in pairs for part in (at, _short(value))]
    quantile = None if context.quantile is None else _short(context.quantile)
    return [quantile, int(context.peak), int(context.position), context.tokens.tolist(), flat]


def _pairs(found: Sequence[tuple[int, float]]) -> list[Any]:
    return [part for which, value in found for part in (int(which), _short(value))]


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _tokens_of(found: LatentContexts) -> set[int]:
    logits = {int(token) for token, _ in (*found.promoted, *found.suppressed)}
    return logits.union(*(context.tokens.tolist() for context in found.contexts))


def _around(context: Context | None, text: Mapping[int, str]) -> tuple[str, str, str]:
    """Return the text before the peak token, the peak token, and the text after it."""
    if context is None:
        return "", "", ""
    ids, peak = context.tokens.tolist(), int(context.peak)
    before = "".join(text[i] for i in ids[max(0, peak - CONTEXT_TOKENS) : peak])
    after = "".join(text[i] for i in ids[peak + 1 : peak + 1 + CONTEXT_TOKENS])
    return before, text[ids[peak]], after


def _write(path: Path, key: str, value: Any) -> None:
    """Write one call of ``reseed.data``; U+2028 and U+2029, which end lines in old JavaScript,
    are escaped."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    path.write_text(f"reseed.data({json.dumps(key)},{text})\n", encoding="utf-8")
