"""Language models that are found and described, but not loaded.

`FoundModel` describes a model by its configuration and tokenizer alone, so that a wrong layer, site
or context length is refused before the weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.model_files import (
    check_architecture,
    check_tokenizer,
    foreign,
    load_trained,
    quiet,
    read_light,
    report_unused,
)
from reseed.activations.places import Place, read, watch
from reseed.activations.sites import (
    Sites,
    WithoutValues,
    blocks_path,
    find_sites,
)
from reseed.activations.source import ResolvedSource, SourceConfig
from reseed.config import setting
from reseed.errors import ConfigError, did_you_mean

_MOST_LAYERS = 10_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig(SourceConfig):
    """Base configuration of the language models (`model_source`)."""

    dtype: str = setting("float32", choices=tuple(DTYPES))
    """Precision of the forward pass and of the activations; part of the signature."""
    batch_sequences: int = setting(16, at_least=1)
    """Number of sequences in a forward pass; part of the signature, as it can change last bits."""
    attention: str = setting("auto", choices=("auto", "sdpa", "eager", "flash_attention_2"))
    """Implementation of attention; ``auto``: sdpa if the architecture has it, else eager."""

    def check_attention(self) -> None:
        """Raise `ConfigError` if the implementation of attention is not installed."""
        if self.attention == "flash_attention_2" and find_spec("flash_attn") is None:
            raise ConfigError("{key}=flash_attention_2 needs the package flash-attn", "attention")

    def with_attention(self, skeleton: nn.Module) -> Self:
        """Return the configuration with an implementation of attention that the model has.

        Raises:
            ConfigError: it lacks the one that is asked for.
        """
        kind: Any = type(skeleton)
        if self.attention == "auto":
            return replace(self, attention="sdpa" if kind._supports_sdpa else "eager")
        supported = {
            "sdpa": kind._supports_sdpa, "flash_attention_2": kind._supports_flash_attn
        }  # fmt: skip
        if not supported.get(self.attention, True):
            raise ConfigError(
                f"{{key}} must be auto or eager: {kind.__name__} does not support {self.attention}",
                "attention",
            )
        return self

    def weights_path(self, folder: Path) -> Path:
        """Return the folder or file of the weights; ``folder`` has the model's other files."""
        return folder


