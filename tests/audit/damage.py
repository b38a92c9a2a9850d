"""``python tests/audit/damage.py``: damage each kind of file, run each command, judge the outcome.

A small project (two compared seeds with evaluations, an interrupted run, caches) is made once. Each
case copies it, damages one file, and runs one command in this process. The outcomes, printed as a
matrix with a row per kind of file and damage:

    N   noticed: the command refuses, or shows the file as damaged, by its name
    R   rebuilt: the command succeeds, and all results are those of the undamaged project
    .   not used: the command succeeds, prints what it prints for the undamaged project, and the
        other files are what they are there
    S   silent: anything else. There must be none.

Words on the command line select the files whose name contains one of them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOBODY = 65534
LINE = ["model=embedded", "dataset=text_files", "dataset.context_length=32",
        "dataset.chunk_tokens=2048", "dataset.held_out_tokens=1024", "sae=topk",
        "sae.num_latents=64", "sae.k=8", "training.batch_size=128", "training.tokens=4096",
        "runtime.progress=false", "runtime.cache=cache", "runtime.threads=1",
        "runtime.activation_cache=activations"]  # fmt: skip
FEW = ["comparison=seeds", "comparison.null_draws=1", "comparison.activation_tokens=512"]
EVALUATIONS = ["evaluation=contexts,faithfulness", "evaluation.tokens=512"]
SEEDS = "seed=0,1"
INTERRUPTED = [*LINE, "seed=5", "training.tokens=16384", "runtime.checkpoint_every_s=0.01"]

FILES = {
    "run.json": "outputs/*-seed0-*/run.json",
    "sae.safetensors": "outputs/*-seed0-*/sae.safetensors",
    "sae.json": "outputs/*-seed0-*/sae.json",
    "latents.safetensors": "outputs/*-seed0-*/latents.safetensors",
    "activations.safetensors": "outputs/*-seed0-*/activations.safetensors",
    "metrics.json": "outputs/*-seed0-*/metrics.json",
    "training.csv": "outputs/*-seed0-*/training.csv",
    "evaluation result.json": "outputs/*-seed0-*/evaluations/contexts-*/result.json",
    "contexts.parquet": "outputs/*-seed0-*/evaluations/contexts-*/contexts.parquet",
    "texts.parquet": "outputs/*-seed0-*/evaluations/contexts-*/texts.parquet",
    "checkpoint.pt": "outputs/*-seed5-*/checkpoint.pt",
    "checkpoint.pt.sha256": "outputs/*-seed5-*/checkpoint.pt.sha256",
    "interrupted run.json": "outputs/*-seed5-*/run.json",
    "manifest.jsonl": "sweeps/seeds-*/manifest.jsonl",
    "comparison.json": "sweeps/seeds-*/comparison.json",
    "evaluations.json": "sweeps/seeds-*/evaluations.json",
    "outputs.json": "sweeps/seeds-*/outputs.json",
    "summary.csv": "sweeps/seeds-*/summary.csv",
    "sweep latents.parquet": "sweeps/seeds-*/latents.parquet",
    "figure": "sweeps/seeds-*/seeds.svg",
    "cell.json": "sweeps/seeds-*/cells/*/cell.json",
    "pairs.parquet": "sweeps/seeds-*/cells/*/pairs.parquet",
    "strata.parquet": "sweeps/seeds-*/cells/*/strata.parquet",
    "cell latents.parquet": "sweeps/seeds-*/cells/*/latents.parquet",
    "tokens store.json": "cache/tokens/*/store.json",
    "train.int32": "cache/tokens/*/train.int32",
    "held_out.int32": "cache/tokens/*/held_out.int32",
    "train-starts.npy": "cache/tokens/*/train-starts.npy",
    "cached activations": "activations/*/000000-*.safetensors",
}


def _flip(path: Path, data: bytes) -> None:
    at = len(data) * 3 // 5
    path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])


def _quiet_flip(path: Path, data: bytes) -> None:
    """Flip a bit as a failing disk does: size and times stay."""
    about = path.stat()
    _flip(path, data)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def _replace_by_folder(path: Path, data: bytes) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, bytes], object]] = {
    "truncated": lambda path, data: path.write_bytes(data[: len(data) // 2]),
    "one bit flipped": _flip,
    "a bit flipped on disk": _quiet_flip,
    "emptied": lambda path, data: path.write_bytes(b""),
    "a folder": _replace_by_folder,
    "unreadable": lambda path, data: path.chmod(0),
}


def commands(project: Path) -> dict[str, Callable[[], object]]:
    """Return what is run on a copy of the project, by name; each runs in the copy."""
    import reseed
    from reseed.cli.main import main

    run = next(p.parent for p in sorted(project.glob("outputs/*-seed0-*/sae.json"))).name
    sweep = next(project.glob("sweeps/seeds-*")).name
    of_runs = [*LINE, f"dataset.path={project.parent / 'text.txt'}"]
    return {
        "train": lambda: main(["train", "-m", *of_runs, SEEDS]),
        "resume": lambda: main(["train", *of_runs, *INTERRUPTED[len(LINE) :]]),
        "run": lambda: main(["run", *FEW, *of_runs, SEEDS, *EVALUATIONS]),
        "compare": lambda: main(["compare", *FEW, *of_runs, SEEDS]),
        "evaluate": lambda: main(["evaluate", sweep, *EVALUATIONS, "runtime.cache=cache"]),
        "report": lambda: main(["report", sweep]),
        "show": lambda: main(["show", run, "3"]),
        "check": lambda: main(["check", "--latents", "3", *FEW, *of_runs, SEEDS]),
        "status": lambda: main(["status"]),
        "status SWEEP": lambda: main(["status", sweep]),
        "status --verify": lambda: main(["status", "--verify"]),
        "push": lambda: main(["push", f"outputs/{run}", "me/sae", "--dry-run", "pushed"]),
        "convert": lambda: main(["convert", f"outputs/{run}", "converted", "--to", "saelens"]),
        "load_run": lambda: print(reseed.load_run(run).metrics["fvu"]),
        "load_sae": lambda: print(reseed.load_sae(f"outputs/{run}").W_dec.sum()),
        "load_sweep": lambda: print(reseed.load_sweep(sweep)),
    }


USED_BY = {"resume": ("checkpoint", "interrupted", "tokens", "int32", "npy", "cached")}
"""Commands that are run only for the files whose name contains one of these words."""


def make_project(root: Path) -> Path:
    """Make the project below ``root``, and return its folder."""
    import random

    project = root / "project"
    project.mkdir(parents=True)
    chosen = random.Random(0)
    words = ("the", "cat", "and", "dog", "sat", "on", "a", "mat", "of", "red", "wool", "again")
    documents = [" ".join(chosen.choices(words, k=chosen.randint(20, 60))) for _ in range(600)]
    (root / "text.txt").write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    here = [f"dataset.path={root / 'text.txt'}"]
    for words_ in (
        ["run", *FEW, *LINE, *here, SEEDS, *EVALUATIONS],
        ["train", *INTERRUPTED, *here],
    ):
        with _at_work(project), _interrupting("seed=5" in words_):
            status, text = _outcome(lambda words_=words_: _main(words_))
        if status != (130 if "seed=5" in words_ else 0):
            raise SystemExit(f"the project cannot be made ({status}):\n{text}")
    return project


def _main(words: Sequence[str]) -> None:
    from reseed.cli.main import main

    main(list(words))


@contextmanager
def _interrupting(wanted: bool) -> Iterator[None]:
    """Let training end like after Ctrl-C, once it has written a few checkpoints."""
    from reseed.train.run_state import RunState

    train = RunState.train
    if wanted:

        def interrupted(self: RunState, *given: Any) -> None:
            if self.step == 20:
                raise KeyboardInterrupt
            train(self, *given)

        RunState.train = interrupted  # type: ignore[method-assign]
    try:
        yield
    finally:
        RunState.train = train  # type: ignore[method-assign]


@contextmanager
def _at_work(folder: Path) -> Iterator[None]:
    """Work in a folder, with few figures and without what the process keeps of earlier copies."""
    from reseed.activations.tokens import _read_store
    from reseed.report.figures import comparison_drawings
    from reseed.study import result

    place, drawings = Path.cwd(), result.figure_drawings
    os.chdir(folder)
    result.figure_drawings = lambda cells, runs: {  # type: ignore[assignment]
        "seeds": comparison_drawings(cells)["seeds"]
    }
    _read_store.cache_clear()
    try:
        yield
    finally:
        os.chdir(place)
        result.figure_drawings = drawings


@contextmanager
def _unprivileged(folder: Path) -> Iterator[None]:
    """Work as a user who cannot read everything, if this process can; the folder becomes theirs."""
    if os.geteuid() != 0:
        yield
        return
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def _outcome(command: Callable[[], object]) -> tuple[int, str]:
    """Run a command, and return its exit status and output."""
    out = io.StringIO()
    status: int = 0
    with redirect_stdout(out), redirect_stderr(out):
        try:
            command()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except KeyboardInterrupt:
            status = 130
        except Exception as error:
            import reseed

            known = isinstance(error, reseed.ReseedError)
            out.write(f"{'error' if known else 'Traceback'}: {type(error).__name__}: {error}\n")
            status = 1
    return status, out.getvalue()


@dataclass(frozen=True)
class Outcome:
    """The exit status and output of a command, and the results after it, by path."""

    status: int
    text: str
    results: dict[str, Any]
    rewritten: bool = False
    """True if the damaged file was written again."""


def run_on_copy(
    project: Path, name: str, path: str = "", damage: Callable[[Path, bytes], object] | None = None
) -> Outcome:
    """Copy the project, damage a file of the copy, run a command in it, and delete it."""
    copy = _copied(project)
    try:
        if damage is not None:
            damage(copy / path, (copy / path).read_bytes())
        damaged = _state(copy / path)
        with _at_work(copy), _unprivileged(copy):
            status, text = _outcome(commands(project)[name])
        rewritten = _state(copy / path) != damaged
        return Outcome(status, _undated(text), results_in(copy), rewritten)
    finally:
        for path in copy.rglob("*"):
            if not path.is_symlink():
                path.chmod(stat.S_IRWXU)
        shutil.rmtree(copy)


def _state(path: Path) -> tuple[int, bytes]:
    if not path.is_file():
        return 0, b""
    return path.stat().st_mode, path.read_bytes()


def _copied(project: Path) -> Path:
    copy = project.parent / "copy"
    if copy.exists():
        shutil.rmtree(copy)
    shutil.copytree(project, copy, symlinks=True)
    return copy


_TIMES = {"started", "ended", "resumed", "seconds", "timings", "environment", "checksum", "files",
          "group"}  # fmt: skip


def results_in(folder: Path) -> dict[str, Any]:
    """Return path → content of the results below a folder, without times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if re.search(r"(^|/)(\.|report|pushed|converted|progress\.json|outputs\.json)", name):
            continue
        if not path.is_file() or not path.stat().st_mode & stat.S_IRUSR:
            found.update({name: None} if not path.is_dir() else {})
            continue
        data = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            try:
                found[name] = [_timeless(json.loads(line)) for line in _parts(data, path.suffix)]
            except ValueError:
                found[name] = data
        elif path.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(data.decode("utf-8", "replace"))))
            found[name] = [_timeless(row) for row in rows]
        else:
            found[name] = data
    return found


