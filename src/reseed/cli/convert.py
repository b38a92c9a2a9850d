"""``reseed convert`` and ``reseed push``: write an SAE in another format, or push it to the hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reseed.cli.arguments import convert_parser, push_parser
from reseed.cli.errors import run_and_report
from reseed.errors import ConfigError, ReseedError
from reseed.sae.base import SAE
from reseed.sae.checkpoint import load_sae, read_metadata
from reseed.sae.formats import detect_format, differ, export_sae, import_sae
from reseed.sae.formats.files import HubPlace, fetch
from reseed.store.find import load_run
from reseed.store.runs import Run
from reseed.system.console import say
from reseed.system.environment import VERSION
from reseed.system.files import atomic_write_json, atomic_write_text

_METRICS = {
    "fvu": "fraction of variance unexplained",
    "l0": "number of latents active per token",
    "cosine": "cosine of reconstruction and activation",
    "live_fraction": "fraction of latents that fire at least 10 times",
    "dead_fraction": "fraction of latents that are dead at the end of training",
}
_USAGE = {
    "sparsify": (
        'from sparsify import SparseCoder\n\nsae = SparseCoder.load_from_hub("{repo}"{path})'
    ),
    "saelens": 'from sae_lens import SAE\n\nsae = SAE.load_from_disk("FOLDER")',
    "dictionary_learning": (
        "from dictionary_learning.utils import load_dictionary\n\n"
        'sae, config = load_dictionary("FOLDER", device="cpu")'
    ),
    "gemma_scope": 'import numpy as np\n\nparams = np.load("FOLDER/params.npz")',
    "reseed": "",
}


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
    """Raise `ConfigError` if ``out`` exists and is not an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already and is not overwritten: name a new folder")


def write_checked(sae: SAE, out: Path, format: str, metadata: Mapping[str, Any]) -> tuple[str, ...]:
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


def model_card(run: Run, sae: SAE, place: str, format: str) -> str:
    """Return the card: a description of the SAE, code that loads it, its metrics and settings.

    Args:
        place: ``OWNER/NAME[/path]``, its place on the hub.
        format: the format of its files.
    """
    record = run.record
    e, labels = record["experiment"], record["labels"]
    repo, _, path = place.partition("/")[2].partition("/")
    repo = f"{place.partition('/')[0]}/{repo}"
    own = _USAGE[format].format(repo=repo, path=f', hookpoint="{path}"' if path else "")
    again = f"\n\nIn the format of {format}:\n\n```python\n{own}\n```" if own else ""
    hook = e["hookpoint"]["module"] or e["hookpoint"]["site"]
    return f"""\
---
library_name: reseed
tags:
- sparse-autoencoder
- interpretability
---
# {sae.config.name} on {labels["model"]}, {hook} of layer {e["layer"]}

A sparse autoencoder with {sae.num_latents:,} latents for activations of width {sae.d_in:,} \
({record["sparsity"]}), trained on {record["tokens"]:,} tokens of {labels["dataset"]} with seed \
{e["seed"]}. It takes raw activations. The signature of its run is `{run.signature}`.

```python
import reseed

sae = reseed.load_sae("hub:{place}")
out = sae(x)  # out.latents, out.reconstruction; x: [..., {sae.d_in}]
```{again}

Another seed finds other latents: `reseed run comparison=seeds` measures how many it has in common.

## On {run.metrics["tokens"]:,} held-out tokens

{_table(_METRICS, run.metrics)}

## Settings

| | |
| :-- | :-- |
{_settings("sae", record["identity"]["sae"])}
{_settings("training", record["identity"]["training"])}
| dataset.context_length | {e["dataset"].get("context_length", "–")} |

Made with reseed {VERSION}.
"""


def _table(names: Mapping[str, str], metrics: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {metrics[name]:.4g} | {what} |"
        for name, what in names.items()
        if metrics.get(name) is not None
    ]
    return "\n".join(["| | | |", "| :-- | --: | :-- |", *rows])


def _settings(group: str, values: Mapping[str, Any]) -> str:
    """Return a row for each setting that enters the signature and has a value."""
    shown = {key: value for key, value in values.items() if value is not None and key != "type"}
    return "\n".join(f"| {group}.{key} | {value} |" for key, value in shown.items())


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
        check_new(out)
        notes = make_folder(run, out, given.repo, given.path, given.to)
        where = f"{out}: the files that would be pushed to {given.repo}"
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
        notes on the properties that the format does not hold.
    """

    sae = load_sae(run.path)
    notes = write_checked(sae, out, format, read_metadata(run.path))
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
