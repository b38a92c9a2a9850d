"""``reseed push RUN REPO``: push a trained SAE to the hub, with a card that describes it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from reseed.atomic import atomic_write_json, atomic_write_text
from reseed.cli.card import model_card
from reseed.cli.convert import FORMATS, Parser, check_new, written
from reseed.cli.errors import reported
from reseed.config import ConfigError, ReseedError

if TYPE_CHECKING:
    from reseed.runs import Run


def main(arguments: Sequence[str]) -> int:
    return reported(lambda: _main(arguments))


def parser() -> Parser:
    """Return the parser of the command's arguments."""
    made = Parser("reseed push", description=__doc__, allow_abbrev=False)
    made.add_argument("run", help="a run's folder")
    made.add_argument("repo", help="OWNER/NAME on the hub; created if necessary")
    made.add_argument("--to", default="reseed", choices=FORMATS, help="the format to write")
    made.add_argument("--path", default="", help="folder in the repository; by default its top")
    made.add_argument("--private", action="store_true", help="create a private repository")
    made.add_argument("--dry-run", metavar="OUT", help="write to the folder OUT, push nothing")
    return made


def _main(arguments: Sequence[str]) -> None:
    given = parser().parse_args(list(arguments))
    from reseed.console import say
    from reseed.runs import load_run
    from reseed.sae.formats.source import HubPlace

    HubPlace.parse("/".join(part for part in (given.repo, given.path) if part))
    run = load_run(given.run)
    if not run.finished:
        raise ReseedError(f"{run.path} is {run.status}: only a finished run is pushed")
    if found := run.record.get("pretrained"):
        raise ReseedError(f"{run.path} was not trained here, but read from {found['source']}")
    if given.dry_run:
        out = Path(given.dry_run)
        check_new(out)
        notes = make_folder(run, out, given.repo, given.path, given.to)
        where = f"{out}: what would be pushed to {given.repo}"
    else:
        with tempfile.TemporaryDirectory() as folder:
            notes = make_folder(run, Path(folder), given.repo, given.path, given.to)
            where = _upload(Path(folder), given.repo, given.path, given.private, run.id)
    say(where)
    for note in notes:
        say(f"  {note}")


def make_folder(run: Run, out: Path, repo: str, path: str, format: str) -> tuple[str, ...]:
    """Write the files to push: the SAE, its metrics, and README.md.

    Returns:
        notes on what the format does not keep.
    """
    from reseed.sae.checkpoint import read_metadata

    sae = run.sae()
    notes = written(sae, out, format, read_metadata(run.path))
    atomic_write_json(out / "metrics.json", run.metrics)
    place = "/".join(part for part in (repo, path) if part)
    atomic_write_text(out / "README.md", model_card(run, sae, place, format))
    return notes


def _upload(folder: Path, repo: str, path: str, private: bool, name: str) -> str:
    """Push a folder to the hub, and return a message with the commit."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=folder, path_in_repo=path or None, commit_message=name
        )
    except LocalTokenNotFoundError as error:
        raise ConfigError("you are not logged in to the hub: run `hf auth login`") from error
    except Exception as error:  # any error of the hub, the network, or a library below
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ReseedError(f"cannot push to {repo}: {reason}. Nothing was changed here.") from error
    return f"{repo}: pushed as commit {commit.oid}"
