"""``reseed convert`` and ``reseed push``: other formats, and the folder pushed to a hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import reseed
from reseed.cli import convert, train
from reseed.sae.base import SAE, SAEConfig
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.checkpoint import load_sae, save_sae
from reseed.sae.formats import differ
from reseed.sae.gated import GatedConfig
from reseed.sae.topk import TopKConfig
from reseed.store.runs import Run, RunStore


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Train a run."""
    outputs = tmp_path_factory.mktemp("runs")
    assert train.main([*tiny_overrides, "sae=topk", f"runtime.outputs={outputs}"]) == 0
    (found,) = RunStore(outputs).runs()
    return found


def saved(config: SAEConfig, folder: str = "sae") -> SAE:
    sae = config.build(8, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter += 0.1
    if isinstance(config, BatchTopKConfig):
        sae.threshold.fill_(0.5)
    save_sae(sae, folder, {"seed": 3})
    return sae


def test_an_sae_survives_four_formats_and_back(capsys: pytest.CaptureFixture[str]) -> None:
    sae = saved(TopKConfig(num_latents=32, k=3, aux_alpha=0.0, unit_norm_decoder=False))
    before = "sae"
    for format in ("sparsify", "saelens", "dictionary_learning", "reseed"):
        assert convert.main([before, "--to", format, format]) == 0
        before = format
    again = reseed.load_sae("reseed")
    for name, tensor in sae.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    said = capsys.readouterr().out
    assert "sparsify: topk, 32 latents of width 8, from reseed to sparsify" in said
    assert "not kept" not in said


def test_lost_settings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    saved(BatchTopKConfig(num_latents=32, k=2.5))
    assert convert.main(["sae", "out", "--to", "gemma_scope"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "params.npz does not store where the SAE comes from" in said
    assert "sae=batch_topk is stored as a JumpReLU, without its k" in said
    assert "no such settings: sae.unit_norm_decoder, sae.aux_alpha, sae.k, " in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sae", "out", "--to", "gemma_scope"], "gemma_scope cannot hold sae=gated: it holds "),
        (["sae", "sae", "--to", "saelens"], "sae exists already and is not overwritten"),
        (["sae", "out", "--to", "saelenz"], "reseed convert: argument --to: invalid choice"),
        (["sae", "out"], "reseed convert: the following arguments are required: --to"),
        (["nowhere", "out", "--to", "reseed"], "there is no folder nowhere"),
        (["sae", "out", "--to", "reseed", "--format", "sparsify"], "Expected sparsify"),
    ],
)
def test_an_impossible_conversion_is_refused_and_leaves_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(GatedConfig(num_latents=16))
    assert convert.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not Path("out").exists()


def test_a_file_that_differs_from_the_sae_is_removed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A defective writer does not leave a file."""
    from reseed.sae.formats import base

    saved(TopKConfig(num_latents=32, k=3))
    right = base.state
    monkeypatch.setattr(base, "state", lambda sae: right(sae) | {"W_dec": -sae.W_dec})
    assert convert.main(["sae", "out", "--to", "sparsify"]) == 1
    assert "cannot hold this SAE unchanged: the files differ in recons" in (capsys.readouterr().err)
    assert not Path("out").exists()


def test_differ_names_the_first_difference() -> None:
    one, other = (saved(TopKConfig(num_latents=32, k=k)) for k in (3, 4))
    assert differ(one, one) == ""
    assert differ(one, other).startswith("latents: ")
    assert differ(one, saved(TopKConfig(num_latents=16, k=3))) == "their sizes"
    with torch.no_grad():
        moved = saved(TopKConfig(num_latents=32, k=3))
        moved.W_dec[0] *= 1.01
    assert differ(one, moved) == "reconstructions"


def test_a_transcoder_is_not_converted_to_an_sae(capsys: pytest.CaptureFixture[str]) -> None:
    saved(TopKConfig(num_latents=32, k=3))
    assert convert.main(["sae", "out", "--to", "sparsify"]) == 0
    file = Path("out/cfg.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"transcode": True}))
    assert convert.main(["out", "again", "--to", "saelens"]) == 1
    assert "out is a transcoder: written as an SAE" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["reseed", "sparsify"])
def test_a_push_writes_a_folder_with_a_card(
    format: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.push([str(run.path), "me/saes", "--to", format, "--dry-run", "out"]) == 0
    assert "out: the files that would be pushed to me/saes" in capsys.readouterr().out
    assert differ(load_sae(run.path), reseed.load_sae("out")) == ""
    card = Path("out/README.md").read_text()
    assert 'sae = reseed.load_sae("hub:me/saes")' in card
    assert f"| fvu | {run.metrics['fvu']:.4g} | fraction of variance unexplained |" in card
    assert f"The signature of its run is `{run.signature}`" in card
    assert "| sae.k | 8 |" in card
    assert ("SparseCoder.load_from_hub" in card) == (format == "sparsify")
    # The card must not disclose folders of this machine.
    assert str(Path.cwd().parent) not in card
    metrics = json.loads(Path("out/metrics.json").read_text())
    assert metrics == run.metrics
    with pytest.raises(SystemExit):
        convert.push(["--help"])


def test_only_a_finished_run_is_pushed(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run.path, run.path.name)
    run = Run(Path(run.path.name))
    run.update(status="failed")
    assert convert.push([str(run.path), "me/saes", "--dry-run", "out"]) == 1
    assert "is failed: only a finished run is pushed" in capsys.readouterr().err
    assert convert.push([str(run.path), "saes", "--dry-run", "out"]) == 1
    assert "a place on the hub is written hub:OWNER/NAME" in capsys.readouterr().err


def test_an_unreachable_hub_is_reported(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import huggingface_hub

    class Hub:
        def create_repo(self, *_: object, **__: object) -> None:
            raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    assert convert.push([str(run.path), "me/saes"]) == 1
    assert "cannot push to me/saes: no route. Nothing was changed here." in capsys.readouterr().err
