"""Reading a file never executes code from it: the tests plant payloads that make a folder."""

from __future__ import annotations

import ast
import io
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import reseed
from payload import Payload
from reseed.cli import train
from reseed.compare.dictionary import initial_sae
from reseed.compare.matching import MatchingCache
from reseed.sae.checkpoint import CheckpointError
from reseed.store.runs import Run, RunError, RunStore
from reseed.system.integrity import (
    DamagedFileError,
    describe_files,
    read_record,
    sha256_of,
    write_record,
)


@pytest.fixture
def line(tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    return [*tiny_overrides, "runtime.cache=cache", "training.tokens=1024"]


@pytest.fixture(scope="module")
def trained(tiny_overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run and return its folder."""
    outputs = tmp_path_factory.mktemp("safe") / "outputs"
    assert train.main([*tiny_overrides, "training.tokens=512", f"runtime.outputs={outputs}"]) == 0
    (found,) = RunStore(outputs).runs()
    return found.path


def forge(folder: Path) -> None:
    """Make all checksums in a folder fit its files, as its owner can."""
    for path in folder.glob("*.sha256"):
        path.write_text(sha256_of(path.with_suffix("")))
    for name in ("sae.json", "run.json", "store.json"):
        if (folder / name).is_file():
            record = read_record(folder / name)
            if "weights_sha256" in record:
                record["weights_sha256"] = sha256_of(folder / "sae.safetensors")
            if "files" in record:
                record["files"] = describe_files(folder, record["files"], times=True)
            write_record(folder / name, record)


def plain(sign: Path) -> bytes:
    return pickle.dumps(Payload(sign))


def saved_by_torch(sign: Path) -> bytes:
    data = io.BytesIO()
    torch.save({"step": Payload(sign)}, data)
    return data.getvalue()


def old_torch(sign: Path) -> bytes:
    data = io.BytesIO()
    torch.save({"step": Payload(sign)}, data, _use_new_zipfile_serialization=False)
    return data.getvalue()


def numpy_object(sign: Path) -> bytes:
    data = io.BytesIO()
    np.save(data, np.array([Payload(sign)], dtype=object), allow_pickle=True)
    return data.getvalue()


def test_the_payloads_work(sign: Path) -> None:
    """Without this the tests below would show nothing."""
    for read in (
        lambda: pickle.loads(plain(sign)),
        lambda: torch.load(io.BytesIO(saved_by_torch(sign)), weights_only=False),
        lambda: torch.load(io.BytesIO(old_torch(sign)), weights_only=False),
        lambda: np.load(io.BytesIO(numpy_object(sign)), allow_pickle=True),
    ):
        read()
        sign.rmdir()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("payload", [plain, saved_by_torch, old_torch])
def test_a_payload_in_a_checkpoint_is_not_executed(
    trained: Path,
    line: list[str],
    sign: Path,
    payload: Callable[[Path], bytes],
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Run(Path("outputs") / trained.name)
    shutil.copytree(trained, found.path)
    (found.path / "metrics.json").unlink()  # so that the run resumes from its checkpoint
    (found.path / "checkpoint.pt").write_bytes(payload(sign))
    assert train.main([*line, "training.tokens=512"]) == 1
    assert "checkpoint.pt cannot be read" in capsys.readouterr().out
    assert found.status == "failed"


@pytest.mark.parametrize("payload", [plain, saved_by_torch])
def test_payloads_in_a_run_folder_are_not_executed(
    trained: Path, tmp_path: Path, sign: Path, payload: Callable[[Path], bytes]
) -> None:
    path = tmp_path / trained.name
    shutil.copytree(trained, path)
    found = reseed.load_run(path)
    for name, error, read in (
        ("sae.safetensors", CheckpointError, lambda: reseed.load_sae(path)),
        ("latents.safetensors", DamagedFileError, found.latents),
        ("activations.safetensors", DamagedFileError, found.activations),
        ("initial.safetensors", DamagedFileError, lambda: initial_sae(found)),
    ):
        (path / name).write_bytes(payload(sign))
        forge(path)
        with pytest.raises(error, match=rf"{name} (cannot|is damaged: it cannot) be read"):
            read()
    (path / "run.json").write_bytes(payload(sign))
    with pytest.raises(RunError, match=r"run\.json is damaged"):
        reseed.load_run(path)


def test_a_class_named_in_a_record_is_not_imported(
    trained: Path, sign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted.py").write_text(f"import os\nos.mkdir({str(sign)!r})\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / trained.name
    shutil.copytree(trained, path)
    description = read_record(path / "sae.json")
    write_record(path / "sae.json", description | {"type": "planted.Thing"})
    forge(path)
    with pytest.raises(CheckpointError, match=r"planted\.Thing"):
        reseed.load_sae(path)


def test_a_payload_in_the_cache_of_tokens_is_not_executed(
    line: list[str], sign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from reseed.activations.tokens import _read_store

    assert train.main([*line, "training.tokens=64"]) == 0
    _read_store.cache_clear()  # as in a new process
    for starts in Path("cache").glob("tokens/*/train-starts.npy"):
        starts.write_bytes(numpy_object(sign))
        forge(starts.parent)
    assert train.main([*line, "seed=1"]) == 1
    assert "cannot read the stored tokens" in capsys.readouterr().err


@pytest.mark.parametrize("payload", [plain, saved_by_torch])
def test_a_payload_in_the_store_of_matchings_is_not_executed(
    tmp_path: Path, sign: Path, payload: Callable[[Path], bytes]
) -> None:
    """The store recomputes a matching that it cannot read."""
    store = MatchingCache(tmp_path / "matchings", least=1)
    a, b = np.random.default_rng(0).normal(size=(2, 8, 4))
    made = store(a, b)
    (path,) = store.folder.glob("*.safetensors")
    path.write_bytes(payload(sign))
    forge(store.folder)
    assert np.array_equal(store(a, b).assignment, made.assignment)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_pickled_weights_of_a_language_model_are_refused(
    line: list[str], tiny_model: Path, tmp_path: Path, sign: Path, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """They are refused under their own name and under that of a safetensors file."""
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_model, folder)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(saved_by_torch(sign))
    assert train.main([*line, f"model.path={folder}"]) == 1
    said = capsys.readouterr().err
    assert ("must hold weights as *.safetensors" if name.endswith("bin") else "is damaged") in said


@pytest.mark.parametrize("known", [True, False])
def test_python_files_of_a_language_model_are_not_executed(
    line: list[str], tiny_model: Path, tmp_path: Path, sign: Path, known: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """They are ignored for a known architecture; a model that needs them is refused."""
    folder = tmp_path / "foreign"
    shutil.copytree(tiny_model, folder)
    planted = f"import os\nos.mkdir({str(sign)!r})\nclass C:\n    pass\n"
    (folder / "planted.py").write_text(planted)
    config = json.loads((folder / "config.json").read_text())
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    config["auto_map"] = dict.fromkeys(names, "planted.C")
    config["model_type"] = config["model_type"] if known else "planted"
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["auto_map"] = {"AutoTokenizer": ["planted.C", "planted.C"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    status = train.main([*line, f"model.path={folder}"])
    said = capsys.readouterr()
    assert status == (0 if known else 1), said
    if not known:
        assert "needs python code of its own, which reseed does not run" in said.err


SOURCE = Path(reseed.__file__).parents[1]
EXECUTES = {
    "eval", "exec", "compile", "__import__", "os.system", "read_pickle", "to_pickle",
    "unsafe_load", "full_load", "broadcast_object_list", "all_gather_object", "gather_object",
    "scatter_object_list", "send_object_list", "recv_object_list",
}  # fmt: skip
"""Functions that execute, or read pickles, whatever their arguments."""
PICKLERS = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
SAFE_ONLY_WITH = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
}
NEVER = {"trust_remote_code": True, "shell": True, "allow_pickle": True, "weights_only": False}


def executing(tree: ast.AST) -> Iterator[str]:
    """Yield the calls and imports of a module that could execute what it reads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ({alias.name.partition(".")[0] for alias in node.names} & PICKLERS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLERS:
            names = {alias.name for alias in node.names} - {"UnpicklingError"}
            yield from (f"{node.module}.{name}" for name in names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {
                k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)
            }
            name, value = SAFE_ONLY_WITH.get(called, ("", None))
            known = called in EXECUTES or called.rpartition(".")[2] in EXECUTES - {
                "compile",
                "eval",
            }
            if known or (name and given.get(name) is not value) or called == "yaml.load":
                yield f"{called}, line {node.lineno}"
            yield from (f"{k}={v}" for k, v in NEVER.items() if given.get(k, not v) is v)


def test_no_module_executes_what_it_reads() -> None:
    paths = [path for folder in SOURCE.iterdir() for path in folder.rglob("*.py")]
    found = {p.relative_to(SOURCE): [*executing(ast.parse(p.read_text()))] for p in paths}
    assert {path: calls for path, calls in found.items() if calls} == {}
    assert len(found) > 200


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import numpy, cloudpickle", "eval('1')",
        "torch.load(path)", "torch.load(path, weights_only=False)", "np.load(path)", "yaml.load(x)",
        "dist.all_gather_object(a, b)", "f(trust_remote_code=True)", "pd.read_pickle(path)",
    ],
)  # fmt: skip
def test_the_check_of_modules_finds_what_executes(line: str) -> None:
    assert len(list(executing(ast.parse(line)))) >= 1
    assert list(executing(ast.parse("torch.load(p, weights_only=True); model.eval()"))) == []
