"""End-to-end tests: declare, train, compare, tabulate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import reseed
from reseed.cli import compare, run, status
from reseed.compare.cell import compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import Dictionary, load_dictionaries
from reseed.sae.topk import TopKConfig
from reseed.store.runs import RunStore
from reseed.system.integrity import write_record

COLUMNS = [
    "n_seeds", "shared_fraction", "shared_fraction_low", "shared_fraction_high",
    "shared_fraction_live", "coverage", "cosine_encoder", "cosine_decoder", "null_cosine",
    "null_shared_fraction", "fvu", "l0", "dead_fraction", "runs",
]  # fmt: skip


@pytest.fixture
def line(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return ["comparison=seeds", *tiny_overrides, "sae=topk,relu"]


def test_run_trains_compares_and_tabulates(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(line) == 0
    said = capsys.readouterr().out
    (sweep,) = Path("sweeps").iterdir()
    assert str(sweep) in said

    summary = pd.read_csv(sweep / "summary.csv")
    assert set(COLUMNS) <= set(summary.columns)
    assert summary["sae"].tolist() == ["topk", "relu"]
    assert summary["n_seeds"].tolist() == [3, 3]
    assert (summary["fvu"] < 1).all()
    manifest = [json.loads(text) for text in (sweep / "manifest.jsonl").read_text().splitlines()]
    assert [row["axes"] for row in manifest] == [
        {"seed": str(seed), "sae": sae} for seed in (0, 1, 2) for sae in ("topk", "relu")
    ]
    assert len(pd.read_csv(sweep / "pairs.csv")) == 6
    assert len(pd.read_parquet(sweep / "latents.parquet")) == 6 * 64
    for name in ("shared_fraction", "seeds", "cosines"):
        for kind in ("png", "svg"):
            assert (sweep / f"{name}.{kind}").stat().st_size > 1000

    # The same command again trains nothing and writes the same numbers.
    before = (sweep / "summary.csv").read_bytes()
    assert run.main(line) == 0
    assert "nothing to train: 6 runs already finished" in capsys.readouterr().out
    assert compare.main(line) == 0
    assert (sweep / "summary.csv").read_bytes() == before
    assert len(list(Path("sweeps").iterdir())) == 1


def test_the_tables_agree_with_the_weights(line: list[str]) -> None:
    """Apply the strict rule by a plain loop over the weights that users load."""
    assert run.main(line) == 0
    (sweep,) = Path("sweeps").iterdir()
    pairs = pd.read_csv(sweep / "pairs.csv")
    from scipy.optimize import linear_sum_assignment

    for _, row in pairs.iterrows():
        a, b = (reseed.load_sae(Path("outputs") / row[key]) for key in ("a", "b"))
        matched = {}
        for part in ("W_enc", "W_dec"):
            x, y = (getattr(s, part).detach().double().numpy() for s in (a, b))
            x, y = (m / np.linalg.norm(m, axis=1, keepdims=True) for m in (x, y))
            _, columns = linear_sum_assignment(-(x @ y.T))
            matched[part] = [(j, float(x[i] @ y[j])) for i, j in enumerate(columns)]
        shared = sum(
            e[0] == d[0] and e[1] >= 0.7 and d[1] >= 0.7
            for e, d in zip(matched["W_enc"], matched["W_dec"], strict=True)
        )
        assert row["shared_fraction"] == pytest.approx(shared / 64)


@pytest.mark.slow
def test_a_permuted_copy_shares_everything(line: list[str]) -> None:
    assert run.main(line) == 0
    found = RunStore("outputs").runs()[-1]
    trained, untrained = load_dictionaries(found, "0")
    assert trained.covariance is not None
    assert untrained.covariance is None, "no table shows it for untrained weights"
    order = np.random.default_rng(0).permutation(trained.num_latents)
    from dataclasses import replace

    copy = replace(
        trained, id="copy", seed="1", encoder=trained.encoder[order],
        decoder=trained.decoder[order], firing=trained.firing[order], dead=trained.dead[order],
    )  # fmt: skip
    settings = ComparisonConfig(name="t", grid={"seed": ["0", "1"]}, pair_by="seed")
    result = compare_cell([trained, copy], [], settings)
    assert result.pairs["shared_fraction"].tolist() == [1.0]
    assert result.pairs["cosine_encoder"].iloc[0] == pytest.approx(1)
    assert result.pairs["shared_fraction_correlation"].tolist() == [1.0]
    # Runs from before activations were described still count as finished and can be compared.
    record = found.record
    del record["files"]
    write_record(found.path / "run.json", record)
    (found.path / "activations.safetensors").unlink()
    assert found.finished
    assert load_dictionaries(found, "0")[0].covariance is None


@pytest.mark.slow
def test_an_incomplete_cell_is_reported(
    line: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reseed.train.run_state import RunState

    original = RunState.train

    def poisoned(self: RunState, x: torch.Tensor, optimizer: object) -> None:
        bad = "topk" in self.id and "seed2" in self.id and self.step == 3
        original(self, x * float("nan") if bad else x, optimizer)

    monkeypatch.setattr(RunState, "train", poisoned)
    assert run.main(line) == 1
    said = capsys.readouterr().out
    told = "incomplete: sae=topk: 2 of 3 runs (the loss is not finite at step 3"
    assert said.splitlines()[-1].startswith(told), "it must be the last line"
    (sweep,) = Path("sweeps").iterdir()
    assert f"- {told}" in (sweep / "summary.md").read_text()
    monkeypatch.setattr(RunState, "train", original)
    assert run.main(line) == 0
    said = capsys.readouterr().out
    assert "incomplete" not in said
    assert "5 of 6 runs already finished" in said


@pytest.mark.slow
def test_a_project_can_be_moved_and_read_from_anywhere(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(line) == 0
    moved = tmp_path / "elsewhere" / "project"
    moved.mkdir(parents=True)
    for name in ("outputs", "sweeps"):
        shutil.move(tmp_path / name, moved / name)
    capsys.readouterr()
    assert status.main([f"runtime.{n}={moved / n}" for n in ("outputs", "sweeps")]) == 0
    assert "6 finished; summary.md" in capsys.readouterr().out


def test_pairs_along_another_axis(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The command line sets the pairing axis; the values of the other axis make cells."""
    assert run.main([*line, "seed=0,1", "comparison.pair_by=sae"]) == 0
    (sweep,) = Path("sweeps").iterdir()
    summary = pd.read_csv(sweep / "summary.csv")
    assert summary["sae"].tolist() == ["topk|relu"] * 2
    assert summary["seed"].tolist() == [0, 1]
    assert summary["n_seeds"].tolist() == [2, 2]


