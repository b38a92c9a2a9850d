"""Evaluations on a real SLURM: after training, and of an existing sweep."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from one_node import Desk

from reseed.cli import evaluate, run, status

pytestmark = pytest.mark.slow

FEW = ["evaluation=reconstruction", "evaluation.tokens=500"]


def results(outputs: str = "outputs") -> dict[tuple[str, str], dict[str, float]]:
    """Return the metrics by run and evaluation."""
    found = sorted(Path(outputs).glob("*/evaluations/*/result.json"))
    return {(p.parts[-4], p.parts[-2]): json.loads(p.read_text())["metrics"] for p in found}


def test_evaluations_are_submitted_once_and_equal_local_ones(
    desk: Desk, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*desk.line, "comparison=seeds", "sae=topk", "seed=0,1", *FEW]
    assert run.main([*line, "wait=false"]) == 0
    jobs = desk.jobs
    assert [job.kind for job in jobs] == ["train", "evaluate", "compare", "collect"]
    assert set(jobs[1].runs) == set(jobs[0].runs)
    capsys.readouterr()
    assert status.main([desk.sweep.path.name]) == 0
    assert "evaluations: 1 queued" in capsys.readouterr().out

    assert run.main(line) == 0  # waits for the submitted jobs
    said = capsys.readouterr().out
    assert "waiting for 4 jobs" in said
    assert "What is lost of the activations?" in said
    assert desk.jobs == jobs
    found = results()
    assert len(found) == 2
    own = [word for word in desk.line if word.startswith("runtime")]
    sweep = desk.sweep.path.name
    for run_folder, name in found:
        shutil.rmtree(Path("outputs", run_folder, "evaluations", name))
    assert evaluate.main([sweep, *own, *FEW]) == 0
    assert results() == found

    # Another evaluation of the sweep: cancelled, then submitted again and waited for.
    own += [word for word in desk.line if word.startswith("hydra")]
    line = [sweep, *own, "evaluation=reconstruction", "evaluation.tokens=600"]
    held = "+hydra.launcher.additional_parameters.hold=true"
    assert evaluate.main([*line, held, "wait=false"]) == 0
    assert [job.kind for job in desk.jobs[4:]] == ["evaluate", "collect"]
    assert status.cancel([sweep]) == 0
    desk.cluster.wait_for(lambda: not desk.queue())
    assert results() == found
    capsys.readouterr()
    assert evaluate.main(line) == 0
    assert "waiting for 2 jobs" in capsys.readouterr().out
    assert len(results()) == 4
    assert len(desk.jobs) == 8
    assert evaluate.main(line) == 0  # again, with nothing left to do
    assert len(desk.jobs) == 8
