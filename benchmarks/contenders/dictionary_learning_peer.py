"""Contenders of dictionary_learning: `update` of each of its trainers.

It keeps decoder rows at norm 1, removes the parallel gradient and clips gradients at norm 1 like
reseed, unless a class says otherwise. There are no warm-ups. Its AuxK needs ten million silent
tokens, so none of these runs has it.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Mapping
from typing import Any, ClassVar

from contenders.base import (
    BANDWIDTH,
    L0,
    L1,
    LEARNING_RATE,
    PREFIXES,
    STEPS,
    TARGET_L0,
    THRESHOLD,
    THRESHOLD_RATE,
    Contender,
    K,
    LearnsThreshold,
    Matched,
)


class DictionaryLearning(Contender):
    """One trainer of dictionary_learning."""

    needs = "dictionary_learning"
    trainer: ClassVar[tuple[str, str]]
    """Module and class."""
    names: ClassVar[Mapping[str, str]]
    """reseed's names of the parameters → the library's names."""
    transposed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, architecture: str, d_in: int, num_latents: int) -> None:
        module, name = self.trainer
        build = getattr(_trainers(module), name)
        self.library = build(
            steps=STEPS,
            activation_dim=d_in,
            dict_size=num_latents,
            layer=0,
            lm_name="none",
            lr=LEARNING_RATE,
            warmup_steps=0,
            device="cpu",
            **self.options(d_in, num_latents),
        )
        self.module = self.library.ae
        self.index = 1  # step 0 would start b_dec at the geometric median

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        """Return further arguments of the trainer."""
        return {"sparsity_warmup_steps": None}

    def step(self, x: Any) -> None:
        self.library.update(self.index, x)
        self.index += 1

    def loss(self, x: Any) -> Any:
        return self.library.loss(x, step=self.index)

    def parameters(self) -> dict[str, Any]:
        theirs = dict(self.module.named_parameters())
        return {name: theirs[own] for name, own in self.names.items()}

    def _turned(self, name: str, tensor: Any) -> Any:
        return tensor.T if name in self.transposed else tensor


class BatchTopK(DictionaryLearning):
    """`BatchTopKTrainer`."""

    trainer = ("batch_top_k", "BatchTopKTrainer")
    names: ClassVar[Mapping[str, str]] = {
        "W_enc": "encoder.weight",
        "b_enc": "encoder.bias",
        "W_dec": "decoder.weight",
        "b_dec": "b_dec",
    }
    transposed: ClassVar[tuple[str, ...]] = ("W_dec",)

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {"k": K, "threshold_beta": 1 - THRESHOLD_RATE, "threshold_start_step": 0}


class Matryoshka(BatchTopK):
    """`MatryoshkaBatchTopKTrainer`: mean over the prefixes, where reseed has the sum."""

    trainer = ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer")
    names: ClassVar[Mapping[str, str]] = {
        "W_enc": "W_enc",
        "b_enc": "b_enc",
        "W_dec": "W_dec",
        "b_dec": "b_dec",
    }
    transposed: ClassVar[tuple[str, ...]] = ("W_enc",)

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        groups = [b - a for a, b in zip((0.0, *PREFIXES), PREFIXES, strict=False)]
        weights = [1.0] * len(groups)  # its default divides by the number of groups twice
        more = {"group_fractions": groups, "group_weights": weights}
        return {**super().options(d_in, num_latents), **more}

    def matched(self, d_in: int, num_latents: int) -> Matched:
        return Matched(sae={"multipliers": (1 / len(PREFIXES),) * len(PREFIXES)})


class JumpReLU(LearnsThreshold, DictionaryLearning):
    """`JumpReluTrainer`: (L0/L0* − 1)² is added to ‖e‖², where reseed has ‖e‖²/D."""

    trainer = ("jumprelu", "JumpReluTrainer")
    names: ClassVar[Mapping[str, str]] = {
        "W_enc": "W_enc",
        "b_enc": "b_enc",
        "W_dec": "W_dec",
        "b_dec": "b_dec",
        "log_threshold": "threshold",
    }
    transposed: ClassVar[tuple[str, ...]] = ("W_enc",)

    def __init__(self, architecture: str, d_in: int, num_latents: int) -> None:
        super().__init__(architecture, d_in, num_latents)
        self.module.threshold.data.fill_(THRESHOLD * d_in**0.5)

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {
            **super().options(d_in, num_latents),
            "bandwidth": BANDWIDTH * d_in**0.5,
            "sparsity_penalty": L0 * d_in,
            "target_l0": TARGET_L0,
        }

    def matched(self, d_in: int, num_latents: int) -> Matched:
        kernel = (
            "its kernel for L0 is applied after the jump, so it ignores values just below θ; the "
            "paper (and reseed) applies it to pre-activations"
        )
        return Matched(
            sae={"target_l0": TARGET_L0, "penalty": "quadratic"},
            optimizer={"max_grad_norm": 1 / d_in, "eps": 1e-8 / d_in, "betas": (0.0, 0.999)},
            factor=d_in,
            differs={"log_threshold": kernel},
            diverges="it learns θ and reseed log θ, so Adam's steps differ",
        )


class Gated(DictionaryLearning):
    """`GatedSAETrainer`: no clipping, β₁ = 0."""

    trainer = ("gdm", "GatedSAETrainer")
    names: ClassVar[Mapping[str, str]] = {
        "W_enc": "encoder.weight",
        "b_enc": "gate_bias",
        "W_dec": "decoder.weight",
        "b_dec": "decoder_bias",
        "r_mag": "r_mag",
        "b_mag": "mag_bias",
    }
    transposed: ClassVar[tuple[str, ...]] = ("W_dec",)

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {**super().options(d_in, num_latents), "l1_penalty": L1}

    def matched(self, d_in: int, num_latents: int) -> Matched:
        return Matched(optimizer={"max_grad_norm": None, "betas": (0.0, 0.999)})


class ReLU(DictionaryLearning):
    """`StandardTrainerAprilUpdate`: decoder rows are not normalised; it encodes x − b_dec."""

    trainer = ("standard", "StandardTrainerAprilUpdate")
    names: ClassVar[Mapping[str, str]] = {
        "W_enc": "encoder.weight",
        "b_enc": "encoder.bias",
        "W_dec": "decoder.weight",
        "b_dec": "bias",
    }
    transposed: ClassVar[tuple[str, ...]] = ("W_dec",)

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {**super().options(d_in, num_latents), "l1_penalty": L1}

    def matched(self, d_in: int, num_latents: int) -> Matched:
        return Matched(sae={"subtract_b_dec": True})


def _trainers(module: str) -> Any:
    """Import a module of the library's trainers.

    The package imports nnsight for language models. Training does not need it, so an empty stub
    replaces it if it is not installed.
    """
    if "nnsight" not in sys.modules and importlib.util.find_spec("nnsight") is None:
        stand_in = types.ModuleType("nnsight")
        stand_in.LanguageModel = object  # pyright: ignore[reportAttributeAccessIssue]
        sys.modules["nnsight"] = stand_in
    return importlib.import_module(f"dictionary_learning.trainers.{module}")
