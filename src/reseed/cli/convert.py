"""``reseed convert SOURCE --to FORMAT OUT``: convert an SAE to another library's format."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reseed.cli.arguments import convert_parser
from reseed.cli.errors import run_and_report
from reseed.errors import ConfigError, ReseedError
from reseed.sae.base import SAE
from reseed.sae.formats import detect_format, differ, export_sae, import_sae
from reseed.sae.formats.files import fetch
from reseed.system.console import say


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> None:
    given = convert_parser().parse_args(list(arguments))
    check_new(Path(given.out))
    path = fetch(given.source, revision=given.revision)
    source = detect_format(path, given.format)
    found = source.load(path)
    if found.transcoder:
        raise ReseedError(
            f"{given.source} is a transcoder: written as an SAE, it would wrongly be taken to "
            "reconstruct its input"
        )
    notes = write_checked(found.sae, Path(given.out), given.to, found.metadata)
    say(f"{given.out}: {found.sae.config.name}, {found.sae.num_latents:,} latents of width "
        f"{found.sae.d_in:,}, from {source.name} to {given.to}")  # fmt: skip
    for note in (*found.notes, *notes):
        say(f"  {note}")


def check_new(out: Path) -> None:
    """Raise `ConfigError` if something would be overwritten."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not overwritten: name a new folder")


def write_checked(sae: SAE, out: Path, format: str, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Write an SAE in a format, and read it again to check that it is unchanged.

    Returns:
        notes on what the format does not keep.

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
                f"{format} cannot hold this SAE unchanged: what is written differs in {difference}"
            )
    except BaseException:
        if not there:
            shutil.rmtree(out, ignore_errors=True)
        raise
    return (*notes, *_forgotten(sae, again))


def _forgotten(sae: SAE, again: SAE) -> tuple[str, ...]:
    """Return a note on the settings that the new files do not hold."""
    before, after = sae.config.to_dict(), again.config.to_dict()
    # Either of two keys may give the width; the exporter notes a changed architecture itself.
    unsaid = ("type", "num_latents", "expansion_factor", "decoder_init_norm")
    lost = [key for key, value in before.items() if key not in unsaid and after.get(key) != value]
    if not lost:
        return ()
    return (f"how it was trained is not kept: sae.{', sae.'.join(lost)}",)
