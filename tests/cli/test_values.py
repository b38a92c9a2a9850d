"""Values of overrides: quoting, folders named like numbers, long names, sizes, folders."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from reseed.cli import compare, train
from reseed.cli.hydra_app import CommandLine, override, parse
from reseed.cli.plan import plan_runs
from reseed.errors import ConfigError, ReseedError
from reseed.sae.checkpoint import save_sae
from reseed.sae.topk import TopKConfig
from reseed.store.runs import RunStore
from reseed.store.sweeps import Sweep
from reseed.study import train as study_train
from reseed.system.devices import total_memory
from reseed.system.environment import derived_data, derived_folder
from reseed.system.files import shorten, user_path

WORLD = ["model=world_easy", "sae.num_latents=64", "training.tokens=4096", "runtime.threads=1",
         "training.batch_size=64", "runtime.progress=false"]  # fmt: skip
LIKE_OTHERS = [
    "10", "20240101", "1e3", "007", "null", "true", "NaN", "-inf", "1_0", "[a]", "{a: 1}", "", " ",
    "a,b", "a b", "${seed}", "it's", 'a "b"', "\\", "a\\", "\\'", "a=b", "é", "~", "C:\\x\\", "+1",
    "0x1", "???", "choice(1)", "a\tb", "x\ny",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_hydra_reads_a_quoted_string_as_the_same_string() -> None:
    chosen = random.Random(0)
    letters = "0123456789.eE+-_nulltruefaisd'\"\\ ,:=[]{}()$%@?é漢\t/~#!&*"
    drawn = ["".join(chosen.choices(letters, k=chosen.randint(1, 9))) for _ in range(1_500)]
    parser = OverridesParser.create()
    for text in [*LIKE_OTHERS, *drawn]:
        assert parser.parse_override(override("key", text)).value() == text, text
    for value in (10, 1.5, True):
        assert parser.parse_override(override("key", value)).value() == value


def saved(folder: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    save_sae(TopKConfig(num_latents=16, k=4).build(64, generator), folder)


def test_sources_are_the_words_of_the_command_line() -> None:
    text = """sources=[10, 007,1e3,'a,b',"c 'd", null,true ,e]"""
    (parsed,) = parse([text])
    words = ["10", "007", "1e3", "a,b", "c 'd", "null", "true", "e"]
    assert compare._listed(parsed, text) == words
    assert compare._checked([words]) == words
    for wrong in ([[["a"], "b"]], [["a", " "]], [["a", "a"]], [["a"]], ["a"]):
        with pytest.raises(ConfigError, match="`sources`"):
            compare._checked(wrong)


@pytest.mark.slow
def test_folders_named_like_numbers_are_sources() -> None:
    names = ["10", "20240101", "1e3", "007", "true", "1_0"]
    for seed, name in enumerate(names):
        saved(name, seed)
    assert compare.main([f"sources=[{', '.join(names)}]", "runtime.threads=1"]) == 0
    (pairs,) = Path("sweeps").glob("sources-*/pairs.csv")
    read = pd.read_csv(pairs, dtype=str, keep_default_na=False)
    assert set(read["source_a"]) | set(read["source_b"]) == set(names)


@pytest.mark.slow
def test_folders_named_like_numbers_are_measured_on_activations(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed, name in enumerate(["10", "20240101"]):
        saved(name, seed)
    line = ["model=world_easy", "dataset.held_out_tokens=2048", "dataset.chunk_tokens=2048"]
    assert compare.main(["sources=[10,20240101]", *line, "runtime.threads=1"]) == 0
    assert len(RunStore("outputs").runs()) == 2
    capsys.readouterr()


@pytest.mark.parametrize(
    "stem",
    ["漢" * 80, *(pytest.param(s, marks=pytest.mark.slow) for s in ("a" * 240, "ä" * 110))],
    ids=["3 bytes", "1 byte", "2 bytes"],
)
def test_a_text_with_a_long_name_trains(
    stem: str, tiny_overrides: list[str], tmp_path: Path, tiny_text: Path
) -> None:
    text = tmp_path / f"{stem}.txt"
    text.write_bytes(tiny_text.read_bytes())
    line = [o for o in tiny_overrides if not o.startswith("dataset.path")]
    line += [f"dataset.path='{text}'", "runtime.activation_cache=cache", "runtime.threads=1"]
    assert train.main(line) == 0
    (run,) = RunStore("outputs").runs()
    assert run.finished
    assert run.id.startswith("tiny-llama-resid_post.1-")
    assert "-seed0-" in run.id
    short = [o for o in tiny_overrides if not o.startswith("dataset.path")]
    assert train.main([*short, f"dataset.path={tiny_text}", "runtime.threads=1"]) == 0
    assert RunStore("outputs").runs() == [run]  # the same signature, so the same run


def test_names_are_shortened_in_whole_characters() -> None:
    for name in ("a" * 300, "ä" * 300, "漢" * 300, "a" + "😀" * 300, "short"):
        found = shorten(name)
        assert name.startswith(found)
        assert len(found.encode()) <= 180
        assert len(found.encode()) > 176 or found == name
    folder = Sweep(Path("x")).cell_folder({"dataset.path": "漢" * 300})
    assert len(folder.name.encode()) < 220
    # The names of earlier versions stay.
    assert Sweep(Path("x")).cell_folder({"sae": "topk"}).name == "sae=topk"


def test_a_run_that_can_never_fit_is_refused_before_anything_is_written(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = [o for o in WORLD if "num_latents" not in o]
    assert train.main(["-m", *line, "sae.num_latents=64,1000000000000", "seed=0,1"]) == 1
    told = capsys.readouterr().err
    # 2 F D parameters of 4 bytes, each with a gradient, two moments of Adam and a copy:
    # 5 x 2 x 1e12 x 64 x 4 bytes are 2,328.3 TiB; b_enc, states and chunks are below 0.1%.
    assert "needs about 2328.3 TiB of memory (1,000,000,000,000 latents of width 64" in told
    assert "Lower sae.num_latents" in told
    assert not Path("outputs").exists()
    assert not Path("sweeps").exists()


def test_memory_gib_replaces_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_train, "total_memory", lambda device: 1)
    plan = plan_runs(CommandLine("train", WORLD))
    with pytest.raises(ConfigError, match="this machine has 0 KiB"):
        study_train.check_size(plan.experiments, plan.runtime)
    plan = plan_runs(CommandLine("train", [*WORLD, "runtime.memory_gib=8"]))
    study_train.check_size(plan.experiments, plan.runtime)


def test_the_memory_of_a_machine_is_at_least_what_is_free() -> None:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert total_memory(torch.device("cpu")) > min(free, 2**28)


def test_a_budget_of_centuries_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    line = [o for o in WORLD if "tokens" not in o]
    assert train.main([*line, "training.tokens=1e18"]) == 1
    assert "would take about" in capsys.readouterr().err


def test_a_folder_of_derived_data_that_cannot_be_used_is_named(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("/proc/nosuch", "/dev/null"):
        assert train.main([*tiny_overrides, f"runtime.cache={folder}"]) == 1
        told = capsys.readouterr().err
        assert told.count("\n") == 1
        assert f"`runtime.cache`: the folder of derived data, {folder}, cannot be used" in told
        assert "Set it, or RESEED_CACHE, to a folder that can be written" in told


def test_errors_elsewhere_are_not_blamed_on_the_folder_of_derived_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), derived_data(tmp_path / "cache"):
        (tmp_path / "other").read_text()
    with pytest.raises(ConfigError, match=r"runtime\.cache"), derived_data(tmp_path / "cache"):
        (tmp_path / "cache" / "tokens").read_text()


def test_an_unknown_home_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "expanduser", lambda path: (_ for _ in ()).throw(RuntimeError()))
    monkeypatch.delenv("RESEED_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(ConfigError, match=r"`runtime\.cache` is needed.*or RESEED_CACHE"):
        derived_folder(None)
    with pytest.raises(ReseedError, match="name the folder without ~, or set HOME"):
        user_path("~nosuch/x")


@pytest.mark.slow
def test_a_user_without_home_and_passwd_entry_is_told_in_one_line(tmp_path: Path) -> None:
    code = """
