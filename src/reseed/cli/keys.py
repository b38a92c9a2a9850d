"""Messages about keys that a configuration does not have, with the likely intended key."""

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
    """A key that does not exist.

    Attributes:
        key: the key as given, extended by the offending entry if the given value is a mapping.
        parent: the part of the key that exists; may be empty.
        name: the entry that ``parent`` does not have.
    """

    key: str
    parent: str
    name: str

    def __str__(self) -> str:
        return f"there is no key `{self.key}`."

    @classmethod
    def of(cls, error: Exception) -> MissingKey | None:
        """Return the missing key that an error of Hydra or OmegaConf is about, or None."""
        told = re.search(r"Could not override '([^']*)'", str(error))
        given = told[1] if told else ""
        # Only OmegaConf's part of the error says how much of the key exists.
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
    """Return the message about a key that the options chosen by ``overrides`` do not have."""
    try:
        base = loader.base(config_name, overrides)
    except HydraException:  # the group is missing, not a key in it
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
        return (
            f"{group}={option} has no key `{missing.key}`. Options with it: "
            f"{group}={', '.join(having)}."
        )
    known = [str(name) for name in parent if not str(name).startswith("_")]
    # Only the name is compared, because all keys of a group share the rest.
    close = nearest(missing.name, known)
    dotted = f"`{missing.parent}." if missing.parent else "`"
    return f"{missing}{close.replace('`', dotted, 1)}"


def _about_entry(missing: MissingKey) -> str:
    """Return the message about a mapping that does not have the entry."""
    simple = re.fullmatch(r"\w+", missing.name)
    entry = f".{missing.name}=..." if simple else f"={{{missing.name}: ...}}"
    return f"`{missing.parent}` has no entry `{missing.name}`: add one by +{missing.parent}{entry}"
