"""Base classes of the formats of saved SAEs, reseed's own format, and conversions of tensors.

Letters as in `reseed.sae.base`: D ``d_in``, F ``num_latents``; our W_enc and W_dec are [F, D]. A
format reads its files into one of our architectures so that latents and reconstructions equal those
of its own formula; otherwise it raises `CheckpointError` with the reason.

Conversions keep b_enc and thresholds as [F], b_dec as [D]; changed biases are computed in float64
and rounded once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from reseed.errors import ConfigError
from reseed.sae.base import SAE, SAEConfig
from reseed.sae.batch_topk import BatchSparseSAE
from reseed.sae.checkpoint import (
    DESCRIPTION_FILE,
    WEIGHTS_FILE,
    CheckpointError,
    load_sae,
    read_metadata,
    save_sae,
)
from reseed.sae.gated import GatedConfig
from reseed.sae.jumprelu import JumpReLU, JumpReLUConfig
from reseed.sae.relu import ReLU, ReLUConfig
from reseed.sae.topk import TopKConfig, choice_weights

TRANSCODER_NOTE = "a transcoder: it reconstructs activations at another hookpoint"


@dataclass(frozen=True)
class Imported:
    """An SAE that was read from files of some format.

    Attributes:
        sae: the SAE for raw activations, in float32, without gradients.
        metadata: the SAE's origin (model, hookpoint, ...) as far as the files give it.
        notes: caveats for the user: sentences without a full stop.
        reads: the files that were read.
        transcoder: whether the SAE reconstructs activations at another hookpoint than its input's.
    """

    sae: SAE
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    reads: tuple[Path, ...] = ()
    transcoder: bool = False


class Format(ABC):
    """A format of saved SAEs. Subclasses are final and have no state.

    Attributes:
        name: the value for ``format=`` and ``--to``.
        layouts: tuples of files; a folder has the format if it holds every file of any tuple.
    """

    name: ClassVar[str]
    layouts: ClassVar[tuple[tuple[str, ...], ...]]

    def recognises(self, path: Path) -> bool:
        """Return whether ``path``, a folder or one of its files, has this format."""
        folder = self.folder_of(path)
        return folder is not None and any(
            all((folder / file).is_file() for file in layout) for layout in self.layouts
        )

    def folder_of(self, path: Path) -> Path | None:
        """Return ``path`` if it is a folder, or the parent of a file that a layout names."""
        if path.is_dir():
            return path
        named = {Path(file).name for layout in self.layouts for file in layout}
        return path.parent if path.is_file() and path.name in named else None

    @abstractmethod
    def load(self, path: Path) -> Imported:
        """Read a recognised folder or file.

        Raises:
            CheckpointError: files are missing, damaged or inconsistent, or none of our
                architectures equals the SAE; the message gives the reason.
        """

    def save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """Write ``sae`` into ``folder`` (created if need be), each file atomically.

        Args:
            metadata: the SAE's origin; stored as far as the format can.

        Returns:
            notes for the user.

        Raises:
            CheckpointError: the format cannot hold an SAE that equals this one.
        """
        raise CheckpointError(
            f"cannot write sae={sae.config.name} as {self.name}: reseed only reads this format"
        )


class Exporting(Format):
    """A format of another library that reseed also writes.

    Attributes:
        exports: the stable names of the architectures that it can hold.
    """

    exports: ClassVar[tuple[str, ...]]

    def save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        if sae.config.name not in self.exports:
            raise CheckpointError(
                f"{self.name} cannot hold sae={sae.config.name}: it holds {', '.join(self.exports)}"
            )
        return self._save(sae, folder, metadata)

    @abstractmethod
    def _save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        """Write an SAE of an architecture in `exports`, as `save` does."""


@final
class Reseed(Format):
    """reseed's own format (`reseed.sae.checkpoint`): any architecture, its whole configuration."""

    name = "reseed"
    layouts = ((DESCRIPTION_FILE,),)

    def load(self, path: Path) -> Imported:
        folder = self.folder_of(path)
        assert folder is not None
        sae, reads = load_sae(folder), (folder / DESCRIPTION_FILE, folder / WEIGHTS_FILE)
        return Imported(sae, read_metadata(folder), (), reads)

    def save(self, sae: SAE, folder: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
        save_sae(sae, folder, metadata)
        return ()


UNIT = 1e-3
"""Decoder rows count as constrained to norm 1 if all norms are within this distance of 1."""


def build_sae(config: SAEConfig, file: Path, tensors: Mapping[str, Tensor]) -> SAE:
    """Build an SAE of an architecture with these parameters.

    Args:
        file: for messages.
        tensors: all parameters and buffers, by reseed's names.

    Raises:
        CheckpointError: the parameters break a rule of the architecture.
    """
    d_in = len(tensors["b_dec"])
    try:
        config.check_d_in(d_in)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    with torch.device("meta"):
        sae = config.empty(d_in)
    whole = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    sae.load_state_dict(whole, assign=True)
    return sae.requires_grad_(False)


def build_from_weights(
    kind: type[SAEConfig], file: Path, tensors: Mapping[str, Tensor], **values: Any
) -> SAE:
    """Build an SAE with `build_sae`, its configuration derived from the weights and ``values``."""
    norms = tensors["W_dec"].norm(dim=1)
    unit = bool(((norms - 1).abs() < UNIT).all()) and not values.get("weigh_by_decoder_norm")
    values = {"num_latents": len(tensors["b_enc"]), "unit_norm_decoder": unit, **values}
    if unit:
        values["decoder_init_norm"] = 1.0
    try:
        config = kind(**values)
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return build_sae(config, file, tensors)


def topk(
    file: Path, tensors: Mapping[str, Tensor], k: int, *, centred: bool = True, **values: Any
) -> SAE:
    """Build TopK_k(ReLU(W_enc (x − b_dec) + b_enc)); with W_enc x + b_enc if not ``centred``."""
    tensors = tensors if centred else _decentred(tensors)
    return build_from_weights(TopKConfig, file, tensors, k=k, aux_alpha=0.0, **values)


def relu(file: Path, tensors: Mapping[str, Tensor], *, centred: bool) -> SAE:
    """Build ReLU(W_enc (x − b_dec) + b_enc); with W_enc x + b_enc if not ``centred``."""
    return build_from_weights(ReLUConfig, file, tensors, subtract_b_dec=centred)


def jumprelu(
    file: Path, tensors: Mapping[str, Tensor], threshold: Float[Tensor, " F"], *, centred: bool
) -> SAE:
    """Build ReLU(π)·1[π > θ], π = W_enc (x − b_dec) + b_enc; W_enc x + b_enc if not ``centred``."""
    whole = {**tensors, "log_threshold": exact_log(threshold)}
    return build_from_weights(JumpReLUConfig, file, whole, subtract_b_dec=centred)


def gated(file: Path, tensors: Mapping[str, Tensor], *, centred: bool = True) -> SAE:
    """Build 1[π > 0]·ReLU(exp(r) ⊙ W_enc (x − b_dec) + b_mag), π = W_enc (x − b_dec) + b_enc; with
    x instead of x − b_dec if not ``centred``."""
    if not centred:
        shift = tensors["W_enc"].double() @ tensors["b_dec"].double()
        magnitude = tensors["b_mag"].double() + tensors["r_mag"].double().exp() * shift
        tensors = {**_decentred(tensors), "b_mag": magnitude.float()}
    return build_from_weights(GatedConfig, file, tensors)


def exact_log(threshold: Float[Tensor, " F"]) -> Float[Tensor, " F"]:
    """Return ℓ in float64 such that π > exp(ℓ) is π > θ for every float32 π > 0 and float32 θ.

    exp(ℓ) lies at or above θ and below the next float32. In float32, exp(ℓ) could differ from θ by
    several units in the last place, and latents near θ would change between active and inactive.
    A θ of 0 or less sets no latent to 0 that ReLU does not: ℓ = −∞.
    """
    exact = threshold.detach().double().clamp_min(0)
    log = exact.log()
    while bool((low := log.exp() < exact).any()):
        log = torch.where(low, torch.nextafter(log, torch.full_like(log, torch.inf)), log)
    return log


def thresholds(sae: SAE) -> Float[Tensor, " F"] | None:
    """Return θ_j in float32 of an SAE that computes ReLU(π)·1[π > θ]; None for other SAEs."""
    if isinstance(sae, JumpReLU):
        return sae.threshold.float()
    if isinstance(sae, ReLU):
        return torch.zeros_like(sae.b_enc)
    if isinstance(sae, BatchSparseSAE):
        weights = choice_weights(sae)
        if weights is None:
            return sae.threshold.float().expand(sae.num_latents).clone()
        # Active where π‖d‖ > θ; a latent with a zero row never is.
        found = (sae.threshold.double() / weights.double()).float()
        return torch.where(weights == 0, torch.inf, found)
    return None


def is_centred(sae: SAE) -> bool:
    """Return whether the SAE encodes x − b_dec (not x)."""
    return bool(getattr(sae.config, "subtract_b_dec", True))


def state(sae: SAE) -> dict[str, Tensor]:
    """Return the SAE's parameters and buffers in float32 on the CPU, by reseed's names."""
    return {name: t.detach().to("cpu", torch.float32) for name, t in sae.state_dict().items()}


def uncentred_b_enc(sae: SAE) -> Float[Tensor, " F"]:
    """Return b_enc of the equal SAE that has π = W_enc x + b_enc."""
    own = state(sae)
    if not is_centred(sae):
        return own["b_enc"]
    return (own["b_enc"].double() - own["W_enc"].double() @ own["b_dec"].double()).float()


def _decentred(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Turn an SAE that encodes x into one that encodes x − b_dec: b_enc becomes
    b_enc + W_enc b_dec."""
    shift = tensors["W_enc"].double() @ tensors["b_dec"].double()
    return {**tensors, "b_enc": (tensors["b_enc"].double() + shift).float()}
