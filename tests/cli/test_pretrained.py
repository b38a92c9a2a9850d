"""``sae=pretrained`` and ``reseed compare sources=[…]``: SAEs that were trained elsewhere."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch

from reseed.cli import compare, convert, run, status, train
from reseed.compare.dictionary import initial_sae
from reseed.compare.matching import match
from reseed.sae.checkpoint import load_sae, save_sae
from reseed.sae.topk import TopKConfig
from reseed.store.runs import RunError, RunStore

QUIET = ["comparison.activation_tokens=0", "runtime.threads=1"]


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str]) -> list[str]:
    return [o for o in tiny_overrides if not o.startswith("sae.")]


@pytest.fixture(scope="module")
def trained(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train three seeds, and convert the first two to other libraries' formats."""
    folder = tmp_path_factory.mktemp("trained")
    outputs, sweeps = f"runtime.outputs={folder}/outputs", f"runtime.sweeps={folder}/sweeps"
    line = [*overrides, "sae=topk", "sae.num_latents=64", "seed=0,1,2", outputs, sweeps]
    assert train.main(["-m", *line]) == 0
    for seed, format in ((0, "sparsify"), (0, "saelens"), (1, "dictionary_learning")):
        (source,) = (folder / "outputs").glob(f"*seed{seed}-*")
        assert convert.main([str(source), f"{folder}/{format}", "--to", format]) == 0
    return folder


@pytest.fixture(autouse=True)
def _with_what_was_trained(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")


def of(kind: str):
    """Return the only run whose name contains a word."""
    (found,) = (one for one in RunStore("outputs").runs() if kind in one.id)
    return found


def test_a_pretrained_run_has_the_metrics_of_the_trained_one(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*overrides, "sae=pretrained", "sae.source=sparsify"]) == 0
    ours, theirs = of("seed0"), of("pretrained")
    assert theirs.finished
    for name in ("fvu", "l0", "cosine", "live", "silent_fraction"):
        assert ours.metrics[name] == theirs.metrics[name]
    assert torch.equal(load_sae(ours.path).W_dec, load_sae(theirs.path).W_dec)
    assert (ours.latents()["firing"] == theirs.latents()["firing"]).all()
    dead = theirs.latents()["tokens_since_fired"] >= theirs.record["dead_after_tokens"]
    assert dead.mean() == theirs.metrics["silent_fraction"] == theirs.metrics["dead_fraction"]
    record = theirs.record
    assert record["pretrained"]["format"] == "sparsify"
    assert record["pretrained"]["metadata"]["seed"] == 0
    assert (record["tokens"], record["experiment"]["sae"]["type"]) == (0, "topk")
    with pytest.raises(RunError, match="is a pretrained SAE: its initial weights are unknown"):
        initial_sae(theirs)
    said = capsys.readouterr().out
    assert "measuring 1 SAE (topk 64 k=8) on" in said
    assert status.main([]) == 0
    assert f"{theirs.id}" in capsys.readouterr().out


def test_one_sae_is_one_run_in_any_format_seed_and_training(overrides: list[str]) -> None:
    line = [*overrides, "sae=pretrained", "source=sparsify,saelens", "seed=0,1"]
    assert train.main(["-m", *line, "training.lr=1e-3,2e-3"]) == 0
    assert train.main(["-m", *line, "dataset.subset_seed=0,1"]) == 0
    assert len([one for one in RunStore("outputs").runs() if "pretrained" in one.id]) == 1
    before = of("pretrained").record["ended"]
    assert train.main([*overrides, "sae=pretrained", "source=saelens"]) == 0
    assert of("pretrained").record["ended"] == before
    # Other held-out activations give another run.
    assert train.main([*overrides, "sae=pretrained", "source=saelens", "layer=0"]) == 0
    assert len([one for one in RunStore("outputs").runs() if "pretrained" in one.id]) == 2


def test_another_layer_than_the_saes_own_gets_a_warning(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*overrides, "sae=pretrained", "source=saelens", "plan_only=true"]
    assert train.main(line) == 0
    assert "warning" not in capsys.readouterr().out
    for own, told in (("layer=0", "layer=0 hookpoint=resid_post"),
                      ("hookpoint=mlp_out", "layer=1 hookpoint=mlp_out")):  # fmt: skip
        assert train.main([*line, own]) == 0
        said = capsys.readouterr().out
        assert "warning: saelens was trained on the activations of layer=1 hookpoint=" in said
        assert f"and now reads those of {told}" in said
        assert said.count("warning") == 1


