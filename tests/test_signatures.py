"""Signatures hold: 215 experiments have the identity, digests and start seed of version 0.1."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from reseed.cli.hydra_app import CommandLine
from reseed.distributed.worker import group_message, read_group
from reseed.experiment import experiment_from
from reseed.experiment.resolve import Resolved, resolve_experiment
from reseed.train.config import RuntimeConfig

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


RECORDED = json.loads((RECORDS / "experiments.json").read_text())


@pytest.fixture(scope="module")
def experiments(
    tmp_path_factory: pytest.TempPathFactory, tiny_text: Path
) -> Iterator[list[tuple[Resolved, RuntimeConfig]]]:
    """Compose and resolve every recorded experiment, in the folder that their paths need."""
    folder = tmp_path_factory.mktemp("records")
    with_records(folder, tiny_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with CommandLine("train", []).composer() as composed:
            made = [experiment_from(composed(e["overrides"])) for e in RECORDED["experiments"]]
        yield [(resolve_experiment(experiment, runtime), runtime) for experiment, runtime in made]


def test_experiments_keep_their_signatures(
    experiments: list[tuple[Resolved, RuntimeConfig]],
) -> None:
    wrong = []
    for (found, _), entry in zip(experiments, RECORDED["experiments"], strict=True):
        wrong += differences(found, entry, RECORDED["identities"])
    assert wrong == []
    assert len(RECORDED["experiments"]) > 200


def test_experiments_keep_their_signatures_in_a_message_to_a_worker(
    experiments: list[tuple[Resolved, RuntimeConfig]],
) -> None:
    calibration = {"rounds": [{"l0": 0.1 + 0.2, "steps": 10**20}], "error": math.inf}
    for found, runtime in experiments:
        penalty = 1 / 3 if found.experiment.architecture.penalty_field else None
        steered = replace(found, role="steered", penalty=penalty, calibration=calibration)
        sent = json.loads(json.dumps(group_message([found, steered], runtime)))
        received, same_runtime = read_group(sent)
        assert same_runtime == runtime
        for before, message in zip((found, steered), received, strict=True):
            after = message.resolve(same_runtime)
            assert after == before
            assert (after.signature, after.init_seed) == (before.signature, before.init_seed)
            assert json.dumps(after.record()) == json.dumps(before.record())


def differences(found: Resolved, entry: dict[str, Any], bases: dict[str, Any]) -> list[str]:
    """Describe where a resolved experiment differs from its record."""
    base = {k: v for k, v in bases[entry["kind"]].items() if k not in entry["absent"]}
    expected = base | entry["changed"]
    identity = flat(found.identity)
    keys = [k for k in {**expected, **identity} if identity.get(k, ...) != expected.get(k, ...)]
    names = ("label", "signature", "init_seed", "stream")
    keys += [name for name in names if getattr(found, name) != entry[name]]
    return [f"{' '.join(entry['overrides'])}: {', '.join(keys)}"] if keys else []
