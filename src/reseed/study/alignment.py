"""Bases of the language models of a comparison: refused pairs, and the maps between them.

SAEs of one model have one basis, whatever their hookpoint in the residual stream. Two models with
different weights have unrelated bases even at equal width (arXiv 2605.24577), so that cosines of
their rows mean nothing; `comparison.align` says what is done with such pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from reseed.compare.alignment import (
    MARGIN,
    MEASURED,
    Alignment,
    TooFewTokensError,
    fit_maps,
    needed_tokens,
)
from reseed.compare.config import ALIGN, ComparisonConfig
from reseed.compare.dictionary import DIFFERENT_MODELS, Dictionary
from reseed.config import digest
from reseed.errors import ConfigError, ReseedError
from reseed.experiment.resolve import Resolved
from reseed.store.runs import Run
from reseed.study.held_out import (
    held_out_chunks,
    held_out_part,
    runs_by_activations,
    token_mismatch,
)
from reseed.system.console import counted, say
from reseed.train.config import RuntimeConfig

KEY = "comparison.align"
_MOST = 4
"""Maximum number of tokens of a map, as a multiple of the minimum."""
_DIRECTIONS = ("seed", "dictionary", "num_features", "d_in")
"""Settings of a world that determine the directions of its features."""
_GENERATED = "generated"
"""Data set of SAEs of a world."""
_NAMES = ("model", "model_name", "lm_name")
"""Entries of the files of SAEs that name the language model."""


def basis_of(identity: Mapping[str, Any]) -> str:
    """Return a name for the basis of the activations that a run reads: of the model's weights, or
    of the world's directions. It begins with "activations" if the model is unknown."""
    prints = identity["fingerprints"]
    for kind in ("model", "activations"):
        if kind in prints:
            return f"{kind}:{prints[kind]}"
    world = {name: identity["model"].get(name) for name in _DIRECTIONS}
    return f"world:{json.dumps(world)}"


