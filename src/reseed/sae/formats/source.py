"""Where a saved SAE is: a folder, a file, or a place on the hub, which is downloaded."""

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
_SHOWN = 8  # folders in a message


@dataclass(frozen=True)
class HubPlace:
    """``hub:OWNER/NAME[@revision][/path]``."""

    repo: str
    revision: str = MAIN
    path: str = ""

    @classmethod
    def parse(cls, source: str) -> HubPlace:
        """Raises `CheckpointError` where it is not of that form."""
        found = _HUB.fullmatch(source.removeprefix(HUB))
        if found is None or ".." in Path(found["path"] or "").parts:
            raise CheckpointError(
                f"a place on the hub is {HUB}OWNER/NAME[@revision][/path]; got {source}"
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
    """The local folder or file of a source, downloaded if need be.

    Args:
        source: a path, or ``hub:…``; None where ``repo`` is given.
        repo, revision, path: a place on the hub.

    Raises:
        CheckpointError: nothing (or too much) is named, or it cannot be had.
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
    """What a source means.

    Raises: see `found_at`.
    """
    if (source is None) == (repo is None):
        raise CheckpointError("name either a source or `repo`: where is the SAE?")
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
            raise CheckpointError(f"{source} is of {place.revision}, and `revision` is {revision}")
        return HubPlace(place.repo, revision, place.path)
    if revision is not None or path is not None:
        raise CheckpointError(f"`revision` and `path` are for the hub; got the folder {source}")
    return Path(str(source)).expanduser()


def download(place: HubPlace) -> tuple[Path, str]:
    """The local copy of a place on the hub, and the commit that it is of.

    Raises:
        CheckpointError: the hub cannot be reached and it is not in the local cache, or there is no
            such path.
    """
    from huggingface_hub import snapshot_download

    wanted = {"revision": place.revision, "allow_patterns": [place.path, f"{place.path}/*"]}
    try:
        if not place.path:  # some repositories hold thousands of SAEs
            wanted["allow_patterns"] = _top(place)
        root = Path(snapshot_download(place.repo, **wanted))  # type: ignore[arg-type]
    except CheckpointError:
        raise
    except Exception as online:
        wanted.pop("allow_patterns")
        try:  # without a network, what was downloaded before is as good
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
    """The files at the top of a repository.

    Raises:
        CheckpointError: no weights are among them; with the folders that have some.
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
            f"{place} has no SAE at its top. Name a folder, as in {HUB}{place.repo}/"
            f"{folders[0] if folders else 'FOLDER'}; with weights are {listed}{more}"
        )
    return top


def _hint(source: str) -> str:
    """What may have been meant by a path that is not there."""
    if re.fullmatch(r"[\w-]+/[\w.-]+", source):
        return f"; on the hub it would be {HUB}{source}"
    return ""
