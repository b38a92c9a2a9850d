"""Comparison of language models of equal width: what is refused, and end-to-end maps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import ortho_group

from reseed.cli import compare, run
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import make_plan
from reseed.compare.cell import compare_cell
from reseed.compare.config import ComparisonConfig
from reseed.compare.dictionary import DIFFERENT_MODELS, load_dictionaries
from reseed.compare.pair import WEIGHTS_NOTE
from reseed.errors import ConfigError, ReseedError
from reseed.store.runs import Run, RunStore
from reseed.study.alignment import aligned, check_named_models, same_basis, same_model
from reseed.train.config import RuntimeConfig

ROOT = Path(__file__).parents[2]
READS_RESIDUAL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head", "embed_tokens")
PROCRUSTES = "comparison.align=procrustes"
PAIRED = "comparison.pair_by=[model,seed]"


@pytest.fixture(scope="module")
def rotation() -> np.ndarray:
    return ortho_group.rvs(16, random_state=5)


def save_rotated(model: Path, rotation: np.ndarray, folder: Path) -> Path:
    """Save a Llama with another basis of its residual stream: x becomes xQ everywhere.

    The scales of RMSNorms, which depend on the basis, are moved into the matrices that read them.
    """
    from transformers import AutoModelForCausalLM

    shutil.copytree(model, folder)
    made = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    made.config.tie_word_embeddings = False
    q = torch.from_numpy(rotation)
    with torch.no_grad():
        made.lm_head.weight = torch.nn.Parameter(made.lm_head.weight.clone())  # untied
        scaled = [(made.model.norm, (made.lm_head,))]
        for block in made.model.layers:
            attention, mlp = block.self_attn, block.mlp
            read = (attention.q_proj, attention.k_proj, attention.v_proj)
            scaled.append((block.input_layernorm, read))
            scaled.append((block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)))
        for norm, readers in scaled:
            for reader in readers:
                reader.weight.mul_(norm.weight)
            norm.weight.fill_(1)
        for name, weight in made.named_parameters():
            module, exact = name.split(".")[-2], weight.double()
            if module in READS_RESIDUAL:
                weight.copy_(exact @ q)
            elif module in ("o_proj", "down_proj"):
                weight.copy_(q.T @ exact)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rotated_model(
    tiny_model: Path, rotation: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("rotated") / "rotated-llama"
    return save_rotated(tiny_model, rotation, folder)


@pytest.fixture(scope="module")
def line(
    tiny_model: Path, rotated_model: Path, tiny_overrides: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> list[str]:  # fmt: skip
    """Return flags that add ``model=plain`` and ``model=turned``, and train quickly."""
    path = tmp_path_factory.mktemp("equal")
    options = path / "own" / "model"
    options.mkdir(parents=True)
    for name, folder in (("plain", tiny_model), ("turned", rotated_model)):
        option = (ROOT / "conf" / "model" / "path.yaml").read_text()
        (options / f"{name}.yaml").write_text(option.replace("path: ???", f"path: {folder}"))
    kept = [o for o in tiny_overrides if not o.startswith(("model", "training.tokens"))]
    folders = [f"runtime.{name}={path / name}" for name in ("outputs", "sweeps")]
    return ["--config-dir", str(path / "own"), "comparison=seeds", *kept, *folders, "sae.k=8",
            "training.tokens=2048", "model=plain,turned", "seed=0,1",
            "comparison.null_draws=1"]  # fmt: skip


def refused(line: list[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        make_plan(CommandLine("run", line))
    return str(caught.value)


def test_models_of_equal_width_are_refused_with_the_choices(line: list[str]) -> None:
    assert refused([*line, "comparison.pair_by=model"]) == (
        "`comparison.align` is required: model=plain (tiny-llama) and model=turned (rotated-llama) "
        "are different models. Their bases are unrelated even though both have `d_in`=16, so "
        "cosines of their rows mean nothing. Choose one, or compare runs within each model "
        "(comparison.pair_by=seed):\n"
        "  comparison.align=procrustes: rows of one are mapped into the basis of the other by an "
        "orthogonal map, fitted on the activations of the same tokens\n"
        "  comparison.align=identity: you say that their bases are the same, as those of "
        "checkpoints or fine-tunes of one model are\n"
        "  comparison.align=activations: weights are not compared, only what the latents do on "
        "the same tokens"
    )


@pytest.mark.parametrize(
    "more",
    [
        ("comparison.pair_by=model", "comparison.align=identity"),
        ("model=plain", "layer=0,1", "comparison.pair_by=layer"),
        ("model=plain", "surrogate=none,gaussian", "comparison.pair_by=surrogate"),
    ],
    ids=["identity", "layers", "gaussian"],
)
def test_pairs_of_one_basis_are_planned(line: list[str], more: tuple[str, ...]) -> None:
    given = {word.partition("=")[0] for word in more}
    kept = [word for word in line if word.partition("=")[0] not in given]
    assert make_plan(CommandLine("run", [*kept, *more])).jobs


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            ("dataset.held_out_tokens=799", PROCRUSTES),
            "`dataset.held_out_tokens` (=799) must be at least 800 with comparison.align="
            "procrustes: the map between model=plain (tiny-llama) and model=turned (rotated-llama) "
            "has 16 dimensions, and is fitted on 20 tokens for each; one in 5 tokens measures it, "
            "and 2 times as many are planned, because tokens of massive norm are left out",
        ),
        (
            ("comparison.align=activations", "comparison.activation_tokens=0"),
            "`comparison.align`=activations needs the activations of model=plain (tiny-llama) and "
            "model=turned (rotated-llama) on the same tokens, and here "
            "comparison.activation_tokens=0 switches that off",
        ),
        (
            ("comparison.align=procrustis",),
            "`comparison.align` must be one of None, procrustes, identity, activations; got "
            "'procrustis'. Did you mean `procrustes`?",
        ),
    ],
    ids=["few-tokens", "activations-off", "misspelt"],
)
def test_an_alignment_without_its_tokens_is_refused(
    line: list[str], more: tuple[str, ...], told: str
) -> None:
    kept = [word for word in line if not word.startswith("dataset.held_out_tokens")]
    if not more[0].startswith("dataset"):
        kept = line
    assert refused([*kept, "comparison.pair_by=model", *more]) == told


def test_worlds_of_different_directions_have_no_common_tokens(line: list[str]) -> None:
    kept = [o for o in line if not o.startswith(("model", "dataset", "layer"))]
    worlds = [*kept, "model=world_easy", "dataset=generated", "model.seed=0,1",
              "comparison.pair_by=model.seed"]  # fmt: skip
    told = refused(worlds)
    assert told.startswith("`comparison.align` is required: model.seed=0 (world_easy) and ")
    assert told.endswith(
        "\nHere only identity is possible, because the activations of a world are random draws "
        "without tokens."
    )
    assert "and here the activations of a world are random draws" in refused([*worlds, PROCRUSTES])
    same = [*worlds[:-2], "model.magnitude_std=0.1,0.2", "comparison.pair_by=model.magnitude_std"]
    assert make_plan(CommandLine("run", same)).jobs, "one seed gives one set of directions"


def test_other_tokenizers_leave_only_the_identity(line: list[str], tmp_path: Path) -> None:
    options, other = tmp_path / "own" / "model", tmp_path / "other-words"
    shutil.copytree(Path(line[1], "model"), options)
    turned = (options / "turned.yaml").read_text()
    (folder,) = (row[6:] for row in turned.splitlines() if row.startswith("path: "))
    shutil.copytree(folder, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    words["cat"], words["dog"] = words["dog"], words["cat"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    (options / "turned.yaml").write_text(turned.replace(folder, str(other)))
    own = ["--config-dir", str(tmp_path / "own"), *line[2:], "comparison.pair_by=model"]
    reason = "their models have different tokenizers"
    assert refused(own).endswith(f"Here only identity is possible, because {reason}.")
    told = refused([*own, "comparison.align=activations"])
    assert told.startswith("`comparison.align`=activations needs the activations of model=plain ")
    assert told.endswith(f"on the same tokens, and here {reason}")


@pytest.fixture(scope="module")
def compared(line: list[str]) -> Path:
    """Compare both models with two seeds each by a map, and return the sweep's folder."""
    assert run.main([*line, PAIRED, PROCRUSTES]) == 0
    (sweeps,) = (Path(o.partition("=")[2]) for o in line if o.startswith("runtime.sweeps="))
    (sweep,) = sweeps.glob("seeds-*")
    return sweep