@pytest.mark.slow
def test_pretrained_and_trained_runs_share_a_comparison(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        *overrides, *QUIET, "comparison=seeds", "comparison.pair_by=[sae,seed]", "seed=0,1,2",
        "source=dictionary_learning",
    ]  # fmt: skip
    at_one_width = [*line, "sae=topk,pretrained"]
    # sae.num_latents is not a key of sae=pretrained, so it cannot be set for both.
    assert run.main([*at_one_width, "sae.num_latents=64"]) == 1
    assert "sae.num_latents" in capsys.readouterr().err
    assert run.main(at_one_width) == 0
    (sweep,) = Path("sweeps").glob("seeds-*")
    pairs = pd.read_csv(sweep / "pairs.csv")
    # 3 seeds and one pretrained SAE make 4 runs and 6 pairs.
    assert len(pairs) == 6
    assert len(set(pairs["a"]) | set(pairs["b"])) == 4


def test_sources_are_compared_by_weights(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["sources=[sparsify,dictionary_learning]", "runtime.threads=1"]
    assert compare.main(line) == 0
    (sweep,) = Path("sweeps").glob("sources-*")
    pairs = pd.read_csv(sweep / "pairs.csv")
    a, b = load_sae(of("seed0").path), load_sae(of("seed1").path)
    by_encoder, by_decoder = match(a.W_enc, b.W_enc), match(a.W_dec, b.W_dec)
    same = by_encoder.assignment == by_decoder.assignment
    both = (by_encoder.cosines >= 0.7) & (by_decoder.cosines >= 0.7) & same
    assert pairs["shared_fraction"].tolist() == pytest.approx([both.mean()])
    assert pairs["cosine_decoder"].tolist() == pytest.approx([by_decoder.cosines.mean()])
    assert "comparing 2 SAEs by their weights" in capsys.readouterr().out
    assert len(RunStore("outputs").runs()) == 3  # nothing was measured


@pytest.mark.slow
def test_sources_are_compared_on_activations(overrides: list[str]) -> None:
    line = ["sources=[sparsify,dictionary_learning]", *overrides, *QUIET]
    plain = [o for o in line if not o.startswith("training.")]
    assert compare.main(plain) == 0
    (sweep,) = Path("sweeps").glob("sources-*")
    by_weights = Path("elsewhere")
    assert compare.main([line[0], f"runtime.sweeps={by_weights}", "runtime.threads=1"]) == 0
    (other,) = by_weights.glob("sources-*")
    found, alone = (pd.read_csv(folder / "pairs.csv") for folder in (sweep, other))
    assert found["shared_fraction"].tolist() == alone["shared_fraction"].tolist()
    assert found["shared_fraction_live"].notna().all()
    assert len([one for one in RunStore("outputs").runs() if "pretrained" in one.id]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["sources=[sparsify]"], "`sources` must list at least 2 SAEs; got 1"),
        (["sources=[sparsify,sparsify]"], "must list every SAE once; sparsify is there twice"),
        (["sources=[sparsify,saelens]"], "sparsify and saelens are the same SAE"),
        (["sources=sparsify"], "`sources` must be one list, as in sources=[FOLDER,"),
        (["sources=[sparsify,nowhere]"], "`sources`: there is no folder nowhere"),
        (["sources=[sparsify,saelens]", "sae=topk"], "`sae` cannot be given with sources=[…]; "),
        (["sources=[sparsify,saelens]", "training.lr=1"], "`training.lr` changes nothing when"),
    ],
)
def test_sources_that_cannot_be_compared_are_refused(
    line: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main(line) == 1
    assert message in capsys.readouterr().err
    assert not list(Path("sweeps").glob("sources-*"))


def test_invalid_pretrained_runs_are_refused_before_training(
    overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*overrides, "sae=pretrained"]

    def refused(arguments: list[str], message: str, command=train.main) -> None:
        assert command(arguments) == 1
        assert message in capsys.readouterr().err

    refused(line, "`sae.source` is required with sae=pretrained: give it a value")
    refused([*line, "source=nowhere"], "`sae.source`: there is no folder nowhere")
    refused([*line, "sae.format=sae_lens", "source=saelens"], "Did you mean `saelens`?")
    refused([*overrides, "source=saelens"], "`source` needs sae=pretrained; got source=saelens")
    save_sae(TopKConfig(num_latents=8, k=2).empty(9), "wide", {"layer": 7})
    refused(
        [*line, "source=wide"],
        "`sae.source` takes activations of width 9, but those at the hookpoint have width 16. "
        "Its files say: layer: 7.",
    )
    refused(
        [*line, "comparison=seeds", "source=saelens"],
        "`comparison.pair_by` leaves sae=pretrained alone in its cell",
        run.main,
    )
    assert len(RunStore("outputs").runs()) == 3


def test_a_source_changed_after_its_check_is_an_error(overrides: list[str]) -> None:
    from reseed.sae import pretrained

    config = pretrained.PretrainedConfig(source="saelens")
    found = config.resolve()
    shutil.rmtree("saelens")
    shutil.copytree("dictionary_learning", "saelens")
    with pytest.raises(Exception, match=r"cfg.json is not valid JSON|has changed since"):
        found.load()