def _parts(data: bytes, suffix: str) -> list[bytes]:
    return data.splitlines() if suffix == ".jsonl" else [data]


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if k not in _TIMES}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _undated(text: str) -> str:
    return re.sub(r"\d+\.\d+ s\b|\d[\d,]* tokens/s|\d+:\d\d(:\d\d)?", "TIME", text)


def judge(sound: Outcome, found: Outcome, path: str) -> str:
    """Return the letter of an outcome.

    Args:
        sound: the outcome for the undamaged project.
        path: the damaged file.
    """
    if "Traceback" in found.text or "defect of reseed" in found.text:
        return "S"
    named = Path(path).name in found.text or Path(path).parent.name in found.text
    told = ("damaged", "must be a file", "computed again")
    said = found.status != 0 or any(word in found.text for word in told)
    same = {k: v for k, v in found.results.items() if k != path}
    expected = {k: v for k, v in sound.results.items() if k != path}
    if found.status == sound.status and same == expected:
        if found.rewritten and found.results.get(path) == sound.results.get(path):
            return "R"
        if found.text == sound.text:
            return "."
    return "N" if named and said and "damaged" not in sound.text else "S"


def audit(project: Path, chosen: Sequence[str] = (), sample: int = 1) -> list[tuple[str, ...]]:
    """Return a row per file and damage, with the letter of each command; "" if it was not run.

    Args:
        chosen: words of which a file's name must contain one; by default all files.
        sample: run only every n-th case.
    """
    names = [*commands(project)]
    for name in names:  # imports what it needs, from folders that only root may be able to read
        with _at_work(_copied(project)):
            _outcome(commands(project)[name])
    shutil.rmtree(project.parent / "copy")
    sound: dict[str, Outcome] = {}
    for name in names:
        began = time.monotonic()
        sound[name] = run_on_copy(project, name)
        print(f"{name}: {time.monotonic() - began:.1f} s")
        if sound[name].status:
            raise SystemExit(f"{name} fails on the undamaged project:\n{sound[name].text}")
    rows: list[tuple[str, ...]] = []
    number = 0
    for file, pattern in FILES.items():
        if chosen and not any(word in file for word in chosen):
            continue
        path = min(str(p.relative_to(project)) for p in project.glob(pattern))
        for damage, apply in DAMAGES.items():
            letters = []
            for name in names:
                number += 1
                fits = any(word in file for word in USED_BY.get(name, (file,)))
                if not fits or number % sample:
                    letters.append("")
                    continue
                found = run_on_copy(project, name, path, apply)
                letters.append(judge(sound[name], found, path))
                if letters[-1] == "S":
                    last = found.text.strip()[-600:].replace("\n", "\n        ")
                    print(
                        f"silent: {file}, {damage}, {name} (status {found.status})\n        {last}"
                    )
                    for key in sorted({*found.results} | {*sound[name].results}):
                        if found.results.get(key) != sound[name].results.get(key):
                            print(f"        differs: {key}")
            rows.append((file, damage, *letters))
            print(" ".join(f"{word:<22}" for word in rows[-1][:2]), *map("{:1}".format, letters),
                  flush=True)  # fmt: skip
    return rows


def main() -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        os.environ["RESEED_CACHE"] = str(root / "user-cache")
        project = make_project(root)
        for i, name in enumerate(commands(project)):
            print(f"{'':<46}{' ' * 2 * i}{name}")
        rows = audit(project, sys.argv[1:])
    letters = [letter for row in rows for letter in row[2:]]
    counts = {word: letters.count(letter) for letter, word in
              (("N", "noticed"), ("R", "rebuilt"), (".", "not used"), ("S", "silent"))}  # fmt: skip
    listed = ", ".join(f"{count:,} {word}" for word, count in counts.items())
    print(f"{sum(counts.values()):,} cases in {time.monotonic() - started:,.0f} s: {listed}")
    return 1 if counts["silent"] else 0


if __name__ == "__main__":
    sys.exit(main())
