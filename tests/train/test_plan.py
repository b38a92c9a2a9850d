"""Plans: groups of runs, their estimated cost, and training when memory does not suffice."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reseed.cli.main import main
from reseed.experiment.resolve import Resolved
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore
from reseed.study.train import train_missing
from reseed.system.console import format_duration
from reseed.system.devices import available_memory, is_out_of_memory
from reseed.train.config import RuntimeConfig, TrainingConfig
from reseed.train.plan import (
    Group,
    Machine,
    _weights,
    cost,
    format_bytes,
    group_by_stream,
    make_plan,
    split_to_fit,
    step_flops,
)
from reseed.train.run_state import RunState
from reseed.train.spec import RunSpec

Jobs = Callable[..., tuple[list[Resolved], RuntimeConfig]]


def runs(resolved: list[Resolved], runtime: RuntimeConfig) -> list[Run]:
    return [r.run(RunStore(runtime.outputs)) for r in resolved]


def specs(resolved: list[Resolved]) -> list[RunSpec]:
    return [r.spec for r in resolved]


@pytest.mark.parametrize(
    ("sweep", "groups"),
    [
        (
            "seed=0,1 layer=0,2 sae=topk,relu training.batch_size=64,256 training.tokens=4096,8192",
            1,
        ),
        ("training.precision=float32,bfloat16 hookpoint=mlp_out,attn_out", 1),
        ("dataset.order_seed=0,1 seed=0,1", 2),
        ("dataset.held_out_tokens=512,1024", 2),
        ("model.dtype=float32,bfloat16", 2),
        ("surrogate=none,gaussian,random_weights", 3),
    ],
)
def test_runs_that_read_the_same_activations_train_together(
    jobs: Jobs, sweep: str, groups: int
) -> None:
    planned = specs(jobs(*sweep.split())[0])
    assert len(group_by_stream(planned)) == groups
    # A run that is asked for twice is trained once.
    assert sum(map(len, group_by_stream([*planned, *planned]))) == len(planned)


def spec(**options: object) -> RunSpec:
    training = TrainingConfig(tokens=64, batch_size=16, **options)  # type: ignore[arg-type]
    sae = SimpleNamespace(dense_products=5)
    return SimpleNamespace(training=training, sae=sae, num_latents=8, d_in=2)  # type: ignore[return-value]


def test_the_operations_of_a_step_equal_hand_computed_cases() -> None:
    # Five products of 16 × 8 × 2, and 12 operations for each of two matrices' 16 weights.
    plain = 5 * 2 * 16 * 8 * 2 + 12 * 32
    assert (step_flops(spec()), _weights(spec())) == (plain, 32)
    # Two matrices, five rounds, each 2·(2·2²·8 + 2³) operations.
    assert step_flops(spec(optimizer="muon")) == plain + 2 * 5 * 2 * (2 * 4 * 8 + 8)
    # 8 × 3 more weights: the product with 3 × 2 centroids and its gradient, Adam's 12 per weight.
    archetypal = spec(decoder="archetypal", archetypes=3)
    assert _weights(archetypal) == 32 + 24
    assert step_flops(archetypal) == plain + 2 * 2 * 24 * 2 + 12 * 24
    assert _weights(spec(decoder="archetypal")) == 32 + 64


def test_costs_add_up(jobs: Jobs) -> None:
    planned = specs(jobs("seed=0,1", "layer=0,2")[0])
    each, together = [cost([r]) for r in planned], cost(planned)
    assert together.parameters == sum(c.parameters for c in each)
    # One pass of the model to the deepest layer: the steps of four SAEs, the larger of two passes.
    steps = [r.training.steps * step_flops(r) for r in planned]
    passes = [c.flops - s for c, s in zip(each, steps, strict=True)]
    assert together.flops == pytest.approx(max(passes) + sum(steps))
    by_layer = {r.hookpoint.layer: p for r, p in zip(planned, passes, strict=True)}
    # Layer 0 needs one of three blocks, layer 2 all.
    assert by_layer[2] == pytest.approx(3 * by_layer[0])
    # Memory that does not depend on the number of SAEs counts once.
    assert max(c.memory for c in each) < together.memory < sum(c.memory for c in each)


def test_the_memory_estimate_covers_weights_and_moments(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are measured for every run after a step, when its gradients are freed."""
    resolved, runtime = jobs("seed=0,1", "sae=topk,relu", "sae.num_latents=512")
    kept: dict[str, int] = {}
    original = RunState.train

    def weighed(self: RunState, *arguments: object) -> None:
        original(self, *arguments)  # type: ignore[arg-type]
        tensors = [*self.sae.parameters()]
        tensors += [t for s in self.optimizer.state.values() for t in s.values()]
        kept[self.id] = sum(t.numel() * t.element_size() for t in tensors)
        assert all(p.grad is None for p in self.sae.parameters()), "freed before the next SAE"

    monkeypatch.setattr(RunState, "train", weighed)
    assert train_missing(resolved, runtime) == {}
    assert len(kept) == 4
    one = sum(kept.values()) / 4
    # Each further SAE counts with the tensors that it keeps and the copy that is stored.
    more = (cost(specs(resolved)).memory - cost(specs(resolved[:2])).memory) / 2
    assert one <= more <= 1.5 * one


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_a_group_that_does_not_fit_is_split(jobs: Jobs, parts: int) -> None:
    planned = specs(jobs("seed=0,1,2,3", "layer=0,2")[0])
    single = cost(planned[:1]).memory
    slope = cost(planned[:3]).memory - cost(planned[:2]).memory
    memory = {2: single + 3.5 * slope, 3: single + 2.5 * slope, 8: single - 1}[parts]
    found = split_to_fit(planned, memory)
    assert sorted(r.signature for part in found for r in part) == sorted(
        r.signature for r in planned
    )
    if parts < 8:
        assert all(cost(part).memory <= memory for part in found)
        assert len(found) == parts if parts == 2 else len(found) <= 4
        if parts == 2:  # split by depth, so that each group runs the model only as far as needed
            assert [{r.hookpoint.layer for r in part} for part in found] == [{0}, {2}]
    else:
        assert [len(part) for part in found] == [1] * 8, "a run that does not fit is tried alone"
    assert split_to_fit(planned, 1e18) == [planned]


