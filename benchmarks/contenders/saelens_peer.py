"""Contenders of sae-lens: `SAETrainer.step` on each of its training SAEs.

It always clips gradients at norm 1, never keeps decoder rows at norm 1, and starts b_dec at 0. Its
AuxK needs latents that are silent for a thousand steps, so none of these runs has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from contenders.base import (
    BANDWIDTH,
    BATCH,
    L0,
    L1,
    LEARNING_RATE,
    PREFIXES,
    STEPS,
    THRESHOLD,
    THRESHOLD_RATE,
    Contender,
    K,
    LearnsThreshold,
    Matched,
)


class SAELens(Contender):
    """One training SAE of sae-lens."""

    needs = "sae_lens"
    sae_class: ClassVar[str]
    names: ClassVar[Mapping[str, str]] = {}
    """reseed's names of the parameters that sae-lens names differently → its names."""

    def __init__(self, architecture: str, d_in: int, num_latents: int) -> None:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        build = getattr(sae_lens, self.sae_class)
        configure = getattr(sae_lens, f"{self.sae_class}Config")
        self.module = build(
            configure(d_in=d_in, d_sae=num_latents, **self.options(d_in, num_latents))
        )
        config = SAETrainerConfig(
            total_training_samples=BATCH * STEPS,
            train_batch_size_samples=BATCH,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE,
        )
        self.trainer = SAETrainer(config, self.module, data_provider=iter(()))

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        """Return options of the SAE's configuration."""
        return {}

    def matched(self, d_in: int, num_latents: int) -> Matched:
        return Matched(sae={"unit_norm_decoder": False})

    def step(self, x: Any) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    def loss(self, x: Any) -> Any:
        from sae_lens.saes.sae import TrainStepInput

        step_input = TrainStepInput(
            sae_in=x,
            dead_neuron_mask=self.trainer.dead_neurons,
            coefficients=self.trainer.get_coefficients(),
            n_training_steps=self.trainer.n_training_steps,
            is_logging_step=False,
        )
        return self.module.training_forward_pass(step_input).loss

    def parameters(self) -> dict[str, Any]:
        ours = {theirs: own for own, theirs in self.names.items()}
        named: dict[str, Any] = dict(self.module.named_parameters())
        return {ours.get(name, name): parameter for name, parameter in named.items()}

    def _turned(self, name: str, tensor: Any) -> Any:
        return tensor.T if name == "W_enc" else tensor


class TopK(SAELens):
    """TopK with dense latents, its default."""

    sae_class = "TopKTrainingSAE"
    sparse = False

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {
            "k": K,
            "rescale_acts_by_decoder_norm": False,
            "use_sparse_activations": self.sparse,
        }


class TopKSparse(TopK):
    """TopK with `use_sparse_activations`."""

    sparse = True


class BatchTopK(SAELens):
    """BatchTopK, whose latents are dense whatever `use_sparse_activations` is."""

    sae_class = "BatchTopKTrainingSAE"

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {
            "k": float(K),
            "rescale_acts_by_decoder_norm": False,
            "topk_threshold_lr": THRESHOLD_RATE,
        }


class Matryoshka(BatchTopK):
    """Matryoshka with the sum over the prefixes, each of weight 1, like reseed."""

    sae_class = "MatryoshkaBatchTopKTrainingSAE"

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        widths = [round(fraction * num_latents) for fraction in PREFIXES]
        return {**super().options(d_in, num_latents), "matryoshka_widths": widths}


class JumpReLU(LearnsThreshold, SAELens):
    """JumpReLU: λ·L0 is added to ‖e‖², where reseed has ‖e‖²/D."""

    sae_class = "JumpReLUTrainingSAE"
    names: ClassVar[Mapping[str, str]] = {"log_threshold": "threshold"}

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {
            "apply_b_dec_to_input": False,
            "jumprelu_init_threshold": THRESHOLD * d_in**0.5,
            "jumprelu_bandwidth": BANDWIDTH * d_in**0.5,
            "l0_coefficient": L0 * d_in,
        }

    def matched(self, d_in: int, num_latents: int) -> Matched:
        return Matched(
            sae={"unit_norm_decoder": False},
            optimizer={"max_grad_norm": 1 / d_in, "eps": 1e-8 / d_in},
            factor=d_in,
            diverges="it learns θ and reseed log θ, so Adam's steps differ",
        )


class Gated(SAELens):
    """Gated: L1 weighted by the decoder's norms, and an auxiliary loss that trains the decoder.

    The paper and reseed detach the decoder in the auxiliary loss and keep its rows at norm 1.
    """

    sae_class = "GatedTrainingSAE"
    names: ClassVar[Mapping[str, str]] = {"b_enc": "b_gate"}

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {"l1_coefficient": L1}

    def matched(self, d_in: int, num_latents: int) -> Matched:
        reason = "its auxiliary loss and its L1 penalty train the decoder too"
        return Matched(sae={"unit_norm_decoder": False}, differs={"W_dec": reason, "b_dec": reason})


class ReLU(SAELens):
    """`StandardTrainingSAE`: L1 weighted by the decoder's norms."""

    sae_class = "StandardTrainingSAE"

    def options(self, d_in: int, num_latents: int) -> dict[str, Any]:
        return {"l1_coefficient": L1, "apply_b_dec_to_input": False}