import pwd
def unknown(*given):
    raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = unknown
from reseed.cli.main import main
main()
"""
    left = {k: v for k, v in os.environ.items() if k not in ("HOME", "USER", "RESEED_CACHE")}
    words = [sys.executable, "-c", code, "train", "model=embedded", "runtime.threads=1"]
    found = subprocess.run(words, env=left, capture_output=True, text=True, check=False)
    assert found.returncode == 1
    (line,) = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: `runtime.cache` is needed, because the home folder of ~/.cache/")
    assert "RESEED_CACHE" in line
    assert "Traceback" not in found.stderr


def test_more_processes_than_cpus_get_a_warning_and_many_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_train, "cpus", lambda: 1)
    monkeypatch.setattr(study_train, "make_plan", lambda *given: 1 / 0)
    line = [*WORLD, "runtime=spread", "runtime.device=cpu"]
    with pytest.raises(ZeroDivisionError):
        study_train.train_missing([], train_runtime(2))
    assert "warning: runtime.ranks=2 is more than the 1 CPUs" in capsys.readouterr().out
    assert train.main([*line, "runtime.ranks=65"]) == 1
    assert "`runtime.ranks` must be an integer or null, at least 1 and at most 64; got 65" in (
        capsys.readouterr().err
    )


def train_runtime(ranks: int) -> study_train.RuntimeConfig:
    return study_train.RuntimeConfig(strategy="spread", ranks=ranks, device="cpu", tflops=1.0)


def test_settings_of_a_launcher_that_is_not_chosen_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for text in ("hydra.launcher._target_=x", "++hydra.launcher.n_jobs=2"):
        assert train.main(["-m", *WORLD, text]) == 1
        assert "has no effect: choose a launcher by hydra/launcher=..." in capsys.readouterr().err


def test_a_malformed_override_is_shown_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main([*WORLD, "sae.k=[1,2"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: sae.k=[1,2: ")
    assert told.count("\n") == 1


def test_a_sweep_of_too_many_or_no_jobs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["-m", *WORLD, "seed=range(1e9)"]) == 1
    assert "a sweep has at most 100,000" in capsys.readouterr().err
    assert train.main(["-m", *WORLD, "seed=range(0,0)"]) == 1
    assert "`seed` lists no values" in capsys.readouterr().err
