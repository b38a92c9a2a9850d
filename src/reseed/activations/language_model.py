"""Language models that compute activations: any causal LM of transformers.

`FoundModel` describes a model by its configuration and tokenizer alone, so that a wrong layer or
context length is refused before the weights are loaded. `LanguageModel` loads the weights on first
use, and never if all activations are on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reseed.activations.hookpoints import Hookpoint, first_tensor, module_path
from reseed.activations.model_files import (
    check_architecture,
    check_tokenizer,
    foreign,
    load_trained,
    quiet,
    read_light,
    report_unused,
)
from reseed.activations.source import ResolvedSource, SourceConfig
from reseed.config import setting
from reseed.errors import ConfigError

_MOST_LAYERS = 10_000
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ModelConfig(SourceConfig):
    """Base configuration of the language models (`model_source`)."""

    dtype: str = setting("float32", choices=tuple(DTYPES))
    """Precision of the forward pass and of the activations; part of the signature."""
    batch_sequences: int = setting(16, at_least=1)
    """Number of sequences in a forward pass; part of the signature, as it can change last bits."""
    attention: str = setting("sdpa", choices=("sdpa", "eager", "flash_attention_2"))

    def check_attention(self) -> None:
        """Raise `ConfigError` if the implementation of attention is not installed."""
        if self.attention == "flash_attention_2" and find_spec("flash_attn") is None:
            raise ConfigError("{key}=flash_attention_2 needs the package flash-attn", "attention")

    def weights_path(self, folder: Path) -> Path:
        """Return the folder or file of the weights; ``folder`` has the model's other files."""
        return folder


@dataclass(frozen=True)
class FoundModel(ResolvedSource):
    """A language model whose files are found and whose weights are not loaded.

    Attributes:
        config: the declared configuration.
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
    def place(self) -> Path:
        """The folder or file of the model that the user knows."""
        return self.origin or self.folder

    @cached_property
    def transformers_config(self) -> Any:
        """The transformers configuration of the architecture."""
        from transformers import AutoConfig

        found = read_light(AutoConfig, self.folder)
        check_architecture(found, self.place)
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer."""
        from transformers import AutoTokenizer

        found = read_light(AutoTokenizer, self.folder)
        rows = self.skeleton.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        check_tokenizer(found, rows, self.place)
        return found

    @cached_property
    def skeleton(self) -> nn.Module:
        """The model on the meta device: module names and shapes, without weights."""
        assert self.num_layers  # many layers take long to build, even without weights
        with foreign(self.place, "transformers cannot build the model of its config.json"):
            return _build_skeleton(self.transformers_config)

    @property
    def num_layers(self) -> int:
        """Number of transformer blocks."""
        with foreign(self.place, "its config.json has no usable `num_hidden_layers`"):
            count = int(self.transformers_config.get_text_config().num_hidden_layers)
            if not 0 < count <= _MOST_LAYERS:
                raise ValueError(f"it must be from 1 to {_MOST_LAYERS:,}; got {count}")
            return count

    @property
    def context_length(self) -> int:
        """Maximum length of a sequence, in tokens."""
        with foreign(self.place, "its config.json has no usable `max_position_embeddings`"):
            text = self.transformers_config.get_text_config()
            limit = getattr(text, "max_position_embeddings", None)
            return int(limit) if limit else 1 << 62

    def check(self, hookpoint: Hookpoint) -> None:
        """Raise `ConfigError` if the model has no such layer or module."""
        if not 0 <= hookpoint.layer < self.num_layers:
            raise ConfigError(
                f"{{key}} must be from 0 to {self.num_layers - 1}: {self.label} has "
                f"{self.num_layers} layers; got {hookpoint.layer}",
                "layer",
            )
        module_path(self.skeleton, hookpoint)

    def d_in(self, hookpoint: Hookpoint) -> int:
        """Return the width of the activations at ``hookpoint``, from a meta forward pass."""
        if hookpoint not in self._widths:  # every job of a sweep calls this
            self._widths[hookpoint] = self._find_width(hookpoint)
        return self._widths[hookpoint]

    @cached_property
    def _widths(self) -> dict[Hookpoint, int]:
        return {}

    def _find_width(self, hookpoint: Hookpoint) -> int:
        tokens = torch.zeros(2, 3, dtype=torch.long, device="meta")
        what = "its model cannot compute activations"
        with torch.no_grad(), foreign(self.place, what):
            # Without an explicit mask, transformers would read the tokens, but meta has no values.
            modules = _modules(self.skeleton, [hookpoint])
            found = _record(self.skeleton, tokens, modules, torch.ones_like(tokens))
        shape = tuple(found[hookpoint].shape)
        if len(shape) != 3 or shape[:2] != (2, 3):
            raise ConfigError(
                f"{{key}}: {hookpoint} must give one vector per token; for 2 sequences of 3 tokens "
                f"it returned a tensor of shape {shape}",
                "hookpoint.module",
            )
        return int(shape[-1])


