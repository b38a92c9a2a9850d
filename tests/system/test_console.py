"""Output ends no command: its reader may leave, and every encoding can show it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from reseed.system.console import Stream

HELP = [sys.executable, "-m", "reseed", "--help"]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def without_reader() -> int:
    """Return the writing end of a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def test_a_stream_drops_output_once_its_reader_has_gone() -> None:
    handle = without_reader()
    stream = Stream(handle, "w", closefd=False)
    assert stream.write(b"lost") == 4
    assert stream.write(b"lost, too") == 9
    assert os.readlink(f"/proc/self/fd/{handle}") == os.devnull, "children inherit no broken pipe"
    os.close(handle)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_gone_ends_well(unbuffered: str) -> None:
    handle = without_reader()
    found = subprocess.run(
        HELP, stdout=handle, stderr=subprocess.PIPE, check=False,
        env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(handle)
    assert (found.returncode, found.stderr) == (0, b"")


def test_a_command_may_have_no_open_stream(tmp_path: Path) -> None:
    """A file that it opens must not get the number of a stream."""
    code = "from reseed.cli.main import main; import os, sys; sys.argv[1:] = ['--help']\n"
    code += f"try: main()\nfinally: os.write(os.open({str(tmp_path / 'x')!r}, 66), b'ok')\n"
    code += "print('no more')"
    close = 'exec "$0" -c "$1" <&- >&- 2>&-'
    found = subprocess.run(["bash", "-c", close, sys.executable, code], check=False)
    assert found.returncode == 0
    assert (tmp_path / "x").read_text() == "ok"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_one_error(unbuffered: str) -> None:
    with open("/dev/full", "w") as full:
        found = subprocess.run(
            HELP, stdout=full, stderr=subprocess.PIPE, check=False, text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
    assert found.returncode == 1
    assert found.stderr == "error: cannot write to stdout: No space left on device\n"


@pytest.mark.parametrize(
    ("encoding", "shown"), [("", b"?"), ("latin-1", "ê".encode("latin-1")), ("utf-8", "ê".encode())]
)
def test_characters_that_the_terminal_lacks_are_replaced(encoding: str, shown: bytes) -> None:
    """Under the locale C and without its coercion, files have UTF-8 names all the same."""
    own = ASCII | ({"PYTHONIOENCODING": encoding} if encoding else {})
    found = subprocess.run(
        [sys.executable, "-m", "reseed", "tr\u00eain"], env=os.environ | own, capture_output=True,
        check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith(
        b"error: there is no command `tr" + shown + b"in`. Did you mean `train`?"
    )


def test_an_argument_that_is_no_text_is_refused() -> None:
    found = subprocess.run(
        [sys.executable.encode(), b"-m", b"reseed", b"status", b"runtime.outputs=\xe9"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr == "error: an argument is not UTF-8 text: 'runtime.outputs=\\udce9'\n"
