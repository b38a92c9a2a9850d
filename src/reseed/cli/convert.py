"""``reseed convert`` and ``reseed push``: write an SAE in another format, or push it to the hub."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from reseed.cli.arguments import convert_parser, push_parser
from reseed.cli.errors import run_and_report
from reseed.errors import ConfigError, ReseedError
from reseed.sae.formats import detect_format, export_checked
from reseed.sae.formats.files import HubPlace, fetch
from reseed.store.find import load_run
from reseed.study.publish import upload, write_published
from reseed.system.console import say


def main(arguments: Sequence[str]) -> int:
    return run_and_report(lambda: _main(arguments))


def _main(arguments: Sequence[str]) -> None:
    given = convert_parser().parse_args(list(arguments))
    _check_new(Path(given.out))
    path = fetch(given.source, revision=given.revision)
    source = detect_format(path, given.format)
    found = source.load(path)
    if found.transcoder:
        raise ReseedError(
            f"{given.source} is a transcoder: written as an SAE, it would wrongly be taken to "
            "reconstruct its input"
        )
    notes = export_checked(found.sae, Path(given.out), given.to, found.metadata)
    say(f"{given.out}: {found.sae.config.name}, {found.sae.num_latents:,} latents of width "
        f"{found.sae.d_in:,}, from {source.name} to {given.to}")  # fmt: skip
    for note in (*found.notes, *notes):
        say(f"  {note}")


def push(arguments: Sequence[str]) -> int:
    """Push a run's SAE to the hub, with a card that describes it."""
    return run_and_report(lambda: _push(arguments))


def _push(arguments: Sequence[str]) -> None:
    given = push_parser().parse_args(list(arguments))
    HubPlace.parse("/".join(part for part in (given.repo, given.path) if part))
    run = load_run(given.run)
    if not run.finished:
        raise ReseedError(f"{run.path} is {run.status}: only a finished run is pushed")
    if found := run.record.get("pretrained"):
        raise ReseedError(f"{run.path} was not trained here, but read from {found['source']}")
    if given.dry_run:
        out = Path(given.dry_run)
        _check_new(out)
        notes = write_published(run, out, given.repo, given.path, given.to)
        where = f"{out}: the files that would be pushed to {given.repo}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            notes = write_published(run, Path(folder), given.repo, given.path, given.to)
            where = upload(Path(folder), given.repo, given.path, given.private, run.id)
    say(where)
    for note in notes:
        say(f"  {note}")


def _check_new(out: Path) -> None:
    """Raise `ConfigError` if ``out`` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not overwritten: name a new folder")
