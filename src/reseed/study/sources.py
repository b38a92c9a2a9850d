"""Comparison of existing SAEs by their weights, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reseed.compare.cell import compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary
from reseed.compare.matching import MatchingCache
from reseed.compare.pairing import add_axis_columns
from reseed.errors import ConfigError
from reseed.report.cell_labels import Cell
from reseed.report.figures import write_figures
from reseed.report.table_files import write_tables
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats import import_sae
from reseed.sae.formats.files import fetch
from reseed.sae.pretrained import fingerprint_of
from reseed.store.sweeps import Sweep
from reseed.study.alignment import check_named_models
from reseed.system.console import counted, say, throttled_say
from reseed.system.devices import pick_device
from reseed.train.config import RuntimeConfig

KEY = "sources"
_MEASURED = ("fvu", "l0", "cosine", "dead_fraction")
"""Metrics of runs on held-out tokens, which are unknown if only weights are compared."""


def compare_weights(
    sources: Sequence[str], settings: ComparisonConfig, runtime: RuntimeConfig
) -> tuple[list[Cell], Path, bool]:
    """Match all pairs of SAEs, and write tables and figures.

    Args:
        sources: folders, files and places on the hub, as `load_sae` takes them.

    Returns:
        the cell, the folder, and whether figures were drawn.

    Raises:
        ConfigError: a source cannot be read, two are the same SAE, or two are of different models.
    """
    read = [_dictionary(source) for source in sources]
    for i, (one, *_) in enumerate(read):
        same = [sources[k] for k, (other, *_) in enumerate(read[:i]) if other.id == one.id]
        if same:
            raise ConfigError(f"{{key}}: {same[0]} and {sources[i]} are the same SAE", KEY)
    found = [one for one, *_ in read]
    if notice := check_named_models([said for *_, said in read], sources, settings):
        say(notice)
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    sweep = Sweep.of(runtime.sweeps, "sources", [one.id for one in found], settings.signed())
    say(f"comparing {counted(len(found), 'SAE')} by their weights")
    device = str(pick_device(runtime.device))
    store = MatchingCache(sweep.path.parent / "matchings", device=device, progress=throttled_say())
    result = compare_cell(found, (), settings, matcher=store, device=device)
    places = {one.id: {"source": one.seed} for one in found}
    result = replace(result, pairs=add_axis_columns(result.pairs, places, settings))
    result.write(sweep.cell_folder({}))
    knobs = {
        "sae": "|".join(dict.fromkeys(kind for _, kind, _ in read)),
        "num_latents": "|".join(dict.fromkeys(f"{one.num_latents}" for one in found)),
    }
    cells: list[Cell] = [(knobs, result)]
    write_tables(cells, sweep.path)
    return cells, sweep.path, bool(write_figures(cells, sweep.path))


def _dictionary(source: str) -> tuple[Dictionary, str, Mapping[str, Any]]:
    """Return an SAE's encoder and decoder rows, without firing counts, its architecture, and what
    its files say of its origin."""
    try:
        found = import_sae(fetch(source))
    except CheckpointError as error:
        raise ConfigError(f"{{key}}: {error}", KEY) from error
    sae = found.sae
    nothing = np.zeros(sae.num_latents, dtype=np.int64)
    unknown: dict[str, float] = {name: float("nan") for name in _MEASURED}
    made = Dictionary(
        id=f"{sae.config.name}-{sae.num_latents}-{fingerprint_of(sae)}",
        seed=source,
        firing=nothing,
        held_out_tokens=0,
        dead=nothing.astype(bool),
        metrics=unknown,
        encoder=sae.W_enc.detach().numpy(),
        decoder=sae.W_dec.detach().numpy(),
    )
    return made, sae.config.name, found.metadata
