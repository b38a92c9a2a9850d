"""The results of a run, written when it has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Int
from safetensors.torch import save_file
from torch import Tensor

from reseed.atomic import atomic_write
from reseed.evaluate.reconstruction import Reconstruction
from reseed.evaluate.truth import TruthResult
from reseed.runs import Run
from reseed.sae.checkpoint import save_sae
from reseed.train.imported import ImportedMember
from reseed.train.member import Member

if TYPE_CHECKING:
    from reseed.experiment import Resolved

AnyMember = Member | ImportedMember


def record(
    member: AnyMember,
    resolved: Resolved,
    run: Run,
    measured: Reconstruction,
    truth: TruthResult | None,
    timings: dict[str, Any],
) -> None:
    """Write the results of a run, and the record's status last."""
    save_sae(measured.sae, run.path, _metadata(member, resolved))
    since, dead = _silence(member, measured)
    latents = {
        "firing": measured.firing.cpu(),
        "tokens_since_fired": since.cpu(),
        "activation_sum": measured.activation_sum.cpu(),
        "activation_square_sum": measured.activation_square_sum.cpu(),
    }
    if truth is not None:
        latents |= truth.latents
    atomic_write(run.path / "latents.safetensors", lambda path: save_file(latents, path))
    if measured.moments is not None:
        moments = measured.moments.so_far().tensors()
        atomic_write(run.path / "activations.safetensors", lambda path: save_file(moments, path))
    member.write_curve(run.path)
    metrics = measured.metrics() | {"dead_fraction": float(dead.double().mean())}
    if isinstance(member, Member) and resolved.sae.penalty_field is not None:
        metrics["penalty_weight"] = member.sae.penalty_weight
    if truth is not None:
        metrics["truth"] = truth.metrics
    seconds = member.curve.rows[-1]["seconds"] if isinstance(member, Member) else 0.0
    run.finish(metrics, timings=timings | {"seconds": seconds})


def _metadata(member: AnyMember, resolved: Resolved) -> dict[str, Any]:
    """Return the SAE's origin for sae.json."""
    e, found = resolved.experiment, resolved.pretrained
    own = {"seed": e.seed} if found is None else {"pretrained": found.record()}
    return {
        "signature": resolved.signature,
        "model": resolved.model_label,
        "model_fingerprint": resolved.model.fingerprint,
        "hookpoint": str(e.hook),
        "site": e.hookpoint.site,
        "layer": e.layer,
        "dataset": resolved.data.label,
        "context_length": resolved.data.context_length,
        "tokens": resolved.tokens,
        **own,
        "input_scale": member.scale,
    }


def _silence(
    member: AnyMember, measured: Reconstruction
) -> tuple[Int[Tensor, " num_latents"], Bool[Tensor, " num_latents"]]:
    """Return the tokens since each latent fired, and the mask of dead latents. For an SAE that was
    trained elsewhere these are the latents that did not fire on the held-out tokens."""
    if isinstance(member, Member):
        return member.tokens_since_fired, member.dead
    silent = measured.firing == 0
    return silent * measured.tokens, silent
