"""A trained SAE on disk: ``sae.safetensors`` (parameters) and ``sae.json`` (their description).

The description has a checksum of its own and the SHA-256 of the parameters, which reading verifies.
These files name no class to import: the architecture is looked up by its stable name among those
that are registered.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor

from reseed.errors import ConfigError, ReseedError
from reseed.sae import load_all
from reseed.sae.base import SAE, SAEConfig
from reseed.system.environment import VERSION
from reseed.system.files import atomic_write_bytes
from reseed.system.integrity import (
    DamagedFileError,
    check_record,
    read_record,
    sha256_of,
    write_record,
)

FORMAT_VERSION = 1
WEIGHTS_FILE = "sae.safetensors"
DESCRIPTION_FILE = "sae.json"


class CheckpointError(ReseedError):
    """Raised for a saved SAE that cannot be read."""


def save_sae(sae: SAE, folder: str | Path, metadata: Mapping[str, Any] | None = None) -> None:
    """Write ``sae`` to ``folder`` (created if missing), each file atomically.

    Args:
        metadata: the origin of the SAE; anything JSON can hold.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in sae.state_dict().items()}
    description = {
        "format_version": FORMAT_VERSION,
        "type": sae.config.name,
        "config": sae.config.to_dict(),
        "d_in": sae.d_in,
        "num_latents": sae.num_latents,
        "reseed_version": VERSION,
        "metadata": dict(metadata or {}),
    }
    # The weights first: a folder with a description is then complete.
    weights = to_safetensors(tensors)
    atomic_write_bytes(folder / WEIGHTS_FILE, weights)
    description["weights_sha256"] = sha256(weights).hexdigest()
    write_record(folder / DESCRIPTION_FILE, description)


