"""The commands on the command line: help, errors, one run, status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from reseed.cli import compare, run, status, train
from reseed.cli.hydra_app import CommandLine, override, parse
from reseed.cli.main import COMMANDS, main
from reseed.cli.plan import make_plan
from reseed.config import digest
from reseed.sae.topk import TopKConfig
from reseed.store.runs import RESULTS, Run, RunStore
from reseed.study.calibrate import CalibrationError
from reseed.study.train import failure_lines

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def replaced(overrides: list[str], **values: object) -> list[str]:
    """Return the command line with some values changed; None removes a key."""
    keys = {key.replace("__", "."): value for key, value in values.items()}
    kept = [o for o in overrides if o.partition("=")[0] not in keys]
    return kept + [f"{key}={value}" for key, value in keys.items() if value is not None]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"], ["--version"], ["train", "--help"], ["run", "--help"], ["compare", "--help"],
        ["status", "--help"], ["check", "--help"], ["train", "--cfg", "job"],
        ["evaluate", "--help"], ["evaluate", "--cfg", "job", "evaluation=absorption"],
        ["evaluate", "-sc", "query=bash"],
        ["run", "--cfg", "job", "comparison=quickstart"], ["completion", "bash"],
        ["train", "-sc", "query=bash"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_commands_that_only_show_import_nothing_heavy(arguments: list[str]) -> None:
    code = f"""
import sys
from reseed.cli.main import main
try:
    main({arguments!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = {{
    "torch", "lightning", "transformers", "datasets", "pandas", "scipy", "matplotlib", "numba",
}}
print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env=os.environ | {"COMP_LINE": "reseed sae="},
    )  # fmt: skip
    assert found.stdout.splitlines()[-1] == "HEAVY []"


def test_an_interrupted_command_leaves_the_signal_handlers_of_its_caller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "main", interrupted)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as end:
        main(["train"])
    assert end.value.code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in COMMANDS)


def test_an_unknown_command_gets_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["trian"])
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: there is no command `trian`. Did you mean `train`?")


ARCHITECTURES = sorted(p.stem for p in (Path(__file__).parents[2] / "conf" / "sae").glob("*.yaml"))
LISTED = ", ".join(ARCHITECTURES)


def test_completion_lists_commands_and_options() -> None:
    script = f"""
    reseed() {{ {sys.executable} -m reseed "$@"; }}
    eval "$(reseed completion bash)"
    ask() {{
        COMP_LINE="$1"; COMP_WORDS=($1); COMP_CWORD=$2
        _reseed_completion
        echo "${{COMPREPLY[*]}}"
    }}
    ask "reseed tr" 1
    ask "reseed train sae=" 2
    ask "reseed train training=st" 2
    """
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    options = " ".join(f"sae={name}" for name in ARCHITECTURES)
    assert found.stdout.splitlines() == ["train", options, "training=standard"]


CASES = [
    (["sae.k=abc"], "`sae.k` must be an integer, at least 1; got 'abc'"),
    (["sae.kk=3"], "there is no key `sae.kk`. Did you mean `sae.k`?"),
    (["+sae.kk=3"], "there is no key `sae.kk`. Did you mean `sae.k`?"),
    (["sae.k=4096"], "`sae.k` (=4096) must not exceed `num_latents` (=64)"),
    (["layer=99"], "`layer` must be from 0 to 2: tiny-llama has 3 layers; got 99"),
    (["sae=topkk"], f"`sae` has no option `topkk`. Did you mean `topk`? Options: {LISTED}."),
    (["lyer=1"], "there is no key `lyer`. Did you mean `layer`?"),
    (["dataset.path=no.txt"], "`dataset.path` must be an existing file or folder; got no.txt"),
    (["dataset.path=empty.txt"], "`dataset.path`: the text in empty.txt is empty"),
    (["dataset.path=short.txt"], "`training.tokens` (=8,192) must not exceed the activations"),
    (["training.tokens=10000000"], "`training.tokens` (=10,000,000) must not exceed the"),
    (["dataset.held_out_tokens=100000"], "`dataset.held_out_tokens` (=100,000) must not exceed"),
    (["dataset.context_length=999"], "`dataset.context_length` must not exceed the 64 positions"),
    (["training.batch_size=100"], "`training.batch_size` must be a multiple of 8 that divides"),
    (["training.tokens=1"], "`training.tokens` must be at least one batch"),
    (["model.path=nowhere"], "`model.path` must be an existing folder; got nowhere"),
    (["runtime.device=tpu"], "`runtime.device` must be auto, cpu, cuda or cuda:N; got tpu"),
    (["~sae.k"], "`sae.k` is required: do not remove it"),
    (["~layer"], "`layer` is required: do not remove it"),
    (["sae=null"], "the configuration cannot be composed"),
    (["hookpoint=module"], "`hookpoint.module` is required: give it a value"),
    (["hookpoint=module", "hookpoint.module=model.rotary_emb"], "must be one vector per token"),
    (["model.attention=flash_attention_2"], "`model.attention`=flash_attention_2 needs the pack"),
    (["runtime.loggers=[wandb]"], "wandb is not installed (pip install 'reseed[wandb]')"),
    (["dataset.separator=null"], "set dataset.separator to split it"),
    (["runtime.loggers=[papyrus]"], "`runtime.loggers` may contain only tensorboard and wandb"),
]  # fmt: skip


