"""Tests that keys of cached and shared data cover all that determines them."""

from __future__ import annotations

from pathlib import Path

import pytest

from reseed.activations import text as text_module
from reseed.activations.text import HubTextConfig
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import check_jobs


@pytest.mark.parametrize(
    "axis",
    ["dataset.context_length=16,32", "model.dtype=float32,bfloat16", "dataset.order_seed=0,1"],
)
def test_settings_that_change_activations_change_stream_and_signature(
    axis: str, tiny_overrides: list[str], tmp_path: Path
) -> None:
    overrides = [*tiny_overrides, f"runtime.outputs={tmp_path}", axis]
    jobs, _ = check_jobs(CommandLine("train", []), overrides, multirun=True)
    first, second = (job.resolved for job in jobs)
    assert first.stream != second.stream
    assert first.signature != second.signature


def test_the_fingerprint_of_a_text_depends_on_its_revision(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(text_module, "_dataset_commit", lambda config: f"sha-of-{config.revision}")
    found = [
        HubTextConfig(repository="a/b", revision=revision).resolve(tmp_path).fingerprint
        for revision in ("main", "v2", "main")
    ]
    assert found[0] == found[2] != found[1]
