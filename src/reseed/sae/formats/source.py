"""Sources of saved SAEs: a folder, a file, or a place on the hub, which is downloaded."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from reseed.sae.checkpoint import CheckpointError

HUB = "hub:"
MAIN = "main"
_HUB = re.compile(
    r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/@\s]+))?(?:/(?P<path>[^\s]+?))?/?"
)
_WEIGHTS = (".safetensors", ".npz", ".pt")
_SHOWN = 8  # at most so many folders in a message


@dataclass(frozen=True)
class HubPlace:
    """A place on the Hugging Face hub: ``hub:OWNER/NAME[@revision][/path]``."""

    repo: str
    revision: str = MAIN
    path: str = ""

    @classmethod
    def parse(cls, source: str) -> HubPlace:
        """Parse a source; raise `CheckpointError` if it does not have that form."""
        found = _HUB.fullmatch(source.removeprefix(HUB))
        if found is None or ".." in Path(found["path"] or "").parts:
            raise CheckpointError(
                f"a place on the hub is written {HUB}OWNER/NAME[@revision][/path]; got {source}"
            )
        return cls(found["repo"], found["revision"] or MAIN, found["path"] or "")

    def __str__(self) -> str:
        return f"{HUB}{self.repo}@{self.revision}" + (f"/{self.path}" if self.path else "")


def found_at(
    source: str | Path | None,
    repo: str | None = None,
    revision: str | None = None,
    path: str | None = None,
) -> Path:
    """Return the local folder or file of a source, downloaded if need be.

    Args:
        source: a path or ``hub:…``; None if ``repo`` is given.
        repo, revision, path: a place on the hub.

    Raises:
        CheckpointError: neither or both of ``source`` and ``repo`` are given, the path does not
            exist, or the download fails.
    """
    place = place_of(source, repo, revision, path)
    if isinstance(place, HubPlace):
        return download(place)[0]
    if not place.exists():
        raise CheckpointError(f"there is no folder {place}{_hint(str(source))}")
    return place


def place_of(
    source: str | Path | None,
    repo: str | None = None,
    revision: str | None = None,
    path: str | None = None,
) -> Path | HubPlace:
    """Return the local path or the place on the hub that a source names.

    Raises: see `found_at`.
    """
    if (source is None) == (repo is None):
        raise CheckpointError("give either a source or `repo` to say where the SAE is")
    if repo is not None:
        source = (
            f"{HUB}{repo}" + (f"@{revision}" if revision else "") + (f"/{path}" if path else "")
        )
        return HubPlace.parse(source)
    if isinstance(source, str) and source.startswith(HUB):
        place = HubPlace.parse(source)
        if revision is None:
            return place
        if place.revision not in (MAIN, revision):
            raise CheckpointError(
                f"{source} names revision {place.revision}, but `revision` is {revision}"
            )
        return HubPlace(place.repo, revision, place.path)
    if revision is not None or path is not None:
        raise CheckpointError(
            f"`revision` and `path` apply to the hub only; got the folder {source}"
        )
    return Path(str(source)).expanduser()


def download(place: HubPlace) -> tuple[Path, str]:
    """Return the local copy of a place on the hub, and its commit.

    Raises:
        CheckpointError: the hub cannot be reached and the local cache lacks the place, or the
            repository has no such path.
    """
    from huggingface_hub import snapshot_download

    wanted = {"revision": place.revision, "allow_patterns": [place.path, f"{place.path}/*"]}
    try:
        if not place.path:  # a repository may hold thousands of SAEs: take only its top level
            wanted["allow_patterns"] = _top(place)
        root = Path(snapshot_download(place.repo, **wanted))  # type: ignore[arg-type]
    except CheckpointError:
        raise
    except Exception as online:
        wanted.pop("allow_patterns")
        try:  # without a network, use an earlier download
            root = Path(snapshot_download(place.repo, local_files_only=True, **wanted))  # type: ignore[arg-type]
        except Exception:
            reason = (str(online).strip().splitlines() or [type(online).__name__])[0]
            raise CheckpointError(
                f"cannot get {place} from the hub, and it is not in the local cache: {reason}"
            ) from online
    found = root / place.path
    if not found.exists():
        raise CheckpointError(f"{place.repo} (revision {place.revision}) has no {place.path}")
    return found, root.name


def _top(place: HubPlace) -> list[str]:
    """Return the files at the top of a repository.

    Raises:
        CheckpointError: none of them are weights; the message lists folders that have some.
    """
    from huggingface_hub import HfApi

    names = HfApi().list_repo_files(place.repo, revision=place.revision)
    top = [name for name in names if "/" not in name]
    if not any(name.endswith(_WEIGHTS) for name in top):
        weights = (name for name in names if name.endswith(_WEIGHTS))
        folders = list(dict.fromkeys(name.rpartition("/")[0] for name in weights))
        listed = ", ".join(folders[:_SHOWN]) or "none"
        more = f" and {len(folders) - _SHOWN:,} more" if len(folders) > _SHOWN else ""
        raise CheckpointError(
            f"{place} has no SAE at its top level. Name a folder, as in {HUB}{place.repo}/"
            f"{folders[0] if folders else 'FOLDER'}; folders with weights: {listed}{more}"
        )
    return top


def _hint(source: str) -> str:
    """Suggest the place on the hub that a missing path may stand for."""
    if re.fullmatch(r"[\w-]+/[\w.-]+", source):
        return f"; for a repository on the hub write {HUB}{source}"
    return ""
