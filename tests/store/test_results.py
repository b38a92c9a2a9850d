"""Tests of stored evaluation results: written atomically, found by their signed settings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reseed.evaluate.reconstruction import ReconstructionConfig
from reseed.store.results import (
    EvaluationError,
    RowGroups,
    StoredEvaluation,
    column,
    result_folder,
    write_failure,
)


def stored() -> StoredEvaluation:
    return StoredEvaluation(
        "trial",
        {"type": "trial", "tokens": 5},
        {"fraction": np.float32(0.25), "count": np.int64(3), "unknown": None, "nan": float("nan")},
        {"letters": pd.DataFrame({"class": ["a", "b"], "main": [[[1], [2, 3]], []]})},
        {"density": np.array([0.5, 0.25], dtype=np.float32)},
    )


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = tmp_path / "evaluations" / "trial-1"
    stored().write(folder, subject="run", seconds=1.5)
    again = StoredEvaluation.read(folder)
    assert again.metrics == {"fraction": 0.25, "count": 3, "unknown": None, "nan": None}
    assert again.settings == {"type": "trial", "tokens": 5}
    assert again.tables["letters"]["class"].tolist() == ["a", "b"]
    assert [x.tolist() for x in again.tables["letters"]["main"][0]] == [[1], [2, 3]]
    assert again.latents["density"].tolist() == [0.5, 0.25]
    record = json.loads((folder / "result.json").read_text())
    assert (record["subject"], record["seconds"]) == ("run", 1.5)
    assert record["environment"]["packages"]["torch"]


def test_tables_are_read_lazily(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored().write(tmp_path)
    read: list[str] = []
    real = pd.read_parquet
    monkeypatch.setattr(pd, "read_parquet", lambda p: read.append(p.name) or real(p))
    again = StoredEvaluation.read(tmp_path)
    assert "letters" in again.tables
    assert list(again.tables) == ["letters"]
    assert "words" not in again.tables
    assert read == ["latents.parquet"]
    assert len(again.tables["letters"]) == 2
    assert read == ["latents.parquet", "letters.parquet"]


def test_a_large_table_is_written_piece_by_piece(tmp_path: Path) -> None:
    schema = pa.schema([("value", pa.int64())])
    written: list[int] = []

    def pieces():
        for i in range(3):
            written.append(i)
            yield pa.table([pa.array([i, i])], schema=schema)

    large = StoredEvaluation("trial", {}, {}, {"large": RowGroups(schema, pieces())})
    assert not written
    large.write(tmp_path)
    file = pq.ParquetFile(tmp_path / "large.parquet")
    assert file.num_row_groups == 3
    assert file.read_row_group(1)["value"].to_pylist() == [1, 1]
    assert StoredEvaluation.read(tmp_path).tables["large"]["value"].tolist() == [0, 0, 1, 1, 2, 2]


def test_a_partially_written_result_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored().write(tmp_path)

    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        stored().write(tmp_path)
    with pytest.raises(FileNotFoundError):
        StoredEvaluation.read(tmp_path)


def test_a_damaged_result_is_an_error(tmp_path: Path) -> None:
    stored().write(tmp_path)
    (tmp_path / "letters.parquet").write_bytes(b"cut")
    with pytest.raises(EvaluationError, match=r"letters\.parquet is damaged: it has 3 bytes"):
        StoredEvaluation.read(tmp_path)
    (tmp_path / "result.json").write_text('{"format": 99}')
    with pytest.raises(EvaluationError, match="its format is 99; this version reads 1"):
        StoredEvaluation.read(tmp_path)


def test_a_result_replaces_a_failure(tmp_path: Path) -> None:
    write_failure(tmp_path, ValueError("no such thing"))
    assert json.loads((tmp_path / "failed.json").read_text())["message"] == "no such thing"
    stored().write(tmp_path)
    assert not (tmp_path / "failed.json").exists()


def test_the_folder_depends_on_the_settings(tmp_path: Path) -> None:
    folders = {
        result_folder(tmp_path, "reconstruction", ReconstructionConfig(tokens=n).signed())
        for n in (5, 5, 6)
    }
    assert len(folders) == 2
    assert {f.name.partition("-")[0] for f in folders} == {"reconstruction"}


def test_a_column_name_contains_its_evaluation_once() -> None:
    assert column("absorption", "absorption_fraction") == "absorption_fraction"
    assert column("faithfulness", "kl") == "faithfulness_kl"
