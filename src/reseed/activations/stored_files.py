"""Files of activations, memory-mapped.

    .npy, .safetensors, .pt   are mapped as they are
    .parquet                  is copied once into a .safetensors file of derived data

Nothing that a file holds is executed: pickled arrays and classes are refused.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from safetensors import SafetensorError, safe_open
from torch import Tensor

from reseed.activations.chunk_cache import DTYPES, data_of, file_header
from reseed.activations.token_store import mix_bits
from reseed.config import digest
from reseed.errors import ConfigError, did_you_mean
from reseed.system.environment import allow_open_files
from reseed.system.files import atomic_write, find_same_files
from reseed.system.integrity import stamp

ENDINGS = (".npy", ".safetensors", ".parquet", ".pt")
COPIES = "activations"
"""Folder of derived data that holds copies of parquet columns and of activations from memory."""
_PER_CALL = 8_192
"""Number of rows of a parquet file that are decoded at once."""


def find_files(path: Path) -> tuple[list[Path], list[str]]:
    """Return the shards of a file or folder, and the names that are passed over.

    Numbers in names count as numbers: ``part-2`` comes before ``part-10``. Hidden files and folders
    are passed over silently.

    Raises:
        ConfigError: there is none, they have several formats, or two are the same file.
    """
    listed = ", ".join(ENDINGS)
    if path.is_file():
        if path.suffix.lower() not in ENDINGS:
            raise ConfigError(f"{{key}} must end in one of {listed}; got {path}", "path")
        return [path], []
    if not path.is_dir():
        raise ConfigError(f"{{key}} must be an existing file or folder; got {path}", "path")
    inside = sorted((p for p in path.iterdir() if not p.name.startswith(".")), key=_natural)
    files = [p for p in inside if p.suffix.lower() in ENDINGS and p.is_file()]
    if not files:
        there = ", ".join(p.name for p in inside[:5]) or "nothing"
        more = f" and {len(inside) - 5:,} more" if len(inside) > 5 else ""
        raise ConfigError(
            f"{{key}} must hold files that end in one of {listed}; {path} holds {there}{more}",
            "path",
        )
    if other := [p for p in files if p.suffix.lower() != files[0].suffix.lower()]:
        raise ConfigError(
            f"{{key}}: all shards must have one format; {path} holds {files[0].name} and "
            f"{other[0].name}",
            "path",
        )
    if same := find_same_files(files):
        raise ConfigError(
            f"{{key}}: a folder must not hold a file twice, because its rows would count twice: "
            f"{same[0]} and {same[1]} are the same",
            "path",
        )
    return files, [p.name for p in inside if p not in files]


def map_files(
    files: Sequence[Path], tensor: str | None, field: str | None, cache: Path
) -> list[tuple[Path, Tensor]]:
    """Map files into memory; only headers are read, except for parquet, which is copied.

    Args:
        tensor: name of the tensor in each .safetensors or .pt file.
        field: column of the .parquet files.
        cache: folder of derived data.

    Returns:
        the mapped file and the tensor, for each file.

    Raises:
        ConfigError: a file cannot be read, or has no such tensor.
    """
    ending = files[0].suffix.lower()
    if tensor is not None and ending not in (".safetensors", ".pt"):
        raise ConfigError(f"{{key}} is for .safetensors and .pt; got {files[0]}", "tensor")
    if field is not None and ending != ".parquet":
        raise ConfigError(f"{{key}} is for .parquet; got {files[0]}", "field")
    allow_open_files(len(files), f"{len(files):,} files of activations")
    if ending == ".parquet":
        copies = [_copy_parquet(file, field, cache) for file in files]
        return [(copy, _map_safetensors(copy, None)) for copy in copies]
    read: dict[str, Callable[[Path], Tensor]] = {
        ".npy": _map_npy,
        ".pt": partial(_map_pt, name=tensor),
        ".safetensors": partial(_map_safetensors, name=tensor),
    }
    return [(file, _read(file, read[ending])) for file in files]


def write_tensor(
    path: Path,
    shape: Sequence[int],
    dtype: torch.dtype,
    blocks: Iterable[Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the blocks of one tensor as a .safetensors file, with the memory of one block.

    Args:
        blocks: consecutive items, contiguous and on the CPU.
    """

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(file_header(dtype, shape, metadata))
            for block in blocks:
                file.write(data_of(block))

    atomic_write(path, write)


