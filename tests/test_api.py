"""The Python API: the same files as the command line; errors and shapes of its functions."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose as hydra_compose
from hydra import initialize_config_dir, version
from matplotlib.figure import Figure

import reseed
from reseed.cli import run as run_command
from reseed.store.runs import Run
from reseed.study.study import Study

SMALL = ["runtime.threads=1", "training.tokens=2048", "comparison.null_draws=1"]


@pytest.fixture(scope="module")
def line(tiny_overrides: list[str]) -> list[str]:
    kept = [o for o in tiny_overrides if not o.startswith("training.tokens")]
    return ["comparison=seeds", "sae=topk,relu", "seed=0,1", *kept, *SMALL]


@pytest.fixture(scope="module")
def worked(line: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a study through the API, and return its project folder."""
    folder = tmp_path_factory.mktemp("api")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = reseed.compose(*line).run()
        assert result.complete
    return folder


@pytest.fixture
def study(worked: Path, line: list[str], monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(worked)
    return reseed.compose(*line)


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files that hold no times: weights, metrics, tables, figures."""
    timed = ("run.json", "result.json", "training.csv", ".lock", ".html")
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in found
        if not path.name.endswith(timed) and "cache" not in path.parts
    }


def same_files(one: Path, other: Path) -> list[str]:
    """Compare two projects byte for byte; return the names of their files."""
    first, second = files_of(one), files_of(other)
    assert list(first) == list(second)
    assert [name for name in first if first[name] != second[name]] == []
    return list(first)


def test_the_api_writes_the_files_of_the_command_line(
    worked: Path, line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command.main(line) == 0
    names = {Path(name).name for name in same_files(worked, tmp_path)}
    assert {"sae.safetensors", "summary.csv", "summary.tex", "pairs.csv", "latents.parquet",
            "cosines.png", "manifest.jsonl", "comparison.json"} <= names  # fmt: skip
    of_api, of_cli = (sorted(folder.glob("outputs/*/run.json")) for folder in (worked, tmp_path))
    for one, other in zip(of_api, of_cli, strict=True):
        a, b = Run(one.parent).record, Run(other.parent).record
        assert a["environment"]["command"] == b["environment"]["command"]
        assert a["identity"] == b["identity"]


@pytest.mark.audit
def test_the_quickstart_is_the_same_from_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["comparison=quickstart", "evaluation=contexts", "training.tokens=50_000",
            "evaluation.tokens=10_000", "runtime.threads=1"]  # fmt: skip
    for name in ("api", "cli"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        if name == "api":
            assert reseed.compose(*line).run().complete
        else:
            assert run_command.main(line) == 0
    assert len(same_files(tmp_path / "api", tmp_path / "cli")) > 60


def test_activations_from_memory_are_stored_once_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    x = torch.randn(120, 20, 8, generator=torch.Generator().manual_seed(0))
    small = ["sae.num_latents=16", "sae.k=4", "training.tokens=1024", "training.batch_size=64",
             "dataset.chunk_tokens=512", "dataset.held_out_tokens=64", "runtime.threads=1",
             "runtime.progress=false", "runtime.cache=derived"]  # fmt: skip
    (run,) = reseed.compose(*small, activations=x, progress=lambda message: None).train()
    (copy,) = Path("derived/activations").iterdir()
    assert run.record["fingerprints"] == {"activations": copy.stem}
    assert run.record["experiment"]["model"]["origin"] == "memory"
    assert str(copy) in run.record["environment"]["command"]
    # The same activations in parts: nothing is trained or written.
    again = reseed.compose(*small, "model.label=mine", activations=[x[:50], x[50:].numpy()])
    assert again.runs[0].signature == run.signature
    assert again.runs[0].finished
    assert list(Path("derived/activations").iterdir()) == [copy]
    for given, message in (
        (x.long(), r"`activations`: activations must be one of .*; item 0 is int64"),
        ([x, x[:, :3]], r"item 0 is float32 \[120, 20, 8\], item 1 is float32 \[120, 3, 8\]"),
        ([1.0, 2.0], "must be a tensor, an array or a list of them; item 0 is a float"),
        (x / 0, "must be finite in float32; position 0 of sequence 0 of item 0"),
        (np.array([{}], dtype=object), "item 0 is object"),
    ):
        with pytest.raises(reseed.ConfigError, match=message):
            reseed.compose(*small, activations=given)  # type: ignore[arg-type]
    with pytest.raises(reseed.ConfigError, match=r"give activations= or `model.path`=, not both"):
        reseed.compose(*small, "model.path=x", activations=x)
    copy.unlink()
    with pytest.raises(reseed.ReseedError, match="have changed, or are gone, since they were"):
        again.evaluate("reconstruction", "evaluation.tokens=64")
    line = ["model=activations", f"model.path={copy}", "model.origin=memory"]
    with pytest.raises(reseed.ConfigError, match=r"from memory, .* is gone: call reseed.compose"):
        reseed.compose(*small, *line)


def test_a_result_has_the_tables_of_its_folder(study: Study) -> None:
    result = study.result()
    pd.testing.assert_frame_equal(
        result.summary.astype(object).fillna(np.nan).reset_index(drop=True)[["sae", "mmcs"]],
        pd.read_csv(result.path / "summary.csv")[["sae", "mmcs"]].astype(object),
    )
    assert list(result.summary) == list(pd.read_csv(result.path / "summary.csv"))
    assert list(result.pairs) == list(pd.read_csv(result.path / "pairs.csv"))
    assert len(result.latents) == 4 * 64
    assert list(result.latents) == list(pd.read_parquet(result.path / "latents.parquet"))
    assert isinstance(result.figure("cosines"), Figure)
    with pytest.raises(reseed.ReseedError, match=r"no figure 'cosine'.* Did you mean `cosines`"):
        result.figure("cosine")
    assert "<table" in result._repr_html_()
    assert f"seeds: 2 cells in {result.path}/" in repr(result)


def test_a_report_can_go_to_another_folder(study: Study, tmp_path: Path) -> None:
    page = study.result().report("md", tmp_path / "sent")
    assert page == tmp_path / "sent" / "report.md"
    assert page.is_file()
    with pytest.raises(
        reseed.ConfigError, match="`format` must be one of html, md, tex; got 'pdf'"
    ):
        study.result().report("pdf")


def test_steps_are_taken_one_by_one(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    study = reseed.compose(*line, progress=said.append)
    with pytest.raises(reseed.ReseedError, match="none of the 4 runs is finished"):
        study.compare()
    with pytest.raises(reseed.ReseedError, match="nothing to evaluate"):
        study.evaluate("reconstruction")
    study.plan()
    assert said[0].startswith("plan: 4 runs in 1 group")
    assert not list(tmp_path.rglob("sae.safetensors"))
    assert [run.status for run in study.train()] == ["finished"] * 4
    assert repr(study) == "<Study seeds: 4 runs, 4 finished>"
    frame = study.evaluate("reconstruction", "faithfulness", "evaluation.tokens=500")
    assert {"reconstruction_fvu", "faithfulness_kl"} <= set(frame)
    assert sorted(zip(frame["sae"], frame["seed"], strict=True)) == [
        ("relu", 0), ("relu", 1), ("topk", 0), ("topk", 1),
    ]  # fmt: skip
    with pytest.raises(reseed.ReseedError, match="its runs have not been compared"):
        study.result()
    result = study.compare()
    assert "reconstruction_fvu_low" in result.summary  # evaluations are in the tables
    study.evaluate("contexts", "evaluation.tokens=500")
    for tables in (study.result().summary, pd.read_csv(result.path / "summary.csv")):
        assert "contexts_silent_fraction" in tables  # also those made after the comparison
    with pytest.raises(reseed.ConfigError, match="give names or `evaluation`=, not both"):
        study.evaluate("contexts", "evaluation=reconstruction")
    assert "nothing to train: 4 runs already finished" not in said
    study.train()
    assert said[-2] == "nothing to train: 4 runs already finished"
    assert capsys.readouterr().out == ""  # every message went to the function


def test_a_study_without_comparison_only_trains(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (one,) = reseed.compose(*tiny_overrides, *SMALL[:2], "seed=3").train()
    assert one.record["experiment"]["seed"] == 3
    assert not Path("sweeps").exists()
    study = reseed.compose(*tiny_overrides, *SMALL[:2], "seed=3,4")
    assert [e.seed for e in study.experiments] == [3, 4]
    with pytest.raises(reseed.ConfigError, match="`comparison` is required"):
        study.run()
    assert repr(study) == "<Study 2 runs, 1 finished>"


def test_a_failed_run_is_an_error_after_the_others_were_trained(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    study = reseed.compose(*[o for o in line if not o.startswith("comparison")], "training.lr=1e30")
    with pytest.raises(reseed.ReseedError, match="failed: "):
        study.train()
    assert study.failures


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["sae=topkk"], "`sae` has no option `topkk`. Did you mean `topk`?"),
        (["sae.k=-1"], "`sae.k` must be"),
        (["comparison=seeds", "evaluation=reconstructon"], "Did you mean `reconstruction`"),
        (["-m", "seed=0,1"], "overrides are KEY=VALUE; got the flag -m"),
        (["seed=[1"], "seed=[1"),
        (["plan_only=true"], "`plan_only` is for the command line: call Study.plan()"),
        (["hydra/launcher=slurm"], "this works on the command line only, as `reseed train`"),
        (["hydra/sweeper=optuna", "seed=0"], "this works on the command line only"),
    ],
)
def test_wrong_overrides_are_errors(overrides: list[str], message: str) -> None:
    with pytest.raises(reseed.ReseedError) as error:
        reseed.compose(*overrides)
    assert message in str(error.value)


def test_composing_leaves_the_hydra_of_the_caller_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("value: 1\n")
    with initialize_config_dir(version_base="1.1", config_dir=str(tmp_path)):
        reseed.compose("model=world_easy", "seed=1")
        assert hydra_compose("mine").value == 1
        assert str(version.getbase()) == "1.1"


def test_a_failing_progress_function_fails_no_run(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error is raised at the end; the runs are finished."""
    monkeypatch.chdir(tmp_path)

    def broken(message: str) -> None:
        if message.startswith("training"):
            raise RuntimeError("the widget is gone")

    study = reseed.compose(*line, progress=broken)
    with pytest.raises(RuntimeError, match="the widget is gone"):
        study.train()
    assert [run.status for run in study.runs] == ["finished"] * 4


def test_studies_in_threads_keep_their_messages_apart(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said: dict[int, list[str]] = {0: [], 1: []}

    def work(seed: int) -> str:
        (run,) = reseed.compose(
            *tiny_overrides, *SMALL[:2], f"seed={seed}", progress=said[seed].append
        ).train()
        return run.status

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, said)) == ["finished"] * 2
    for seed, lines in said.items():
        assert f"seed{seed}" in lines[-1]
        assert not any(f"seed{1 - seed}" in line for line in lines)


