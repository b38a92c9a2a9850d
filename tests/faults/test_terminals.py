"""Commands whose reader has gone end well, and every locale reads what another has written."""

from __future__ import annotations

import os
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from reseed.store.runs import RunStore

pytestmark = pytest.mark.slow
FEW = ["training.tokens=1024", "comparison.activation_tokens=0", "comparison.null_draws=1"]
CONTEXTS = ["evaluation=contexts", "evaluation.tokens=500", "evaluation.top=3"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
C = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


class Project:
    """A folder with a finished comparison, whose model and text have names with accents."""

    def __init__(self, folder: Path, overrides: Sequence[str], model: Path, text: Path) -> None:
        self.folder = folder
        shutil.copytree(model, folder / "modèle-ñ")
        shutil.copyfile(text, folder / "wörter.txt")
        fixed = ("model.path=", "dataset.path=", "training.tokens=")
        self.tiny = [o for o in overrides if not o.startswith(fixed)] + FEW[:1]
        self.tiny += [f"model.path='{folder}/modèle-ñ'", f"dataset.path='{folder}/wörter.txt'"]
        self.comparison = ["comparison=seeds", *self.tiny, *FEW[1:], "sae=topk", "seed=0,1"]
        ended = self.reseed("run", *self.comparison, *CONTEXTS)
        assert ended.returncode == 0, ended.stderr

    def reseed(
        self, *words: str, environment: Mapping[str, str] | None = None, reads: bool = True
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command; if nobody ``reads``, its stdout is a pipe without a reader."""
        out: int = subprocess.PIPE
        if not reads:
            other, out = os.pipe()
            os.close(other)
        try:
            return subprocess.run(
                [sys.executable, "-m", "reseed", *words], cwd=self.folder, check=False,
                env=os.environ | ONE_THREAD | dict(environment or {}),
                stdout=out, stderr=subprocess.PIPE,
            )  # fmt: skip
        finally:
            if not reads:
                os.close(out)

    def words(self, name: str) -> list[str]:
        """Return the arguments of a command that reads the comparison."""
        (sweep,) = (self.folder / "sweeps").glob("seeds-*")
        run = RunStore(self.folder / "outputs").runs()[0].id
        listed = {
            "status": ["status"],
            "status SWEEP": ["status", sweep.name],
            "show": ["show", run, "1,2", "--partners"],
            "compare": ["compare", *self.comparison],
            "report": ["report", sweep.name],
            "report md": ["report", sweep.name, "--format", "md", "--out", "markdown"],
            "check": ["check", "--latents", "3,17", *self.comparison],
            "convert": ["convert", f"outputs/{run}", "--to", "sparsify", "converted"],
            "help": ["train", "--help"],
            "cfg": ["train", "--cfg", "job"],
            "completion": ["completion", "bash"],
            "nothing to train": ["train", *self.tiny, "sae=topk", "seed=0"],
        }
        return listed[name]


AUDIT = pytest.mark.audit
"""Marks cases that differ little from others: `make audit` runs them."""
READERS = ("status", "status SWEEP", "show", "compare", "report", "report md")
COMMANDS = (*READERS, "help", "cfg", "completion", "nothing to train", "convert")


@pytest.fixture(scope="module")
def project(
    tiny_overrides: list[str],
    tiny_model: Path,
    tiny_text: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Project:
    return Project(tmp_path_factory.mktemp("project"), tiny_overrides, tiny_model, tiny_text)


@pytest.mark.parametrize(
    "name",
    ["status", "compare", "cfg", *(pytest.param(name, marks=AUDIT) for name in COMMANDS
                                   if name not in ("status", "compare", "cfg"))],
)  # fmt: skip
def test_a_query_whose_reader_has_gone_ends_silently(name: str, project: Project) -> None:
    ended = project.reseed(*project.words(name), reads=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("seeds", "how"),
    [
        ("7", []),
        pytest.param("8,9", ["-m"], marks=AUDIT),
        pytest.param("10", ["runtime=ddp", "runtime.ranks=2"], marks=AUDIT),
        ("11,12", ["-m", "runtime=spread", "runtime.ranks=2"]),
        pytest.param(
            "13,14", ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], marks=AUDIT
        ),
    ],
    ids=["one", "sweep", "ddp", "spread", "joblib"],
)
def test_training_whose_reader_has_gone_finishes(
    seeds: str, how: list[str], project: Project
) -> None:
    line = [*how, *project.tiny, "runtime.progress=true", "runtime.outputs=unread"]
    ended = project.reseed("train", *line, f"seed={seeds}", reads=False)
    assert (ended.returncode, ended.stderr) == (0, b"")
    runs = RunStore(project.folder / "unread").runs()
    for seed in seeds.split(","):
        (run,) = (run for run in runs if f"-seed{seed}-" in run.id)
        assert run.finished


def test_a_shell_pipe_may_end_at_the_first_line(project: Project) -> None:
    words = shlex.join([sys.executable, "-m", "reseed", *project.words("compare")])
    ended = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{words} 2>&1 | head -1"], cwd=project.folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0
    assert ended.stdout.count("\n") == 1
    assert ended.stderr == ""


def latin_1(folder: Path) -> dict[str, str]:
    """Return the environment of a Latin-1 locale; without one, only the streams are Latin-1."""
    place = folder / "locales" / "en_US.ISO-8859-1"
    place.parent.mkdir(exist_ok=True)
    if shutil.which("localedef"):
        made = ["localedef", "-i", "en_US", "-f", "ISO-8859-1", str(place)]
        subprocess.run(made, check=False, capture_output=True)
    if place.is_dir():
        return C | {"LC_ALL": place.name, "LOCPATH": str(place.parent)}
    return C | {"PYTHONIOENCODING": "latin-1"}


@pytest.mark.parametrize(
    ("name", "locale"),
    [
        ("status", "C"),
        ("report", "C"),
        *(pytest.param(name, "C", marks=AUDIT) for name in READERS[1:] if name != "report"),
        ("status", "latin-1"),
    ],
)
def test_every_locale_reads_a_comparison(name: str, locale: str, project: Project) -> None:
    """The files are the same, and the names of the runs appear as far as the encoding has them."""
    environment = C if locale == "C" else latin_1(project.folder)
    ended = project.reseed(*project.words(name), environment=environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    shown = {"C": b"mod?le-?", "latin-1": "modèle-ñ".encode("latin-1")}[locale]
    if name in ("status", "status SWEEP", "show"):
        assert shown in ended.stdout
        assert b"damaged" not in ended.stdout


@pytest.mark.parametrize("locale", ["C", pytest.param("latin-1", marks=AUDIT)])
def test_every_locale_makes_the_same_run(locale: str, project: Project) -> None:
    """Nothing is left to train after a run under another locale, and its record is UTF-8."""
    environment = C if locale == "C" else latin_1(project.folder)
    line = ["train", *project.tiny, "sae=relu", "seed=3", f"runtime.outputs={locale}"]
    ended = project.reseed(*line, environment=environment)
    assert ended.returncode == 0, ended.stderr
    (run,) = RunStore(project.folder / locale).runs()
    assert run.id.startswith("modèle-ñ-")
    assert run.record["experiment"]["dataset"]["path"] == f"{project.folder}/wörter.txt"
    assert b"nothing to train" in project.reseed(*line).stdout


@pytest.mark.parametrize("hard", [64, pytest.param(4096, marks=AUDIT)])
def test_sixty_runs_train_with_a_soft_limit_of_64_files(hard: int, project: Project) -> None:
    """If the system forbids to raise it, nothing is trained, and the message names the remedy."""
    line = [*project.tiny, "training.tokens=256", "seed=range(60)", f"runtime.outputs=limit-{hard}"]
    ended = subprocess.run(
        [sys.executable, "-m", "reseed", "train", "-m", *line], cwd=project.folder, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard)),
        capture_output=True, text=True, env=os.environ | ONE_THREAD,
    )  # fmt: skip
    runs = RunStore(project.folder / f"limit-{hard}").runs()
    if hard == 4096:
        assert ended.returncode == 0, ended.stderr
        assert sum(run.finished for run in runs) == 60
        return
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: a group of 60 runs needs ")
    assert "allows this process 64: raise the limit with `ulimit -n " in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert runs == []