def _natural(path: Path) -> tuple[list[Any], str]:
    parts = re.split(r"([0-9]+)", path.name)
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], path.name


def check_kind(name: str, x: Tensor) -> None:
    """Raise `ConfigError` for a tensor whose dtype or shape is not that of activations."""
    if x.layout != torch.strided or x.is_nested or x.is_meta:
        raise ConfigError(f"{{key}}: {name} must be a dense tensor", "path")
    if x.dtype not in DTYPES:
        raise wrong_dtype(name, str(x.dtype).removeprefix("torch."))
    if x.ndim not in (2, 3) or not x.shape[-1]:
        raise ConfigError(
            "{key}: activations must be [rows, width] or [sequences, positions, width]; "
            f"{name} is {described(x)}",
            "path",
        )


def described(x: Tensor) -> str:
    """Return dtype and shape of a tensor, for messages."""
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def check_finite(name: str, first: int, block: Tensor) -> None:
    """Raise `ConfigError` if an activation is not finite in float32.

    Args:
        first: number of the first item of the block in the shard, for the message.
    """
    sound = block.float().isfinite()
    if bool(sound.all()):
        return
    item, *position, index = (~sound).nonzero()[0].tolist()
    where = f"row {first + item:,}"
    if position:
        where = f"position {position[0]:,} of sequence {first + item:,}"
    value = float(block[(item, *position, index)])
    raise ConfigError(
        f"{{key}}: activations must be finite in float32; {where} of {name} (from 0) has {value} "
        f"at index {index:,}",
        "path",
    )


def is_float(dtype: np.dtype) -> bool:
    """Return True for a dtype of numpy that torch has, too: float16, float32, float64."""
    return dtype.kind == "f" and dtype.itemsize <= 8 and dtype.isnative


def wrong_dtype(name: str, dtype: object) -> ConfigError:
    """Return the error about a dtype that activations cannot have."""
    allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
    return ConfigError(f"{{key}}: activations must be one of {allowed}; {name} is {dtype}", "path")


def _read(file: Path, read: Callable[[Path], Any]) -> Any:
    """Return ``read(file)``; an error of a library names the file."""
    try:
        return read(file)
    except ConfigError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, LookupError, EOFError, SafetensorError,
            UnpicklingError, zipfile.BadZipFile) as error:  # fmt: skip
        if isinstance(error, OSError) and error.filename not in (None, str(file)):
            raise  # about the folder of derived data
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{{key}}: {file} cannot be read: {reason}", "path") from error


def _map_npy(path: Path) -> Tensor:
    # Private and writable, because torch has no read-only tensors; nothing writes to it.
    x = np.lib.format.open_memmap(path, mode="c")
    if not is_float(x.dtype):
        raise wrong_dtype(str(path), x.dtype)
    if (left := path.stat().st_size - x.offset - x.nbytes) > 0:
        raise ValueError(f"{left:,} bytes follow the array; a file must hold one array")
    return torch.from_numpy(x)


def _map_safetensors(path: Path, name: str | None) -> Tensor:
    with safe_open(path, "pt") as file:
        return file.get_tensor(_named(list(file.keys()), name, path))


def _map_pt(path: Path, name: str | None) -> Tensor:
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type for entry in archive.infolist()):
            raise ValueError("it is compressed; save it with torch.save")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError("it holds other things than tensors, which are not loaded") from error
    if isinstance(found, dict):
        named = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        found = named[_named(list(named), name, path)]
    elif name is not None:
        raise ConfigError(f"{{key}}: the tensor in {path} has no name; got {name}", "tensor")
    if not isinstance(found, Tensor):
        raise ValueError(f"it must hold a tensor or a dictionary of them; got a {type(found)}")
    return found


def _named(names: Sequence[str], wanted: str | None, path: Path) -> str:
    listed = ", ".join(sorted(names)[:8])
    if not names:
        raise ConfigError(f"{{key}}: {path} holds no tensor", "path")
    if wanted is None and len(names) > 1:
        raise ConfigError(f"{{key}} is required: {path} holds several ({listed})", "tensor")
    if wanted is not None and wanted not in names:
        raise ConfigError(
            f"{{key}}: {path} has no tensor `{wanted}`.{did_you_mean(wanted, names)} It has "
            f"{listed}",
            "tensor",
        )
    return wanted or names[0]


