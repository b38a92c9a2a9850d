"""`reseed power` on the command line: a pilot of three budgets, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

import reseed
from reseed.cli.main import main


def said(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> str:
    """Run `reseed power`, and return what it prints."""
    with pytest.raises(SystemExit) as end:
        main(["power", *words])
    printed = capsys.readouterr()
    assert end.value.code == status, printed
    return printed.err if status else printed.out


def test_help_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    printed = said(capsys, "--help")
    for flag in (
        "--difference",
        "--power",
        "--confidence",
        "--measure",
        "--tokens",
        "--differences",
    ):
        assert flag in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reseed power takes one sweep, the pilot; got none"),
        (["a", "b"], "reseed power takes one sweep, the pilot; got a, b"),
        (["nothing"], "there is no sweep nothing in sweeps/."),
        (["a", "--difference", "x"], "argument --difference: invalid float value: 'x'"),
        (["a", "--differences", "x"], "argument --differences: invalid int value: 'x'"),
        (["a", "--tokens", "1.5"], "--tokens: must be integers, as in 4_000_000,8e6; got '1.5'"),
        (["a", "seed=3"], "`seed` cannot be set for named runs and sweeps"),
    ],
)
def test_a_wrong_command_line_is_refused(
    words: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert message in said(capsys, *words, status=1)


@pytest.mark.slow
def test_a_pilot_over_three_budgets_is_analysed_from_its_files(
    tiny_overrides: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    kept = [o for o in tiny_overrides if not o.startswith("training.tokens")]
    study = reseed.compose(
        "comparison=seeds", *kept, "sae=topk", "seed=0,1,2", "training.tokens=2048,4096,8192",
        "comparison.threshold=0.3", "comparison.null_draws=1", "comparison.activation_tokens=0",
    )  # fmt: skip
    study.train()
    (folder,) = Path("sweeps").iterdir()
    assert "its runs have not been compared" in said(capsys, folder.name, status=1)
    result = study.compare()
    found = reseed.load_sweep(folder).power(difference=0.1, tokens=[65_536])
    assert found.budgets["tokens"].tolist() == [8_192, 65_536]
    assert (found.seeds["seconds_per_run"] > 0).all()
    timings = {run.record["timings"]["training_s"] for run in result.sweep.runs()}
    assert 3 * found.seeds["seconds_per_run"].sum() == pytest.approx(sum(timings))
    capsys.readouterr()
    printed = said(capsys, folder.name, "--difference", "0.1", "--tokens", "65_536")
    assert printed.startswith(f"{folder.name}\nseeds needed to see a difference of 0.1 in shared")
    assert "65,536" in printed
    wrong = said(capsys, folder.name, "--measure", "coverages", status=1)
    assert "got 'coverages'. Did you mean `coverage`?" in wrong