@pytest.mark.parametrize("sweep", [False, True], ids=["one", "sweep"])
@pytest.mark.parametrize(("wrong", "message"), CASES, ids=[" ".join(c[0]) for c in CASES])
def test_bad_input_is_refused_before_anything_is_written(
    tiny_overrides: list[str], wrong: list[str], message: str, sweep: bool,
    capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("the cat sat\n<|endoftext|>\n" * 20)
    before = sorted(tmp_path.iterdir())
    more = ["-m", "seed=0,1"] if sweep else []
    assert train.main([*more, *tiny_overrides, *wrong]) == 1
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert "Traceback" not in said.err
    assert sorted(tmp_path.iterdir()) == before


def test_a_list_of_values_needs_multirun(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*tiny_overrides, "seed=0,1"]) == 1
    assert capsys.readouterr().err == (
        "error: `seed` lists several values: add -m to sweep over them (reseed train -m ...)\n"
    )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([], "`comparison` is required, for example comparison=quickstart"),
        (["comparison=sedes"], "`comparison` has no option `sedes`. Did you mean `seeds`?"),
        (["comparison=seeds", "comparison.pair_by=sed"],
         "`comparison.pair_by` must be an axis of `grid` (seed); got 'sed'. Did you mean `seed`?"),
        (["comparison=seeds", "seed=3"], "must have at least 2 values; got ['3']"),
        (["comparison=seeds", "comparison.threshold=2"],
         "`comparison.threshold` must be a number, above 0 and below 1; got 2"),
    ],
)  # fmt: skip
def test_invalid_comparisons_are_refused(
    tiny_overrides: list[str], wrong: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (run, compare):
        assert command.main([*tiny_overrides, *wrong]) == 1
        assert message in capsys.readouterr().err


def test_a_run_writes_its_files_and_is_trained_once(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(tiny_overrides) == 0
    said = capsys.readouterr().out
    assert "training 1 SAE (topk 64 k=8) on tiny-llama resid_post.1, text words" in said
    (folder,) = Path("outputs").iterdir()
    assert {p.name for p in folder.iterdir()} == {
        ".lock", "run.json", "sae.safetensors", "sae.json", "metrics.json", "training.csv",
        "latents.safetensors", "activations.safetensors",
    }  # fmt: skip
    assert train.main(tiny_overrides) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == ["nothing to train: 1 run already finished", str(folder)]


def test_status_lists_finished_and_damaged_runs(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert status.main([]) == 0
    assert capsys.readouterr().out == "no runs in outputs/\n"
    train.main(["-m", *tiny_overrides, "seed=0,1"])
    (folder, other) = sorted(Path("outputs").iterdir())
    (other / "run.json").write_text("{")
    capsys.readouterr()
    assert status.main([]) == 0
    said = capsys.readouterr().out
    assert folder.name in said.replace("\n", "").replace(" ", "") or folder.name in said
    assert "finished" in said
    assert "damaged" in said


@pytest.fixture
def stored(tmp_path: Path) -> list[str]:
    """Store two runs, the second failed, and three of their calibration; return their names."""
    names = []
    for i, role in enumerate(["", "", "steered", "calibration", "calibration"]):
        identity = {"number": i} | ({"role": role} if role else {})
        last = role or f"seed{i}"
        name = f"a-rather-long-model-name-resid_post.2-text-relu-512-L08-{last}-{digest(identity)}"
        run = Run(tmp_path / "outputs" / name)
        record = {"identity": identity, "tokens": 64_000}
        run.path.mkdir(parents=True)
        run.begin(record)
        if i == 1:
            run.fail(ValueError("no such thing"))
        else:
            for file in RESULTS:
                (run.path / file).touch()
            run.finish({"fvu": 0.25, "l0": 8.0, "dead_fraction": 0.5})
        names.append(name)
    return names


@pytest.mark.parametrize("width", [80, 140])
def test_status_never_wraps_a_name(
    stored: list[str], width: int, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    wanted = Console(width=width, force_terminal=True, highlight=False)
    monkeypatch.setattr("reseed.system.console.console", lambda: wanted)
    assert status.main([]) == 0
    said = capsys.readouterr().out
    assert all(said.count(name) >= 1 for name in stored[:2])
    assert not any(name in said for name in stored[2:])
    assert "+ 3 calibration runs (--all lists them)" in said
    line = "finished · tokens 64,000 · FVU 0.250 · L0 8.0 · dead 50.0%"
    assert (line in said) == (width == 80)
    assert f"{stored[1]}: no such thing" in said
    assert status.main(["--all"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in stored)
    assert "+ 3" not in said


def test_status_counts_calibrations_by_state(
    stored: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (Path("outputs") / stored[4] / "metrics.json").unlink()
    Run(Path("outputs") / stored[3]).update(status="running")
    assert status.main([]) == 0
    said = capsys.readouterr().out
    assert "+ 2 calibration runs: 1 finished, 1 interrupted (--all lists them)" in said
    assert f"{stored[4]}  damaged" in said, "a damaged run is always listed"


def failed(store: RunStore, label: str, seed: int, error: Exception) -> SimpleNamespace:
    """Return a job whose run failed."""
    identity = {"label": label, "seed": seed}
    run = store.run(digest(identity), f"{label}-seed{seed}")
    run.path.mkdir(parents=True)
    run.begin({"identity": identity})
    run.fail(error)
    experiment = SimpleNamespace(seed=seed)
    return SimpleNamespace(resolved=SimpleNamespace(
        label=f"{label}-seed{seed}", experiment=experiment, run=lambda store: run))  # fmt: skip


def test_runs_of_a_cell_with_the_same_error_share_a_line(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "outputs")
    behind = CalibrationError("the calibration failed: a defect")
    behind.__cause__ = ValueError("a defect")
    jobs = [failed(store, "one", seed, CalibrationError("no weight")) for seed in range(3)]
    jobs += [failed(store, "two", 0, CalibrationError("no weight"))]
    jobs += [failed(store, "two", seed, ValueError("a defect")) for seed in (1, 2)]
    jobs += [failed(store, "three", 0, behind)]
    traceback = "  the full traceback is in {}/run.json"
    paths = [job.resolved.run(store).path for job in jobs]
    assert failure_lines([job.resolved for job in jobs], store) == [
        "failed: one (3 seeds): no weight",
        f"failed: {paths[3].name}: no weight",
        "failed: two (2 seeds): a defect",
        traceback.format(paths[4]),
        f"failed: {paths[6].name}: the calibration failed: a defect",
        traceback.format(paths[6]),
    ]


def test_comparing_needs_finished_runs(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["comparison=seeds", *tiny_overrides]
    assert compare.main(line) == 1
    said = capsys.readouterr().err
    assert "none of the 3 runs is finished: `reseed run` with the same arguments trains" in said
    assert not Path("outputs").exists()


def test_config_dir_adds_options(
    tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    own = tmp_path / "own" / "sae"
    own.mkdir(parents=True)
    text = (ROOT / "conf" / "sae" / "topk.yaml").read_text().replace("k: 32", "k: 3")
    (own / "mine.yaml").write_text(text)
    assert train.main(["--config-dir", str(tmp_path / "own"), *tiny_overrides, "sae=mine"]) == 0
    (folder,) = Path("outputs").iterdir()
    assert '"k": 3' in (folder / "run.json").read_text()
    capsys.readouterr()


@pytest.mark.parametrize(
    "head", ["defaults: [/sae/topk@_here_, _self_]\n", "defaults: [topk, _self_]\n"]
)
def test_a_user_option_inherits_from_a_built_in_one(
    head: str, tiny_overrides: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae, comparison = tmp_path / "own" / "sae", tmp_path / "own" / "comparison"
    sae.mkdir(parents=True)
    (sae / "mine.yaml").write_text(head + "multi_topk: true\n")
    comparison.mkdir()
    ours = (ROOT / "conf" / "comparison" / "memory_of_init.yaml").read_text()
    (comparison / "copy.yaml").write_text(ours.replace("name: memory_of_init", "name: copy"))
    own = ["--config-dir", str(tmp_path / "own")]
    plan = make_plan(CommandLine("run", [*own, "comparison=copy", *tiny_overrides, "sae=mine"]))
    assert plan.settings.name == "copy"
    saes = {job.resolved.experiment.sae for job in plan.jobs}
    assert saes == {TopKConfig(num_latents=64, target_l0=8, multi_topk=True)}
    assert [len(launch.jobs) for launch in plan.launches] == [5, 5, 5]
    assert train.main([*own, "sae=relu", "sae.multi_topk=true"]) == 1
    assert (
        "sae=relu has no key `sae.multi_topk`. Options with it: sae=mine, topk."
        in capsys.readouterr().err
    )


def test_completion_supports_bash_and_zsh_only(capsys: pytest.CaptureFixture[str]) -> None:
    for shell, code in (("zsh", 0), ("fish", 2)):
        with pytest.raises(SystemExit) as end:
            main(["completion", shell])
        assert end.value.code == code
    assert "bashcompinit" in capsys.readouterr().out


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "x=y",
        "a,b",
        "it's",
        "[1]",
        "/ü b/c=d",
        "a\\b",
        "{layer}",
        "plain",
        "1e-3",
        "end\\",
        "\\'",
        "\\\\'x",
        '{"a": "it\'s \\\\ here\\\\"}',
    ],
)
def test_any_value_reaches_hydra_unchanged(value: str) -> None:
    (parsed,) = parse([override("some.key", value)])
    assert not parsed.is_sweep_override()
    assert str(parsed.value()) in (value, str(float(value)) if value == "1e-3" else value)


def test_sigterm_outside_training_ends_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints a message and exits with status 143."""
    import os
    import signal

    from reseed.cli.errors import run_and_report

    before = signal.getsignal(signal.SIGTERM)
    assert run_and_report(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 143
    assert "stopped by SIGTERM; saved results are kept" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