class LanguageModel:
    """A causal LM that computes activations; its weights are loaded on first use.

    Args:
        resolved: the model to load.
        device: device on which the model runs.
    """

    def __init__(self, resolved: FoundModel, device: torch.device | str = "cpu") -> None:
        self.resolved = resolved
        self.device = torch.device(device)
        self.batch_sequences = resolved.config.batch_sequences
        self.dtype = DTYPES[resolved.config.dtype]

    @cached_property
    def model(self) -> nn.Module:
        """The model with its weights, on the device."""
        # The first use may be inside `inference_mode`, whose tensors do not support gradients.
        with torch.inference_mode(False):
            return self._loaded().to(self.device).eval().requires_grad_(False)

    def _loaded(self) -> nn.Module:
        found = self.resolved
        dtype, attention = self.dtype, found.config.attention
        if found.random_seed is None:
            weights = found.config.weights_path(found.folder)
            config = found.transformers_config if found.origin else None
            model, fit = load_trained(weights, dtype, attention, config)
            report_unused(fit, found.place, found.fingerprint)
            return model
        return _build_untrained(found.transformers_config, found.random_seed, dtype, attention)

    @torch.inference_mode()
    def activations(
        self, tokens: Int[Tensor, "sequences context"], hookpoints: Sequence[Hookpoint]
    ) -> Iterator[dict[Hookpoint, Float[Tensor, "batch context d_in"]]]:
        """Yield the activations of consecutive batches, in the model's dtype, on its device.

        The forward pass stops at the deepest hookpoint; later blocks and the unembedding do not
        run.
        """
        modules = _modules(self.model, hookpoints)
        for start in range(0, len(tokens), self.batch_sequences):
            batch = tokens[start : start + self.batch_sequences].to(self.device)
            yield _record(self.model, batch, modules)


class _Stop(Exception):
    """Exception by which the deepest hook ends the forward pass."""


def _modules(model: nn.Module, hookpoints: Sequence[Hookpoint]) -> dict[Hookpoint, nn.Module]:
    """Return the modules at the hookpoints. Slow: searches all modules of the model."""
    return {h: model.get_submodule(module_path(model, h)) for h in dict.fromkeys(hookpoints)}


def _record(
    model: nn.Module,
    tokens: Int[Tensor, "batch context"],
    modules: Mapping[Hookpoint, nn.Module],
    mask: Tensor | None = None,
) -> dict[Hookpoint, Tensor]:
    found: dict[Hookpoint, Tensor] = {}
    waiting = set(modules)

    def hook_for(hookpoint: Hookpoint):
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            found[hookpoint] = first_tensor(output)
            waiting.discard(hookpoint)
            if not waiting:
                raise _Stop

        return hook

    handles = [module.register_forward_hook(hook_for(h)) for h, module in modules.items()]
    try:
        model(input_ids=tokens, attention_mask=mask, use_cache=False)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    if waiting:
        missed = ", ".join(str(h) for h in waiting)
        raise ConfigError(f"{{key}}: the forward pass never reached {missed}", "hookpoint")
    return found


def _build_skeleton(config: Any) -> nn.Module:
    """Build the model of a transformers configuration on the meta device, without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), quiet():
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


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
