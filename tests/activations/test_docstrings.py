"""The embedded text, on hand-made sources and on this installation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reseed.activations import docstrings
from reseed.activations.docstring_prose import prose_paragraphs, read_paragraphs, source_docstrings

SOURCE = b'''"""Describe the tools for the harvest of apples."""

import no_such_package_anywhere

NOT_A_DOCSTRING = """Neither is this string of words, for all that it is long."""


class Basket:
    """A basket holds the apples that were picked."""

    def add(self, apple):
        """Put an apple into the basket."""

        def helper():
            """Say what is inside the helper."""

    async def empty(self):
        """Take all the apples out of the basket."""


if True:

    def guarded():
        """Defined under a condition of the module."""


add_newdoc("basket", """Documentation that a call attaches to a built-in.""")
print("""Not documentation, only words that are printed.""")
'''


def test_docstrings_of_module_classes_functions_and_calls_in_source_order() -> None:
    found = [text for text in source_docstrings(SOURCE) if " " in text]
    assert found == [
        "Describe the tools for the harvest of apples.",
        "A basket holds the apples that were picked.",
        "Put an apple into the basket.",
        "Say what is inside the helper.",
        "Take all the apples out of the basket.",
        "Defined under a condition of the module.",
        "Documentation that a call attaches to a built-in.",
    ]


@pytest.mark.parametrize("source", [b"", b"x = 1", b'"""unclosed', b'def f(:\n    """text"""'])
def test_a_source_without_docstrings_or_with_a_syntax_error_gives_none(source: bytes) -> None:
    assert source_docstrings(source) == []


NUMPY_STYLE = """Return the mean of the values along an axis.

    The mean is the sum of the values
    divided by their number.

    Parameters
    ----------
    values : array_like, optional
        The values of which the mean is wanted.
    axis : int or None
        The axis along which it is computed.

    Returns
    -------
    mean : float

    .. versionadded:: 1.2
       The keyword that is named axis.

    .. note::
       The result of an empty input is not a number.

    Examples
    --------
    >>> mean([1, 2, 3])
    the output of the example is here
    2.0

    For instance, this is the code of a call::

        result = the_function(of, the, arguments)

    After the code, `prose` goes on with :func:`~numpy.mean` of it.
    """


def test_numpy_style_keeps_the_prose_and_drops_code_types_and_headings() -> None:
    assert prose_paragraphs(NUMPY_STYLE) == [
        "Return the mean of the values along an axis.",
        "The mean is the sum of the values divided by their number.",
        "The values of which the mean is wanted.",
        "The axis along which it is computed.",
        "The result of an empty input is not a number.",
        "For instance, this is the code of a call:",
        "After the code, prose goes on with numpy.mean of it.",
    ]


GOOGLE_STYLE = """Split a text into the words that it has.

    Args:
        text (`str`, *optional*):
            The text that is to be split.
        limit: The largest number of words to return.

    Returns:
        A list of the words, in their order.

    ```python
    words = split("the text of an example is here")
    ```

    - the first item of a list
    - the second item of a list
    """


def test_google_style_strips_names_fences_and_bullets() -> None:
    assert prose_paragraphs(GOOGLE_STYLE) == [
        "Split a text into the words that it has.",
        "The text that is to be split.",
        "The largest number of words to return.",
        "A list of the words, in their order.",
        "the first item of a list",
        "the second item of a list",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "|  a  |  table of words  |  is it  |",
        "f(x) = a*x**2 + b*x + c, x in [0, 1]; y = 3.14159",
        "Größe und Maß, the German of it",
        "words without grammar stand here",
        "too short a",
    ],
)
def test_text_that_is_not_english_prose_is_dropped(line: str) -> None:
    assert prose_paragraphs(line) == []


def test_paragraphs_that_differ_only_in_names_numbers_and_punctuation_are_kept_once() -> None:
    filler = "This sentence only makes the document as long as a document of the text has to be, "
    kept = docstrings.unique_documents(
        [
            [filler + "first.", "Build a BERT model with 12 layers."],
            [filler + "second.", "Build a GPT-2 model, with 24 layers!"],
            ["Too short to be a document."],
        ]
    )
    assert kept == [
        filler + "first.\nBuild a BERT model with 12 layers.",
        filler + "second.",
    ]


