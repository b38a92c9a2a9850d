"""End-to-end comparison of models of different width by their activations on the same tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from reseed.cli import compare, run
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import make_plan
from reseed.compare.activations.tables import NOTE, TOKENS
from reseed.compare.dictionary import DIFFERENT_WIDTHS as NO_COMMON_SPACE
from reseed.compare.pair import WEIGHTS_NOTE
from reseed.errors import ConfigError
from reseed.sae.checkpoint import load_sae
from reseed.store.runs import Run, RunStore
from reseed.study.held_out import held_out_chunks, token_mismatch
from reseed.train.config import RuntimeConfig

ROOT = Path(__file__).parents[2]
MATCHED = [f"agreement_{name}_matched" for name in ("pearson", "jaccard", "fraction")]


@pytest.fixture(scope="module")
def wide_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random model of 24 dimensions with the tokenizer of the tiny model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("wide") / "wide-llama"
    shutil.copytree(tiny_model, folder)
    config = AutoConfig.from_pretrained(folder)
    config.hidden_size, config.head_dim = 24, 12
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def line(
    tiny_model: Path, wide_model: Path, tiny_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:  # fmt: skip
    """Return flags that add ``model=narrow`` and ``model=wide``, and train quickly."""
    path = tmp_path_factory.mktemp("apart")
    options = path / "own" / "model"
    options.mkdir(parents=True)
    for name, folder in (("narrow", tiny_model), ("wide", wide_model)):
        option = (ROOT / "conf" / "model" / "path.yaml").read_text()
        assert "path: ???" in option
        (options / f"{name}.yaml").write_text(option.replace("path: ???", f"path: {folder}"))
    kept = [o for o in tiny_overrides if not o.startswith(("model", "training.tokens"))]
    folders = [f"runtime.{name}={path / name}" for name in ("outputs", "sweeps")]
    return ["--config-dir", str(path / "own"), "comparison=seeds", *kept, *folders, "sae.k=8",
            "training.tokens=2048", "model=narrow,wide", "comparison.null_draws=1"]  # fmt: skip


@pytest.fixture(scope="module")
def compared(line: list[str]) -> Path:
    """Compare both models with two seeds each, and return the sweep's folder."""
    assert run.main([*line, "seed=0,1", "comparison.pair_by=[model,seed]"]) == 0
    (sweeps,) = (Path(o.partition("=")[2]) for o in line if o.startswith("runtime.sweeps="))
    (sweep,) = sweeps.glob("seeds-*")
    return sweep


def test_weights_are_compared_within_a_model_and_activations_across(compared: Path) -> None:
    pairs = pd.read_csv(compared / "pairs.csv", keep_default_na=True)
    across = pairs["model_a"] != pairs["model_b"]
    assert across.sum() == 4
    assert pairs.loc[~across, "shared_fraction"].notna().all()
    assert pairs.loc[~across, WEIGHTS_NOTE].isna().all()
    assert pairs.loc[across, "shared_fraction"].isna().all()
    assert (pairs.loc[across, WEIGHTS_NOTE] == NO_COMMON_SPACE).all()
    assert (pairs[TOKENS] == 1024).all()
    assert pairs[NOTE].isna().all()
    for name in ("cka_codes", "cka_reconstructions", *MATCHED):
        assert pairs[name].between(-1, 1).all(), name
    for name in ("substitution", "agreement_pearson_orphan", "novel_fraction"):
        assert pairs.loc[~across, name].notna().all(), name
        assert pairs.loc[across, name].isna().all(), name


def test_cka_across_models_uses_the_same_tokens(compared: Path) -> None:
    """The oracle is CKA by a dense product of the activations that each run was measured on."""
    pairs = pd.read_csv(compared / "pairs.csv")
    row = pairs[pairs["model_a"] != pairs["model_b"]].iloc[0]
    made = []
    for letter in "ab":
        one = Run(compared.parents[1] / "outputs" / row[letter])
        x = torch.cat(list(held_out_chunks([one], 1024, RuntimeConfig())[0])).float()
        made.append(load_sae(one.path).encode(x).detach().double().numpy())
    sums = np.zeros((2, 2))
    for start in range(0, 1024, 256):
        blocks = [h[start : start + 256] for h in made]
        sums += [[_hsic(p @ p.T, q @ q.T) for q in blocks] for p in blocks]
    assert row["cka_codes"] == pytest.approx(sums[0, 1] / np.sqrt(sums[0, 0] * sums[1, 1]))


