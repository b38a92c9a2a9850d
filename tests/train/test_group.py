"""Training in groups: equal to training alone, resumed exactly, with failures recorded."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable

import pytest
import torch

import reseed
from reseed.activations.hookpoints import Hookpoint
from reseed.experiment.resolve import Resolved
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore
from reseed.study import train as study
from reseed.study.train import train_missing
from reseed.train.config import RuntimeConfig, TrainingConfig
from reseed.train.plan import group_by_stream
from reseed.train.run_state import RunState

Jobs = Callable[..., tuple[list[Resolved], RuntimeConfig]]


def run_of(resolved: Resolved, runtime: RuntimeConfig) -> Run:
    return resolved.run(RunStore(runtime.outputs))


def results(run: Run) -> dict[str, object]:
    """Return all results of a run except times."""
    weights = {name: t.clone() for name, t in load_sae(run.path).state_dict().items()}
    curve = [line.split(",") for line in (run.path / "training.csv").read_text().splitlines()]
    seconds = curve[0].index("seconds")
    rows = [[c for i, c in enumerate(row) if i != seconds] for row in curve]
    latents = {name: array.tolist() for name, array in run.latents().items()}
    return {"weights": weights, "curve": rows, "latents": latents, "metrics": run.metrics}


def assert_equal(a: dict[str, object], b: dict[str, object]) -> None:
    first, second = a.pop("weights"), b.pop("weights")
    for name, tensor in first.items():  # type: ignore[union-attr]
        assert torch.equal(tensor, second[name]), name  # type: ignore[index]
    assert a == b


@pytest.mark.parametrize(
    "sweep",
    [
        ["seed=0,1,2"],
        ["sae=topk", "layer=0,2"],
        ["training.tokens=2048,8192"],
        ["hookpoint=resid_post,mlp_out"],
        ["training.lr_scale=1,7", "dataset.held_out_tokens=1024"],
        ["training.batch_size=64,256,32"],
        ["training.batch_size=32,512", "training.tokens=1024,2048", "sae=topk,relu"],
        ["training.precision=float32,bfloat16", "sae=topk,relu", "training.tokens=2048"],
    ],
)
def test_a_group_equals_its_runs_trained_alone(jobs: Jobs, sweep: list[str]) -> None:
    together, runtime = jobs(*sweep)
    assert len(group_by_stream([r.spec for r in together])) == 1
    assert train_missing(together, runtime) == {}
    for index, resolved in enumerate(together):
        alone, other = jobs(*sweep, outputs=f"alone-{index}")
        assert train_missing([alone[index]], other) == {}
        assert_equal(results(run_of(resolved, runtime)), results(run_of(alone[index], other)))


def test_options_of_the_measurement_do_not_change_the_initial_weights(jobs: Jobs) -> None:
    few, many = jobs("dataset.held_out_tokens=512,1024")[0]
    assert few.signature != many.signature
    assert few.init_seed == many.init_seed
    # Budgets with the same number of whole batches are equal.
    a, b = jobs("training.tokens=8192,8200")[0]
    assert a.signature == b.signature


def test_weights_that_are_not_finite_are_a_failure(jobs: Jobs) -> None:
    (resolved,), runtime = jobs("training.tokens=64", "training.lr=1e38")
    assert list(train_missing([resolved], runtime))
    run = run_of(resolved, runtime)
    assert run.status == "failed"
    assert run.record["error"]["message"] == "the weights are not finite at step 1"
    assert run.record["failed_at_step"] == 1


def test_architectures_that_train_together_equal_each_alone(jobs: Jobs) -> None:
    topk, runtime = jobs()
    relu, _ = jobs("sae=relu")
    assert topk[0].stream == relu[0].stream
    assert train_missing([*topk, *relu], runtime) == {}
    alone, other = jobs("sae=relu", outputs="alone")
    train_missing(alone, other)
    assert_equal(results(run_of(relu[0], runtime)), results(run_of(alone[0], other)))


def test_each_seed_changes_only_its_own_draws(jobs: Jobs) -> None:
    same, runtime = jobs("seed=0,1")
    other_order, _ = jobs("dataset.order_seed=1")
    assert same[0].stream == same[1].stream != other_order[0].stream
    train_missing(same, runtime)
    a, b = (load_sae(run_of(r, runtime).path) for r in same)
    assert not torch.equal(a.W_dec, b.W_dec)
    # The data order has its own seed, which does not change the initial weights.
    assert other_order[0].init_seed == same[0].init_seed
    # Seeds are salted: with the same seed another cell has other initial weights.
    assert len({r.init_seed for r in jobs("layer=0,1,2")[0]}) == 3


def test_a_subset_seed_is_a_seed_of_the_data_alone(jobs: Jobs) -> None:
    seeds = ("dataset.subset_seed=0,1", "dataset.order_seed=0,1")
    found, runtime = jobs(*seeds, "training.tokens=1000")
    assert len({r.signature for r in found}) == len({r.stream for r in found}) == 4
    assert len({r.init_seed for r in [*found, *jobs("training.tokens=1000")[0]]}) == 1
    assert len({r.without_seeds().signature for r in found}) == 1
    # The budget decides what is read, so runs of several budgets do not share a stream.
    for options, streams in ((seeds[:1], 4), ((), 1)):
        both, _ = jobs(*options, "training.tokens=1000,1100")
        assert len({r.stream for r in both}) == streams
    assert {r.spec.needed for r in found} == {960}  # in whole batches of 64
    assert train_missing(found[:2], runtime) == {}
    a, b = (run_of(r, runtime).record["data"] for r in found[:2])
    assert a == b
    assert a["documents"] + a["held_out_documents"] == 1_500
    assert a["held_out_windows_in_training"] == 0  # of random words


def test_gaussian_draws_depend_on_neither_subset_nor_budget(jobs: Jobs) -> None:
    """The evaluations open the source with the largest budget of a cell."""
    gaussian = ("surrogate=gaussian", "training.tokens=1000,1100")
    (plain, more), _ = jobs(*gaussian)
    others, _ = jobs(*gaussian, "dataset.subset_seed=0,1")
    assert {r.signature for r in others} == {plain.signature, more.signature}
    assert {r.stream for r in others} == {plain.stream} == {more.stream}
    drawn = [
        resolved.open("cpu", needed).stream([plain.experiment.hook]).chunk(0)
        for resolved in (plain, *others) for needed in (1_000, 5_000)
    ]  # fmt: skip
    for other in drawn[1:]:
        assert torch.equal(other[plain.experiment.hook], drawn[0][plain.experiment.hook])


def test_finished_runs_are_not_trained_again(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    first, runtime = jobs("seed=0,1")
    train_missing(first, runtime)
    before = [(run_of(r, runtime).path / "sae.safetensors").stat().st_mtime_ns for r in first]
    more, _ = jobs("seed=0,1,2")
    trained: list[str] = []
    original = study.fit_group
    monkeypatch.setattr(
        study,
        "fit_group",
        lambda g, *rest: trained.extend(r.signature for r in g) or original(g, *rest),
    )
    train_missing(more, runtime)
    assert trained == [more[2].signature]
    after = [(run_of(r, runtime).path / "sae.safetensors").stat().st_mtime_ns for r in first]
    assert before == after
    train_missing(more, runtime)
    assert trained == [more[2].signature]


def test_the_saved_sae_takes_raw_activations(jobs: Jobs) -> None:
    (resolved,), runtime = jobs()
    train_missing([resolved], runtime)
    run = reseed.load_run(run_of(resolved, runtime).path)
    record = json.loads((run.path / "sae.json").read_text())
    sae = reseed.load_sae(run.path)
    assert record["metadata"]["input_scale"] != 1
    e = resolved.experiment
    (x,) = resolved.open().held_out([e.hook], 1024)
    x = x[e.hook]
    out = sae(x)
    error = (x - out.reconstruction).detach().double().square().sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    assert float(error / variance) == pytest.approx(run.metrics["fvu"], rel=1e-6)
    assert float((out.latents != 0).sum(1).double().mean()) == pytest.approx(run.metrics["l0"])
    assert (out.latents != 0).sum(0).tolist() == run.latents()["firing"].tolist()


def test_the_record_holds_what_was_done(jobs: Jobs) -> None:
    (resolved,), runtime = jobs()
    train_missing([resolved], runtime)
    record = run_of(resolved, runtime).record
    assert record["status"] == "finished"
    assert record["tokens"] == 8192
    assert record["steps"] == 128
    assert 0 < record["timings"]["seconds"] <= record["timings"]["training_s"]
    assert record["experiment"]["sae"]["type"] == "topk"
    assert record["environment"]["packages"]["torch"] == torch.__version__
    assert record["environment"]["threads"] == torch.get_num_threads()
    assert set(record["fingerprints"]) == {"model", "tokenizer", "text"}
    # The curve has steps 10, 20, … 120, and the last one.
    lines = (run_of(resolved, runtime).path / "training.csv").read_text().splitlines()
    steps = [int(line.split(",")[0]) for line in lines[1:]]
    assert steps == [*range(10, 121, 10), 128]


def test_a_loss_that_is_not_finite_ends_only_that_run(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, runtime = jobs("seed=0,1")
    bad = resolved[1].run(RunStore(runtime.outputs)).id
    original = RunState.train

    def poisoned(self: RunState, x: torch.Tensor, optimizer: object) -> None:
        original(self, x * float("nan") if self.id == bad and self.step == 17 else x, optimizer)

    monkeypatch.setattr(RunState, "train", poisoned)
    failures = train_missing(resolved, runtime)
    good_run, bad_run = (run_of(r, runtime) for r in resolved)
    assert good_run.finished
    assert list(failures) == [bad]
    assert bad_run.status == "failed"
    assert bad_run.record["error"]["message"] == "the loss is not finite at step 17"
    assert bad_run.record["failed_at_step"] == 17
    assert not (bad_run.path / "sae.safetensors").exists()
    monkeypatch.setattr(RunState, "train", original)
    assert train_missing(resolved, runtime) == {}
    alone, other = jobs("seed=1", outputs="alone")
    train_missing(alone, other)
    assert_equal(results(bad_run), results(run_of(alone[0], other)))


def test_an_error_is_recorded_with_its_traceback(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved, runtime = jobs("seed=0,1")
    monkeypatch.setattr(RunState, "train", lambda *_: 1 / 0)
    failures = train_missing(resolved, runtime)
    assert len(failures) == 2
    for each in resolved:
        error = run_of(each, runtime).record["error"]
        assert error["type"] == "ZeroDivisionError"
        assert "Traceback" in error["traceback"]


def test_runs_at_different_steps_resume_together(jobs: Jobs) -> None:
    """A checkpoint belongs to a run: in a new group, runs wait for the one furthest behind."""
    from reseed.train.callbacks import CheckpointCallback

    reference, other = jobs("seed=0,1", outputs="reference")
    train_missing(reference, other)
    resolved, runtime = jobs("seed=0,1")
    with pytest.MonkeyPatch.context() as patch:
        saved: list[int] = []

        def save_one(self: CheckpointCallback, module: object) -> None:
            index = len(saved) % 2
            run = module.runs[index]  # type: ignore[attr-defined]
            self._save(run)
            saved.append(run.step)
            if len(saved) == 4:
                raise RuntimeError("power cut")

        patch.setattr(CheckpointCallback, "save", save_one)
        slow = RuntimeConfig.from_dict(runtime.to_dict() | {"checkpoint_every_s": 1e-9})
        train_missing(resolved, slow)
    assert saved == sorted(set(saved)), "every save is at a later step than the one before"
    assert saved[-1] < resolved[0].experiment.training.steps
    assert train_missing(resolved, runtime) == {}
    for a, b in zip(resolved, reference, strict=True):
        assert_equal(results(run_of(a, runtime)), results(run_of(b, other)))


def test_input_scale_and_b_dec_come_from_the_first_activations() -> None:
    from reseed.sae.topk import TopKConfig

    config = TopKConfig(num_latents=8, k=2)
    x = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * 3 + 1
    run = RunState(
        "m", Hookpoint("resid_post", 0), config, TrainingConfig(tokens=64, batch_size=64), 6, 0,
        torch.device("cpu"),
    )  # fmt: skip
    run.start(x)
    assert float((x * run.scale).norm(dim=1).mean()) == pytest.approx(6**0.5, rel=1e-5)
    assert torch.allclose(run.sae.b_dec, x.mean(0) * run.scale, atol=1e-5)


def test_a_fit_restores_the_signal_handlers(jobs: Jobs) -> None:
    """Lightning's own handler, which only notes SIGTERM, does not outlive a fit."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    (resolved,), runtime = jobs()
    assert train_missing([resolved], runtime) == {}
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