@dataclass(frozen=True)
class FoundModel(ResolvedSource):
    """A language model whose files are found and whose weights are not loaded.

    Attributes:
        config: the declared configuration, with the implementation of attention settled.
        folder: folder of its files.
        fingerprint: identifies weights and architecture, independently of the folder's name.
        label: short name for folders and tables.
        random_seed: seed of random weights that replace the trained ones; None for trained ones.
        origin: the file from which ``folder`` was made, for messages; None if the user named it.
        has_unembedding: False if the files are known to lack the unembedding.
    """

    config: ModelConfig
    folder: Path
    fingerprint: str
    label: str
    random_seed: int | None = None
    origin: Path | None = None
    has_unembedding: bool = True

    @property
    def location(self) -> Path:
        """The folder or file of the model that the user knows."""
        return self.origin or self.folder

    @cached_property
    def transformers_config(self) -> Any:
        """The transformers configuration of the architecture."""
        from transformers import AutoConfig

        found = read_light(AutoConfig, self.folder)
        check_architecture(found, self.location)
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        from transformers import AutoTokenizer

        found = read_light(AutoTokenizer, self.folder)
        rows = self.skeleton.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        check_tokenizer(found, rows, self.location)
        return found

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device: module names and shapes, without weights."""
        assert self.num_layers  # many layers take long to build, even without weights
        with foreign(self.location, "transformers cannot build the model of its config.json"):
            return _build_skeleton(self.transformers_config)

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        with foreign(self.location, "its config.json has no usable `num_hidden_layers`"):
            count = int(self.transformers_config.get_text_config().num_hidden_layers)
            if not 0 < count <= _MOST_LAYERS:
                raise ValueError(f"it must be from 1 to {_MOST_LAYERS:,}; got {count}")
            return count

    @property
    def context_length(self) -> int:
        """Maximum length of a sequence, in tokens."""
        with foreign(self.location, "its config.json has no usable `max_position_embeddings`"):
            text = self.transformers_config.get_text_config()
            limit = getattr(text, "max_position_embeddings", None)
            return int(limit) if limit else 1 << 62

    def check(self, hookpoint: Hookpoint) -> None:
        """Raise `ConfigError` if the model has no such layer, site or module."""
        if not 0 <= hookpoint.layer < self.num_layers:
            raise ConfigError(
                f"{{key}} must be from 0 to {self.num_layers - 1}: {self.label} has "
                f"{self.num_layers} layers; got {hookpoint.layer}",
                "layer",
            )
        self.place(hookpoint)

    def place(self, hookpoint: Hookpoint) -> Place:
        """Return the tensor of the forward pass that a hookpoint reads.

        Raises:
            ConfigError: the model has no such site or module.
        """
        if hookpoint.site == "module":
            path = str(replace(hookpoint, side="output"))
            names = [name for name, _ in self.skeleton.named_modules() if name]
            if path not in names:
                raise ConfigError(
                    f"{{key}}: the model has no module `{path}`.{did_you_mean(path, names)}",
                    "hookpoint.module",
                )
            return Place(path, hookpoint.side)
        if hookpoint.site == "embed":
            return self._embedding(hookpoint.layer)
        try:
            return self.sites(hookpoint.layer).place(hookpoint.site)
        except LookupError as error:
            raise self.no_site(hookpoint, str(error)) from None

    def _embedding(self, layer: int) -> Place:
        if layer != 0:
            raise ConfigError(
                f"{{key}} must be 0 with hookpoint=embed, which precedes layer 0; got {layer}",
                "layer",
            )
        table = self.skeleton.get_input_embeddings()  # type: ignore[operator]
        return Place(next(n for n, module in self.skeleton.named_modules() if module is table))

    def no_site(self, hookpoint: Hookpoint, reason: str) -> ConfigError:
        """Return the error about a site that a layer does not have."""
        return ConfigError(
            f"{{key}}={hookpoint.site}: layer {hookpoint.layer} of {self.label} has no such site: "
            f"{reason}. Name a module with hookpoint=module hookpoint.module=...",
            "hookpoint.site",
        )

    def site_identity(self, hookpoint: Hookpoint) -> dict[str, str]:
        """Return what a signature needs to know of a site besides its name."""
        # Until version 0.1, these sites were the outputs of the modules with these names.
        if hookpoint.site not in _FORMER:
            return {}
        place = self.place(hookpoint)
        block = f"{blocks_path(self.skeleton)}.{hookpoint.layer}"
        children = [name for name, _ in self.skeleton.get_submodule(block).named_children()]
        former = next((name for name in _FORMER[hookpoint.site] if name in children), "")
        return {} if place == Place(f"{block}.{former}") else {"place": str(place)}

    def sites(self, layer: int) -> Sites:
        """Return the sites of a layer, found in a forward pass without weights if possible."""
        if layer not in self._sites:
            block = f"{blocks_path(self.skeleton)}.{layer}"
            self._sites[layer] = self._without_weights(
                lambda model, tokens: find_sites(model, block, tokens)
            )
        return self._sites[layer]

    @cached_property
    def _sites(self) -> dict[int, Sites]:
        return {}

    def load(self) -> nn.Module:
        """Load the model with its weights, or with random ones, on the CPU."""
        if "_loaded_early" in vars(self):
            return vars(self).pop("_loaded_early")
        # The first use may be inside `inference_mode`, whose tensors do not support gradients.
        with torch.inference_mode(False):
            return self._loaded().eval().requires_grad_(False)

    def _loaded(self) -> nn.Module:
        dtype, attention = DTYPES[self.config.dtype], self.config.attention
        if self.random_seed is not None:
            return _build_untrained(self.transformers_config, self.random_seed, dtype, attention)
        weights = self.config.weights_path(self.folder)
        config = self.transformers_config if self.origin else None
        model, fit = load_trained(weights, dtype, attention, config)
        report_unused(fit, self.location, self.fingerprint)
        return model

    def d_in(self, hookpoint: Hookpoint) -> int:
        """Return the width of the activations at ``hookpoint``, from a forward pass."""
        if hookpoint not in self._widths:  # every job of a sweep calls this
            self._widths[hookpoint] = self._find_width(hookpoint)
        return self._widths[hookpoint]

    @cached_property
    def _widths(self) -> dict[Hookpoint, int]:
        return {}

    def _find_width(self, hookpoint: Hookpoint) -> int:
        place = self.place(hookpoint)
        shapes: list[torch.Size] = []

        def find(model: nn.Module, tokens: Tensor) -> None:
            # Without an explicit mask, transformers would read the tokens.
            inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            shapes.clear()
            if hookpoint.site != "module":
                shapes.append(read(model, [place], **inputs)[place].shape)
                return
            with watch(model, {place: lambda x: shapes.append(x.shape)}):
                model(**inputs, use_cache=False)

        self._without_weights(find)
        if len(shapes) != 1:
            raise ConfigError(
                f"{{key}}: {place} must be computed once; in one forward pass it is computed "
                f"{len(shapes)} times",
                "hookpoint.module",
            )
        (shape,) = shapes
        if len(shape) != 3 or shape[:2] != (2, 3):
            raise ConfigError(
                f"{{key}}: {place} must be one vector per token; for 2 sequences of 3 tokens it "
                f"has the shape {list(shape)}",
                "hookpoint.module",
            )
        return int(shape[-1])

    def _without_weights(self, use: Callable[[nn.Module, Tensor], T]) -> T:
        """Call ``use`` with the skeleton and 2 sequences of 3 tokens.

        A few architectures compute shapes from values, which the skeleton lacks, and raise one
        error or another. They get the model with its weights.
        """
        tokens = torch.zeros(2, 3, dtype=torch.long)
        try:
            with torch.no_grad(), WithoutValues():
                return use(self.skeleton, tokens.to("meta"))
        except LookupError as error:
            raise ConfigError(f"{{key}}: {error}", "hookpoint") from None
        except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
            with torch.no_grad(), foreign(self.location, "its model cannot compute activations"):
                return use(self._loaded_early, tokens)

    @cached_property
    def _loaded_early(self) -> nn.Module:
        return self.load()


T = TypeVar("T")
_FORMER = {
    "mlp_out": ("mlp", "feed_forward", "ffn", "block_sparse_moe"),
    "attn_out": ("self_attn", "attention", "attn", "self_attention"),
}


def _build_skeleton(config: Any) -> nn.Module:
    """Build the model of a transformers configuration on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(
            config,
            attn_implementation="eager",
            experts_implementation="batched_mm",  # shapes that depend on no values
        ).eval()


def _build_untrained(config: Any, seed: int, dtype: torch.dtype, attention: str) -> nn.Module:
    """Build the model with its architecture's random initial weights, embeddings included.

    The weights are sampled on the CPU in float32, so that they depend on neither device nor
    precision. The process's random state does not change.
    """
    from transformers import AutoModelForCausalLM

    with quiet(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # `fork_rng` forks only this generator
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention
        )
    for weights in model.parameters():  # not buffers: loading does not cast rotary angles either
        weights.data = weights.data.to(dtype)
    return model
