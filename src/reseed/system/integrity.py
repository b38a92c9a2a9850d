"""Detection of changed files by their SHA-256.

    a record         a JSON file whose last entry, ``checksum``, is the SHA-256 of the text before
                     (`write_record`, `read_record`)
    recorded files   a record's list of the files beside it, with their sizes and SHA-256
                     (`describe_files`, `check_files`)
    a checked file   a file with its SHA-256 in ``NAME.sha256`` beside it (`write_checked`)

Files that version 0.1 wrote have no checksums. Their records are read as they are.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from reseed.errors import ReseedError
from reseed.system.files import atomic_write, atomic_write_text, json_text

CHECKSUM = "checksum"
_SEAL = re.compile(rb',?\s*"checksum": "([0-9a-f]{64})"\s*\}\s*\Z')
_SHA256_LENGTH = 64
_SEAL_LENGTH = 120
"""Number of bytes at the end of a record in which its checksum is looked for."""
_known: dict[tuple[int, ...], str] = {}
"""SHA-256 by device, inode, size and times of change, so that a process reads a file only once."""

_RECORDS = ("run.json", "sae.json", "result.json", "cell.json", "comparison.json",
            "evaluations.json", "outputs.json")  # fmt: skip
_CHECKED = ("checkpoint.pt", "initial.safetensors")

FileRecord = Mapping[str, Any]
"""``size`` in bytes and ``sha256`` of a file when it was written; of a run's files ``mtime_ns``."""


class DamagedFileError(ReseedError):
    """Error about a file that cannot be read, or that is not as it was written.

    Args:
        path: the file.
        reason: what is wrong with it; the message is "PATH is damaged: REASON".
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} is damaged: {reason}")
        self.path, self.reason = path, reason


def seal(text: str) -> str:
    """Add a checksum as the last entry of the text of a JSON object."""
    body = text.rstrip().removesuffix("}").rstrip()
    between, end = (",\n  ", "\n}\n") if "\n" in body else (", ", "}")
    between = between if body != "{" else ""
    return f'{body}{between}"{CHECKSUM}": "{_sha256(body.encode())}"{end}'


def unseal(data: bytes, path: Path) -> dict[str, Any]:
    """Parse a JSON object, and verify its checksum if it has one.

    Args:
        path: the file that holds it, for messages.

    Raises:
        DamagedFileError: it is not a JSON object, or does not have the checksum.
    """
    found = _SEAL.search(data, max(0, len(data) - _SEAL_LENGTH))
    if found is not None and _sha256(data[: found.start()]) != found[1].decode():
        raise DamagedFileError(path, "its checksum does not fit its content")
    try:
        value = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not data.strip() else f"it is not JSON ({error})"
        raise DamagedFileError(path, reason) from None
    if not isinstance(value, dict):
        raise DamagedFileError(path, f"it must hold a JSON object; it holds a {_kind(value)}")
    if found is None and _had_seal(value):
        raise DamagedFileError(path, "its checksum cannot be read")
    value.pop(CHECKSUM, None)
    return value


def _had_seal(value: Mapping[str, Any]) -> bool:
    """Return True for the content of a sealed object whose last entry was changed."""
    last = [*value.values()][-1] if value else None
    return CHECKSUM in value or (isinstance(last, str) and len(last.encode()) == _SHA256_LENGTH)


def write_record(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, atomically; NaN and infinity become null."""
    atomic_write_text(path, seal(json_text(dict(value))))


def read_record(path: Path) -> dict[str, Any]:
    """Read the JSON object that `write_record` wrote, without its checksum.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it cannot be read, or its content has changed.
    """
    return unseal(read_bytes(path), path)


def is_there(path: Path) -> bool:
    """Return False only if there is nothing at ``path``; a folder that cannot be read may have it,
    and whoever reads it gets the reason."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError, ValueError):  # a name cannot have a NUL
        return False
    except OSError:
        pass
    return True


def read_bytes(path: Path) -> bytes:
    """Read a file.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedFileError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFileError(path, _cannot_be_read(error)) from None


def stamp(files: Iterable[Path]) -> tuple[tuple[str, int, int], ...]:
    """Return path, size and time of change of files, which change if a content does; () if one is
    missing."""
    try:
        abouts = [(str(file.absolute()), file.stat()) for file in files]
    except OSError:
        return ()
    return tuple((path, about.st_size, about.st_mtime_ns) for path, about in abouts)


