"""``reseed show`` on the command line."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from reseed.cli import run, show
from reseed.cli.main import COMMANDS, main
from reseed.store.contexts import Contexts
from reseed.store.runs import RunStore
from reseed.system.integrity import read_record, write_record

SMALL = ["evaluation=contexts", "evaluation.tokens=500", "evaluation.top=2", "evaluation.sampled=2",
         "evaluation.reservoir=4", "evaluation.lens=3", "evaluation.neighbours=2"]  # fmt: skip


@pytest.fixture(scope="module")
def project(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compare two seeds with contexts, and add a copy of one run without contexts."""
    folder = tmp_path_factory.mktemp("project")
    few = ["training.tokens=1024", "comparison.activation_tokens=0", "comparison.null_draws=1"]
    line = [o for o in tiny_overrides if not o.startswith("training.tokens")]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("reseed.study.result.figure_drawings", lambda cells, runs: {})
        assert run.main(["comparison=seeds", *line, *few, "sae=topk", "seed=0,1", *SMALL]) == 0
        first = next(r.path for r in RunStore("outputs").runs())
        shutil.copytree(first, "outputs/without", ignore=shutil.ignore_patterns("evaluations"))
    return folder


@pytest.fixture
def said(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Enter the project, and return a function that returns the output of `reseed show`."""
    monkeypatch.chdir(project)

    def answer(*words: str, status: int = 0) -> str:
        assert show.main(list(words)) == status
        return "".join(capsys.readouterr())

    return answer


def runs(name: str) -> list[str]:
    return [r.id for r in RunStore("outputs").runs() if f"-{name}-" in r.id]


def most_active(run: str) -> int:
    contexts = Contexts.of(Path("outputs") / run)
    assert contexts is not None
    return max(contexts.latents(0, contexts.num_latents), key=lambda x: x.firing).latent


def test_latents_are_shown_with_their_matches_in_other_seeds(said: Callable[..., str]) -> None:
    first, second = runs("topk")
    latent = most_active(first)
    shown = said(first, f"{latent},0")
    assert f"{first}  latent {latent}\nfires on " in shown
    assert f"{first}  latent 0\n" in shown
    assert "reproducibility" in shown
    assert " of 1  seed 1: " in shown
    assert all(word in shown for word in ("promotes", "suppresses", "neighbours", "fires most"))
    assert "in seed 1" not in shown
    with_partners = said(f"outputs/{first}", str(latent), "--partners")
    assert "\nin seed 1: " in with_partners
    assert with_partners.count("fires most") == 2
    # A run may be named by the start of its name, as for every command.
    assert said(second[:-3], "0").startswith(f"{second}  latent 0\n")


def test_showing_latents_loads_no_torch(project: Path) -> None:
    """The command must start at once, because users look at many latents one by one."""
    code = """
import sys
from pathlib import Path
from reseed.cli import show
run = next(path.name for path in Path("outputs").iterdir() if "-topk-" in path.name)
assert show.main([run, "3"]) == 0
print("HEAVY", sorted({"torch", "lightning", "transformers", "scipy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def test_errors_say_why_nothing_is_shown(said: Callable[..., str]) -> None:
    first, _ = runs("topk")
    assert (
        "error: without has no contexts yet; make them with: reseed evaluate outputs/without "
        "evaluation=contexts"
    ) in said("without", "3", status=1)
    assert "takes a run and its latents, for example reseed show RUN 3,17; got " in said(
        first, status=1
    )
    assert "latent must be from 0 to 63 in" in said(first, "64", status=1)
    assert "a latent is an integer, at least 0; got '-3x'" in said(first, "3,-3x", status=1)
    assert "`layer` cannot be set for named runs and sweeps" in said(
        first, "3", "layer=2", status=1
    )
    (sweep,) = Path("sweeps").glob("seeds-*")
    assert f"{sweep.name} is a sweep, but latents belong to a run: name one of {first}" in said(
        sweep.name, "3", status=1
    )


def test_show_is_listed_and_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert "show" in COMMANDS
    with pytest.raises(SystemExit) as ended:
        main(["show", "--help"])
    assert ended.value.code == 0
    assert "reseed show: show what a latent fires on" in capsys.readouterr().out


def test_matches_and_contexts_of_earlier_weights_are_refused(
    said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run was trained again with another outcome."""
    shutil.copytree(Path(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    first, _ = runs("topk")
    path = next(Path("sweeps").glob("*/cells/*/cell.json"))
    record = read_record(path)
    record["inputs"][first]["sae.json"] = "0" * 64
    write_record(path, record)
    assert f"was compared before {first} was trained again" in said(first, "3", status=1)
    path = next(Path("outputs", first).glob("evaluations/contexts-*/result.json"))
    write_record(path, read_record(path) | {"weights": "0" * 64})
    assert "result.json is of earlier weights of this SAE" in said(first, "3", status=1)
