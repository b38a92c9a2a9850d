"""Columns, their order and their values in five kinds of cells, as recorded with version 0.1.

`python tests/compare/test_recorded_cells.py` writes the record again. Columns may be added to it;
a value that changes needs a new version of its measure.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from reseed.compare.activations.measures import measure_same_activations, measure_same_tokens
from reseed.compare.activations.tables import weight_matches, with_activations
from reseed.compare.cell import CellResult, compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary
from reseed.sae.topk import TopKConfig

RECORD = Path(__file__).parents[1] / "records" / "cells.json"
NUM_LATENTS, D_IN, TOKENS = 32, 16, 1000


def made_run(seed: int, d_in: int = D_IN, trained: bool = True) -> Dictionary:
    """Return a run that has a noisy copy of 20 latents in common with every other seed."""
    rng = np.random.default_rng([seed, d_in, trained])
    rows = rng.standard_normal((2, NUM_LATENTS, d_in))
    if trained:
        common = np.random.default_rng(d_in).standard_normal((2, 20, d_in))
        rows[:, :20] = common + rng.uniform(0, 1, (2, 20, 1)) * rng.standard_normal((2, 20, d_in))
        rows[:, 20] = rows[:, 0] * [[1.0], [0.9]]  # a duplicate
        rows[:, 21] = -rows[:, 1]  # its antipode
        rows[0, 31] = 0
    else:
        rows[1] = rows[0]
    order = rng.permutation(NUM_LATENTS)
    firing = np.minimum(TOKENS, np.exp(rng.uniform(0, 6, NUM_LATENTS)).astype(np.int64) - 1)
    return Dictionary(
        id=f"run-{seed}",
        seed=str(seed),
        encoder=rows[0, order],
        decoder=rows[1, order],
        firing=firing,
        held_out_tokens=TOKENS,
        dead=firing == 0,
        metrics={"fvu": 0.1 + 0.01 * seed, "l0": 8.0 + seed, "cosine": 0.9, "dead_fraction": 0.1,
                 "steps": 100},
        covariance=np.diag(np.linspace(0.1, 1, d_in)) if trained else None,
        variance=rng.uniform(0, 1, NUM_LATENTS) if trained else None,
    )  # fmt: skip


def made_settings(**values: object) -> ComparisonConfig:
    grid = {"seed": [0, 1, 2, 3], "layer": [0, 1, 2, 3]}
    return ComparisonConfig(**{"name": "trial", "grid": grid, "null_draws": 1} | values)  # type: ignore[arg-type]


def seeds() -> CellResult:
    return compare_cell(
        [made_run(s) for s in range(4)],
        [made_run(s, trained=False) for s in range(4)],
        made_settings(),
    )


def of_different_widths() -> CellResult:
    """Return a cell in which the third run reads activations of another width."""
    widths = (D_IN, D_IN, 8)
    return compare_cell(
        [made_run(s, d) for s, d in enumerate(widths)],
        [made_run(s, d, trained=False) for s, d in enumerate(widths)],
        made_settings(pair_by="layer"),
    )


def with_truth() -> CellResult:
    labels = np.random.default_rng(5).integers(0, 4, (3, NUM_LATENTS))
    metrics = {"truth_atoms_found": 0.5}
    runs = [
        dataclasses.replace(x, truth=labels[s], metrics={**x.metrics, **metrics})
        for s, x in enumerate(made_run(s) for s in range(3))
    ]
    return compare_cell(runs, [], made_settings())


def without_covariance() -> CellResult:
    runs = [dataclasses.replace(made_run(s), covariance=None, variance=None) for s in range(3)]
    return compare_cell(runs, [], made_settings(threshold=0.6, live_at_least=3))


def on_activations() -> CellResult:
    """Return a cell of SAEs, measured on the same activations."""
    saes, x = made_saes((D_IN, D_IN, D_IN)), made_activations(D_IN)
    cell = cell_of(saes, [x] * 3, made_settings())
    return with_activations(cell, measure_same_activations(saes, weight_matches(cell), [x]))


def on_the_same_tokens() -> CellResult:
    """Return a cell of SAEs of two widths, measured on the same tokens."""
    saes = made_saes((D_IN, D_IN, 8))
    streams = [made_activations(d) for d in (D_IN, 8)]
    cell = cell_of(saes, [streams[i] for i in (0, 0, 1)], made_settings(pair_by="layer"))
    matches, chunks = weight_matches(cell), [[x] for x in streams]
    return with_activations(cell, measure_same_tokens(saes, matches, chunks, [0, 0, 1], 500))


def not_measured_on_activations() -> CellResult:
    return with_activations(without_covariance(), None, "the text is gone")


def made_saes(widths: tuple[int, ...]) -> list:
    """Return TopK SAEs with 24 latents of the first SAE of the same width, and noise."""
    found, first = [], {}
    for s, d_in in enumerate(widths):
        config = TopKConfig(num_latents=NUM_LATENTS, k=4)
        sae = config.build(d_in, torch.Generator().manual_seed(s)).requires_grad_(False)
        same = first.setdefault(d_in, sae)
        for name in ("W_enc", "W_dec"):
            noise = getattr(sae, name)[:24].clone() * 0.2
            getattr(sae, name)[:24] = getattr(same, name)[:24] + noise
        found.append(sae)
    for sae in found:
        sae.W_dec *= 0.3  # so that taking a latent out does damage
    return found


def made_activations(d_in: int) -> torch.Tensor:
    return torch.randn(500, d_in, generator=torch.Generator().manual_seed(7))


def cell_of(saes: list, read: list, settings: ComparisonConfig) -> CellResult:
    runs = []
    for s, (sae, x) in enumerate(zip(saes, read, strict=True)):
        firing = (sae.encode(x) != 0).sum(0).numpy()
        rows = (sae.W_enc.numpy(), sae.W_dec.numpy())
        runs.append(Dictionary(f"run-{s}", str(s), *rows, firing, len(x), firing == 0))
    return compare_cell(runs, [], settings)


CELLS: dict[str, Callable[[], CellResult]] = {
    of.__name__: of
    for of in (
        seeds, of_different_widths, with_truth, without_covariance, on_activations,
        on_the_same_tokens, not_measured_on_activations,
    )
}  # fmt: skip


def contents(cell: CellResult) -> dict:
    """Return the columns of a cell in order, with the values of pairs, runs and estimates, and two
    sums of each column of latents and strata."""
    return {
        "pairs": {name: values(cell.pairs[name]) for name in cell.pairs},
        "runs": {name: values(cell.runs[name]) for name in cell.runs},
        "estimates": {
            name: [*values([e.mean, e.low, e.high, e.standard_error, e.n]), e.reason]
            for name, e in cell.estimates.items()
        },
        "latents": {
            name: [str(cell.latents.schema.field(name).type), *sums(cell.latents[name])]
            for name in cell.latents.column_names
        },
        "strata": {name: sums(pa.array(cell.strata[name])) for name in cell.strata},
        "p": values(cell.p),
    }


def values(column: object) -> list:
    found = [x.item() if isinstance(x, np.generic) else x for x in list(column)]  # type: ignore[call-overload]
    return [
        x if x is None or isinstance(x, str | int) else None if np.isnan(x) else float(f"{x:.10g}")
        for x in found
    ]


def sums(column: pa.ChunkedArray | pa.Array) -> list:
    """Return the sum of a column and its scalar product with cosines of the row number; texts count
    by their length, lists by their entries."""
    if pa.types.is_list(column.type):
        column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        column = column.flatten()
    entries = [len(x) if isinstance(x, str) else x for x in column.to_pylist()]
    numbers = np.array([np.nan if x is None else x for x in entries], dtype=np.float64)
    known = np.nan_to_num(numbers)
    weighted = known @ np.cos(np.arange(len(known)))
    return values([float(known.sum()), float(weighted), int(np.isnan(numbers).sum())])


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_has_the_recorded_columns_and_values(name: str) -> None:
    recorded = json.loads(RECORD.read_text())[name]
    found = contents(CELLS[name]())
    for table in ("pairs", "runs", "latents", "strata"):
        kept = [column for column in found[table] if column in recorded[table]]
        assert kept == list(recorded[table]), f"the columns of {table} and their order"
    for table in ("pairs", "runs", "estimates", "latents", "strata"):
        assert recorded[table].keys() <= found[table].keys(), table
        for column, expected in recorded[table].items():
            values = found[table][column]
            if table == "estimates":  # version 0.1 wrote intervals of width 0; now there is none
                mean, low, high, _, n, _ = expected
                if low is not None and low == high:
                    assert "a spread of 0 is no estimate of the error" in values.pop()
                    expected = [mean, None, None, None, n]
            assert same(values, expected), f"{table}: {column}"
    assert same(found["p"], recorded["p"])


def same(found: list, expected: list) -> bool:
    return len(found) == len(expected) and all(
        x == y if x is None or y is None or isinstance(x, str) else x == pytest.approx(y, rel=1e-5)
        for x, y in zip(found, expected, strict=True)
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = json.dumps({name: contents(of()) for name, of in CELLS.items()}, ensure_ascii=False)
    RECORD.write_text(text.replace("], ", "],\n").replace("}, ", "},\n") + "\n")
    sys.stdout.write(f"{RECORD}\n")
