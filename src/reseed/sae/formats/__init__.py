"""Formats of saved SAEs, ours and other libraries', each recognised by its files.

Load and write an SAE of any format, and compare (`differ`) what two SAEs compute on random inputs.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.errors import ReseedError, did_you_mean
from reseed.sae.base import SAE, origin_of
from reseed.sae.checkpoint import CheckpointError
from reseed.sae.formats.base import Format, Imported, Reseed
from reseed.sae.formats.dictionary_learning import DictionaryLearning
from reseed.sae.formats.files import fetch, first_few
from reseed.sae.formats.gemma_scope import GemmaScope
from reseed.sae.formats.llama_scope import LlamaScope
from reseed.sae.formats.saelens import SAELens
from reseed.sae.formats.sparsify import Sparsify

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (
        Reseed(),
        Sparsify(),
        SAELens(),
        DictionaryLearning(),
        GemmaScope(),
        LlamaScope(),
    )
}


def load_sae(
    source: str | Path | None = None,
    device: str | torch.device = "cpu",
    *,
    format: str | None = None,
    repo: str | None = None,
    revision: str | None = None,
    path: str | None = None,
) -> SAE:
    """Load an SAE of any known format, for raw activations.

    Args:
        source: a run folder, a folder (or file) that another library saved, or
            ``hub:OWNER/NAME[@revision][/path]``.
        format: a key of `FORMATS`; by default recognised by the files.
        repo, revision, path: a place on the hub, given instead of a ``hub:`` source.

    Raises:
        CheckpointError: the source does not exist, its format is unknown, or none of our
            architectures equals it; the message gives the reason.
    """
    found = import_sae(fetch(source, repo, revision, path), format)
    found.sae.origin = origin_of(found.metadata)
    return found.sae.to(device)


def import_sae(path: Path, format: str | None = None) -> Imported:
    """Load the SAE in a folder or file together with its metadata.

    Raises: see `load_sae`.
    """
    return detect_format(path, format).load(path)


def detect_format(path: Path, format: str | None = None) -> Format:
    """Return the format of a folder or file.

    Raises:
        CheckpointError: no format matches (or not the one given). The message lists the files
            found and those expected.
    """
    known = FORMATS.values() if format is None else [get_format(format)]
    if not path.exists():
        raise CheckpointError(f"there is no folder {path}")
    found = next((one for one in known if one.recognises(path)), None)
    if found is None:
        wanted = "; ".join(_wanted(one) for one in known)
        raise CheckpointError(f"{path} {_describe(path)}. Expected {wanted}.{_nested(path, known)}")
    return found


def get_format(format: str) -> Format:
    """Return the format called ``format``.

    Raises:
        CheckpointError: there is none.
    """
    if format not in FORMATS:
        listed = ", ".join(FORMATS)
        raise CheckpointError(
            f"no format is called `{format}`.{did_you_mean(format, FORMATS)} Formats: {listed}."
        )
    return FORMATS[format]


def export_sae(
    sae: SAE, folder: Path, format: str, metadata: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """Write an SAE in a format and return notes on what the format could not keep.

    Raises:
        CheckpointError: the format has nothing equal to this SAE.
    """
    return get_format(format).save(sae, folder, metadata or {})


def export_checked(
    sae: SAE, out: Path, format: str, metadata: Mapping[str, Any]
) -> tuple[str, ...]:
    """Write an SAE in a format, and read it again to check that it is unchanged.

    Returns:
        notes on the properties that the format does not hold.

    Raises:
        ReseedError: the format cannot hold the SAE unchanged; the new folder is removed.
    """
    there = out.exists()
    try:
        notes = export_sae(sae, out, format, metadata)
        again = import_sae(out, format).sae
        difference = differ(sae, again)
        if difference:
            raise ReseedError(
                f"{format} cannot hold this SAE unchanged: the files differ in {difference}"
            )
    except BaseException:
        if not there:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return (*notes, *_forgotten(sae, again))


def _forgotten(sae: SAE, again: SAE) -> tuple[str, ...]:
    """Return a note on the settings that the new files do not hold."""
    before, after = sae.config.to_dict(), again.config.to_dict()
    # Two keys can give the number of latents; the exporter notes a changed architecture itself.
    unsaid = ("type", "num_latents", "expansion_factor", "decoder_init_norm")
    lost = [key for key, value in before.items() if key not in unsaid and after.get(key) != value]
    if not lost:
        return ()
    return (f"not kept, as the format has no such settings: sae.{', sae.'.join(lost)}",)


def _wanted(one: Format) -> str:
    return f"{one.name}: {' or '.join(' with '.join(layout) for layout in one.layouts)}"


def _describe(path: Path) -> str:
    if path.is_file():
        return "is not a file of a known format, or its companion files are missing"
    names = sorted(entry.name + "/" * entry.is_dir() for entry in path.iterdir())
    listed = first_few(names) if names else "nothing"
    return f"holds no SAE of a known format; it contains {listed}"


def _nested(path: Path, known: Any) -> str:
    """Name the folders up to two levels below ``path`` that have a known format."""
    if not path.is_dir():
        return ""
    found = []
    for folder in sorted(path.glob("*/")) + sorted(path.glob("*/*/")):
        one = next((one for one in known if one.recognises(folder)), None)
        if one is not None:
            found.append(f"{folder.relative_to(path)} ({one.name})")
    return f" Below it are {first_few(found)}: give one of them." if found else ""


TOLERANCE = 1e-5
"""Allowed error relative to the largest value: float32, with products in another order."""
FLIPPED = 1e-4
"""Fraction of the active latents that may differ: those at their threshold, or tied."""
_TOKENS = 64
_LENGTHS = (0.1, 1.0, 10.0)
"""Lengths of the inputs' deviations from b_dec, in units of max(‖b_dec‖, √D)."""


@torch.no_grad()
def differ(first: SAE, second: SAE) -> str:
    """Say in words where two SAEs differ; "" if they agree."""
    if (first.d_in, first.num_latents) != (second.d_in, second.num_latents):
        return "their sizes"
    for x in _inputs(first):
        a, b = first(x), second(x)
        tolerance = TOLERANCE * float(a.latents.abs().max())
        active = int(((a.latents != 0) | (b.latents != 0)).sum())
        off = (a.latents - b.latents).abs() > tolerance
        if int(off.sum()) > FLIPPED * active:
            return f"latents: {int(off.sum()):,} of {active:,} active ones"
        steady = ~off.any(1)  # the reconstruction of a token whose latents flipped differs too
        error = (a.reconstruction - b.reconstruction)[steady].abs()
        if error.numel() and float(error.max()) > TOLERANCE * float(a.reconstruction.abs().max()):
            return "reconstructions"
    return ""


def _inputs(sae: SAE) -> list[Float[Tensor, "tokens d_in"]]:
    generator = torch.Generator().manual_seed(0)
    centre = sae.b_dec.detach().to("cpu", torch.float32)
    length = max(float(centre.norm()), sae.d_in**0.5) / sae.d_in**0.5
    draws = [torch.randn(_TOKENS, sae.d_in, generator=generator) for _ in _LENGTHS]
    return [centre + scale * length * x for scale, x in zip(_LENGTHS, draws, strict=True)]
