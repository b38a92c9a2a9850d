"""Keys that a configuration does not have: which is meant, and what to say of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from reseed.config import nearest

if TYPE_CHECKING:
    from reseed.cli.loading import OnceLoader


@dataclass(frozen=True)
class MissingKey:
    """A key that there is not.

    Attributes:
        key: as it was given, or with the entry of the given value that there is no key for.
        parent: what exists of it; may be empty.
        name: what ``parent`` does not have.
    """

    key: str
    parent: str
    name: str

    def __str__(self) -> str:
        return f"there is no key `{self.key}`."

    @classmethod
    def of(cls, error: Exception) -> MissingKey | None:
        """The key that an error of Hydra or OmegaConf is about, if it is about a missing one."""
        told = re.search(r"Could not override '([^']*)'", str(error))
        given = told[1] if told else ""
        # OmegaConf alone tells how much of the key exists, and of entries of a given value.
        inner = re.search(
            r"Key '(.*)' is not in struct\s+full_key: (.*)", f"{error}\n{error.__cause__}"
        )
        if inner:
            name, full = inner[1], inner[2].strip()
            parent = full.removesuffix(name).removesuffix(".")
            return cls(given if given.startswith(full) else full, parent, name)
        if not given:
            return None
        parent, _, name = given.rpartition(".")
        return cls(given, parent, name)


def about_missing(
    missing: MissingKey, loader: OnceLoader, config_name: str, overrides: Sequence[str]
) -> str:
    """What to say of a key that is not in the options which ``overrides`` choose."""
    try:
        base = loader.base(config_name, overrides)
    except HydraException:  # it is a group that is missing, not a key in one
        return str(missing)
    parent = OmegaConf.select(base, missing.parent) if missing.parent else base
    if not isinstance(parent, DictConfig):
        return str(missing)
    group, _, rest = missing.key.partition(".")
    if "." in missing.parent and "_target_" not in parent:  # names are free: axes, arms
        return _about_entry(missing)
    option = base.hydra.runtime.choices.get(group) if rest else None
    having = loader.options_with(missing.key, config_name, overrides) if option else []
    if having:
        return f"{group}={option} has no key `{missing.key}`. With it: {group}={', '.join(having)}."
    known = [str(name) for name in parent if not str(name).startswith("_")]
    # The name alone is compared: keys of one group are alike in the rest.
    close = nearest(missing.name, known)
    dotted = f"`{missing.parent}." if missing.parent else "`"
    return f"{missing}{close.replace('`', dotted, 1)}"


def _about_entry(missing: MissingKey) -> str:
    """What to say of a mapping without such an entry."""
    simple = re.fullmatch(r"\w+", missing.name)
    entry = f".{missing.name}=..." if simple else f"={{{missing.name}: ...}}"
    return f"`{missing.parent}` has no entry `{missing.name}`: add one by +{missing.parent}{entry}"
