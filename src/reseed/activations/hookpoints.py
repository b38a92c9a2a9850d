"""Hookpoints: the activations of a language model that an SAE reads."""

from __future__ import annotations

from dataclasses import dataclass

from reseed.config import Config, setting
from reseed.errors import ConfigError

SITES = (
    "resid_post", "resid_pre", "resid_mid", "mlp_out", "attn_out", "attn_z", "embed", "module"
)  # fmt: skip


@dataclass(frozen=True)
class HookpointConfig(Config, family="hookpoint"):
    """The site within a layer.

    ``resid_pre``, ``resid_mid`` and ``resid_post`` are the residual stream before the block,
    between attention and MLP, and after the block. ``attn_out`` and ``mlp_out`` are what attention
    and MLP add to it, ``attn_z`` is the input of attention's output projection (the heads
    concatenated), ``embed`` the token embeddings, ``module`` the output or input of any module,
    given by its path.
    """

    site: str = setting("resid_post", choices=SITES)
    module: str | None = None
    """The module's path if ``site=module``, with ``*`` in place of the layer's number."""
    side: str = setting("output", choices=("output", "input"), neutral="output")
    """The module's output or its input."""

    def validate(self) -> None:
        if (self.site == "module") != (self.module is not None):
            rule = "is required with" if self.site == "module" else "is only for"
            raise ConfigError(
                f"{{key}} {rule} hookpoint.site=module; got {self.module!r} with site={self.site}",
                "module",
            )
        if self.side == "input" and self.site != "module":
            raise ConfigError(
                f"{{key}}=input is only for hookpoint.site=module; got site={self.site}", "side"
            )


@dataclass(frozen=True)
class Hookpoint:
    """A site at a layer (0-based). Hashable: chunks are dictionaries keyed by hookpoint."""

    site: str
    layer: int
    module: str | None = None
    side: str = "output"

    @classmethod
    def of(cls, config: HookpointConfig, layer: int) -> Hookpoint:
        return cls(config.site, layer, config.module, config.side)

    def __str__(self) -> str:
        if self.module is not None:
            path = self.module.replace("*", str(self.layer))
            return f"{path}.input" if self.side == "input" else path
        return f"{self.site}.{self.layer}"

    @property
    def key(self) -> list[str | int | None]:
        """The hookpoint in keys of caches."""
        # Until version 0.1, these were the outputs of the modules, which can be something else.
        added = ["added"] if self.site in ("mlp_out", "attn_out") else []
        side = ["input"] if self.side == "input" else []
        return [self.site, self.layer, self.module, *added, *side]