def test_a_split_sweep_gives_the_same_weights(jobs: Jobs) -> None:
    together, runtime = jobs("seed=0,1", "sae.num_latents=512")
    train_missing(together, runtime)
    apart, other = jobs("seed=0,1", "sae.num_latents=512", outputs="apart")
    tight = dataclasses.replace(other, memory_gib=cost(specs(apart[:1])).memory * 1.01 / 2**30)
    assert len(make_plan(specs(apart), Machine.of(tight)).groups) == 2
    assert train_missing(apart, tight) == {}
    for a, b in zip(runs(together, runtime), runs(apart, other), strict=True):
        assert a.record["group"] != b.record["group"]
        assert torch.equal(load_sae(a.path).W_dec, load_sae(b.path).W_dec)


@pytest.mark.slow
def test_out_of_memory_retries_with_half_of_the_runs(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reference, other = jobs("seed=0,1,2", outputs="reference")
    train_missing(reference, other)
    resolved, runtime = jobs("seed=0,1,2")
    greedy = runs(resolved, runtime)[2].id
    original = RunState.train
    made: list[str] = []

    def crowded(self: RunState, *arguments: object) -> None:
        made.append(self.id)
        company = len({r.id for r in runs(resolved, runtime) if r.status == "running"})
        if self.step == 40 and company > 1:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunState, "train", crowded)
    saving = dataclasses.replace(runtime, checkpoint_every_s=1e-6)
    assert train_missing(resolved, saving) == {}
    said = capsys.readouterr().out
    assert "out of memory with 3 SAEs" in said
    assert "out of memory with 2 SAEs" in said
    assert "retrying with half of the runs" in said
    # The last run resumed alone instead of starting again.
    assert made.count(greedy) < 2 * resolved[2].experiment.training.steps
    for a, b in zip(runs(reference, other), runs(resolved, runtime), strict=True):
        assert b.finished
        assert torch.equal(load_sae(a.path).W_dec, load_sae(b.path).W_dec)