def _copy_parquet(path: Path, field: str | None, cache: Path) -> Path:
    """Return a copy of a parquet file's activations as a .safetensors file.

    There is one for each file and field; it is written again if the file has changed.
    """
    copy = cache / COPIES / f"{digest([str(path.absolute()), field], 32)}.safetensors"
    stamped = json.dumps(stamp([path]))
    with suppress(FileNotFoundError, SafetensorError), safe_open(copy, "pt") as file:
        if (file.metadata() or {}).get("stamp") == stamped:
            return copy
    _read(path, partial(_write_copy, field=field, copy=copy, stamped=stamped))
    return copy


def _write_copy(path: Path, field: str | None, copy: Path, stamped: str) -> None:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        columns = _columns(file.schema_arrow, field, path)
        batches = file.iter_batches(_PER_CALL, columns=columns)
        matrices = _matrices((batch for batch in batches if len(batch)), path)
        like = next(matrices, torch.zeros(0, 1))
        shape = [file.metadata.num_rows, like.shape[1]]
        write_tensor(copy, shape, like.dtype, chain([like], matrices), {"stamp": stamped})


def _columns(schema: Any, field: str | None, path: Path) -> list[str]:
    """Return the columns to read: that of lists, or all if they are numbers."""
    import pyarrow.types as kinds

    names = list(schema.names)
    if field is not None and names.count(field) != 1:
        number = "several columns" if field in names else "no column"
        raise ConfigError(
            f"{{key}}: {path} has {number} `{field}`."
            f"{did_you_mean(field, names)} It has {', '.join(names[:8])}",
            "field",
        )
    wanted = names if field is None else [field]
    for name in wanted:
        kind: Any = schema.field(name).type if names.count(name) == 1 else "there twice"
        if len(wanted) == 1 and hasattr(kind, "value_type"):
            kind = kind.value_type
        if isinstance(kind, str) or not kinds.is_floating(kind):
            if field is None and len(names) > 1:
                raise ConfigError(
                    f"{{key}} is required: {path} has {len(names)} columns, and `{name}` is {kind}",
                    "field",
                )
            raise wrong_dtype(f"the column `{name}` of {path}", kind)
    return wanted


def _matrices(batches: Iterable[Any], path: Path) -> Iterator[Tensor]:
    """Yield the rows of batches as matrices [rows, width] of one width and dtype."""
    first, width = 0, None
    for batch in batches:
        columns = [_numbers(column, first, path) for column in batch.columns]
        x = columns[0] if columns[0].ndim == 2 else np.stack(columns, axis=1)
        if width is not None and x.shape[1] != width:
            raise _ragged(path, first, x.shape[1], width)
        first, width = first + len(x), x.shape[1]
        yield torch.from_numpy(np.array(x))


def _numbers(column: Any, first: int, path: Path) -> np.ndarray:
    """Return a column of numbers [rows] or of lists [rows, width]; ``first`` is its first row."""
    from pyarrow import compute

    def refuse_missing(values: Any, width: int) -> None:
        if values.null_count:
            row = first + int(values.is_null().to_numpy(zero_copy_only=False).argmax()) // width
            raise ConfigError(f"{{key}}: a value is missing in row {row:,} of {path}", "path")

    refuse_missing(column, 1)
    if not hasattr(column.type, "value_type"):
        return column.to_numpy(zero_copy_only=False)
    lengths = compute.call_function("list_value_length", [column]).to_numpy(zero_copy_only=False)
    if len(other := np.flatnonzero(lengths != lengths[0])):
        raise _ragged(path, first + int(other[0]), int(lengths[other[0]]), int(lengths[0]))
    values, width = column.flatten(), int(lengths[0])
    refuse_missing(values, max(width, 1))
    return values.to_numpy(zero_copy_only=False).reshape(len(column), width)


def _ragged(path: Path, row: int, length: int, before: int) -> ConfigError:
    return ConfigError(
        f"{{key}}: all lists of {path} must have one length; row {row:,} has {length:,}, those "
        f"before have {before:,}",
        "path",
    )


def held_out_units(count: int, fraction: float) -> Bool[np.ndarray, " count"]:
    """Return a mask of about this fraction of the units, by a hash of each unit's number.

    The hashes are the numbers that SplitMix64 draws with the seed 0 (Steele et al. 2014).
    """
    states = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mix_bits(states) < np.uint64(fraction * 2**64)
