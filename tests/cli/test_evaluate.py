"""``reseed evaluate`` on the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from reseed.cli import compare, evaluate, run, train
from reseed.evaluate.base import EvaluationInput, LoadedRun, Result
from reseed.evaluate.faithfulness import FaithfulnessConfig
from reseed.evaluate.reconstruction import ReconstructionConfig
from reseed.store.runs import RunStore
from reseed.study.evaluate import LOCK
from reseed.system.files import lock_file
from reseed.system.integrity import read_record, write_record

FEW = "training.tokens=1024"
BOTH = ["evaluation=reconstruction,faithfulness", "evaluation.tokens=500"]
Said = Callable[[], str]


@pytest.fixture(scope="module")
def trained(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory):
    """Compare two seeds of two architectures; return the project and its command line."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("reseed.study.result.figure_drawings", lambda cells, runs: {})
        line = [o for o in tiny_overrides if not o.startswith("training.tokens")] + [FEW]
        line += ["comparison.activation_tokens=0", "comparison.null_draws=1"]
        line = ["comparison=seeds", *line, "sae=topk,relu", "seed=0,1"]
        assert run.main(line) == 0
    return folder, line


@pytest.fixture
def line(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copy the project, enter it, and return the command line; no figures are drawn."""
    folder, found = trained
    for name in ("outputs", "sweeps"):
        shutil.copytree(folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("reseed.study.result.figure_drawings", lambda cells, runs: {})
    return found


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Said:
    return lambda: "".join(capsys.readouterr())


def the_sweep() -> Path:
    (sweep,) = Path("sweeps").glob("seeds-*")
    return sweep


def results(name: str = "*") -> list[Path]:
    return sorted(Path("outputs").glob(f"*/evaluations/{name}-*/result.json"))


def test_a_comparison_is_evaluated_end_to_end(line: list[str], said: Said) -> None:
    assert evaluate.main([*line, *BOTH]) == 0
    shown = said()
    assert "What is lost of the activations?" in shown
    assert "What does the model lose?" in shown
    assert "reconstruction: 4 of 4 SAEs in" in shown
    assert len(results("reconstruction")) == len(results("faithfulness")) == 4

    sweep = the_sweep()
    rows = pd.read_csv(sweep / "evaluations.csv")
    assert rows["run"].tolist() == [r.id for r in RunStore("outputs").runs()] or len(rows) == 4
    summary = pd.read_csv(sweep / "summary.csv").set_index("sae")
    for sae, own in rows.groupby("sae"):
        mean = own["faithfulness_ce_increase"].mean()
        assert summary.loc[sae, "faithfulness_ce_increase"] == pytest.approx(mean)
        record = json.loads((Path("outputs") / own["run"].iloc[0] / "metrics.json").read_text())
        assert own["fvu"].iloc[0] == pytest.approx(record["fvu"])
    assert "## What does the model lose?" in (sweep / "summary.md").read_text()
    assert "What does the model lose?" in (sweep / "summary.tex").read_text()
    latents = pd.read_parquet(sweep / "latents.parquet")
    first = latents[latents["run"] == rows["run"][0]]
    table = pd.read_parquet(results("reconstruction")[0].parent / "latents.parquet")
    own = latents[latents["run"] == results("reconstruction")[0].parts[1]]
    assert own["reconstruction_density"].tolist() == table["density"].tolist()
    assert len(first) == 64

    # A second command evaluates and changes nothing, and compare keeps the columns.
    before = (sweep / "summary.csv").read_bytes()
    assert evaluate.main([*line, *BOTH]) == 0
    assert "faithfulness: 4 SAEs already evaluated" in said()
    assert compare.main(line) == 0
    assert "What does the model lose?" in said()
    assert (sweep / "summary.csv").read_bytes() == before


def test_runs_are_found_by_folder_and_by_start_of_name(line: list[str], said: Said) -> None:
    found = RunStore("outputs").runs()
    assert evaluate.main([str(found[0].path), found[1].id[:-3], *BOTH]) == 0
    shown = said()
    assert "What is lost of the activations?" in shown
    assert str(found[0].path / "evaluations") in shown
    assert {p.parts[1] for p in results()} == {found[0].id, found[1].id}
    assert not list(Path("sweeps").glob("*/evaluations.csv"))


def test_a_sweep_is_found_by_name_and_takes_runtime_overrides(line: list[str]) -> None:
    assert evaluate.main(["seeds", BOTH[0], BOTH[1], "runtime.threads=1"]) == 0
    assert len(results()) == 8
    assert (the_sweep() / "evaluations.csv").is_file()


def test_declared_runs_are_evaluated(line: list[str], said: Said) -> None:
    plain = [o for o in line if not o.startswith(("comparison", "seed=", "sae="))]
    assert evaluate.main([*plain, "sae=topk", "seed=0,1", "evaluation=reconstruction",
                          "evaluation.tokens=500"]) == 0  # fmt: skip
    assert len(results()) == 2
    said()
    assert evaluate.main([*plain, "sae=topk", "seed=7", "evaluation=reconstruction"]) == 1
    assert "there is nothing to evaluate: no run is finished (tiny-llama" in said()


@pytest.mark.slow
def test_an_sae_that_is_not_a_run_gives_the_same_metrics(line: list[str], said: Said) -> None:
    source = RunStore("outputs").runs()[0]
    folder = Path("mine")
    folder.mkdir()
    for name in ("sae.json", "sae.safetensors"):
        shutil.copy(source.path / name, folder / name)
    on = [o for o in line if not o.startswith(("comparison", "seed=", "sae", "training"))]
    on += ["training.tokens=1024", "training.batch_size=64"]
    assert evaluate.main(["mine", *on, *BOTH]) == 0
    assert evaluate.main([str(source.path), *BOTH]) == 0
    mine, same = (
        json.loads(next(f.glob("evaluations/faithfulness-*/result.json")).read_text())
        for f in (folder, source.path)
    )
    assert mine["metrics"] == pytest.approx(same["metrics"], nan_ok=True)
    said()
    on = [o for o in on if not o.startswith("layer")] + ["layer=0", "hookpoint=module"]
    assert evaluate.main(["mine", *on, "hookpoint.module=model.layers.*.mlp.up_proj", *BOTH]) == 1
    assert "mine: its `d_in` (=16) must equal that of model.layers.0.mlp.up_proj" in said()


@pytest.mark.slow
def test_a_stopped_evaluation_continues_with_the_next_sae(
    line: list[str], monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    whole = FaithfulnessConfig.evaluate
    seen: list[str] = []

    def stopped(
        self: Any, subjects: Sequence[LoadedRun], evaluated: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        for i, (name, result) in enumerate(whole(self, subjects, evaluated)):
            if i == 2:
                raise KeyboardInterrupt
            seen.append(name)
            yield name, result

    own = [*line, "evaluation=faithfulness", "evaluation.tokens=500"]
    monkeypatch.setattr(FaithfulnessConfig, "evaluate", stopped)
    assert evaluate.main(own) == 130
    assert {p.parts[1] for p in results()} == set(seen)
    kept = {p: p.read_bytes() for p in results()}
    monkeypatch.setattr(FaithfulnessConfig, "evaluate", whole)
    said()
    assert evaluate.main(own) == 0
    shown = said()
    assert "2 SAEs already evaluated" in shown
    assert "evaluating 2 SAEs" in shown
    assert len(results()) == 4
    assert all(path.read_bytes() == text for path, text in kept.items())


@pytest.mark.slow
def test_saes_that_do_not_fit_together_are_evaluated_in_parts(
    line: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, sizes = ReconstructionConfig.evaluate, []

    def counted(self: Any, subjects: Sequence[LoadedRun], evaluated: EvaluationInput) -> Any:
        sizes.append(len(subjects))
        return whole(self, subjects, evaluated)

    monkeypatch.setattr(ReconstructionConfig, "evaluate", counted)
    monkeypatch.setattr("reseed.study.evaluate.BYTES_PER_PASS", 3 * 8 * 64 * 16)
    assert evaluate.main([*line, "evaluation=reconstruction", "evaluation.tokens=500"]) == 0
    assert sizes == [3, 1]
    assert len(results()) == 4


@pytest.mark.slow
def test_a_failing_sae_does_not_stop_the_others(
    line: list[str], monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    whole = ReconstructionConfig.evaluate
    bad = RunStore("outputs").runs()[1].id

    def failing(
        self: Any, subjects: Sequence[LoadedRun], evaluated: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        if any(subject.id == bad for subject in subjects):
            raise RuntimeError("the latents are not finite")
        return whole(self, subjects, evaluated)

    monkeypatch.setattr(ReconstructionConfig, "evaluate", failing)
    assert evaluate.main([*line, *BOTH]) == 1
    shown = said()
    assert f"failed: evaluation=reconstruction: {bad}: the latents are not finite" in shown
    assert len(results("reconstruction")) == 3
    assert len(results("faithfulness")) == 4
    (failure,) = Path("outputs").glob("*/evaluations/*/failed.json")
    assert failure.parts[1] == bad
    assert "RuntimeError" in json.loads(failure.read_text())["traceback"]
    rows = pd.read_csv(the_sweep() / "evaluations.csv").set_index("run")
    assert rows["reconstruction_fvu"].isna().sum() == 1
    monkeypatch.setattr(ReconstructionConfig, "evaluate", whole)
    assert evaluate.main([*line, *BOTH]) == 0
    assert not failure.exists()


@pytest.mark.slow
def test_a_result_that_was_not_declared_is_refused(
    line: list[str], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    declared = ReconstructionConfig.metrics
    monkeypatch.setattr(ReconstructionConfig, "metrics", declared[1:])
    one = sorted(Path("outputs").iterdir())[0]
    assert evaluate.main([str(one), "evaluation=reconstruction", "evaluation.tokens=500"]) == 1
    assert (
        "evaluation=reconstruction returned `fvu`, which `ReconstructionConfig.metrics` does not "
        "declare: add a `Metric` for each"
    ) in said()
    assert results() == []
    (failure,) = one.glob("evaluations/reconstruction-*/failed.json")
    assert json.loads(failure.read_text())["type"] == "EvaluationError"


def test_unfinished_runs_are_reported_and_the_others_evaluated(line: list[str], said: Said) -> None:
    gone = RunStore("outputs").runs()[0]
    shutil.rmtree(gone.path)
    assert evaluate.main([*line, "evaluation=reconstruction", "evaluation.tokens=500"]) == 1
    shown = said()
    assert "not evaluated, because not finished: 1 run" in shown
    assert f"{gone.id}: not trained" in shown
    assert len(results()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "`evaluation` is required, for example evaluation=reconstruction,faithfulness"),
        (["seeds", "evaluation=faithfullness"],
         "`evaluation` has no option `faithfullness`. Did you mean `faithfulness`?"),
        (["seeds", "evaluation=faithfulness", "evaluation.token=5"],
         "there is no key `evaluation.token`. Did you mean `evaluation.tokens`?"),
        (["seeds", "evaluation=faithfulness", "evaluation.tokens=0"],
         "`evaluation.tokens` must be an integer, at least 1; got 0"),
        (["sedes", "evaluation=faithfulness"], "there is no run, sweep or SAE sedes: no such fol"),
        (["tiny", "evaluation=faithfulness"],
         "tiny may be any of these: give more of the name tiny-llama-"),
        (["seeds", "evaluation=faithfulness", "sae=relu"],
         "`sae` cannot be set for named runs and sweeps: their records say what they were"),
        (["seeds", "evaluation=faithfulness", "wait=false"],
         "`wait` cannot be set for named runs and sweeps: their records say what they were"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_refused_before_anything_is_computed(
    line: list[str], said: Said, arguments: list[str], message: str
) -> None:
    assert evaluate.main(arguments) == 1
    assert message in " ".join(said().split())
    assert not results()


def test_results_of_another_version_are_left_out_until_renewed(line: list[str], said: Said) -> None:
    asked = ["seeds", "evaluation=reconstruction", "evaluation.tokens=500"]
    assert evaluate.main(asked) == 0
    path = the_sweep() / "evaluations.json"
    record = read_record(path)
    record["reconstruction"]["signed"]["version"] = 0
    write_record(path, record)
    said()
    assert compare.main(line) == 0
    told = " ".join(said().split())
    assert "the results of evaluation=reconstruction are from another version of it" in told
    assert "What is lost of the activations?" not in told
    assert evaluate.main(asked) == 0
    assert "What is lost of the activations?" in said()


def test_slurm_evaluates_the_runs_of_exactly_one_sweep(line: list[str], said: Said) -> None:
    own = RunStore("outputs").runs()[0].id
    asked = ["evaluation=reconstruction", "hydra/launcher=slurm"]
    for words, got in (([own], "0 sweeps and 1 SAE"), (["seeds", str(the_sweep())], "2 sweeps")):
        assert evaluate.main([*words, *asked]) == 1
        told = " ".join(said().split())
        assert "`hydra/launcher`=slurm evaluates the runs of exactly one sweep, whose f" in told
        assert got in told


def test_an_sae_locked_by_another_process_is_waited_for(
    line: list[str], said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other SAEs are evaluated meanwhile, and the locked one is not evaluated again."""
    asked = ["seeds", "evaluation=reconstruction", "evaluation.tokens=500"]
    assert evaluate.main(asked) == 0
    first, *others = results()
    made, kept = first.stat().st_mtime_ns, first.with_suffix(".kept")
    first.rename(kept)
    for path in others:
        path.unlink()
    handle = lock_file(first.parent / LOCK)
    assert handle is not None
    told: list[str] = []

    def heard(text: str) -> None:
        told.append(text)
        if "waiting" in text:  # now the other process finishes
            assert all(path.exists() for path in others)
            kept.rename(first)
            os.close(handle)

    monkeypatch.setattr("reseed.study.evaluate.say", heard)
    assert evaluate.main(asked) == 0
    assert first.stat().st_mtime_ns == made
    assert "  reconstruction: evaluating 3 SAEs on tiny-llama and words" in told
    assert "  reconstruction: waiting for another process (1 SAE)" in told
    assert not any("evaluating 1 SAE " in text for text in told)


def test_a_world_is_refused_if_a_language_model_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Said
) -> None:
    monkeypatch.chdir(tmp_path)
    world = ["model=world_easy", "training.tokens=4096", "training.batch_size=512",
             "sae.num_latents=16", "runtime.progress=false", "dataset.held_out_tokens=2048",
             "dataset.chunk_tokens=4096"]  # fmt: skip
    assert train.main(world) == 0
    both = ["evaluation=reconstruction,faithfulness", "evaluation.tokens=1000"]
    assert evaluate.main([*world, *both]) == 1
    assert "evaluation=faithfulness needs a language model; world_easy is a world, w" in said()
    assert evaluate.main([*world, "evaluation=contexts"]) == 1
    assert "evaluation=contexts needs a language model; world_easy is a world, w" in said()
    assert not results()
    assert evaluate.main([*world, "evaluation=reconstruction", "evaluation.tokens=1000"]) == 0
    assert len(results()) == 1


def test_compare_refuses_evaluations(line: list[str], said: Said) -> None:
    assert compare.main([*line, "evaluation=reconstruction"]) == 1
    assert "`evaluation` is for `reseed evaluate` and `reseed run`; here it would" in said()


@pytest.mark.slow
def test_run_evaluates_before_its_tables(line: list[str], said: Said) -> None:
    assert run.main([*line, *BOTH]) == 0
    shown = said()
    assert "nothing to train" in shown
    assert "What does the model lose?" in shown
    assert "faithfulness_kl" in pd.read_csv(the_sweep() / "summary.csv")