def test_source_files_are_ordered_by_name_without_tests_and_generated_files(tmp_path: Path) -> None:
    names = ["b.py", "a/z.py", "a/tests/t.py", "a/b/c.py", "version.py", "notes.txt", "Z.py"]
    for name in reversed(names):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    found = [file.relative_to(tmp_path).as_posix() for file in docstrings.source_files(tmp_path)]
    assert found == ["Z.py", "a/b/c.py", "a/z.py", "b.py"]


def test_worker_processes_give_the_same_result_as_one_process(tmp_path: Path) -> None:
    files = []
    for i in range(7):
        files.append(tmp_path / f"{i}.py")
        files[-1].write_text(f'"""The text of the file, of which {i} came before."""\n')
    expected = [paragraphs for file in read_paragraphs(map(str, files)) for paragraphs in file]
    assert len(expected) == 7
    assert list(docstrings._read_in_processes(files)) == expected


@pytest.fixture
def tiny_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Replace the list of packages by one package with one documented module."""
    root = tmp_path / "site" / "orchard"
    root.mkdir(parents=True)
    sentence = (
        "The orchard is the place from which the apples of all of the examples come every day."
    )
    (root / "__init__.py").write_text(f'"""{sentence}"""\nraise RuntimeError("imported")\n')
    monkeypatch.syspath_prepend(root.parent)
    monkeypatch.setattr(docstrings, "PACKAGES", {"orchard": "orchard"})
    monkeypatch.setattr(docstrings, "_version", lambda package: "1.0")
    return root


def test_the_cache_is_read_until_a_version_changes(
    tiny_packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    first = docstrings.docstring_documents(cache)
    assert len(first) == 1
    assert first[0].startswith("The orchard")
    assert sorted(file.suffix for file in cache.iterdir()) == [".json", ".sha256"]

    (tiny_packages / "__init__.py").write_text("")
    assert docstrings.docstring_documents(cache) == first
    monkeypatch.setattr(docstrings, "_version", lambda package: "2.0")
    assert docstrings.docstring_documents(cache) == []


@pytest.mark.usefixtures("tiny_packages")
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "PACKAGES", {"no_such_orchard": "no-such-orchard"})
    with pytest.raises(ModuleNotFoundError, match="needs the package `no_such_orchard`"):
        docstrings.docstring_documents(tmp_path)


def test_a_missing_distribution_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "PACKAGES", {"no_such_orchard": "no-such-orchard"})
    with pytest.raises(ModuleNotFoundError, match="distribution `no-such-orchard`"):
        docstrings.docstring_documents(tmp_path)


def test_the_fingerprint_depends_on_the_text_and_the_document_boundaries() -> None:
    fingerprint = docstrings.docstring_fingerprint
    assert fingerprint(["ab", "c"]) == fingerprint(["ab", "c"])
    assert len({fingerprint(d) for d in (["ab", "c"], ["a", "bc"], ["abc"], ["c", "ab"])}) == 4


SCRIPT = """
import json, sys, time
from pathlib import Path
from reseed.activations.docstrings import docstring_documents, docstring_fingerprint
documents = docstring_documents(Path(sys.argv[1]))
start = time.perf_counter()
again = docstring_documents(Path(sys.argv[1]))
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "same": again == documents,
    "fingerprint": docstring_fingerprint(documents),
    "imported": sorted({"torch", "numpy", "transformers", "scipy"} & set(sys.modules)),
}))
"""


@pytest.mark.audit
def test_the_text_of_this_installation_is_large_unique_and_reproducible(tmp_path: Path) -> None:
    # Other tests need them too.
    documents = docstrings.docstring_documents(Path(os.environ["RESEED_CACHE"]))
    assert sum(len(document.encode()) for document in documents) > 10e6
    assert len(set(documents)) == len(documents)
    paragraphs = [paragraph for text in documents for paragraph in text.split("\n")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert all(len(document) >= docstrings.MIN_DOCUMENT_CHARS for document in documents)

    # Another process, with another hash seed and an empty cache, gets the same text.
    source = Path(docstrings.__file__).parents[2]
    other = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "second")],
        env={**os.environ, "PYTHONPATH": str(source), "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    report = json.loads(other.stdout.splitlines()[-1])
    assert report["fingerprint"] == docstrings.docstring_fingerprint(documents)
    assert report["same"]
    assert report["imported"] == []
    assert report["seconds"] < 1