def runs_of(sweep: Path, model: str) -> list[Run]:
    found = RunStore(sweep.parents[1] / "outputs").runs()
    return [run for run in found if run.record["labels"]["model"] == model]


@pytest.mark.slow
def test_the_map_of_a_rotated_model_is_its_rotation(compared: Path) -> None:
    pairs = pd.read_csv(compared / "pairs.csv")
    across = pairs["model_a"] != pairs["model_b"]
    assert across.sum() == 4
    assert pairs.loc[across, "map_r2"].to_numpy() == pytest.approx(1, abs=1e-4)
    assert pairs.loc[across, "map_r2_shuffled"].abs().max() < 0.1
    assert pairs.loc[across, "map_r2_random"].between(-0.1, 0.9).all()
    assert (pairs.loc[across, "map_tokens"] + pairs.loc[across, "map_massive"]
            + pairs.loc[across, "map_held_out"] == 1024).all()  # fmt: skip
    assert pairs.loc[~across, "map_r2"].isna().all()
    assert pairs["shared_fraction"].notna().all()
    assert pairs["cka_codes"].notna().all(), "activations on the same tokens are compared, too"
    assert WEIGHTS_NOTE not in pairs


@pytest.mark.slow
def test_sharing_with_a_rotated_model_is_that_of_the_unrotated_pair(
    compared: Path, rotation: np.ndarray
) -> None:
    """The rows of a run are rotated exactly, and read as a run of the rotated model."""
    settings = ComparisonConfig(
        name="t", grid={"model": ["0", "1"]}, pair_by="model", null_draws=1, align="procrustes"
    )
    plain, turned = runs_of(compared, "tiny-llama"), runs_of(compared, "rotated-llama")
    a, b = (load_dictionaries(run, str(i))[0] for i, run in enumerate(plain))
    moved = dataclasses.replace(b, encoder=b.encoder @ rotation, decoder=b.decoder @ rotation)
    found, maps = aligned([plain[0], turned[0]], [a, moved], settings, RuntimeConfig())
    assert maps[0, 1].rotation == pytest.approx(rotation, abs=1e-3)
    across = compare_cell(found, [], settings, alignments=maps).pairs.iloc[0]
    within = compare_cell([a, b], [], settings).pairs.iloc[0]
    for name in ("shared_fraction", "coverage", "cosine_encoder", "cosine_decoder", "mmcs"):
        assert across[name] == pytest.approx(within[name], abs=1e-3), name
    back, other = aligned([turned[0], plain[0]], [moved, a], settings, RuntimeConfig())
    assert other[0, 1].rotation == pytest.approx(rotation.T, abs=1e-3)
    assert [x.id for x in back] == [moved.id, a.id]


