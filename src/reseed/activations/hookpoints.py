"""Hookpoints: the places in a language model where activations are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from reseed.config import Config, setting
from reseed.errors import ConfigError, did_you_mean

SITES = ("resid_post", "mlp_out", "attn_out", "module")
_CHILDREN = {
    "mlp_out": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "attn_out": ("self_attn", "attention", "attn", "self_attention"),
}


@dataclass(frozen=True)
class HookpointConfig(Config, family="hookpoint"):
    """The site within a layer.

    ``resid_post`` is the residual stream after the block, ``mlp_out`` and ``attn_out`` the outputs
    of the block's MLP and attention, ``module`` the output of any module, given by its path.
    """

    site: str = setting("resid_post", choices=SITES)
    module: str | None = None
    """The module's path if ``site=module``, with ``*`` in place of the layer's number."""

    def validate(self) -> None:
        if (self.site == "module") != (self.module is not None):
            rule = "is required with" if self.site == "module" else "is only for"
            raise ConfigError(
                f"{{key}} {rule} hookpoint.site=module; got {self.module!r} with site={self.site}",
                "module",
            )


@dataclass(frozen=True)
class Hookpoint:
    """A site at a layer (0-based). Hashable: chunks are dictionaries keyed by hookpoint."""

    site: str
    layer: int
    module: str | None = None

    @classmethod
    def of(cls, config: HookpointConfig, layer: int) -> Hookpoint:
        return cls(config.site, layer, config.module)

    def __str__(self) -> str:
        if self.module is not None:
            return self.module.replace("*", str(self.layer))
        return f"{self.site}.{self.layer}"


def module_path(model: nn.Module, hookpoint: Hookpoint) -> str:
    """Return the path of the module whose output ``hookpoint`` reads.

    Raises:
        ConfigError: the model has no such module; the message names the nearest one.
    """
    if hookpoint.module is not None:
        path = str(hookpoint)
        names = [name for name, _ in model.named_modules() if name]
        if path not in names:
            raise ConfigError(
                f"{{key}}: the model has no module `{path}`.{did_you_mean(path, names)}",
                "hookpoint.module",
            )
        return path
    block = f"{blocks_path(model)}.{hookpoint.layer}"
    if hookpoint.site == "resid_post":
        return block
    children = [name for name, _ in model.get_submodule(block).named_children()]
    for name in _CHILDREN[hookpoint.site]:
        if name in children:
            return f"{block}.{name}"
    raise ConfigError(
        f"{{key}}: cannot tell which module of {block} is {hookpoint.site}; its modules are "
        f"{', '.join(children)}. Name it with hookpoint=module hookpoint.module=...",
        "hookpoint.site",
    )


def first_tensor(output: Any) -> Tensor:
    """Return the hidden states from a module's output: a tensor, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def blocks_path(model: nn.Module) -> str:
    """Return the path of the blocks: the outermost ModuleList with one entry per layer."""
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        raise ConfigError(
            "{key}: cannot find the model's blocks; name the module with hookpoint=module "
            "hookpoint.module=...",
            "hookpoint.site",
        )
    return min(lists, key=lambda name: name.count("."))
