"""The embedded text: the docstrings of the packages that every installation of reseed has.

It has a few megabytes of English and needs no network. The sources of a fixed list of dependencies
are parsed (never imported), their docstrings are reduced to prose, and duplicate paragraphs are
dropped. This module needs no package outside the standard library.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from reseed.activations import docstring_prose
from reseed.system.console import say
from reseed.system.integrity import is_intact, write_checked

EXTRACTOR_VERSION = 1
"""Increase it with every change that alters the documents: it is part of the cache file's name."""

STANDARD_LIBRARY = "python"

PACKAGES: dict[str, str] = {
    STANDARD_LIBRARY: STANDARD_LIBRARY,
    "numpy": "numpy",
    "scipy": "scipy",
    "pandas": "pandas",
    "matplotlib": "matplotlib",
    "sympy": "sympy",
    "mpmath": "mpmath",
    "networkx": "networkx",
    "torch": "torch",
    "torchmetrics": "torchmetrics",
    "lightning": "lightning",
    "transformers": "transformers",
    "datasets": "datasets",
    "huggingface_hub": "huggingface-hub",
    "safetensors": "safetensors",
    "pyarrow": "pyarrow",
    "fsspec": "fsspec",
    "aiohttp": "aiohttp",
    "jaxtyping": "jaxtyping",
    "hydra": "hydra-core",
    "omegaconf": "omegaconf",
    "rich": "rich",
    "jinja2": "Jinja2",
    "PIL": "pillow",
    "fontTools": "fonttools",
    "dateutil": "python-dateutil",
    "packaging": "packaging",
    "tqdm": "tqdm",
}
"""Import name → distribution name, in the order of the text. A paragraph that two packages share
appears only in the first. All are hard dependencies of reseed, or of its dependencies."""

MIN_DOCUMENT_CHARS = 80

_SKIPPED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "testing",
        "_testing",
        "benchmarks",
        "__pycache__",
        "_vendor",
        "vendor",
        "vendored",
        "externals",
        "extern",
        "site-packages",
        "dist-packages",
        "idlelib",
        "lib2to3",
        "tkinter",
        "turtledemo",
        "ensurepip",
        "pydoc_data",
        "encodings",
    }
)
# Generated at installation, or different between the wheels of two platforms.
_SKIPPED_FILES = frozenset({"__config__.py", "version.py", "_version.py", "__about__.py"})
# Transformers: a fifth of all sources; nearly all of its prose is in the configurations.
_SKIPPED_PREFIXES = ("modeling_", "modular_", "convert_")
_LOWER_WORD = re.compile(r"\b[a-z]+\b")


def docstring_documents(cache_dir: Path) -> list[str]:
    """Return the embedded text: one document per docstring, paragraphs separated by a newline.

    The same installation gives the same list, in the same order. The first call parses all
    sources (about 15 s) and stores the result in `cache_dir`; later calls read that file.

    Raises:
        ModuleNotFoundError: if a package of `PACKAGES` is not installed.
    """
    path = cache_dir / f"docstrings-{_installation_digest()}.json"
    if is_intact(path):
        return json.loads(path.read_text(encoding="utf-8"))
    say("reading the docstrings of the installed packages (once, about half a minute)")
    files = [file for package in PACKAGES for file in source_files(package_root(package))]
    documents = unique_documents(_read_in_processes(files))
    data = json.dumps(documents).encode()
    write_checked(path, lambda temporary: temporary.write_bytes(data))
    return documents


def docstring_fingerprint(documents: Iterable[str]) -> str:
    """Return the SHA-256 (hex) of the documents and their boundaries."""
    digest = hashlib.sha256()
    for document in documents:
        encoded = document.encode()
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.hexdigest()


def _installation_digest() -> str:
    """Return 16 hex characters that depend on the extractor's and all packages' versions."""
    versions = {name: _version(name) for name in PACKAGES}
    record = json.dumps([EXTRACTOR_VERSION, versions])
    return hashlib.sha256(record.encode()).hexdigest()[:16]


def _version(package: str) -> str:
    if package == STANDARD_LIBRARY:
        return sys.version.split()[0]
    try:
        return importlib.metadata.version(PACKAGES[package])
    except importlib.metadata.PackageNotFoundError:
        raise _not_installed(package) from None


def _not_installed(package: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(
        f"the embedded text needs the package `{package}` (distribution `{PACKAGES[package]}`), "
        "a dependency of reseed that is not installed here; install it, or set `dataset` to a "
        "text of your own",
        name=package,
    )


def package_root(package: str) -> Path:
    """Return the folder of a package's sources without importing the package.

    Raises:
        ModuleNotFoundError: if the package is not installed, or is not a folder of sources.
    """
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise _not_installed(package)
    return Path(spec.submodule_search_locations[0])


def source_files(root: Path) -> list[Path]:
    """Return the Python files below `root` except tests, sorted by name."""
    found: list[tuple[str, ...]] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        parts = Path(folder).relative_to(root).parts
        found.extend((*parts, name) for name in names if _is_kept(name))
    return [root.joinpath(*parts) for parts in sorted(found)]


def _is_kept(name: str) -> bool:
    is_source = name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES)
    return is_source and name not in _SKIPPED_FILES


def unique_documents(docstrings: Iterable[list[str]]) -> list[str]:
    """Return a document per docstring (its paragraphs), without repeated paragraphs.

    Two paragraphs count as the same if their lower-case words agree, so that copies may differ in
    the name of a class, in a number or in punctuation. Documents left with fewer than
    `MIN_DOCUMENT_CHARS` are dropped.
    """
    seen: set[str] = set()
    documents = []
    for paragraphs in docstrings:
        kept = []
        for paragraph in paragraphs:
            key = " ".join(_LOWER_WORD.findall(paragraph)) or paragraph
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        document = "\n".join(kept)
        if len(document) >= MIN_DOCUMENT_CHARS:
            documents.append(document)
    return documents


def _read_in_processes(files: list[Path]) -> Iterator[list[str]]:
    """Yield the paragraphs of every docstring, in the order of the files.

    The workers run `docstring_prose.py` as a script. Unlike multiprocessing, this neither forks a
    process that may have threads nor imports the caller's main module again.
    """
    num_workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2, 8)
    names = [str(file) for file in files]
    workers = []
    for rank in range(num_workers):
        worker = subprocess.Popen(
            [sys.executable, "-I", "-X", "utf8", docstring_prose.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(names[rank::num_workers]))
        worker.stdin.close()
        workers.append(worker)
    per_file: list[list[list[str]]] = [[] for _ in names]
    for rank, worker in enumerate(workers):
        assert worker.stdout is not None
        output = worker.stdout.read()
        if worker.wait() != 0:
            raise RuntimeError(
                f"a worker that reads docstrings ended with status {worker.returncode}"
            )
        per_file[rank::num_workers] = json.loads(output)
    for docstrings in per_file:
        yield from docstrings