@pytest.mark.slow
def test_a_compared_cell_is_kept_and_another_alignment_compares_again(
    compared: Path, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.main([*line, PAIRED, PROCRUSTES]) == 0
    assert "comparing" not in capsys.readouterr().out
    assert compare.main([*line, PAIRED, "comparison.align=activations"]) == 0
    (other,) = (p for p in compared.parent.glob("seeds-*") if p != compared)
    pairs = pd.read_csv(other / "pairs.csv")
    across = pairs["model_a"] != pairs["model_b"]
    assert set(pairs.loc[across, WEIGHTS_NOTE]) == {DIFFERENT_MODELS}
    assert pairs.loc[across, "shared_fraction"].isna().all()
    assert pairs.loc[~across, "shared_fraction"].notna().all()
    assert pairs["cka_codes"].notna().all()
    assert "map_r2" not in pairs
    assert DIFFERENT_MODELS in (other / "summary.md").read_text()
    shutil.rmtree(other)


@pytest.mark.slow
def test_the_tables_show_the_map_beside_its_nulls(compared: Path) -> None:
    text = (compared / "summary.md").read_text()
    assert "## Maps between the models" in text
    assert "| model | and | R² of map | R², shuffled | R², random weights |" in text
    assert "(comparison.align=procrustes)" in text
    rows = pd.read_csv(compared / "pairings.csv")
    across = rows["first"] != rows["second"]
    assert rows.loc[across, "map_r2"].round(3).tolist() == [1, 1]
    assert rows.loc[~across, "map_r2"].isna().all()
    assert "nan" not in text


@pytest.mark.slow
def test_runs_of_two_models_are_refused_from_their_records(compared: Path) -> None:
    settings = ComparisonConfig(name="t", grid={"model": ["0", "1"]}, pair_by="model")
    runs = [runs_of(compared, name)[0] for name in ("tiny-llama", "rotated-llama")]
    loaded = [load_dictionaries(run, str(i))[0] for i, run in enumerate(runs)]
    with pytest.raises(ReseedError, match=r"comparison\.align is required: tiny-llama-"):
        aligned(runs, loaded, settings, RuntimeConfig())
    kept = dataclasses.replace(settings, align="identity")
    assert aligned(runs, loaded, kept, RuntimeConfig()) == (loaded, {})


@pytest.mark.slow
def test_saes_of_two_models_are_refused_by_their_files(
    compared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    a, b = (runs_of(compared, name)[0].path for name in ("tiny-llama", "rotated-llama"))
    assert compare.main([f"sources=[{a},{b}]"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: `comparison.align`=null: {a} is an SAE of tiny-llama (weights ")
    assert f"{b} of rotated-llama (weights " in told
    assert "Different models have unrelated bases" in told
    assert "`comparison.align`=identity if both names mean one model" in told
    assert compare.main([f"sources=[{a},{b}]", PROCRUSTES]) == 1
    capsys.readouterr()
    assert compare.main([f"sources=[{a},{b}]", "comparison.align=identity"]) == 0
    assert "(comparison.align=identity)" in " ".join(capsys.readouterr().out.split())


def test_stored_activations_are_compared_with_a_notice(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for seed, name in enumerate("ab"):
        rows = np.random.default_rng(seed).standard_normal((8_000, 8)).astype(np.float32)
        np.save(tmp_path / f"{name}.npy", rows)
    paths = ",".join(f"{tmp_path}/{name}.npy" for name in "ab")
    words = ["comparison=seeds", "model=activations", f"model.path={paths}", "dataset=stored",
             "dataset.held_out_tokens=256", "layer=0", "sae.num_latents=16", "training.tokens=2048",
             "training.batch_size=64", "dataset.chunk_tokens=2048", "seed=0"]  # fmt: skip
    assert make_plan(CommandLine("run", [*words, "comparison.pair_by=model.path"])).jobs
    told = capsys.readouterr().out
    assert told.count("notice: stored activations do not name their model") == 1
    assert "SAEs of different models have no common basis" in told


def test_files_that_name_no_model_give_a_notice() -> None:
    settings = ComparisonConfig(name="t", grid={"seed": [0, 1]})
    known, other = {"model_name": "gpt2"}, {"model": "openai/gpt2"}
    assert check_named_models([known, other], ["a", "b"], settings) == ""
    assert check_named_models([known, {}, {}], ["a", "b", "c"], settings) == (
        "notice: the files of b, c do not name a language model, so that nothing can check that "
        "all SAEs are of one. SAEs of different models have no common basis, and cosines of their "
        "rows mean nothing"
    )
    worlds = [{"dataset": "generated", "model_fingerprint": own} for own in "xxy"]
    assert check_named_models(worlds[:2], ["a", "b"], settings) == ""
    assert check_named_models(worlds, ["a", "b", "c"], settings).startswith(
        "notice: the files of these SAEs name different worlds, but not the directions of their "
    )
    drawn = {"model": "m", "model_fingerprint": "random_weights-seed0-0123456789abcdef"}
    with pytest.raises(ConfigError, match=r"m \(weights random_weights-seed0-01234567\), b of m"):
        check_named_models([drawn, {"model": "m", "model_fingerprint": "ff"}], ["a", "b"], settings)
    kept = dataclasses.replace(settings, align="identity")
    assert check_named_models([known, {"model": "pythia"}], ["a", "b"], kept) == ""


@pytest.mark.real
@pytest.mark.audit
def test_a_rotated_real_model_shares_as_much_across_as_within(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own" / "model").mkdir(parents=True)
    plain = real_data / "models" / "TinyStories-656K"
    turned = save_rotated(plain, ortho_group.rvs(128, random_state=0), tmp_path / "turned")
    text = (ROOT / "conf" / "model" / "path.yaml").read_text()
    for name, folder in (("plain", plain), ("turned", turned)):
        option = text.replace("path: ???", f"path: {folder}")
        (tmp_path / "own" / "model" / f"{name}.yaml").write_text(option)
    words = ["--config-dir", "own", "comparison=seeds", "model=plain,turned", "layer=1",
             "dataset=text_files", f"dataset.path={real_data / 'text' / 'tinystories_train.txt'}",
             "dataset.held_out_tokens=16384", "sae.num_latents=256", "training.tokens=160000",
             "seed=0,1,2", PAIRED, PROCRUSTES, "comparison.null_draws=1",
             "runtime.progress=false"]  # fmt: skip
    assert run.main(words) == 0
    (found,) = Path("sweeps").glob("seeds-*")
    pairs = pd.read_csv(found / "pairs.csv")
    across = pairs["model_a"] != pairs["model_b"]
    assert pairs.loc[across, "map_r2"].min() > 0.999
    assert pairs.loc[across, ["map_r2_shuffled", "map_r2_random"]].max(axis=None) < 0.2
    within, beside = (pairs.loc[x, "shared_fraction"].mean() for x in (~across, across))
    assert within > 0.2
    assert beside == pytest.approx(within, abs=0.05)
    assert pairs.loc[across, "map_shuffled_shared_fraction"].max() < 0.02


IDENTITY = {"fingerprints": {"model": "x"}, "model": {}}
WORLD = {"fingerprints": {}, "model": {"seed": 0, "dictionary": "random", "d_in": 8}}
FILES = {"fingerprints": {"activations": "x"}, "model": {}}


@pytest.mark.parametrize(
    ("first", "other", "same"),
    [
        (IDENTITY, IDENTITY | {"layer": 3, "surrogate": "gaussian"}, True),
        (IDENTITY, IDENTITY | {"fingerprints": {"model": "y"}}, False),
        (IDENTITY, WORLD, False),
        (WORLD, WORLD | {"model": WORLD["model"] | {"magnitude_std": 3}}, True),
        (WORLD, WORLD | {"model": WORLD["model"] | {"seed": 1}}, False),
        (FILES, FILES, True),
        (FILES, FILES | {"fingerprints": {"activations": "y"}}, None),
        (FILES, IDENTITY, None),
    ],
)
def test_a_basis_belongs_to_weights_or_directions(first: dict, other: dict, same: object) -> None:
    assert same_basis(first, other) is same
    assert same_basis(other, first) is same


@pytest.mark.parametrize(
    ("first", "other", "same"),
    [
        ({"model_fingerprint": "x", "model": "a"}, {"model_fingerprint": "x", "model": "b"}, True),
        ({"model_fingerprint": "x", "model": "a"}, {"model_fingerprint": "y", "model": "a"}, False),
        ({"model_fingerprint": "x", "model": "gpt2"}, {"model_name": "openai/GPT2"}, True),
        ({"lm_name": "EleutherAI/pythia-70m"}, {"model_name": "gpt2"}, False),
        ({"model": "gpt2+gaussian"}, {"model_name": "gpt2"}, True),
        ({"lm_name": "unknown"}, {"model_name": "gpt2"}, None),
        ({}, {"model_name": "gpt2"}, None),
        (
            {"dataset": "generated", "model_fingerprint": "x"},
            {"dataset": "generated", "model_fingerprint": "y"},
            None,
        ),
        ({"dataset": "generated", "model_fingerprint": "x"}, {"model_fingerprint": "y"}, False),
        ({"dataset": "stored", "model_fingerprint": "x", "model": "a"}, {"model": "b"}, None),
    ],
)
def test_files_name_their_model_by_weights_or_by_name(
    first: dict, other: dict, same: object
) -> None:
    assert same_model(first, other) is same
    assert same_model(other, first) is same