def _hsic(k: np.ndarray, m: np.ndarray) -> float:
    """Return the unbiased HSIC, literally as in Song et al. 2012, eq. 5."""
    n = len(k)
    k, m = k * (1 - np.eye(n)), m * (1 - np.eye(n))
    one = np.ones(n)
    found = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return (found - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))


def test_the_tables_say_why_columns_are_empty(compared: Path) -> None:
    text = (compared / "summary.md").read_text()
    assert "CKA codes | CKA rec | r of matched | agree [95%] |" in text
    assert "where no cosine is defined: runs of different `d_in` have no common space" in text
    rows = pd.read_csv(compared / "pairings.csv").set_index(["first", "second", "differs_in"])
    row = rows.loc[("narrow", "wide", "model, seed")]
    assert np.isnan(row["shared_fraction"])
    assert row["note"] == NO_COMMON_SPACE
    assert -1 <= row["agreement_pearson_matched"] <= 1
    assert NO_COMMON_SPACE in pd.read_csv(compared / "summary.csv").loc[0, "note"]
    assert "nan" not in text


def test_compared_cells_are_not_compared_again(
    compared: Path, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    before = (compared / "pairs.csv").read_bytes()
    assert compare.main([*line, "seed=0,1", "comparison.pair_by=[model,seed]"]) == 0
    assert "comparing" not in capsys.readouterr().out
    assert (compared / "pairs.csv").read_bytes() == before


def test_pairs_of_models_without_seeds_draw_no_figures(
    compared: Path, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """No pair of these cells has a common space, so there is nothing to draw."""
    assert compare.main([*line, "seed=0,1", "comparison.pair_by=model"]) == 0
    said = capsys.readouterr().out
    assert "CKA" in said
    assert "no figures\nreport: " in said
    (sweep,) = (p for p in compared.parent.iterdir() if p.is_dir() and p != compared
                and (p / "pairs.csv").is_file())  # fmt: skip
    found = pd.read_csv(sweep / "pairings.csv")
    assert found["n_seeds"].tolist() == [2]
    assert found["cka_codes"].notna().all()
    assert not list(sweep.glob("*.png"))


def refused(line: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(CommandLine("run", line))
    return str(caught.value)


def test_different_tokenizers_are_refused_before_training(
    line: list[str], wide_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, other = tmp_path / "own" / "model", tmp_path / "other-words"
    options.mkdir(parents=True)
    shutil.copytree(wide_model, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    for option in Path(line[1], "model").iterdir():
        shutil.copy(option, options)
    text = (ROOT / "conf" / "model" / "path.yaml").read_text()
    (options / "wide.yaml").write_text(text.replace("path: ???", f"path: {other}"))
    told = refused(["--config-dir", str(tmp_path / "own"), *line[2:], "seed=0,1",
                    "comparison.pair_by=model"])  # fmt: skip
    assert told == (
        "`comparison.pair_by` pairs runs of different `d_in`: model=narrow (tiny-llama) has 16, "
        "model=wide (other-words) has 24. Their rows are vectors of different spaces and have no "
        "cosine. Such runs can only be compared by their activations on the same tokens (CKA, "
        "agreement of activations), and here their models have different tokenizers. Pair runs of "
        "equal `d_in` (comparison.pair_by=seed)"
    )


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            "surrogate=gaussian",
            "the activations of surrogate=gaussian are random draws without tokens. Pair",
        ),
        (
            "comparison.activation_tokens=0",
            "comparison.activation_tokens=0 switches that off. Pair",
        ),
    ],
)
def test_runs_without_common_tokens_are_refused(line: list[str], more: str, reason: str) -> None:
    assert f"and here {reason}" in refused([*line, "seed=0,1", "comparison.pair_by=model", more])


def test_a_map_needs_one_width(line: list[str]) -> None:
    told = refused([*line, "seed=0,1", "comparison.pair_by=model", "comparison.align=procrustes"])
    assert told == (
        "`comparison.align`=procrustes needs models of one width, as an orthogonal map has; "
        "model=narrow (tiny-llama) has `d_in`=16, model=wide (wide-llama) has 24. With "
        "`comparison.align`=activations their weights are not compared"
    )


def test_random_weights_read_the_same_tokens(line: list[str]) -> None:
    plan = make_plan(CommandLine("run", [*line, "seed=0", "surrogate=random_weights",
                                         "comparison.pair_by=model"]))  # fmt: skip
    assert len(plan.jobs) == 2


DATA = {"context_length": 32, "order_seed": 0, "held_out_tokens": 10}
IDENTITY = {"dataset": DATA, "fingerprints": {"text": "x", "tokenizer": "y", "model": "z"}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"fingerprints": IDENTITY["fingerprints"] | {"model": "other"}, "layer": 3}, ""),
        ({"dataset": DATA | {"order_seed": 3, "held_out_tokens": 4}}, ""),
        ({"dataset": DATA | {"context_length": 64}}, "they differ in dataset.context_length"),
        ({"fingerprints": IDENTITY["fingerprints"] | {"text": "other"}}, "their texts differ"),
        ({"fingerprints": {}}, "the activations of a world are random draws without tokens"),
        ({"fingerprints": {"activations": "x"}}, "stored activations have no tokens"),
    ],
)
def test_other_tokens_gives_the_reason(change: dict, reason: str) -> None:
    assert token_mismatch([IDENTITY, IDENTITY | change]) == reason


