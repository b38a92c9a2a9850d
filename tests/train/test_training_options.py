"""The options of training, from the command line to the files: grouped, resumed and reread."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.moments import geometric_median
from reseed.compare.dictionary import initial_sae, load_dictionaries
from reseed.experiment.resolve import Resolved
from reseed.sae.base import Step
from reseed.sae.checkpoint import load_sae
from reseed.sae.topk import TopKConfig
from reseed.store.runs import INITIAL_FILE, Run, RunError, RunStore
from reseed.study.train import train_missing
from reseed.system.files import atomic_write_json
from reseed.train.callbacks import CheckpointCallback
from reseed.train.config import RuntimeConfig, TrainingConfig
from reseed.train.optim import learning_rate, make_optimizer
from reseed.train.run_state import NotFiniteError, RunState

Jobs = Callable[..., tuple[list[Resolved], RuntimeConfig]]

OPTIONS = {
    "sign_sgd": ["training=sign_sgd"],
    "muon": ["training=muon"],
    "aligned": ["training.aligned=true"],
    "archetypal": ["training.decoder=archetypal", "training.archetypes=32"],
    "all": [
        "training=sign_sgd", "training.decoder=archetypal", "training.aligned=true",
        "training.archetype_seed=own", "training.b_dec_init=geometric_median",
    ],
}  # fmt: skip


@pytest.fixture
def jobs(jobs: Jobs) -> Jobs:
    """Return `jobs` with a smaller budget."""
    return partial(jobs, "training.tokens=2048")


def run_of(resolved: Resolved, runtime: RuntimeConfig) -> Run:
    return resolved.run(RunStore(runtime.outputs))


def assert_equal(a: Run, b: Run) -> None:
    first, second = load_sae(a.path).state_dict(), load_sae(b.path).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert a.metrics == b.metrics


@pytest.mark.parametrize("name", OPTIONS)
def test_a_run_interrupted_and_resumed_in_a_group_equals_the_run_alone(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    alone, runtime = jobs(*OPTIONS[name], "seed=1", outputs="alone")
    assert train_missing(alone, runtime) == {}
    together, other = jobs(*OPTIONS[name], "seed=0,1")
    with monkeypatch.context() as patch:
        original = CheckpointCallback.save

        def saved_once(self: CheckpointCallback, module: object) -> None:
            original(self, module)  # type: ignore[arg-type]
            if module.runs[0].step >= 9:  # type: ignore[attr-defined]
                raise RuntimeError("power cut")

        patch.setattr(CheckpointCallback, "save", saved_once)
        slow = RuntimeConfig.from_dict(other.to_dict() | {"checkpoint_every_s": 1e-9})
        assert len(train_missing(together, slow)) == 2
    assert train_missing(together, other) == {}
    assert_equal(run_of(together[1], other), run_of(alone[0], runtime))
    first, second = (load_sae(run_of(r, other).path).W_dec for r in together)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("name", OPTIONS)
def test_the_metrics_are_those_of_the_stored_sae(jobs: Jobs, name: str) -> None:
    (resolved,), runtime = jobs(*OPTIONS[name])
    train_missing([resolved], runtime)
    run, e = run_of(resolved, runtime), resolved.experiment
    (x,) = resolved.open().held_out([e.hook], 1024)
    x = x[e.hook]
    error = (x - load_sae(run.path)(x).reconstruction).double().square().sum()
    variance = (x.double() - x.double().mean(0)).square().sum()
    assert float(error / variance) == pytest.approx(run.metrics["fvu"], rel=1e-6)


def test_initial_weights_that_the_seed_does_not_determine_are_stored_and_read(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: dict[str, torch.nn.Module] = {}
    original = RunState.start

    def noted(self: RunState, x: torch.Tensor, truth: torch.Tensor | None) -> None:
        original(self, x, truth)
        starts[self.id] = self.trained_sae()

    monkeypatch.setattr(RunState, "start", noted)
    for name in ("aligned", "archetypal"):
        (resolved,), runtime = jobs(*OPTIONS[name], "sae=relu")
        train_missing([resolved], runtime)
        run = run_of(resolved, runtime)
        found, expected = initial_sae(run).state_dict(), starts[run.id].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        trained, untrained = load_dictionaries(run, "0")
        assert (untrained.encoder == expected["W_enc"].numpy()).all()
        assert not (trained.encoder == untrained.encoder).all()
        (run.path / INITIAL_FILE).unlink()
        assert run.record["start_is_drawn"] is False
        of_old = {k: v for k, v in run.record.items() if k != "start_is_drawn"}
        for record in (run.record, of_old):
            atomic_write_json(run.path / "run.json", record)
            with pytest.raises(RunError, match=r"initial.safetensors is damaged: it is missing"):
                initial_sae(run)


@pytest.mark.parametrize("name", ["sign_sgd", "muon"])
def test_initial_weights_that_the_seed_determines_are_not_stored(jobs: Jobs, name: str) -> None:
    (resolved,), runtime = jobs(*OPTIONS[name])
    train_missing([resolved], runtime)
    run = run_of(resolved, runtime)
    assert not (run.path / INITIAL_FILE).exists()
    assert run.record["start_is_drawn"] is True
    assert torch.equal(initial_sae(run).W_enc, initial_sae(run).W_dec)


def test_a_schedule_free_run_stores_the_mean_weights(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[RunState] = []
    original = RunState.trained_sae
    monkeypatch.setattr(RunState, "trained_sae", lambda self: states.append(self) or original(self))
    (resolved,), runtime = jobs("training=sign_sgd")
    train_missing([resolved], runtime)
    (state,) = states
    stored = load_sae(run_of(resolved, runtime).path)
    for name, parameter in state.sae.named_parameters():
        mean = state.optimizer.state[parameter]["x"]
        divisor = state.scale if name in state.sae.homogeneous else 1.0
        assert torch.equal(stored.get_parameter(name), mean / divisor)
        assert not torch.allclose(mean, parameter, rtol=0, atol=1e-5)


def test_mean_weights_that_are_not_finite_are_an_error() -> None:
    state = made(TrainingConfig(tokens=64, batch_size=64, optimizer="sign_sgd", decay_fraction=0))
    state.start(torch.randn(64, 6, generator=torch.Generator().manual_seed(0)))
    state.train(torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), state.optimizer)
    state.check_weights()
    state.optimizer.state[state.sae.b_enc]["x"][0] = float("inf")
    with pytest.raises(NotFiniteError, match="the weights are not finite at step 1"):
        state.check_weights()


def made(training: TrainingConfig) -> RunState:
    config, cpu = TopKConfig(num_latents=8, k=2), torch.device("cpu")
    return RunState("m", Hookpoint("resid_post", 0), config, training, 6, 0, cpu)


def test_b_dec_starts_as_configured() -> None:
    x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).exp()
    for name, expected in (
        ("mean", x.mean(0)),
        ("geometric_median", geometric_median(x).float()),
        ("zeros", torch.zeros(6)),
    ):
        state = made(TrainingConfig(tokens=64, batch_size=64, b_dec_init=name))
        state.start(x)
        torch.testing.assert_close(state.trained_sae().b_dec.detach(), expected)


@pytest.mark.parametrize(
    ("optimizer", "lr", "aligned"),
    [("sign_sgd", 1e-2, False), ("muon", 1e-2, False), ("adam", 3e-3, True), ("muon", 1e-2, True)],
)
def test_planted_features_are_recovered(optimizer: str, lr: float, aligned: bool) -> None:
    """The features are those of ``tests/sae/test_sae_recovery.py``: orthogonal, independent,
    sparse."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    sae = TopKConfig(num_latents=64, k=4).build(32, generator)
    decay = 0.0 if optimizer == "sign_sgd" else 0.2
    training = TrainingConfig(optimizer=optimizer, lr=lr, aligned=aligned, decay_fraction=decay)
    optimiser = make_optimizer(sae, training)
    optimiser.constraints.project(dict(sae.named_parameters()))
    since_fired = torch.zeros(64, dtype=torch.int64)
    for index in range(250):
        active = torch.rand(256, 32, generator=generator) < 0.1
        x = (active * (1 + torch.rand(256, 32, generator=generator))) @ truth
        step = Step(index, 250)
        if index == 0:
            sae.initialise_b_dec(x.mean(0))
        optimiser.set_lr(learning_rate(step, lr, warmup_steps=20, decay_fraction=decay))
        optimiser.zero_grad()
        loss = sae.training_loss(x, step, since_fired > 5_000)
        loss.total.backward()
        optimiser.step()
        since_fired = torch.where(loss.fired > 0, 0, since_fired + 256)
    decoder = optimiser.evaluation_weights().get("W_dec", sae.W_dec).detach()
    cosine = torch.nn.functional.normalize(decoder, dim=1) @ truth.T
    assert cosine.max(0).values.mean() > 0.95