def same_basis(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool | None:
    """Return whether two runs, given by their identities, have one basis; None: unknown, because
    stored activations do not name their model."""
    both = basis_of(a), basis_of(b)
    if both[0] == both[1]:
        return True
    return None if any(one.startswith("activations:") for one in both) else False


def same_model(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool | None:
    """Return whether two SAEs are of one language model by the metadata of their files; None:
    unknown."""
    known = [x.get("dataset") != "stored" for x in (a, b)]  # stored activations name no model
    prints = [x.get("model_fingerprint") for x in (a, b)]
    if all(known) and all(prints):
        worlds = all(x.get("dataset") == _GENERATED for x in (a, b))
        # Two worlds may have the same directions; their files do not name these.
        return prints[0] == prints[1] or (None if worlds else False)
    names = [next((str(x[key]) for key in _NAMES if x.get(key)), "unknown") for x in (a, b)]
    if not all(known) or "unknown" in names:
        return None
    # Gaussian draws with a model's moments have its basis.
    short = [name.rpartition("/")[2].lower().removesuffix("+gaussian") for name in names]
    return short[0] == short[1]


def check_bases(
    first: Resolved, other: Resolved, places: tuple[str, str], settings: ComparisonConfig
) -> str:
    """Check that two runs of a cell can be compared as ``comparison.align`` says.

    Args:
        places: the runs' values of the paired axes, for messages.

    Returns:
        a notice if it is unknown whether the runs have one basis, else "".

    Raises:
        ConfigError: it says nothing, and the runs are of two models; or it needs what they lack.
    """
    both = first.identity, other.identity
    named = [f"{place} ({x.model_label})" for place, x in zip(places, (first, other), strict=True)]
    if first.pretrained and other.pretrained:
        said = (first.pretrained.metadata, other.pretrained.metadata)
        check_named_models(said, (first.pretrained.source, other.pretrained.source), settings)
    same = same_basis(*both) if first.d_in == other.d_in else False
    if same or settings.align == "identity":
        return ""
    reason = token_mismatch(both)
    if first.d_in != other.d_in and settings.align == "procrustes":
        raise ConfigError(
            f"{{key}}=procrustes needs models of one width, as an orthogonal map has; {named[0]} "
            f"has `d_in`={first.d_in}, {named[1]} has {other.d_in}. With {{key}}=activations their "
            "weights are not compared",
            KEY,
        )
    if first.d_in != other.d_in:
        return ""
    if settings.align is None and same is None:
        return (
            "notice: stored activations do not name their model, so that nothing can check that "
            f"those of {named[0]} and {named[1]} are of one model. SAEs of different models have "
            f"no common basis, and cosines of their rows mean nothing ({KEY})"
        )
    if settings.align is None:
        raise ConfigError(_unset(named, first.d_in, reason), KEY)
    if not reason and settings.align == "activations" and not settings.activation_tokens:
        reason = "comparison.activation_tokens=0 switches that off"
    if reason:
        raise ConfigError(
            f"{{key}}={settings.align} needs the activations of {named[0]} and {named[1]} on the "
            f"same tokens, and here {reason}",
            KEY,
        )
    if settings.align == "procrustes":
        _check_number(min((first, other), key=_held_out), named)
    return ""


def _held_out(one: Resolved) -> int:
    return one.experiment.dataset.held_out_tokens


def _check_number(fewest: Resolved, named: Sequence[str]) -> None:
    needed, there = needed_tokens(fewest.d_in), _held_out(fewest)
    if there < needed:
        raise ConfigError(
            f"{{key}} (={there:,}) must be at least {needed:,} with {KEY}=procrustes: the map "
            f"between {named[0]} and {named[1]} has {fewest.d_in} dimensions, and is fitted on 20 "
            f"tokens for each; one in {MEASURED} tokens measures it, and {MARGIN} times as many "
            "are planned, because tokens of massive norm are left out",
            "dataset.held_out_tokens",
        )


def _unset(named: Sequence[str], d_in: int, reason: str) -> str:
    choices = "".join(f"\n  {KEY}={name}: {meaning}" for name, meaning in ALIGN.items())
    lacking = f"\nHere only identity is possible, because {reason}." if reason else ""
    return (
        f"{{key}} is required: {named[0]} and {named[1]} are different models. Their bases are "
        f"unrelated even though both have `d_in`={d_in}, so cosines of their rows mean nothing. "
        "Choose one, or compare runs within each model (comparison.pair_by=seed):"
        f"{choices}{lacking}"
    )


def check_named_models(
    metadata: Sequence[Mapping[str, Any]], sources: Sequence[str], settings: ComparisonConfig
) -> str:
    """Check by their files that existing SAEs are of one language model.

    Returns:
        a notice if the files of some do not name it, else "".

    Raises:
        ConfigError: the files of two name different ones, and ``comparison.align`` is not identity.
    """
    if settings.align == "identity":
        return ""
    every = list(zip(metadata, sources, strict=True))
    for (a, first), (b, other) in combinations(every, 2):
        if same_model(a, b) is False:
            raise ConfigError(
                f"{{key}}={settings.align or 'null'}: {first} is an SAE of {_name(a)}, {other} of "
                f"{_name(b)}, by their files. Different models have unrelated bases, so that "
                "cosines of the rows mean nothing. Give {key}=identity if both names mean one "
                "model, or if one is a checkpoint or fine-tune of the other. The other values "
                "need the activations of both models, so they are for SAEs that reseed trains",
                KEY,
            )
    unknown = [source for one, source in every if same_model(one, one) is None]
    if not unknown and all(same_model(a, b) for a, b in combinations(metadata, 2)):
        return ""
    if not unknown:
        return (
            "notice: the files of these SAEs name different worlds, but not the directions of "
            "their features, so that nothing can check that these are the same. SAEs of worlds "
            "with different directions have no common basis, and cosines of their rows mean nothing"
        )
    return (
        f"notice: the files of {', '.join(unknown)} do not name a language model, so that nothing "
        "can check that all SAEs are of one. SAEs of different models have no common basis, and "
        "cosines of their rows mean nothing"
    )


def _name(metadata: Mapping[str, Any]) -> str:
    name = next((str(metadata[key]) for key in _NAMES if metadata.get(key)), "a model")
    # The kind of the weights, such as random_weights-seed0, precedes their hash.
    kind, dash, own = str(metadata.get("model_fingerprint") or "").rpartition("-")
    return f"{name} (weights {kind}{dash}{own[:8]})" if own else name


_fitted: dict[str, dict[tuple[int, int], Alignment]] = {}
"""The maps of the last cell, by what they depend on: the cells of a study often need the same."""


def aligned(
    runs: Sequence[Run],
    trained: Sequence[Dictionary],
    settings: ComparisonConfig,
    runtime: RuntimeConfig,
) -> tuple[list[Dictionary], dict[tuple[int, int], Alignment]]:
    """Return the dictionaries with their bases, and the maps between them, as
    ``comparison.align`` says.

    Raises:
        ReseedError: it says nothing, and two runs are of different models.
        ConfigError: a model or the data are not found.

    If tokens are lacking for a map, weights of different models are not compared, and the
    dictionaries have the reason.
    """
    identities = [run.record["identity"] for run in runs]
    pairs = [
        (s, t)
        for s, t in combinations(range(len(runs)), 2)
        if trained[s].d_in == trained[t].d_in and not same_basis(identities[s], identities[t])
    ]
    own_bases = [replace(x, basis=basis_of(i)) for x, i in zip(trained, identities, strict=True)]
    if settings.align == "activations":
        return own_bases, {}
    if settings.align == "procrustes" and pairs:
        try:
            return list(trained), _fit(runs, pairs, settings, runtime)
        except TooFewTokensError as error:
            say(f"  weights of different models are not compared: {error}")
            reason = f"{DIFFERENT_MODELS}, and {error}"
            return [replace(x, incompatible=reason) for x in own_bases], {}
    for s, t in pairs:
        if settings.align is None and same_basis(identities[s], identities[t]) is False:
            named = [f"{run.id} ({run.record['labels']['model']})" for run in (runs[s], runs[t])]
            text = _unset(named, trained[s].d_in, token_mismatch([identities[s], identities[t]]))
            raise ReseedError(text.format(key=KEY))
    return list(trained), {}


def _fit(
    runs: Sequence[Run],
    pairs: Sequence[tuple[int, int]],
    settings: ComparisonConfig,
    runtime: RuntimeConfig,
) -> dict[tuple[int, int], Alignment]:
    """Fit the maps between the runs of some pairs, one for each pair of places."""
    groups, reads = runs_by_activations(runs)
    wanted = sorted({(min(reads[s], reads[t]), max(reads[s], reads[t])) for s, t in pairs})
    d_in = max(runs[s].record["d_in"] for s, _ in pairs)
    tokens = min(run.record["experiment"]["dataset"]["held_out_tokens"] for run in runs)
    tokens = min(tokens, _MOST * needed_tokens(d_in))
    read = [held_out_part(own[0].record["identity"]) for own in groups]
    key = digest({"read": read, "pairs": wanted, "tokens": tokens, "seed": settings.null_seed})
    if key not in _fitted:
        say(f"  fitting {counted(len(wanted), 'map')} between models on {tokens:,} tokens")
        untrained = [
            i
            for i, own in enumerate(groups)
            if own[0].record["identity"].get("surrogate", "none") == "none"
        ]
        _fitted.clear()
        _fitted[key] = fit_maps(
            [held_out_chunks(own, tokens, runtime)[0] for own in groups],
            wanted,
            tokens,
            untrained={
                i: held_out_chunks(groups[i], tokens, runtime, "random_weights")[0]
                for i in untrained
            },
            seed=settings.null_seed,
        )
    found = _fitted[key]
    return {
        (s, t): found[reads[s], reads[t]]
        if (reads[s], reads[t]) in found
        else found[reads[t], reads[s]].reversed()
        for s, t in pairs
    }