def describe_files(
    folder: Path, names: Iterable[str], *, times: bool = False
) -> dict[str, dict[str, Any]]:
    """Return name → size and SHA-256 of those of the files that exist.

    A checked file keeps the SHA-256 that stands beside it.

    Args:
        times: add the time of change, for quick checks.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in (folder / name for name in names):
        if path.is_file():
            about = path.stat()
            found[path.name] = {
                "size": about.st_size,
                "sha256": (_hashes(checksum_file(path)) or [sha256_of(path)])[-1],
            }
            if times:
                found[path.name]["mtime_ns"] = about.st_mtime_ns
    return found


def check_files(folder: Path, recorded: Mapping[str, FileRecord], *, quick: bool = False) -> None:
    """Compare the files of a folder with what their record says of them.

    Args:
        quick: compare contents only where the time of change differs.

    Raises:
        DamagedFileError: a file is missing, cannot be read, or has changed.
    """
    for name, about in recorded.items():
        if not (quick and _looks_unchanged(os.path.join(folder, name), about)):
            check_file(folder / name, about)


def _looks_unchanged(path: str, recorded: FileRecord) -> bool:
    try:
        found = os.stat(path)
    except OSError:
        return False
    same = found.st_size, found.st_mtime_ns
    if not stat.S_ISREG(found.st_mode) or same != (recorded["size"], recorded.get("mtime_ns")):
        return False
    # This process may have read the file, and found that only its size and time are the same.
    return _known.get(_key(found), recorded["sha256"]) == recorded["sha256"]


def check_record(path: Path, *, quick: bool = False) -> None:
    """Verify a record and the files that it lists; see `read_record` and `check_files`."""
    check_files(path.parent, recorded_files(path), quick=quick)


def recorded_files(path: Path) -> dict[str, FileRecord]:
    """Return the files that the record in ``path`` lists, by name; {} if it lists none.

    Raises: see `read_record`.
    """
    files = read_record(path).get("files") or {}
    if not isinstance(files, dict) or not all(
        isinstance(about, dict) and {"size", "sha256"} <= about.keys() for about in files.values()
    ):
        raise DamagedFileError(path, "its list of files cannot be read")
    return files


def check_file(path: Path, recorded: FileRecord) -> None:
    """Compare one file with its record; see `check_files`."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise DamagedFileError(path, "it is not a file")
        if found.st_size != recorded["size"]:
            reason = f"it has {found.st_size:,} bytes instead of {recorded['size']:,}"
            raise DamagedFileError(path, reason)
        if sha256_of(path) != recorded["sha256"]:
            if found.st_mtime_ns == recorded.get("mtime_ns"):
                with suppress(OSError):
                    os.utime(path)  # so that quick checks of other processes notice it too
            raise DamagedFileError(path, "its content has changed since it was written")
        if found.st_mtime_ns != recorded.get("mtime_ns", found.st_mtime_ns):
            with suppress(OSError):  # a copy: the next quick check need not read it
                os.utime(path, ns=(found.st_atime_ns, recorded["mtime_ns"]))
    except FileNotFoundError:
        raise DamagedFileError(path, "it is missing") from None
    except OSError as error:
        raise DamagedFileError(path, _cannot_be_read(error)) from None


def find_damaged(folder: Path) -> list[DamagedFileError]:
    """Verify all records, recorded files and checked files below a folder."""
    found: list[DamagedFileError] = []

    def unreadable(error: OSError) -> None:
        found.append(DamagedFileError(Path(error.filename), _cannot_be_read(error)))

    for parent, _, names in os.walk(folder, onerror=unreadable):
        for path in (Path(parent, name) for name in sorted(names)):
            try:
                if path.name in _RECORDS:
                    check_record(path)
                elif path.name == "manifest.jsonl":
                    for line in read_bytes(path).splitlines():
                        unseal(line, path)
                elif path.name in _CHECKED and is_damaged(path):
                    raise DamagedFileError(path, "it does not have its SHA-256")
            except DamagedFileError as error:
                found.append(error)
            except FileNotFoundError:  # deleted meanwhile
                continue
    return found


def write_checked(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file with `atomic_write`, and its SHA-256 beside it."""
    beside = checksum_file(path)

    def fill(temporary: Path) -> None:
        write(temporary)
        # The earlier hash stays in the list, because the process may be killed before the rename.
        hashes = [*_hashes(beside)[-1:], sha256_of(temporary)]
        atomic_write_text(beside, "\n".join(hashes) + "\n")

    atomic_write(path, fill)


def remove_checked(path: Path) -> None:
    """Delete a file that `write_checked` wrote, if it exists."""
    path.unlink(missing_ok=True)
    checksum_file(path).unlink(missing_ok=True)


def is_damaged(path: Path) -> bool:
    """Return True if a hash stands beside the file, and the file is missing or does not have it.

    A file of version 0.1, which has no hash, counts as sound; what uses it must be able to tell.
    """
    return bool(_hashes(checksum_file(path))) and not is_intact(path)


def is_intact(path: Path) -> bool:
    """Return True if the file exists and has the SHA-256 that stands beside it."""
    try:
        return path.is_file() and sha256_of(path) in _hashes(checksum_file(path))
    except OSError:
        return False


def read_tensors(path: Path, load_file: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    """Read the arrays of a safetensors file, which cannot contain executable code.

    Args:
        load_file: safetensors' function for numpy or torch.

    Raises:
        DamagedFileError: it cannot be read.
    """
    from safetensors import SafetensorError

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(path, f"it cannot be read ({error})") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits."""
    key = _key(path.stat())
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]


def _key(about: os.stat_result) -> tuple[int, ...]:
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns


def checksum_file(path: Path) -> Path:
    """Return the path of the file that holds the SHA-256 of a checked file."""
    return path.with_name(f"{path.name}.sha256")


def _hashes(beside: Path) -> list[str]:
    try:
        return beside.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return []


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _cannot_be_read(error: OSError) -> str:
    return f"it cannot be read ({error.strerror})"


def _kind(value: Any) -> str:
    return {list: "list", str: "string", bool: "boolean", type(None): "null"}.get(
        type(value), "number"
    )
