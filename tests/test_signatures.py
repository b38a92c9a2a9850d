"""Signatures hold: 215 experiments have the identity, digests and start seed of version 0.1."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from reseed.cli.hydra_app import CommandLine
from reseed.experiment import experiment_from
from reseed.experiment.resolve import Resolved, resolve_experiment

RECORDS = Path(__file__).parent / "records"


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else None
        found |= {f"{prefix}{key}": value} if inner is None else inner
    return found


def with_records(folder: Path, text: Path) -> None:
    """Lay the records and their text into a working folder."""
    for name in ("outputs", "sweeps"):
        shutil.copytree(RECORDS / name, folder / name)
    shutil.copy(text, folder / "words.txt")


def test_experiments_keep_their_signatures(
    tmp_path: Path, tiny_text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_records(tmp_path, tiny_text)
    monkeypatch.chdir(tmp_path)
    recorded = json.loads((RECORDS / "experiments.json").read_text())
    wrong = []
    with CommandLine("train", []).composer() as composed:
        for entry in recorded["experiments"]:
            experiment, runtime = experiment_from(composed(entry["overrides"]))
            found = resolve_experiment(experiment, runtime)
            wrong += differences(found, entry, recorded["identities"])
    assert wrong == []
    assert len(recorded["experiments"]) > 200


def differences(found: Resolved, entry: dict[str, Any], bases: dict[str, Any]) -> list[str]:
    """Describe where a resolved experiment differs from its record."""
    base = {k: v for k, v in bases[entry["kind"]].items() if k not in entry["absent"]}
    expected = base | entry["changed"]
    identity = flat(found.identity)
    keys = [k for k in {**expected, **identity} if identity.get(k, ...) != expected.get(k, ...)]
    names = ("label", "signature", "init_seed", "stream")
    keys += [name for name in names if getattr(found, name) != entry[name]]
    return [f"{' '.join(entry['overrides'])}: {', '.join(keys)}"] if keys else []
