"""Fixtures: a random language model of a few thousand weights, a text, and the real data."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tiny_tokenizer import WORDS, save_tokenizer

EXTEND = Path(__file__).parents[1] / "docs" / "extend"


def pytest_configure() -> None:
    """Restore Ctrl-C in this process and its children.

    A shell starts background jobs with SIGINT ignored, and children inherit that.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    """Fail a test that leaves other signal handlers: a later one may send the signal."""
    both = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in both]
    yield
    after = [signal.getsignal(number) for number in both]
    if after != before:
        for number, handler in zip(both, before, strict=True):
            signal.signal(number, handler)
    assert after == before, "the test left other signal handlers"


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Point the cache to a temporary folder, so that tests do not use the user's.

    Test processes share it: reading the docstrings of all packages takes half a minute.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["RESEED_CACHE"] = str(folder / "cache")


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Return the folder with real models and text; skip the test without it."""
    folder = os.environ.get("RESEED_TEST_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real models and text: set RESEED_TEST_DATA to their folder")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a random 3-layer Llama of width 16 and a word tokenizer with a BOS token in a folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    save_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 2,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 1,500 documents of random words, about 45,000 tokens."""
    chosen = random.Random(0)
    documents = [" ".join(chosen.choices(WORDS, k=chosen.randint(5, 55))) for _ in range(1_500)]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="session")
def tiny_overrides(tiny_model: Path, tiny_text: Path) -> list[str]:
    """Return a command line that trains in a second."""
    return [
        "model=path",
        f"model.path={tiny_model}",
        "dataset=text_files",
        f"dataset.path={tiny_text}",
        "dataset.context_length=32",
        "dataset.chunk_tokens=2048",
        "dataset.held_out_tokens=1024",
        "layer=1",
        "sae.num_latents=64",
        "training.tokens=8192",
        "training.batch_size=64",
        "runtime.progress=false",
        "runtime.log_every_steps=10",
    ]


@pytest.fixture
def sign(tmp_path: Path) -> Iterator[Path]:
    """Give the folder that an executed `Payload` makes; assert that it does not exist."""
    sign = tmp_path / "executed"
    yield sign
    assert not sign.exists(), "the payload was executed"


class MadeUpPackage:
    """A package of a user: files in a folder, and the metadata that an installation writes.

    Args:
        folder: the folder of the package, in which commands run, too.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write_page(self, name: str, installed: bool = True) -> None:
        """Write the package that a page in docs/extend describes.

        Its files are the code blocks below a line that has only the file's name, its entry points
        are those of the toml block.

        Args:
            installed: whether the package has entry points.
        """
        page = (EXTEND / name).read_text(encoding="utf-8")
        blocks = re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        found = re.search(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
        assert blocks, f"{name} has no files"
        assert found is not None, f"{name} has no entry points"
        groups = tomllib.loads(found[1])["project"]["entry-points"] if installed else {}
        lines = {
            group: "\n".join(f"{name} = {value}" for name, value in entries.items())
            for group, entries in groups.items()
        }
        self.write(dict(blocks), lines)

    def write(self, files: Mapping[str, str], entry_points: Mapping[str, str]) -> None:
        """Write the package.

        Args:
            files: path within the folder → content.
            entry_points: group → the lines of its entry points.
        """
        about = self.folder / "made_up-1.0.dist-info"
        metadata = "Metadata-Version: 2.1\nName: made-up\nVersion: 1.0\n"
        groups = "\n".join(f"[{group}]\n{line}\n" for group, line in entry_points.items())
        for path, text in files.items():
            (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / path).write_text(text)
        about.mkdir(exist_ok=True)
        (about / "METADATA").write_text(metadata)
        (about / "entry_points.txt").write_text(groups)

    def reseed(self, *words: str, succeeds: bool = True) -> str:
        """Run a command of reseed, as `python`."""
        return self.python("-m", "reseed", *words, succeeds=succeeds)

    def python(self, *words: str, succeeds: bool = True) -> str:
        """Run an interpreter that finds the package, and return its output."""
        # Prepended, because the tested package itself may be found through PYTHONPATH.
        path = os.pathsep.join(filter(None, (str(self.folder), os.environ.get("PYTHONPATH"))))
        found = subprocess.run(
            [sys.executable, *words],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (found.returncode == 0) == succeeds, found.stdout + found.stderr
        return found.stdout + found.stderr


@pytest.fixture
def made_up_package(tmp_path: Path) -> MadeUpPackage:
    return MadeUpPackage(tmp_path)
