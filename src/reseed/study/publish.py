"""Publication of a run's SAE: its files in a format, with a card, on the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reseed.errors import ConfigError, ReseedError
from reseed.report.markup import markdown_block, markdown_code, markdown_text
from reseed.sae.base import SAE
from reseed.sae.checkpoint import load_sae, read_metadata
from reseed.sae.formats import export_checked
from reseed.store.runs import Run
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


def write_published(run: Run, out: Path, repo: str, path: str, format: str) -> tuple[str, ...]:
    """Write the files to push: the SAE, its metrics, and README.md.

    Returns:
        notes on the properties that the format does not hold.
    """
    sae = load_sae(run.path)
    notes = export_checked(sae, out, format, read_metadata(run.path))
    atomic_write_json(out / "metrics.json", run.metrics)
    place = "/".join(part for part in (repo, path) if part)
    atomic_write_text(out / "README.md", model_card(run, sae, place, format))
    return notes


def upload(folder: Path, repo: str, path: str, private: bool, name: str) -> str:
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
    own = _USAGE[format].format(repo=repo, path=f", hookpoint={json.dumps(path)}" if path else "")
    again = f"\n\nIn the format of {format}:\n\n{markdown_block(own, 'python')}" if own else ""
    loading = (
        f"import reseed\n\nsae = reseed.load_sae({json.dumps(f'hub:{place}')})\n"
        f"out = sae(x)  # out.latents, out.reconstruction; x: [..., {sae.d_in}]"
    )
    hook = markdown_text(e["hookpoint"]["module"] or e["hookpoint"]["site"])
    model, dataset, sparsity = (
        markdown_text(str(name))
        for name in (labels["model"], labels["dataset"], record["sparsity"])
    )
    return f"""\
---
library_name: reseed
tags:
- sparse-autoencoder
- interpretability
---
# {sae.config.name} on {model}, {hook} of layer {e["layer"]}

A sparse autoencoder with {sae.num_latents:,} latents for activations of width {sae.d_in:,} \
({sparsity}), trained on {record["tokens"]:,} tokens of {dataset} with seed {e["seed"]}. It takes \
raw activations. The signature of its run is {markdown_code(run.signature)}.

{markdown_block(loading, "python")}{again}

Another seed finds other latents: `reseed run comparison=seeds` measures how many it has in common.

## On {run.metrics["tokens"]:,} held-out tokens

{_table(_METRICS, run.metrics)}

## Settings

| | |
| :-- | :-- |
{_settings("sae", record["identity"]["sae"])}
{_settings("training", record["identity"]["training"])}
| dataset.context_length | {markdown_text(str(e["dataset"].get("context_length", "–")))} |

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
    return "\n".join(
        f"| {group}.{key} | {markdown_text(str(value))} |" for key, value in shown.items()
    )
