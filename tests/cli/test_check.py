"""``reseed check`` on the command line."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import pandas as pd
import pytest

from reseed.cli import check, run
from reseed.store.runs import RunStore

FEW = "training.tokens=1024"


@pytest.fixture(scope="module")
def trained(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory):
    """Compare three seeds of two architectures; return the project and its command line."""
    folder = tmp_path_factory.mktemp("project")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("reseed.study.result.figure_drawings", lambda cells, runs: {})
        line = [o for o in tiny_overrides if not o.startswith("training.tokens")] + [FEW]
        assert run.main(["comparison=seeds", *line, "sae=topk,relu"]) == 0
    return folder, line


@pytest.fixture
def line(trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Copy the project without its sweeps, enter it, and return the command line."""
    folder, found = trained
    shutil.copytree(folder / "outputs", tmp_path / "outputs")
    monkeypatch.chdir(tmp_path)
    return found


def a_list(text: str, name: str = "mine.csv") -> str:
    Path(name).write_text(text)
    return name


def ids(sae: str) -> list[str]:
    return [r.id for r in RunStore("outputs").runs() if f"-{sae}-" in r.id]


def test_named_latents_are_checked_end_to_end(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    named = a_list("latent,label\n3,first\n17,\n3,again\n")
    assert check.main([named, *line, "sae=topk"]) == 0
    said = capsys.readouterr().out
    assert "training" not in said.replace("training=", ""), "nothing is trained"
    found = pd.read_csv("check.csv")
    assert found["latent"].tolist() == [3, 17, 3]
    assert found["label"].fillna("").tolist() == ["first", "", "again"]
    assert set(found["run"]) == {ids("topk")[0]}
    assert found["others"].tolist() == [2, 2, 2]
    (sweep,) = Path("sweeps").iterdir()
    latents = pd.read_parquet(next(sweep.glob("cells/*/latents.parquet")))
    own = latents[latents["run"] == ids("topk")[0]].set_index("latent").loc[[3, 17, 3]]
    assert found["firing"].tolist() == own["firing"].tolist()
    assert found["shared_with"].tolist() == own["shared_with"].tolist()
    assert found["partner_2"].tolist() == [p[1] for p in own["partner_decoder"]]
    for name in ("pearson", "jaccard"):
        expected = [float("nan") if values[1] is None else values[1] for values in own[name]]
        assert found[f"{name}_2"].to_numpy() == pytest.approx(expected, nan_ok=True, abs=1e-6)
    text = Path("check.md").read_text()
    assert text.startswith("# Do these latents replicate?\n\nmodel=tiny-llama · layer=1 · ")
    assert (
        "| latent | label | firing | shared with | reproducibility [95%] | same firing | seed 1 |"
        in text
    )
    assert "of 3 latents are shared with all other runs (2)" in text
    defined = [
        found[f"shared_{seed}"].eq(True) & found[f"pearson_{seed}"].notna() for seed in (1, 2)
    ]
    assert (" shared matches " in text) == any(each.any() for each in defined)
    assert "check.csv, check.md" in said
    # The cell has been compared, so it is not compared again.
    assert check.main([named, *line, "sae=topk"]) == 0
    assert "comparing" not in capsys.readouterr().out


def test_latents_from_the_command_line_go_to_the_out_folder(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["--latents", "3, 17", "--out", "there/deep", *line, "seed=1,2"]) == 0
    found = pd.read_csv("there/deep/check.csv")
    assert set(found["run"]) == {ids("topk")[1]}, "without seed 0, the first seed"
    assert check.main(["--latents=5", *line]) == 0
    (sweep,) = [s for s in Path("sweeps").iterdir() if (s / "check.csv").exists()]
    assert pd.read_csv(sweep / "check.csv")["latent"].tolist() == [5]


def test_a_list_may_name_runs_and_seeds(line: list[str]) -> None:
    relu = ids("relu")
    named = a_list(f"latent,run,seed\n3,outputs/{relu[1]},1\n4,{relu[2]},\n")
    assert check.main([named, *line, "sae=topk,relu"]) == 0, "the cell of the named runs"
    found = pd.read_csv("check.csv")
    assert found["run"].tolist() == relu[1:]
    assert found["partner_1"].isna().tolist() == [True, False]
    assert "| latent | seed | firing |" in Path("check.md").read_text()


WRONG = [
    ([], "no latents are given: give a csv file with a column `latent`, or --latents 3,17,250"),
    (["nowhere.csv"], "there is no file nowhere.csv"),
    (["good.csv", "other.csv"], "give one list of latents; got good.csv, other.csv"),
    (["good.csv", "--latents", "3"], "given twice: by good.csv and by --latents 3"),
    (["--latents"], "reseed check: argument --latents: expected one argument"),
    (["--latents", "3,,4"], "--latents: `latent` must be an integer, at least 0; got ''"),
    (["empty.csv"], "empty.csv is empty: it must have a column `latent`"),
    (["wrong.csv"], "has an unknown column `latnet`. Did you mean `latent`?"),
    (["--latents", "3,64"], "--latents: `latent` must be from 0 to 63: {topk} has 64 latents; "
     "got 64"),
    (["of_run.csv"], "of_run.csv, line 2: there is no run tiny-nothing in the comparison."),
    (["of_seed.csv"], "of_seed.csv, line 3: there is no seed 7 in the comparison; there are 0, 1, "
     "2"),
    (["disagree.csv"], "disagree.csv, line 2: the run of seed 1 is {second}; got {topk}"),
    (["good.csv", "sae=topk,relu"], "the comparison has 2 cells (sae=topk; sae=relu), and the "
     "latents must be of one"),
    (["good.csv", "sae=topk,relu", "comparison.pair_by=sae"], "`comparison.pair_by` must be seed "
     "(or dataset.order_seed) to check latents"),
    (["check.csv"], "check.csv is the list of latents itself, and would be overwritten"),
    (["good.csv", "--out", "good.csv"], "`--out` must be a folder; got good.csv, which is a file"),
    (["good.csv", "sae.kk=3"], "there is no key `sae.kk`. Did you mean `sae.k`?"),
    (["good.csv", "--latent=3"], "unrecognized arguments: --latent=3"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[" ".join(w[0]) for w in WRONG])
def test_invalid_arguments_are_refused_with_a_message(
    line: list[str], arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    topk = ids("topk")
    for name in ("good.csv", "other.csv", "check.csv"):
        a_list("latent\n3\n", name)
    a_list("", "empty.csv")
    a_list("latnet\n3\n", "wrong.csv")
    a_list("latent,run\n3,tiny-nothing\n", "of_run.csv")
    a_list("latent,seed\n3,1\n3,7\n", "of_seed.csv")
    a_list(f"latent,run,seed\n3,{topk[0]},1\n", "disagree.csv")
    with suppress(SystemExit):  # raised by Hydra's own parser
        assert check.main([*line, *arguments]) == 1
    said = capsys.readouterr().err
    assert message.format(topk=topk[0], second=topk[1]) in said
    assert "Traceback" not in said
    assert Path("check.csv").read_text() == "latent\n3\n"


def test_missing_runs_are_named_with_the_command_that_trains_them(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    _, second, third = ids("topk")
    shutil.rmtree(Path("outputs") / third)
    named = a_list("latent\n3\n")
    assert check.main([named, *line]) == 1, "checked with the finished runs"
    captured = capsys.readouterr()
    lacking = f"1 of 3 runs are not finished: {third} (missing). Train them with --train, or with: "
    assert f"- {lacking}reseed run comparison=seeds model=path" in Path("check.md").read_text()
    assert pd.read_csv("check.csv")["others"].tolist() == [1]
    shutil.rmtree(Path("outputs") / second)
    assert check.main([named, *line]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(
        f"error: 2 of 3 runs are not finished: {second} (missing), {third}"
    )
    assert not (Path("outputs") / second).exists(), "nothing is trained"
    assert check.main([named, "--train", *line]) == 0
    assert len(ids("topk")) == 3
    assert pd.read_csv("check.csv")["others"].tolist() == [2]


def test_a_missing_run_of_the_latents_is_an_error(
    line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(Path("outputs") / ids("topk")[0])
    assert check.main(["--latents=3", *line]) == 1
    assert "1 of 3 runs are not finished: " in capsys.readouterr().err
