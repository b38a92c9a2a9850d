"""``sae=pretrained``: an existing SAE, used like any other run but never trained."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from reseed.config import setting
from reseed.errors import ConfigError
from reseed.sae.base import SAE, SAEConfig, SAEOption
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats import FORMATS, detect_format
from reseed.sae.formats.base import Imported
from reseed.sae.formats.files import HubPlace, download, parse_source

_FINGERPRINT = 32  # number of hexadecimal characters, as for language models


@dataclass(frozen=True)
class Pretrained:
    """An existing SAE that was located and read.

    Attributes:
        source: the source as the user gave it; for the hub, with the commit.
        path: its local folder or file.
        format: name of its format.
        config: its architecture.
        d_in: width of the activations that it takes.
        fingerprint: hash of what the SAE computes, and nothing else: the same SAE gives the same
            run, whatever its path and format.
        notes: remarks for the user.
        metadata: its origin, according to its files.
    """

    source: str
    path: Path
    format: str
    config: SAEConfig
    d_in: int
    fingerprint: str
    notes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return every field in plain values."""
        plain = {"path": str(self.path), "config": self.config.to_dict(), "notes": list(self.notes)}
        return {f.name: getattr(self, f.name) for f in fields(self)} | plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Pretrained:
        """Build the object from the output of `to_dict`. Unknown keys and formats are refused."""
        known = values.keys() == {f.name for f in fields(cls)}
        if not known or str(values["format"]) not in FORMATS:
            raise ConfigError(f"{{key}} does not describe an SAE: got {dict(values)}", "pretrained")
        config = SAEConfig.from_dict(values["config"], "pretrained.config")
        typed = {"path": Path(values["path"]), "config": config, "notes": tuple(values["notes"])}
        return cls(**{**values, **typed})

    def check_d_in(self, d_in: int) -> None:
        """Raise `ConfigError` if the SAE takes activations of another width."""
        if d_in != self.d_in:
            hint = f" Its files say: {self._said}." if self._said else ""
            raise ConfigError(
                f"{{key}} takes activations of width {self.d_in}, but those at the hookpoint have "
                f"width {d_in}.{hint}",
                "source",
            )

    def misplaced(self, layer: int, site: str, is_module: bool = True) -> str:
        """Return a warning if the SAE's files name another place than this one, else "".

        Args:
            is_module: whether the site is the output of the model's module with this name.
        """
        own_layer, own_site = place_of(self.metadata)
        known, there = (_stream_after(*place) for place in ((own_layer, own_site), (layer, site)))
        wrong_layer = own_layer is not None and known[0] != there[0]
        raw = not is_module and any(name.endswith(_MODULES) for name in _names(self.metadata))
        right_site = own_site is None or known[1] == there[1] or site == "module"
        if not wrong_layer and right_site and not raw:
            return ""
        own = f"layer={'?' if own_layer is None else own_layer} hookpoint={own_site or '?'}"
        if raw:
            own = f"layer={layer} hookpoint=module"
        return (
            f"warning: {self.source} was trained on the activations of {own}, according to its "
            f"files ({self._said}), and now reads those of layer={layer} hookpoint={site}"
        )

    def load(self) -> SAE:
        """Load the SAE.

        Raises:
            CheckpointError: its weights have changed since it was first read.
        """
        sae = FORMATS[self.format].load(self.path).sae
        if fingerprint_of(sae) != self.fingerprint:
            raise CheckpointError(
                f"{self.path} has changed since this command first read it; run the command again"
            )
        return sae

    def record(self) -> dict[str, Any]:
        """Return the description of the SAE for run.json."""
        return {
            "source": self.source,
            "format": self.format,
            "fingerprint": self.fingerprint,
            "notes": list(self.notes),
            "metadata": self.metadata,
        }

    @property
    def _said(self) -> str:
        """The SAE's origin in the words of its files."""
        said = self.metadata.items()
        return ", ".join(
            f"{k}: {v}" for k, v in said if k in _ORIGIN_KEYS and isinstance(v, str | int)
        )