def test_a_run_that_does_not_fit_into_memory_alone_fails(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, runtime = jobs("seed=0,1")
    bad = runs(resolved, runtime)[0].id
    original = RunState.train

    def crowded(self: RunState, *arguments: object) -> None:
        if self.id == bad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunState, "train", crowded)
    failures = train_missing(resolved, runtime)
    assert list(failures) == [bad]
    first, second = runs(resolved, runtime)
    assert first.status == "failed"
    assert first.failure is not None
    assert re.match(r"out of memory with 1 SAE \(CUDA out of memory", first.failure["message"])
    assert first.failure["explained"]
    assert second.finished


def test_out_of_memory_errors_are_recognised() -> None:
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value), "the error of the CPU's allocator"
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))


def test_free_memory_is_plausible() -> None:
    there = available_memory(torch.device("cpu"))
    assert 2**20 < there < 2**50


def test_a_failed_run_does_not_stop_the_others(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved, runtime = jobs("seed=0,1,2")
    bad = runs(resolved, runtime)[1].id
    original = RunState.train

    def broken(self: RunState, *arguments: object) -> None:
        if self.id == bad and self.step == 7:
            raise IndexError("no such thing")
        original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(RunState, "train", broken)
    assert list(train_missing(resolved, runtime)) == [bad]
    assert [run.status for run in runs(resolved, runtime)] == ["finished", "failed", "finished"]
    record = runs(resolved, runtime)[1].record
    assert record["failed_at_step"] == 7
    assert "broken" in record["error"]["traceback"]
    assert f"failed: {bad}: no such thing" in capsys.readouterr().out


def test_plan_only_prints_and_trains_nothing(
    tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["train", "-m", *tiny_overrides, f"runtime.outputs={tmp_path / 'outputs'}"]
    line += [f"runtime.sweeps={tmp_path / 'sweeps'}", "seed=0,1", "dataset.order_seed=0,1"]
    with pytest.raises(SystemExit) as end:
        main([*line, "plan_only=true", "runtime.tflops=1", "runtime.memory_gib=1e-4"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert re.search(r"plan: 4 runs in 4 groups, on cpu about \d+ s, at most \d+ KiB", said), said
    assert "(more than the 105 KiB available)" in said
    assert said.count("text words: 1,500 documents, ") == said.count("  read words.txt\n") == 1
    assert not (tmp_path / "outputs").exists()
    assert not (tmp_path / "sweeps").exists()
    with pytest.raises(SystemExit):
        main([*line, "seed=0"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*line, "plan_only=true"])
    assert "plan: 2 runs in 2 groups (2 more already finished)" in capsys.readouterr().out
    with pytest.raises(SystemExit):  # the text is shown even if all runs are finished
        main([*line, "seed=0", "plan_only=true"])
    said = capsys.readouterr().out
    assert said.startswith("plan: nothing to train; 2 runs finished\n")
    assert said.count("text words: 1,500 documents, ") == 1


def test_a_plan_uses_the_described_machine(jobs: Jobs) -> None:
    resolved, runtime = jobs("seed=0,1")
    there = dataclasses.replace(runtime, tflops=1e-3, memory_gib=2.0)
    machine = Machine.of(there)
    assert (machine.memory, machine.speed) == (2 * 2**30, 1e9)
    group = Group.of(specs(resolved))
    assert machine.seconds(group.cost) == pytest.approx(group.cost.flops / 0.25e9)


def test_the_plan_names_calibrations(jobs: Jobs, capsys: pytest.CaptureFixture[str]) -> None:
    resolved, runtime = jobs("sae=relu", "sae.target_l0=4,8", "seed=0,1")
    plan = make_plan(specs(resolved), Machine.of(runtime))
    assert plan.calibrations == 2
    plan.print()
    assert "before that, calibration runs find 2 penalty weights" in capsys.readouterr().out


def test_durations_and_sizes_are_formatted() -> None:
    assert [format_duration(s) for s in (0.2, 89, 600, 7_200, 400_000)] == [
        "1 s", "89 s", "10 min", "2.0 h", "4.6 days"
    ]  # fmt: skip
    assert [format_bytes(b) for b in (2**12, 5 * 2**20, 2**30, 3 * 2**40)] == [
        "4 KiB", "5 MiB", "1.0 GiB", "3.0 TiB"
    ]  # fmt: skip
