"""``sae=pretrained``: an SAE that is there already, as a run like any other, but for training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from reseed.config import ConfigError, setting
from reseed.sae.base import SAE, SAEConfig, SAEOption
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats import FORMATS, recognised
from reseed.sae.formats.base import Imported
from reseed.sae.formats.source import HubPlace, download, place_of

_FINGERPRINT = 32  # hexadecimal characters, as of language models


@dataclass(frozen=True)
class Pretrained:
    """An SAE that was found and read.

    Attributes:
        source: as it was given; of the hub, with the commit that it is of.
        path: its folder or file here.
        format: name of its format.
        config: its architecture.
        d_in: width of the activations that it takes.
        fingerprint: identifies the weights, and nothing else: by whatever path and in whatever
            format it is found, the same SAE is the same run.
        notes: what its user has to know.
        metadata: what its files say of where it comes from.
    """

    source: str
    path: Path
    format: str
    config: SAEConfig
    d_in: int
    fingerprint: str
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)

    def check(self, d_in: int) -> None:
        """Raise `ConfigError` where it takes activations of another width."""
        if d_in != self.d_in:
            said = ", ".join(f"{key}: {value}" for key, value in self._said.items())
            hint = f" Its files say: {said}." if said else ""
            raise ConfigError(
                f"{{key}} takes activations of width {self.d_in}, and those at the hookpoint have "
                f"{d_in}.{hint}",
                "source",
            )

    def load(self) -> SAE:
        """The SAE.

        Raises:
            CheckpointError: it is no longer what it was.
        """
        sae = FORMATS[self.format].load(self.path).sae
        if fingerprint_of(sae) != self.fingerprint:
            raise CheckpointError(f"{self.path} has changed since it was first read")
        return sae

    def record(self) -> dict[str, Any]:
        """What run.json says of it."""
        return {
            "source": self.source,
            "format": self.format,
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
            "metadata": self.metadata,
        }

    @property
    def _said(self) -> dict[str, Any]:
        return {k: v for k, v in self.metadata.items() if k in _PLACE and isinstance(v, str | int)}


@dataclass(frozen=True)
class PretrainedConfig(SAEOption, name="pretrained"):
    """Where an SAE is. Nothing of it is signed: what counts are the weights that are there.

    Args:
        source: a run folder, the folder (or a file) of another library's, or
            ``hub:OWNER/NAME[@revision][/path]``.
        format: of its files (a key of `FORMATS`); null: recognised.
        revision: of a source on the hub.
    """

    source: str | None = setting(signed=False)
    format: str | None = setting(None, choices=(None, *FORMATS), signed=False)
    revision: str | None = setting(None, signed=False)

    def validate(self) -> None:
        if not self.source:
            raise ConfigError("{key} is required with sae=pretrained: give it a value", "source")

    def found(self) -> Pretrained:
        """The SAE, read once for each command.

        Raises:
            ConfigError: it cannot be read, or is none that can be measured as a run.
        """
        assert self.source is not None
        try:
            return _found(self.source, self.format, self.revision)
        except CheckpointError as error:
            raise ConfigError(f"{{key}}: {error}", "source") from error


@lru_cache(maxsize=64)
def _found(source: str, format: str | None, revision: str | None) -> Pretrained:
    place = place_of(source, revision=revision)
    if isinstance(place, HubPlace):
        path, commit = download(place)
        source = str(HubPlace(place.repo, commit, place.path))
    else:
        path = place
    known = recognised(path, format)
    read = known.load(path)
    _check_kind(read, source)
    return Pretrained(
        source=source,
        path=path,
        format=known.name,
        config=read.sae.config,
        d_in=read.sae.d_in,
        fingerprint=fingerprint_of(read.sae),
        notes=read.notes,
        metadata=dict(read.metadata),
    )


def _check_kind(read: Imported, source: str) -> None:
    if read.transcoder:
        raise CheckpointError(
            f"{source} is a transcoder: its reconstruction is of activations at another hookpoint, "
            "and cannot be measured against those that it reads"
        )


def fingerprint_of(sae: SAE) -> str:
    """SHA-256 over what an SAE computes: its kind, what that hangs on, and its parameters."""
    said = (sae.config.name, *(repr(getattr(sae.config, name, None)) for name in _COMPUTES))
    sha = hashlib.sha256("\n".join(said).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
    return sha.hexdigest()[:_FINGERPRINT]


_PLACE = (
    "model", "model_name", "lm_name", "layer", "hookpoint", "hook_name", "hook_point",
    "submodule_name", "hf_hook_point_in",
)  # fmt: skip
"""What formats call the model and the place in it."""
_COMPUTES = ("k", "activation", "subtract_b_dec", "weigh_by_decoder_norm", "prefixes")
"""The settings that change latents, among those of all architectures."""