@pytest.mark.slow
def test_a_finished_run_that_lost_a_file_is_trained_again(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(line) == 0
    before = {p.name: p.read_bytes() for p in Path("outputs").glob("*/sae.safetensors")}
    found = RunStore("outputs").runs()
    (found[0].path / "sae.safetensors").unlink()
    (found[1].path / "metrics.json").unlink()
    (found[2].path / "run.json").write_text("{}")
    assert [r.status for r in found[:3]] == ["damaged"] * 3
    capsys.readouterr()
    assert run.main(line) == 0
    assert "3 of 6 runs already finished" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in Path("outputs").glob("*/sae.safetensors")} == before


@pytest.mark.slow
@pytest.mark.real
def test_real_models_share_latents(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [
        "comparison=seeds", "model=path", f"model.path={real_data / 'models/TinyStories-656K'}",
        "dataset=text_files", f"dataset.path={real_data / 'text/tinystories_train.txt'}",
        "layer=0", "sae.num_latents=256", "sae.k=8", "training.tokens=400000", "seed=0,1",
        "runtime.progress=false",
    ]  # fmt: skip
    assert run.main(line) == 0
    (sweep,) = Path("sweeps").iterdir()
    row = pd.read_csv(sweep / "summary.csv").iloc[0]
    assert row["fvu"] < 0.4
    assert row["l0"] <= 8
    assert row["shared_fraction"] > 10 * max(row["null_shared_fraction"], 1 / 256)


def test_untrained_saes_share_nothing() -> None:
    """Initial weights are independent, with encoder and decoder tied as in every recipe."""
    settings = ComparisonConfig(name="t", grid={"seed": ["0", "1"]}, pair_by="seed")
    config = TopKConfig(num_latents=512, k=8)
    born = []
    for seed in ("0", "1"):
        sae = config.build(64, torch.Generator().manual_seed(int(seed)))
        rows = (sae.W_enc.detach().numpy(), sae.W_dec.detach().numpy())
        silent = np.zeros(512, dtype=np.int64)
        born.append(Dictionary(seed, seed, *rows, silent, 1000, silent == 0))
    result = compare_cell(born, [], settings)
    assert result.pairs["shared_fraction"].tolist() == [0.0]
    # Tied rows match equally: before training, agreement on the index proves nothing.
    assert result.pairs["index_agreement"].tolist() == [1.0]
