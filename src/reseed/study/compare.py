"""Comparison of the saved runs of a cell: by their weights, then by their activations.

`compare_cell_of` loads the finished runs of a cell, measures all pairs, and writes the result. The
held-out activations of a cell are then read once for all of its SAEs (`write_with_activations`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from reseed.compare.activations.measures import (
    ActivationMeasures,
    measure_same_activations,
    measure_same_tokens,
)
from reseed.compare.activations.tables import (
    lacks_activations,
    weight_matches,
    with_activations,
)
from reseed.compare.cell import CellResult, compare_cell
from reseed.compare.config import REPLICATES, ComparisonConfig, pair_axes
from reseed.compare.dictionary import load_dictionaries
from reseed.compare.matching import MatchingCache
from reseed.compare.pairing import add_axis_columns, axis_label
from reseed.compare.registry import NOTE, Measure, declared
from reseed.compare.truth import LABEL_COLUMN
from reseed.errors import ReseedError
from reseed.sae.base import SAE
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run
from reseed.store.sweeps import Sweep
from reseed.study.alignment import aligned
from reseed.study.held_out import (
    activation_mismatch,
    held_out_chunks,
    held_out_streams,
)
from reseed.system.console import counted, say, throttled_say
from reseed.system.devices import pick_device
from reseed.system.integrity import DamagedFileError
from reseed.train.config import RuntimeConfig


def compare_cell_of(
    sweep: Sweep, axes: dict[str, str], settings: ComparisonConfig, runtime: RuntimeConfig
) -> None:
    """Compare the finished runs of one cell, unless its results exist already."""
    rows = sweep.rows(axes)
    pairs = zip(rows, sweep.runs(**axes), strict=True)
    paired = pair_axes(settings.pair_by)
    finished = [({x: row["axes"][x] for x in paired}, run) for row, run in pairs if run.finished]
    folder = sweep.cell_folder(axes)
    name = ", ".join(f"{axis}={value}" for axis, value in axes.items()) or "all runs"
    if len(finished) < 2:
        say(f"  {name}: {len(finished)} of {len(rows)} runs finished, nothing to compare")
        return
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    runs = [run for _, run in finished]
    done = _done(folder, runs, settings)
    lacking = outdated_measures(done) if done else []
    if done is not None and not lacking:
        write_with_activations(done, runs, folder, name, runtime)
        return
    if lacking:
        say(
            f"  {name}: compared again, because these measures are new or newer: {_listed(lacking)}"
        )
    for run in runs:
        run.verify()
    # Before they are read, because another process may train a run again meanwhile.
    inputs = {run.id: run.hashes() for run in runs}
    _check_weights(finished, name)
    pairs_up = counted(math.comb(len(finished), 2), "pair")
    say(f"  comparing {name}: {len(finished)} runs, {pairs_up}")
    loaded = [load_dictionaries(run, axis_label(place)) for place, run in finished]
    trained, untrained = zip(*loaded, strict=True)
    trained, alignments = aligned(runs, trained, settings, runtime)
    device = str(pick_device(runtime.device))
    # All sweeps share the folder of matchings, because several sweeps may have the same pair.
    store = MatchingCache(sweep.path.parent / "matchings", device=device, progress=throttled_say())
    # A pretrained SAE has no known initialisation, so its cell has no untrained comparison.
    started = [one for one in untrained if one is not None]
    started = started if len(started) == len(trained) else []
    result = compare_cell(
        trained, started, settings, alignments=alignments, matcher=store, device=device
    )
    places = {run.id: place for place, run in finished}
    write_with_activations(
        replace(
            result,
            pairs=add_axis_columns(result.pairs, places, settings),
            inputs=inputs,
        ),
        runs,
        folder,
        name,
        runtime,
    )


def _listed(names: Sequence[str]) -> str:
    few = ", ".join(names[:4])
    return few if len(names) <= 4 else f"{few} and {len(names) - 4} more"


def _done(folder: Path, runs: Sequence[Run], settings: ComparisonConfig) -> CellResult | None:
    """Return the stored result of a cell if it has these runs and settings, else None."""
    try:
        done = CellResult.read(folder)
    except (FileNotFoundError, ValueError):
        return None
    except DamagedFileError as error:
        say(f"  {error}: compared again")
        return None
    same_runs = done.runs["run"].tolist() == [run.id for run in runs]
    same = same_runs and not stale_runs(done, runs) and done.settings.signed() == settings.signed()
    return done if same else None


def stale_runs(cell: CellResult, runs: Iterable[Run]) -> list[Run]:
    """Return those runs of a cell whose files are not those that were compared.

    A cell of version 0.1 records no files; it was compared from runs without hashes.
    """
    compared = cell.inputs or {}
    own = set(cell.runs["run"])
    return [run for run in runs if run.id in own and run.hashes() != compared.get(run.id, {})]


def outdated_measures(cell: CellResult) -> list[str]:
    """Return the names of the declared measures that a cell lacks, or has of another version.

    A cell that an older version of reseed compared has no record of its measures; it holds those
    whose columns it has, in their first version.
    """
    if cell.measures is not None:
        held = cell.measures
        return [
            own.own[0].name
            for own in declared()
            if held.get(own.key) != own.version
            and ("map" not in own.needs or cell.settings.align == "procrustes")
        ]
    tables = {"pair": cell.pairs, "run": cell.runs, "latent": cell.latents.column_names}
    return [
        own.own[0].name
        for own in declared()
        if own.version > 1
        or (_concerns(own, cell) and own.own[0].name not in tables.get(own.level, cell.estimates))
    ]


def _concerns(own: Measure, cell: CellResult) -> bool:
    """Return whether a cell has columns of a measure; those of some needs only some cells have."""
    if "truth" in own.needs:
        return LABEL_COLUMN in cell.latents.column_names
    if not own.needs.isdisjoint(("matched", "map")):
        return False
    return "activations" not in own.needs or NOTE in cell.pairs


def is_complete(sweep: Sweep, axes: dict[str, str], settings: ComparisonConfig) -> bool:
    """Return True if all runs of a cell are finished and compared."""
    runs = sweep.runs(**axes)
    if not all(run.finished for run in runs):
        return False
    done = _done(sweep.cell_folder(axes), runs, settings)
    if done is None or outdated_measures(done):
        return False
    if not settings.activation_tokens:
        return True
    # The note is "interrupted" if a job was stopped; any other note is a final reason.
    return NOTE in done.pairs and "interrupted" not in set(done.pairs[NOTE])


def _check_weights(runs: Sequence[tuple[dict[str, str], Run]], cell: str) -> None:
    """Raise `ReseedError` if seeds of one cell were trained with different penalty weights.

    Args:
        runs: each run, after its values of the paired axes.
    """
    alike: dict[tuple[str, ...], set[float | None]] = {}
    for place, run in runs:
        chosen = tuple(value for axis, value in place.items() if axis not in REPLICATES)
        alike.setdefault(chosen, set()).add(run.record.get("penalty_weight"))
    for chosen, weights in alike.items():
        if len(weights) == 1:
            continue
        told = ", ".join(f"{w:.4g}" if w is not None else "none" for w in weights)
        cell = ", ".join([cell, *chosen])
        raise ReseedError(
            f"{cell}: its runs were trained with different penalty weights ({told}), because their "
            "calibration was lost or repeated elsewhere, so more than the seed differs. Delete the "
            "runs of one weight and train them again."
        )


def write_with_activations(
    cell: CellResult, runs: Sequence[Run], folder: Path, name: str, runtime: RuntimeConfig
) -> None:
    """Write a cell into its folder, with the measures on activations if they can be computed.

    The measures on weights are written first, so that they are not lost if the language model is
    missing or the command is stopped. The next command retries a cell that lacks the requested
    measures on activations.
    """
    wanted = cell.settings.activation_tokens
    if not wanted:
        cell.write(folder)
        return
    if not lacks_activations(cell):
        return
    with_activations(cell, None, "interrupted").write(folder)
    try:
        tokens, measure = _measurement(cell, runs, wanted, runtime)
    except (ReseedError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        say(f"  {name}: compared by weights alone, not by activations: {reason}")
        with_activations(cell, None, reason).write(folder)
        return
    say(f"  {name}: comparing {len(runs)} runs on {tokens:,} held-out activations")
    with_activations(cell, measure()).write(folder)


def _measurement(
    cell: CellResult, runs: Sequence[Run], wanted: int, runtime: RuntimeConfig
) -> tuple[int, Callable[[], ActivationMeasures]]:
    """Return the number of activations, and a function that reads and measures them.

    Raises: see `held_out_chunks`.
    """
    seed, device = cell.settings.null_seed, str(pick_device(runtime.device))

    def saes() -> list[SAE]:
        return [load_sae(run.path, device) for run in runs]

    identities = [run.record["identity"] for run in runs]
    several = activation_mismatch(identities) and cell.settings.align is not None
    if len(set(cell.runs["d_in"])) == 1 and not several:
        chunks, tokens = held_out_chunks(runs, wanted, runtime)
        return tokens, lambda: measure_same_activations(saes(), weight_matches(cell), chunks, seed)
    streams, reads, tokens = held_out_streams(runs, wanted, runtime)
    return tokens, lambda: measure_same_tokens(
        saes(),
        weight_matches(cell),
        streams,
        reads,
        tokens,
        seed=seed,
        threshold=cell.settings.threshold,
    )