def test_reasons_are_told_if_nothing_could_be_compared(
    line: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = [o for o in line if not o.startswith("sae=")] + ["sae=topk"]
    study = reseed.compose(*short)
    for run in study.train():
        weights = run.path / "sae.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(reseed.ReseedError, match=r"sae\.safetensors is damaged: it has 100 bytes"):
        study.compare()
    with pytest.raises(reseed.ReseedError, match=r"0 of 2 runs \(the loss is not finite"):
        reseed.compose(*short, "training.lr=1e30").run()


def test_sweeps_and_runs_are_found_by_the_beginning_of_their_names(
    study: Study, tmp_path: Path
) -> None:
    result = study.result()
    for name in (result.path, result.path.name, "seeds"):
        assert reseed.load_sweep(name).path.resolve() == result.path.resolve()
    with pytest.raises(reseed.ReseedError, match=r"there is no sweep seds .*Did you mean `seeds`"):
        reseed.load_sweep("seds")
    run = study.runs[0]
    for name in (run.path, run.id, run.id[:-3]):
        assert reseed.load_run(name).id == run.id
    with pytest.raises(reseed.ReseedError, match="may be any of"):
        reseed.load_run("tiny")


def test_a_loaded_sae_knows_its_origin_and_its_width(study: Study) -> None:
    run = study.runs[0]
    sae = reseed.load_sae(run.path)
    assert repr(sae).startswith("TopK(model=tiny-llama, layer=1, hookpoint=resid_post, d_in=")
    for method in (sae, sae.encode, sae.encode_sparse):
        with pytest.raises(ValueError, match=rf"^expected d_in {sae.d_in}, got 7$"):
            method(torch.zeros(3, 7))


def test_activations_are_the_hidden_states_at_all_positions(
    study: Study, tiny_overrides: list[str]
) -> None:
    from transformers import AutoModelForCausalLM

    (path,) = [o.partition("=")[2] for o in tiny_overrides if o.startswith("model.path=")]
    tokens = torch.arange(24).reshape(3, 8) % 11
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(path)
        states = model(tokens, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        found = reseed.read_activations(tokens, *tiny_overrides, f"layer={layer}")
        assert found.dtype == torch.float32
        # transformers' last hidden state is normed, which the residual stream is not.
        if layer + 1 < model.config.num_hidden_layers:
            torch.testing.assert_close(found, states[layer + 1])
    run = study.runs[0]
    of_run = reseed.read_activations(tokens.numpy(), run)
    torch.testing.assert_close(of_run, reseed.read_activations(tokens.tolist(), *tiny_overrides))
    assert of_run.shape == (3, 8, reseed.load_sae(run.path).d_in)


@pytest.mark.parametrize(
    ("tokens", "where", "message"),
    [
        ([1, 2], [], "tokens must be integers [sequences, positions], at least one; got int64 [2]"),
        ([[0.5]], [], "got float32 [1, 1]"),
        ([[1], [2, 3]], [], "tokens must be sequences of one length"),
        ([[5_000]], [], "tokens must be from 0 to 4095, the vocabulary of embedded; got 5000"),
        ([[1]], ["layer=9"], "`layer` must be from 0 to"),
        ([[1]], ["model=world_easy"], "read_activations needs a language model"),
    ],
)
def test_tokens_that_cannot_be_read_are_refused(
    tokens: list, where: list[str], message: str
) -> None:
    with pytest.raises(reseed.ConfigError) as error:
        reseed.read_activations(tokens, *where)
    assert message in str(error.value)
