"""Chunk files: safetensors, with a checksum over the chunk's address and its content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

_NAME = "activations"
_LONGEST_HEADER = 1 << 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class Damaged(Exception):
    """A chunk file that is truncated, corrupted or of another chunk; the message says which."""


def write_chunk(path: Path, x: Tensor, address: str) -> None:
    """Write ``x``, in its own precision, as the chunk with this address.

    The file is overwritten in place and not truncated first, so that its space stays reserved. It
    is not fsynced: the checksum detects a file that a power cut left incomplete.

    Args:
        path: an existing file, at least as long as the content.
    """
    x = x.detach().cpu().contiguous()
    payload = _bytes(x)
    about = {
        "__metadata__": {"address": address, "sha256": _checksum(x, address)},
        _NAME: {
            "dtype": _NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [0, payload.nbytes],
        },
    }
    header = json.dumps(about).encode()
    header += b" " * (-len(header) % 8)  # aligns the payload
    with path.open("r+b") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        file.write(payload)
        file.truncate()


def read_chunk(path: Path, address: str) -> Tensor:
    """Read the chunk with this address.

    Raises:
        FileNotFoundError: the file does not exist.
        Damaged: the file is truncated, corrupted, or holds another chunk.
    """
    with path.open("rb") as file:
        begun = file.read(8)
        length = int.from_bytes(begun, "little")
        if len(begun) < 8 or not 2 <= length <= _LONGEST_HEADER:
            raise Damaged("it has no header")
        try:
            header = json.loads(file.read(length))
            metadata, about = header["__metadata__"], header[_NAME]
            shape, dtype = [int(n) for n in about["shape"]], _DTYPES[about["dtype"]]
            begin, end = (int(n) for n in about["data_offsets"])
            address_there, checksum = metadata["address"], metadata["sha256"]
        except (ValueError, KeyError, TypeError):
            raise Damaged("its header cannot be read") from None
        if address_there != address:
            raise Damaged("it holds other activations than its name says")
        size = path.stat().st_size - 8 - length
        if begin != 0 or min(shape, default=0) < 0 or end != size:
            raise Damaged("it is not whole")
        # A corrupt shape must not allocate more memory than the file holds.
        if torch.Size(shape).numel() * dtype.itemsize != size:
            raise Damaged("its header cannot be read")
        x = torch.empty(shape, dtype=dtype)
        if file.readinto(_bytes(x)) != size:
            raise Damaged("it is not whole")
    if _checksum(x, address) != checksum:
        raise Damaged("its checksum is wrong")
    return x


def _checksum(x: Tensor, address: str) -> str:
    sha = hashlib.sha256(json.dumps([address, str(x.dtype), list(x.shape)]).encode())
    sha.update(_bytes(x))
    return sha.hexdigest()


def _bytes(x: Tensor) -> memoryview:
    return x.reshape(-1).view(torch.uint8).numpy().data
