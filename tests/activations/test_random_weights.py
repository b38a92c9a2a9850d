"""The surrogate with random weights: a language model before any training."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.activations.model_source import EmbeddedModelConfig, PathModelConfig
from reseed.activations.synthetic.surrogate import surrogate_source
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import check_jobs
from reseed.errors import ConfigError
from reseed.experiment.resolve import Resolved
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import RunStore
from reseed.study.train import train_missing

HOOK = Hookpoint("resid_post", 1)
TOKENS = torch.randint(2, 15, (4, 12), generator=torch.Generator().manual_seed(0))


def activations(found) -> torch.Tensor:
    return torch.cat([x[HOOK] for x in LanguageModel(found).activations(TOKENS, [HOOK])])


def found_in(folder: Path, cache: Path, **settings):
    return PathModelConfig(path=str(folder), **settings).resolve(cache)


@pytest.mark.parametrize("embedded", [True, False])
def test_every_weight_is_redrawn_reproducibly(
    embedded: bool, tiny_model: Path, tmp_path: Path
) -> None:
    config = EmbeddedModelConfig() if embedded else PathModelConfig(path=str(tiny_model))
    trained = config.resolve(tmp_path)
    random = trained.with_random_weights()
    own, other = LanguageModel(trained).model, LanguageModel(random).model
    again = LanguageModel(random).model
    shapes = {name: p.shape for name, p in own.named_parameters()}
    assert shapes == {name: p.shape for name, p in other.named_parameters()}
    for name, p in own.named_parameters():
        drawn = other.get_parameter(name)
        assert torch.equal(drawn, again.get_parameter(name)), name
        if p.ndim > 1:
            assert not torch.equal(p, drawn), name
    spread = float(other.get_input_embeddings().weight.std())
    # The tests' model has .3, the embedded one .02.
    assert spread == pytest.approx(random.transformers_config.initializer_range, rel=0.1)


def test_weights_follow_the_seed_and_leave_the_random_state_unchanged(
    tiny_model: Path, tmp_path: Path
) -> None:
    random = found_in(tiny_model, tmp_path).with_random_weights()
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    drawn = activations(random)
    assert torch.equal(torch.rand(3), wanted)
    assert torch.equal(activations(random), drawn)
    assert not torch.equal(activations(replace(random, random_seed=2)), drawn)
    torch.manual_seed(random.random_seed)
    reference = AutoModelForCausalLM.from_config(random.transformers_config).eval()
    with torch.no_grad():
        states = reference(TOKENS, output_hidden_states=True).hidden_states
    torch.testing.assert_close(drawn, states[HOOK.layer + 1])


def test_precision_does_not_change_the_draws(tiny_model: Path, tmp_path: Path) -> None:
    exact, rounded = (
        LanguageModel(found_in(tiny_model, tmp_path, dtype=d).with_random_weights()).model
        for d in ("float32", "bfloat16")
    )
    for name, p in exact.named_parameters():
        assert torch.equal(rounded.get_parameter(name), p.bfloat16()), name
    buffers = dict(exact.named_buffers())
    assert buffers, "of rotary angles"
    for name, buffer in rounded.named_buffers():
        assert torch.equal(buffer, buffers[name]), name


def test_the_fingerprint_depends_on_architecture_and_seed_only(
    tiny_model: Path, tmp_path: Path
) -> None:
    trained = found_in(tiny_model, tmp_path)
    random = trained.with_random_weights()
    assert random.fingerprint.startswith("random_weights-seed1-")
    assert random.fingerprints["tokenizer"] == trained.fingerprints["tokenizer"]
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (weights,) = copy.glob("*.safetensors")
    model = AutoModelForCausalLM.from_pretrained(copy)
    model.get_input_embeddings().weight.data += 1
    model.save_pretrained(copy)
    assert weights.is_file()
    again = found_in(copy, tmp_path)
    assert again.fingerprint != trained.fingerprint
    assert again.with_random_weights().fingerprint == random.fingerprint, "ignores the weights"
    described = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(described | {"initializer_range": 0.1}))
    assert found_in(copy, tmp_path).with_random_weights().fingerprint != random.fingerprint


def planned(line: list[str]) -> Resolved:
    return check_jobs(CommandLine("train", []), line, multirun=False)[0][0].resolved


def test_it_enters_signature_stream_seed_and_labels_like_the_gaussian_one(
    tiny_overrides: list[str],
) -> None:
    plain, drawn, random = (
        planned([*tiny_overrides, f"surrogate={name}"])
        for name in ("none", "gaussian", "random_weights")
    )
    assert len({r.signature for r in (plain, drawn, random)}) == 3
    assert len({r.stream for r in (plain, drawn, random)}) == 3
    assert len({r.init_seed for r in (plain, drawn, random)}) == 3
    assert random.identity["surrogate"] == "random_weights"
    assert random.identity["fingerprints"]["model"].startswith("random_weights-seed1-")
    assert random.identity["fingerprints"]["text"] == plain.identity["fingerprints"]["text"]
    assert random.label.startswith("tiny-llama+random_weights-resid_post.1-words")
    assert random.record()["labels"]["model"] == "tiny-llama+random_weights"


def test_runs_are_trained_and_measured_on_its_activations(
    tiny_overrides: list[str], tmp_path: Path
) -> None:
    line = [*tiny_overrides, "surrogate=random_weights", f"runtime.outputs={tmp_path}"]
    (job,), runtime = check_jobs(CommandLine("train", []), line, multirun=False)
    resolved = job.resolved
    assert train_missing([resolved], runtime) == {}
    (run,) = RunStore(tmp_path).runs()
    source = resolved.open()
    x = torch.cat([c[HOOK] for c in source.held_out([HOOK], 1024)])
    firing = (load_sae(run.path).encode(x) != 0).sum(0)
    assert firing.tolist() == run.latents()["firing"].tolist()
    real = planned(tiny_overrides).open()
    assert not torch.equal(torch.cat([c[HOOK] for c in real.held_out([HOOK], 1024)]), x)


@pytest.mark.slow
def test_a_penalty_is_calibrated_on_it(tiny_overrides: list[str], tmp_path: Path) -> None:
    line = [*tiny_overrides, "surrogate=random_weights", f"runtime.outputs={tmp_path}"]
    line = [*line, "sae=relu", "sae.target_l0=4"]
    (job,), runtime = check_jobs(CommandLine("train", []), line, multirun=False)
    assert train_missing([job.resolved], runtime) == {}
    runs = RunStore(tmp_path).runs()
    (run,) = [r for r in runs if not r.record["identity"].get("role")]
    assert run.record["penalty_weight"] == run.record["calibration"]["weight"]
    assert run.metrics["l0"] == pytest.approx(4, rel=0.1)
    models = {r.record["fingerprints"]["model"] for r in runs}
    assert len(runs) > 1
    assert models == {job.resolved.identity["fingerprints"]["model"]}


def test_a_world_has_no_weights() -> None:
    with pytest.raises(ConfigError) as caught:
        planned(["model=world_easy", "surrogate=random_weights"])
    assert str(caught.value) == (
        "`surrogate`=random_weights needs a language model; world_easy has no weights"
    )


def test_other_surrogates_leave_the_source_unchanged(tiny_model: Path, tmp_path: Path) -> None:
    trained = found_in(tiny_model, tmp_path)
    assert surrogate_source(trained, "none") is surrogate_source(trained, "gaussian") is trained
