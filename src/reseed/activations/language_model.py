"""Language models that compute activations: any causal LM of transformers.

The weights are loaded on first use, and never if all activations are on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from reseed.activations.found_model import DTYPES, FoundModel
from reseed.activations.hookpoints import Hookpoint
from reseed.activations.places import Place, read
from reseed.activations.sites import SUBLAYER_SITES, check_sites
from reseed.errors import ConfigError


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
        self.is_checking = False

    @cached_property
    def model(self) -> nn.Module:
        """The model with its weights, on the device."""
        return self.resolved.load().to(self.device)

    @torch.inference_mode()
    def activations(
        self, tokens: Int[Tensor, "sequences context"], hookpoints: Sequence[Hookpoint]
    ) -> Iterator[dict[Hookpoint, Float[Tensor, "batch context d_in"]]]:
        """Yield the activations of consecutive batches, in the model's dtype, on its device.

        The forward pass stops at the deepest hookpoint; later blocks and the unembedding do not
        run.

        Raises:
            ConfigError: see `place`.
        """
        places = {hookpoint: self.place(hookpoint) for hookpoint in dict.fromkeys(hookpoints)}
        for start in range(0, len(tokens), self.batch_sequences):
            batch = tokens[start : start + self.batch_sequences].to(self.device)
            found = read(self.model, list(places.values()), input_ids=batch)
            yield {hookpoint: found[place] for hookpoint, place in places.items()}

    def place(self, hookpoint: Hookpoint) -> Place:
        """Return the tensor that a hookpoint reads, after a check with the weights.

        Raises:
            ConfigError: the model has no such site, or the sums of the sites do not hold.
        """
        found = self.resolved
        place = found.place(hookpoint)
        if hookpoint.site == "module" and place not in self._checked_modules:
            self._check_rows(place)
            self._checked_modules.add(place)
        if hookpoint.site in SUBLAYER_SITES:
            if hookpoint.layer not in self._wrong:
                self._wrong[hookpoint.layer] = self._check_layer(hookpoint.layer)
            if hookpoint.site in self._wrong[hookpoint.layer]:
                raise found.no_site(hookpoint, self._wrong[hookpoint.layer][hookpoint.site])
        return place

    @cached_property
    def _wrong(self) -> dict[int, dict[str, str]]:
        return {}

    @cached_property
    def _checked_modules(self) -> set[Place]:
        return set()

    def _check_layer(self, layer: int) -> dict[str, str]:
        with self._checking() as tokens:
            return check_sites(self.model, self.resolved.sites(layer), tokens)

    def _check_rows(self, place: Place) -> None:
        """Raise `ConfigError` unless a module's rows follow the sequences, as experts' do not."""
        with self._checking() as tokens:
            both = torch.stack([tokens[0], tokens[0].flip(0)])
            x, y = (read(self.model, [place], input_ids=t)[place] for t in (both, both.flip(0)))
        x, y = x.float(), y.flip(0).float()
        if x.shape != y.shape or not bool(((x - y).abs() <= 0.05 * x.abs().max()).all()):
            raise ConfigError(
                f"{{key}}: the rows of {place} do not follow the sequences of the batch",
                "hookpoint.module",
            )

    @contextmanager
    def _checking(self) -> Iterator[Int[Tensor, "1 context"]]:
        """Give a few tokens for a pass in which no intervention acts."""
        self.is_checking = True
        table: Any = self.model.get_input_embeddings()  # type: ignore[operator]
        try:
            with torch.inference_mode():
                yield torch.arange(_CHECKED, device=self.device)[None] % len(table.weight)
        finally:
            self.is_checking = False


_CHECKED = 8
"""Number of tokens with which places are checked."""