def load_sae(path: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read the SAE saved in the folder ``path``: a run folder, or one that holds the two files.

    Raises:
        CheckpointError: the folder or a file is missing or damaged, the files do not fit each
            other, or the architecture is not registered.
    """
    folder = Path(path)
    description = _read_description(folder)
    _check_run(folder)
    sae = _empty(description, folder)
    tensors = _read_tensors(folder / WEIGHTS_FILE, description.get("weights_sha256"))
    expected = {name: tuple(t.shape) for name, t in sae.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if expected != found:
        difference = _difference(expected, found)
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE} does not fit {DESCRIPTION_FILE}: {difference}"
        )
    for name, tensor in sae.state_dict().items():
        if tensors[name].is_floating_point() != tensor.is_floating_point():
            wanted = "floats" if tensor.is_floating_point() else "integers"
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: `{name}` must hold {wanted}; got {tensors[name].dtype}"
            )
        wrong = ~tensors[name].isfinite()
        if name in sae.logarithmic:  # the logarithm of a threshold of 0
            wrong &= tensors[name] != -torch.inf
        if bool(wrong.any()):
            raise CheckpointError(
                f"{folder / WEIGHTS_FILE}: `{name}` holds values that are not finite"
            )
    # `assign` keeps the dtype that was saved, so that the round trip is exact.
    sae.load_state_dict(tensors, assign=True)
    # A loaded SAE is for inference; a caller that trains it turns gradients on.
    return sae.to(device).requires_grad_(False)


def _check_run(folder: Path) -> None:
    """Raise `CheckpointError` if the folder is that of a run, one of whose files is damaged."""
    try:
        if "identity" in read_record(folder / "run.json"):  # reseed's, not that of other programs
            check_record(folder / "run.json", quick=True)
    except FileNotFoundError:
        return
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from None


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return the ``metadata`` given to `save_sae`."""
    return _read_description(Path(path)).get("metadata", {})


def _read_description(folder: Path) -> dict[str, Any]:
    file = folder / DESCRIPTION_FILE
    if not folder.exists():
        raise CheckpointError(f"there is no folder {folder}")
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no trained SAE: {DESCRIPTION_FILE} is missing")
    try:
        description = read_record(file)
    except DamagedFileError as error:
        raise CheckpointError(str(error)) from None
    missing = {"format_version", "type", "config", "d_in", "num_latents"} - set(description)
    if missing:
        raise CheckpointError(f"{file} lacks {', '.join(sorted(missing))}")
    if description["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {description['format_version']}; this program "
            f"(reseed {VERSION}) reads version {FORMAT_VERSION}"
        )
    return description


def _empty(description: Mapping[str, Any], folder: Path) -> SAE:
    """Return the module that the description declares, without weights."""
    load_all()
    file, d_in = folder / DESCRIPTION_FILE, description["d_in"]
    try:
        if not isinstance(d_in, int) or d_in < 1:
            raise ConfigError(f"{{key}} must be a whole number of at least 1; got {d_in!r}", "d_in")
        for key, kind in (("config", dict), ("type", str), ("metadata", dict)):
            if not isinstance(found := description.get(key, {}), kind):
                wanted = {dict: "a mapping", str: "text"}[kind]
                raise ConfigError(f"{{key}} must be {wanted}; got {found!r}", key)
        config = SAEConfig.from_dict(
            {**description["config"], "type": description["type"]}, "config"
        )
        config.check_d_in(d_in)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    if config.width(d_in) != description["num_latents"]:
        raise CheckpointError(
            f"{file}: num_latents is {description['num_latents']}, but its config says "
            f"{config.width(d_in)}"
        )
    with torch.device("meta"):
        return config.empty(d_in)


def _read_tensors(file: Path, recorded: str | None) -> dict[str, Tensor]:
    """Read the parameters after comparing their SHA-256 with the recorded one, if there is one."""
    if not file.is_file():
        raise CheckpointError(f"{file.parent} holds no trained SAE: {file.name} is missing")
    try:
        if recorded is not None and sha256_of(file) != recorded:
            raise CheckpointError(f"{file} is damaged: its content does not fit {DESCRIPTION_FILE}")
        found = load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is damaged: it cannot be read ({error})") from None
    return plain_tensors(file, found)


_DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
)  # fmt: skip
"""The dtypes that any code of SAEs can convert to float32."""


def plain_tensors(file: Path, found: Any) -> dict[str, Tensor]:
    """Return the tensors of a file, contiguous and on the CPU, after checking that all are plain.

    Every file of every format passes here, because later code assumes plain tensors: a tensor
    without values (meta), a sparse or nested one, or one of few values that is expanded to a large
    shape would fail there, or fill the memory.

    Args:
        found: the content of the file.

    Raises:
        CheckpointError: it is not a mapping from names to plain tensors.
    """
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        got = type(found).__name__
        if isinstance(found, dict):
            got = f"the key {next(name for name in found if not isinstance(name, str))!r}"
        raise CheckpointError(f"{file} must hold tensors by name; got {got}")
    for name, tensor in found.items():
        if odd := _oddity(tensor):
            raise CheckpointError(f"{file}: `{name}` must be a plain tensor; it is {odd}")
    return {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}


def _oddity(tensor: Any) -> str:
    """Say in words what makes a tensor unusable; "" for a plain one."""
    if not isinstance(tensor, Tensor):
        return f"of the type {type(tensor).__name__}"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_quantized or tensor.dtype not in _DTYPES:
        return f"of the dtype {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.is_meta:
        return "without values (on the device meta)"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.itemsize:
        return f"expanded: its shape {list(tensor.shape)} has more values than the file"
    return ""


def _difference(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
) -> str:
    for name in sorted({*expected, *found}):
        if name not in found:
            return f"`{name}` is missing"
        if name not in expected:
            return f"`{name}` is not expected"
        if expected[name] != found[name]:
            return f"`{name}` has shape {list(found[name])}, expected {list(expected[name])}"
    raise AssertionError("no difference")
