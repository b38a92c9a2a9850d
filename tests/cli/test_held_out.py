"""Held-out activations of a cell: runs that share them, runs that differ, and missing models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import reseed
from reseed.activations.found_model import FoundModel
from reseed.activations.language_model import LanguageModel
from reseed.cli import compare, run
from reseed.compare.activations.tables import NOTE, TOKENS
from reseed.compare.cell import CellResult, compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import load_dictionaries
from reseed.compare.registry import columns
from reseed.errors import ConfigError
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore
from reseed.study.compare import write_with_activations
from reseed.study.held_out import ActivationsUnavailable, activation_mismatch, held_out_chunks
from reseed.train.config import RuntimeConfig


@pytest.fixture(scope="module")
def folder(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compare two runs on 500 of the 1,024 tokens that each was measured on."""
    path = tmp_path_factory.mktemp("project")
    line = ["comparison=seeds", *tiny_overrides, "sae.k=8", "seed=0,1", "comparison.null_draws=1"]
    line += [f"runtime.{name}={path / name}" for name in ("outputs", "sweeps")]
    assert run.main([*line, "comparison.activation_tokens=500"]) == 0
    return path


@pytest.fixture
def runs(folder: Path) -> list[Run]:
    return RunStore(folder / "outputs").runs()


@pytest.fixture
def compared(runs: list[Run]):
    """Return a function that compares the runs by their weights, given ``activation_tokens``."""

    def compared(tokens: int = 32_768) -> CellResult:
        settings = ComparisonConfig(
            name="t", grid={"seed": [0, 1]}, null_draws=1, activation_tokens=tokens
        )
        return compare_cell([load_dictionaries(r, r.id[-14])[0] for r in runs], [], settings)

    return compared


def completed(cell: CellResult, runs: list[Run], path: Path) -> CellResult:
    write_with_activations(cell, runs, path, "all runs", RuntimeConfig())
    return CellResult.read(path)


def test_pearson_equals_the_correlation_of_activations(folder: Path, runs: list[Run]) -> None:
    (sweep,) = (folder / "sweeps").iterdir()
    (row,) = pd.read_csv(sweep / "pairs.csv").to_dict("records")
    assert row[TOKENS] == 500
    summary = pd.read_csv(sweep / "summary.csv")
    assert summary["cka_codes"].tolist() == pytest.approx([row["cka_codes"]])
    assert {row["a"], row["b"]} == {r.id for r in runs}
    a, b = (Run(folder / "outputs" / str(row[key])) for key in ("a", "b"))
    chunks, tokens = held_out_chunks([a, b], 500, RuntimeConfig())
    x = torch.cat(list(chunks)).float()
    assert (tokens, len(x)) == (500, 500)
    f, g = (load_sae(r.path).encode(x).double().numpy() for r in (a, b))
    latents = pd.read_parquet(sweep / "latents.parquet")
    assert columns("latent", "activations").keys() <= set(latents.columns)
    of_a = latents[latents["run"] == row["a"]]
    pairs = zip(of_a["partner_decoder"], of_a["pearson"], strict=True)
    seen = 0
    for i, ((j,), (found,)) in enumerate(pairs):
        if min(f[:, i].std(), g[:, j].std()) > 0:
            assert found == pytest.approx(np.corrcoef(f[:, i], g[:, j])[0, 1], abs=1e-5)
            seen += 1
    assert seen > 10


def test_no_more_tokens_are_read_than_runs_were_measured_on(runs: list[Run]) -> None:
    chunks, tokens = held_out_chunks(runs, 32_768, RuntimeConfig())
    x = torch.cat(list(chunks)).float()
    assert (tokens, len(x)) == (1024, 1024)
    for found in runs:
        firing = (load_sae(found.path).encode(x) != 0).sum(0)
        assert np.array_equal(firing.numpy(), found.latents()["firing"])