@dataclass(frozen=True)
class PretrainedConfig(SAEOption, name="pretrained"):
    """Location of an existing SAE. No field enters the signature, which has the SAE's fingerprint.

    Args:
        source: a run folder, a folder (or file) of another library, or
            ``hub:OWNER/NAME[@revision][/path]``.
        format: format of its files (a key of `FORMATS`); null: detected.
        revision: revision of a source on the hub.
    """

    source: str | None = setting(signed=False)
    format: str | None = setting(None, choices=(None, *FORMATS), signed=False)
    revision: str | None = setting(None, signed=False)

    def validate(self) -> None:
        if not self.source:
            raise ConfigError("{key} is required with sae=pretrained: give it a value", "source")

    def resolve(self) -> Pretrained:
        """Return the SAE, which is read once per command.

        Raises:
            ConfigError: it cannot be read, or cannot be evaluated as a run.
        """
        assert self.source is not None
        try:
            return _found(self.source, self.format, self.revision)
        except CheckpointError as error:
            raise ConfigError(f"{{key}}: {error}", "source") from error


@lru_cache(maxsize=64)
def _found(source: str, format: str | None, revision: str | None) -> Pretrained:
    place = parse_source(source, revision=revision)
    if isinstance(place, HubPlace):
        path, commit = download(place)
        source = str(HubPlace(place.repo, commit, place.path))
    else:
        path = place
    known = detect_format(path, format)
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
            f"{source} is a transcoder: it reconstructs the activations of a hookpoint other than "
            "the one that it reads, so it cannot be evaluated as an SAE"
        )


def place_of(metadata: Mapping[str, Any]) -> tuple[int | None, str | None]:
    """Return the layer and the site of the activations that an SAE was trained on.

    Args:
        metadata: as the formats give it; either value is None if no entry tells it.
    """
    names = _names(metadata)
    site = metadata.get("site")
    site = site if isinstance(site, str) and site != "module" else None
    found = (_BLOCK.search(name) for name in names)
    layer = next((int(match[1]) for match in found if match), None)
    given = str(metadata.get("layer", ""))
    if given.isascii() and given.isdigit() and len(given) < 6:
        layer = int(given)
    for name in names:
        for own, words in _SITES.items():
            ends = tuple(word for word in words if word.startswith("."))
            inside = (word in name for word in words if not word.startswith("."))
            if site is None and (any(inside) or name.endswith(ends)):
                site = own
    return layer, site


def _names(metadata: Mapping[str, Any]) -> list[str]:
    """Return the entries that may name a hookpoint."""
    keys = (key for key in _ORIGIN_KEYS if key not in ("model", "model_name", "lm_name"))
    return [metadata[key] for key in keys if isinstance(metadata.get(key), str)]


def _stream_after(layer: int | None, site: str | None) -> tuple[int | None, str | None]:
    """Return the place under the name that it has as the output of a layer, if there is one."""
    if site == "resid_pre" and layer:
        return layer - 1, "resid_post"
    return layer, site


def fingerprint_of(sae: SAE) -> str:
    """Return a SHA-256 over the SAE's architecture, `_FINGERPRINTED_SETTINGS` and parameters."""
    said = (
        sae.config.name,
        *(repr(getattr(sae.config, name, None)) for name in _FINGERPRINTED_SETTINGS),
    )
    sha = hashlib.sha256("\n".join(said).encode())
    for name, tensor in sorted(sae.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(memoryview(tensor.detach().cpu().contiguous().numpy()).cast("B"))
    return sha.hexdigest()[:_FINGERPRINT]


_ORIGIN_KEYS = (
    "model", "model_name", "lm_name", "layer", "hookpoint", "hook_name", "hook_point",
    "submodule_name", "hf_hook_point_in",
)  # fmt: skip
"""Metadata keys that the formats use for the model, the layer and the hookpoint."""
_BLOCK = re.compile(r"(?<![a-zA-Z])(?:blocks|layers|layer|h)[._](\d{1,5})(?!\d)")
"""The layer in a hookpoint's name: ``blocks.3.hook_resid_post``, ``layers.3.mlp``."""
_MODULES = (".mlp", ".attn", ".self_attn", ".attention")
"""Ends of names that mean the output of a module."""
_SITES = {
    "embed": ("hook_embed",),
    "resid_pre": ("resid_pre",),
    "resid_mid": ("resid_mid",),
    "attn_z": ("hook_z", "attn_z"),
    "mlp_out": ("hook_mlp_out", "mlp_out", ".mlp"),
    "attn_out": ("hook_attn_out", "attn_out", ".attn", ".self_attn", ".attention"),
    "resid_post": ("resid_post", ".output"),
}
"""Site → what the name of such a hookpoint contains."""
_FINGERPRINTED_SETTINGS = ("k", "activation", "subtract_b_dec", "weigh_by_decoder_norm", "prefixes")
"""The settings of any architecture that change its latents."""
