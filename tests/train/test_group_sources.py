"""Training on worlds and surrogates, through the same code as on language models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reseed.cli import train
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import check_jobs
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore

WORLD = [
    "model=world_easy", "dataset.chunk_tokens=4096", "dataset.held_out_tokens=5000",
    "sae.num_latents=64", "sae.k=4", "training.tokens=4096", "training.batch_size=64",
    "runtime.progress=false", "runtime.log_every_steps=10", "runtime.threads=1",
]  # fmt: skip


def runs(outputs: Path) -> list[Run]:
    return RunStore(outputs).runs()


def assert_same(a: Run, b: Run) -> None:
    assert a.id == b.id
    first, second = load_sae(a.path).state_dict(), load_sae(b.path).state_dict()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
    assert a.metrics == b.metrics


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def launch(where: str, *overrides: str) -> list[Run]:
        assert train.main([*overrides, f"runtime.outputs={where}"]) == 0
        return runs(Path(where))

    return launch


def test_a_sweep_on_a_world_equals_its_runs_trained_alone(
    launched, capsys: pytest.CaptureFixture[str]
) -> None:
    together = launched("together", "-m", *WORLD, "sae=topk,batch_topk", "seed=0,1")
    said = capsys.readouterr().out
    assert "training 4 SAEs" in said
    assert "on world_easy resid_post.0, generated activations" in said
    assert len(together) == 4
    for sae in ("topk", "batch_topk"):
        alone = launched(f"alone-{sae}", *WORLD, f"sae={sae}", "seed=1")
        (same,) = [run for run in together if run.id == alone[0].id]
        assert_same(same, alone[0])
    assert "world_easy-resid_post.0-generated-topk-64-k4-seed1" in str(runs(Path("alone-topk"))[0])
    record = json.loads((together[0].path / "run.json").read_text())
    assert record["labels"] == {"model": "world_easy", "dataset": "generated"}
    assert record["fingerprints"] == {}


def test_a_world_is_learnt(launched) -> None:
    (run,) = launched("out", *WORLD, "training.tokens=32768")
    assert run.metrics["tokens"] == 5000
    assert run.metrics["fvu"] < 0.5


def test_the_order_seed_does_not_change_the_initial_weights() -> None:
    line = [*WORLD, "dataset.order_seed=0,1"]
    a, b = (job.resolved for job in check_jobs(CommandLine("train", []), line, multirun=True)[0])
    assert a.init_seed == b.init_seed
    assert a.signature != b.signature


@pytest.mark.parametrize("source", ["world", "surrogate"])
def test_an_interrupted_run_resumes_bit_identically(
    launched, source: str, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reseed.train.run_state import RunState

    line = (
        WORLD
        if source == "world"
        else [*tiny_overrides, "surrogate=gaussian", "training.tokens=4096"]
    )
    (whole,) = launched("whole", *line)
    original = RunState.train

    def broken(self: RunState, x: torch.Tensor, optimizer: object) -> None:
        if self.step == 40:
            raise RuntimeError("power cut")
        original(self, x, optimizer)

    monkeypatch.setattr(RunState, "train", broken)
    often = "runtime.checkpoint_every_s=1e-9"
    assert train.main([*line, often, "runtime.outputs=parts"]) == 1
    assert (runs(Path("parts"))[0].path / "checkpoint.pt").is_file()
    steps: list[int] = []

    def noted(self: RunState, x: torch.Tensor, optimizer: object) -> None:
        steps.append(self.step)
        original(self, x, optimizer)

    monkeypatch.setattr(RunState, "train", noted)
    (resumed,) = launched("parts", *line)
    assert 0 < steps[0] <= 40
    assert steps == list(range(steps[0], len(steps) + steps[0]))
    assert_same(whole, resumed)


def test_surrogates_of_two_layers_trained_together_equal_each_alone(
    launched, tiny_overrides: list[str]
) -> None:
    line = [*tiny_overrides, "surrogate=gaussian", "training.tokens=4096"]
    together = launched("together", "-m", *line, "layer=0,2")
    assert all("tiny-llama+gaussian" in run.id for run in together)
    for number, run in zip((0, 2), together, strict=True):
        (alone,) = launched(f"alone-{number}", *line, f"layer={number}")
        assert_same(run, alone)