def test_without_activation_tokens_nothing_is_read(
    runs: list[Run], compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reseed.study.compare.held_out_chunks", None)
    cell = completed(compared(0), runs, tmp_path)
    assert not {TOKENS, NOTE, "cka_codes"} & set(cell.pairs.columns)
    assert "pearson" not in cell.latents.column_names


def test_a_missing_model_costs_only_measures_on_activations(
    runs: list[Run],
    compared: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gone(*_: object) -> None:
        raise OSError("the hub cannot be reached\nTraceback")

    weights = compared()
    with monkeypatch.context() as patched:
        patched.setattr(LanguageModel, "__init__", gone)
        cell = completed(weights, runs, tmp_path)
    told = "all runs: compared by weights alone, not by activations: the hub cannot be reached"
    assert told in capsys.readouterr().out
    assert cell.pairs[NOTE].tolist() == ["the hub cannot be reached"]
    assert cell.pairs["shared_fraction"].equals(weights.pairs["shared_fraction"])
    assert (
        cell.pairs[[n for n in columns("pair", "activations") if "matched" not in n]]
        .isna()
        .to_numpy()
        .all()
    )
    # With the model back, the measures on activations are added.
    cell = completed(cell, runs, tmp_path)
    assert "comparing 2 runs on 1,024 held-out activations" in capsys.readouterr().out
    assert cell.pairs[NOTE].tolist() == [""]
    assert cell.pairs["cka_codes"].between(-0.1, 1).all()
    # Then nothing is left to do.
    monkeypatch.setattr(LanguageModel, "__init__", gone)
    write_with_activations(cell, runs, tmp_path, "all runs", RuntimeConfig())
    assert capsys.readouterr().out == ""


def test_an_interruption_keeps_the_measures_on_weights(
    runs: list[Run], compared: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("reseed.study.compare.measure_same_activations", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_with_activations(compared(), runs, tmp_path, "all runs", RuntimeConfig())
    assert CellResult.read(tmp_path).pairs[NOTE].tolist() == ["interrupted"]


def changed(found: Run, **changes: Any) -> Any:
    return SimpleNamespace(record=found.record | changes)


def test_a_changed_text_is_refused(runs: list[Run]) -> None:
    other = runs[0].record["fingerprints"] | {"text": "another"}
    with pytest.raises(
        ActivationsUnavailable, match="the text is not the one that the runs were trained with"
    ):
        held_out_chunks([changed(r, fingerprints=other) for r in runs], 100, RuntimeConfig())


def test_runs_that_version_01_trained_on_another_tensor_are_refused(
    runs: list[Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of Gemma-2 at mlp_out: the record has no place, and the model now has one."""
    place = {"place": "the output of model.layers.1.norm"}
    monkeypatch.setattr(FoundModel, "site_identity", lambda self, hook: place)
    told = r"version 0\.1 read another tensor as resid_post\.1 of this model"
    with pytest.raises(ActivationsUnavailable, match=told):
        held_out_chunks(runs, 100, RuntimeConfig())
    with pytest.raises(ConfigError, match=r"version 0\.1 read another tensor as resid_post\.1"):
        reseed.read_activations([[1, 2]], runs[0])
    both = [runs[0].record["identity"], runs[1].record["identity"] | place]
    assert activation_mismatch(both) == "place"


def test_runs_on_different_activations_are_refused(runs: list[Run]) -> None:
    elsewhere = changed(runs[1], identity=runs[1].record["identity"] | {"layer": 0})
    told = "do not read the same held-out activations: they differ in layer"
    with pytest.raises(ActivationsUnavailable, match=told):
        held_out_chunks([runs[0], elsewhere], 100, RuntimeConfig())


@pytest.mark.slow
def test_a_sweep_over_layers_notes_why_activations_are_not_compared(
    tiny_overrides: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = ["comparison=layers", *tiny_overrides, "layer=0,1", "seed=0,1"]
    line = [o for o in line if o != "layer=1"]
    assert run.main([*line, "comparison.pair_by=layer"]) == 0
    reason = "its runs do not read the same held-out activations: they differ in layer"
    assert f"seed=1: compared by weights alone, not by activations: {reason}" in (
        capsys.readouterr().out
    )
    (sweep,) = Path("sweeps").iterdir()
    assert pd.read_csv(sweep / "pairs.csv")[NOTE].tolist() == [reason] * 2
    # Held-out activations do not depend on the order of training.
    line = [o for o in line if not o.startswith(("layer", "seed="))]
    order = ["layer=1", "seed=0,1", "dataset.order_seed=0,1"]
    assert run.main([*line, *order, "comparison.pair_by=dataset.order_seed"]) == 0
    assert "seed=1: comparing 2 runs on 1,024 held-out activations" in capsys.readouterr().out


@pytest.mark.slow
def test_runs_on_worlds_are_compared_on_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [
        "comparison=seeds", "model=world_easy", "sae.num_latents=32", "sae.k=4", "seed=0,1",
        "training.tokens=8192", "training.batch_size=64", "dataset.held_out_tokens=1024",
        "dataset.chunk_tokens=2048", "runtime.progress=false", "comparison.null_draws=1",
    ]  # fmt: skip
    assert run.main(line) == 0
    (sweep,) = Path("sweeps").iterdir()
    pairs = pd.read_csv(sweep / "pairs.csv")
    assert pairs[TOKENS].tolist() == [1024]
    assert pairs["cka_reconstructions"].between(0, 1).all()
    before = (sweep / "pairs.csv").read_bytes()
    assert compare.main(line) == 0
    assert (sweep / "pairs.csv").read_bytes() == before


IDENTITY = {
    "model": {"type": "path"},
    "layer": 1,
    "hookpoint": {"site": "resid_post"},
    "dataset": {"order_seed": 0, "held_out_tokens": 10, "context_length": 32},
    "fingerprints": {"text": "x"},
    "sae": {"k": 1},
    "seed": 0,
}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"sae": {"k": 2}, "seed": 3, "training": {"tokens": 1}}, ""),
        ({"dataset": {"order_seed": 5, "held_out_tokens": 99, "context_length": 32}}, ""),
        ({"dataset": {"order_seed": 0, "held_out_tokens": 10, "context_length": 64}}, "dataset"),
        ({"fingerprints": {"text": "y"}}, "fingerprints"),
        ({"surrogate": "gaussian"}, "surrogate"),
        ({"hookpoint": {"site": "mlp_out"}}, "hookpoint"),
        ({"layer": 2, "model": {"type": "hub"}}, "model"),
    ],
)
def test_differing_names_what_changes_held_out_activations(change: dict, expected: str) -> None:
    assert activation_mismatch([IDENTITY, IDENTITY | change]) == expected