@pytest.mark.real
@pytest.mark.slow
def test_real_models_with_different_tokenizers_are_refused(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = tmp_path / "own" / "model"
    options.mkdir(parents=True)
    names = ("stories260K", "TinyStories-656K")
    text = (ROOT / "conf" / "model" / "path.yaml").read_text()
    for name in names:
        folder = real_data / "models" / name
        (options / f"{name}.yaml").write_text(text.replace("path: ???", f"path: {folder}"))
    told = refused([
        "--config-dir", str(tmp_path / "own"), "comparison=seeds", f"model={','.join(names)}",
        "dataset=text_files", f"dataset.path={real_data / 'text' / 'tinystories_valid.txt'}",
        "dataset.held_out_tokens=2048", "training.tokens=16384", "layer=1", "seed=0",
        "comparison.pair_by=model",
    ])  # fmt: skip
    assert "model=stories260K (stories260K) has 64" in told
    assert "model=TinyStories-656K (TinyStories-656K) has 128" in told
    assert "their models have different tokenizers" in told


@pytest.mark.real
@pytest.mark.slow
def test_sites_of_different_width_of_a_real_model_are_compared(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sites are the residual stream of one model and the wider hidden layer of its MLP."""
    monkeypatch.chdir(tmp_path)
    paths = "'model.layers.*','model.layers.*.mlp.up_proj'"
    assert run.main([
        "comparison=seeds", "model=path", f"model.path={real_data / 'models' / 'stories260K'}",
        "dataset=text_files", f"dataset.path={real_data / 'text' / 'tinystories_valid.txt'}",
        "dataset.held_out_tokens=8192", "training.tokens=65536", "layer=2", "sae.num_latents=128",
        "hookpoint=module", f"hookpoint.module={paths}", "seed=0,1",
        "comparison.pair_by=[hookpoint.module,seed]", "comparison.null_draws=1",
        "runtime.progress=false",
    ]) == 0  # fmt: skip
    (sweep,) = Path("sweeps").glob("seeds-*")
    pairs = pd.read_csv(sweep / "pairs.csv")
    across = pairs["hookpoint.module_a"] != pairs["hookpoint.module_b"]
    assert set(pairs.loc[across, "cka_codes"].between(0.05, 1)) == {True}
    within, beside = (pairs.loc[x, "agreement_pearson_matched"].mean() for x in (~across, across))
    assert 0 < beside < within
    assert len(RunStore(Path("outputs")).runs()) == 4
