"""The training state of one run: weights, optimiser, dead counters, curve, position."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import save as to_safetensors
from torch import Tensor
from torch.nn.utils import parametrize

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.moments import geometric_median
from reseed.config import digest
from reseed.distributed.process_group import ALONE, ProcessGroup, batch_shared_by
from reseed.errors import ReseedError
from reseed.sae.base import SAE, Loss, SAEConfig, Step
from reseed.sae.losses import PenaltySteering, has_variance, total_variance
from reseed.system.console import say
from reseed.system.devices import is_out_of_memory
from reseed.system.files import DiskFullError
from reseed.system.integrity import write_checked
from reseed.train.archetypes import initialise_archetypes, make_archetypal, with_plain_decoder
from reseed.train.config import ArchetypalDecoder, FreeDecoder, TrainingConfig, TruthStart
from reseed.train.curve import Curve
from reseed.train.optim import learning_rate, make_optimizer, peak_lr


class NotFiniteError(ReseedError, ArithmeticError):
    """Error of a run that diverged: its loss, weights or measures are NaN or infinite.

    Args:
        what: the quantity, with its verb ("the loss is").
        step: the first step at which it was not finite.
        cause: the cause, if it is known.
    """

    def __init__(self, what: str, step: int, cause: str = "") -> None:
        super().__init__(f"{what} not finite at step {step}" + (f": {cause}" if cause else ""))
        self.step = step


def _generator(purpose: str, seed: int) -> torch.Generator:
    """Return the generator for ``purpose``, which differs from that of the initial weights."""
    return torch.Generator().manual_seed(int(digest([purpose, seed]), 16))


class RunState:
    """A run of a group while it trains.

    Args:
        id: the run's folder name.
        hookpoint: the hookpoint whose activations it reads.
        config: the architecture.
        training: the training options.
        d_in: width of the activations.
        init_seed: seed of the weights.
        device: the device on which it trains.
        ranks: the processes that train it together, each on its share of every batch.
    """

    def __init__(
        self,
        id: str,
        hookpoint: Hookpoint,
        config: SAEConfig,
        training: TrainingConfig,
        d_in: int,
        init_seed: int,
        device: torch.device,
        ranks: ProcessGroup = ALONE,
    ) -> None:
        self.id, self.hookpoint, self.training, self.ranks = id, hookpoint, training, ranks
        generator = torch.Generator().manual_seed(init_seed)
        self.sae: SAE = config.build(d_in, generator).to(device)
        self.init_seed = init_seed
        if isinstance(decoder := training.decoder_options, ArchetypalDecoder):
            make_archetypal(self.sae, decoder.count(self.sae.num_latents), decoder.relaxation)
        self.optimizer = make_optimizer(self.sae, training)
        self.peak_lr = peak_lr(training, config, self.sae.num_latents)
        self.tokens_since_fired: Int[Tensor, " num_latents"] = torch.zeros(
            self.sae.num_latents, dtype=torch.int64, device=device
        )
        self.scale = 1.0
        self.step = 0
        self.seconds = 0.0
        self.curve = Curve()
        self.error: BaseException | None = None
        self.steering: PenaltySteering | None = None
        self._first_bad = torch.full((), -1, dtype=torch.int64, device=device)
        self._without_variance = torch.zeros((), dtype=torch.bool, device=device)

    @property
    def active(self) -> bool:
        """True while the run still has steps to make."""
        return self.error is None and self.step < self.training.steps

    @property
    def failed(self) -> bool:
        """True if the run failed or its loss was not finite at some step."""
        return self.error is not None or int(self._first_bad) >= 0

    @property
    def dead(self) -> Tensor:
        """Mask [num_latents] of the dead latents."""
        return self.tokens_since_fired >= self.training.dead_after()

    @contextmanager
    def catch_error(self) -> Iterator[None]:
        """Store an error that is raised in the context in `error`, so that the group continues."""
        try:
            yield
        except DiskFullError:
            raise
        except Exception as error:
            if is_out_of_memory(error):  # affects all runs on the machine, like a full disk
                raise
            if self.ranks.several and not isinstance(error, ReseedError):
                raise  # the other ranks may not have the error and would wait for this one
            self.error = error
            say(f"failed: {self.id}: {error}")

    def start(
        self,
        x: Float[Tensor, "tokens d_in"],
        truth: Float[Tensor, "features d_in"] | None = None,
    ) -> None:
        """Set the input scale, b_dec and everything else that depends on the first activations.

        Args:
            x: the first chunk.
            truth: unit directions of a world's features, for ``training.start=truth``.

        Raises:
            ReseedError: the activations are zero or not finite, or their squares are in float32.
        """
        x = x.to(self.sae.b_dec.device, torch.float32)
        if self.training.normalize_activations:
            norm = float(torch.linalg.vector_norm(x, dim=1).double().mean())
            if not 0 < norm < math.inf:
                why = (
                    "all zero, or so small that float32 rounds their squares to 0"
                    if norm == 0
                    else "not finite, or so large that float32 cannot hold their squares"
                )
                raise ReseedError(
                    f"{self.id}: activations at {self.hookpoint} are {why}; no SAE can be trained"
                )
            self.scale = x.shape[1] ** 0.5 / norm
        if self.training.b_dec_init == "mean":
            self.sae.initialise_b_dec((x.double().mean(0) * self.scale).float())
        elif self.training.b_dec_init == "geometric_median":
            self.sae.initialise_b_dec((geometric_median(x) * self.scale).float())
        if isinstance(decoder := self.training.decoder_options, ArchetypalDecoder):
            own = self.init_seed if decoder.own_seed else 0
            archetypes, weights = _generator("archetypes", own), _generator("W", self.init_seed)
            initialise_archetypes(self.sae, x * self.scale, archetypes=archetypes, weights=weights)
        if isinstance(start := self.training.start_options, TruthStart):
            assert truth is not None
            self._start_at(truth, start.noise)
        self.optimizer.constraints.project(dict(self.sae.named_parameters()))

    @torch.no_grad()
    def _start_at(self, truth: Float[Tensor, "features d_in"], length: float) -> None:
        """Set the directions of both rows of latent i to feature i plus noise of this length, and
        keep their norms."""
        drawn = torch.randn(self.sae.W_dec.shape, generator=_generator("start", self.init_seed))
        noise = drawn * (length / truth.shape[1] ** 0.5)
        rows = truth[: len(noise)] + noise
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(self.sae.W_dec.device)
        for weights in (self.sae.W_dec, self.sae.W_enc):
            weights.copy_(rows * weights.norm(dim=1, keepdim=True))

    def save_start(self, path: Path) -> None:
        """Save the SAE before its first step if its weights cannot be redrawn from the seed."""
        if not self.training.start_is_drawn:
            state = with_plain_decoder(self.sae, {}).folded(self.scale).state_dict()
            state = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
            data = to_safetensors(state)
            write_checked(path, lambda temporary: temporary.write_bytes(data))

    def trained_sae(self) -> SAE:
        """Return the SAE to measure and store: for raw activations, with a plain W_dec.

        With a schedule-free optimiser it has the mean weights, but the curve and the running
        thresholds are those of the weights at which gradients are taken.
        """
        weights = self.optimizer.evaluation_weights()
        if weights or not isinstance(self.training.decoder_options, FreeDecoder):
            return with_plain_decoder(self.sae, weights).folded(self.scale)
        return self.sae.folded(self.scale)

    def steer(self) -> None:
        """Steer the penalty weight towards the architecture's `target_l0` during training."""
        target = self.sae.config.target_l0
        assert target is not None
        self.steering = PenaltySteering(
            target, self.training.steps, math.log(self.sae.penalty_weight)
        )

    def train(self, x: Float[Tensor, "batch d_in"], optimizer: Any) -> None:
        """Take one optimiser step on raw activations ``x``.

        Args:
            x: [batch, d_in], in the model's dtype; this rank's share if several share the batch.
            optimizer: this run's optimiser, as the trainer wraps it.
        """
        x = x.to(torch.float32) * self.scale
        step = Step(self.step, self.training.steps)
        self.optimizer.set_lr(self._rate(step))
        with batch_shared_by(self.ranks), self._precision(), self._decoder_made_once():
            loss = self.sae.training_loss(x, step, self.dead)
            loss.total.backward()
        if self.ranks.several:
            loss = self._over_ranks(loss)
        optimizer.step()
        optimizer.zero_grad()
        if self.steering is not None:
            self.steering.observe(self.step, float(loss.l0))
            self.sae.penalty_weight = self.steering.weight
        self._count(x, loss)
        self.step += 1

    def _over_ranks(self, loss: Loss) -> Loss:
        """Combine the ranks' results: the mean of gradients and loss terms, the sum of counts."""
        gradients = [p.grad for p in self.sae.parameters() if p.grad is not None]
        self.ranks.mean_(gradients)
        means = [loss.total.detach(), loss.l0, *loss.parts.values()]
        sums = torch.cat([loss.fired.double(), torch.stack([loss.squared_error, *means]).double()])
        self.ranks.sum_(sums)
        fired, (squared_error, *means) = sums[: len(loss.fired)], sums[len(loss.fired) :]
        total, l0, *parts = (mean / self.ranks.count for mean in means)
        return Loss(
            total=total,
            parts=dict(zip(loss.parts, parts, strict=True)),
            fired=fired.long(),
            squared_error=squared_error,
            l0=l0,
        )

    def check_weights(self) -> None:
        """Raise `NotFiniteError` if the weights are not finite.

        If several ranks train the run, also raise `ReseedError` if their weights differ.
        """
        weights = [*self.sae.parameters(), *self.optimizer.evaluation_weights().values()]
        if not all(bool(torch.isfinite(p).all()) for p in weights):
            raise NotFiniteError("the weights are", self.step)
        if self.ranks.several:
            own = [float(p.detach().double().sum()) for p in weights]
            if any(other != own for other in self.ranks.gather_json(own)):
                raise ReseedError(
                    f"{self.id}: the ranks that trained it together have different weights; check "
                    "that their devices and library versions are the same"
                )

    def close_curve_row(self, seconds: float) -> dict[str, float]:
        """Close and return a row of the curve, with means since the last row.

        Args:
            seconds: training time in this process.

        Raises:
            NotFiniteError: the loss was not finite at some step.
        """
        bad = int(self._first_bad)
        if bad >= 0:
            cause = (
                f"all {self.training.batch_size:,} activations of the batch at {self.hookpoint} "
                "are equal up to rounding, so the loss has no variance to be relative to"
            )
            raise NotFiniteError("the loss is", bad, cause if self._without_variance else "")
        step = Step(max(self.step - 1, 0), self.training.steps)
        return self.curve.close(
            step=self.step,
            tokens=self.step * self.training.batch_size,
            dead_fraction=float(self.dead.double().mean()),
            lr=self._rate(step),
            seconds=round(self.seconds + seconds, 3),
        )

    def write_curve(self, folder: Path) -> None:
        """Write the whole training.csv."""
        self.curve.write(folder)

    def save(self, path: Path, seconds: float) -> None:
        """Write a checkpoint from which the run resumes bit-identically."""
        state = {
            "step": self.step,
            "seconds": self.seconds + seconds,
            "scale": self.scale,
            "sae": self.sae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "tokens_since_fired": self.tokens_since_fired,
            "first_bad": self._first_bad,
            **self.curve.state(),
            "steering": None if self.steering is None else asdict(self.steering),
        }
        write_checked(path, lambda temporary: torch.save(state, temporary))

    def load(self, path: Path) -> None:
        """Restore the state from a checkpoint of `save`."""
        state = torch.load(path, map_location=self.tokens_since_fired.device, weights_only=True)
        self.step, self.seconds, self.scale = state["step"], state["seconds"], state["scale"]
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.tokens_since_fired.copy_(state["tokens_since_fired"])
        self._first_bad.copy_(state["first_bad"])
        self.curve = Curve.of(state)
        steering = state.get("steering")
        if steering is not None:
            self.steering = PenaltySteering(**steering)
            self.sae.penalty_weight = self.steering.weight

    def _precision(self) -> torch.autocast:
        """Return the autocast context of one step. Each step needs a new one, because a context
        caches casts."""
        low = self.training.precision == "bfloat16"
        return torch.autocast(self.sae.b_dec.device.type, torch.bfloat16, enabled=low)

    @contextmanager
    def _decoder_made_once(self) -> Iterator[None]:
        """Compute an archetypal decoder, and its gradient, only once in the context."""
        if isinstance(self.training.decoder_options, FreeDecoder):
            yield
            return
        with parametrize.cached():
            _ = self.sae.W_dec
            yield

    def _rate(self, step: Step) -> float:
        return learning_rate(
            step,
            self.peak_lr,
            warmup_steps=round(self.training.warmup_fraction * step.total),
            decay_fraction=self.training.decay_fraction,
        )

    def _count(self, x: Tensor, loss: Loss) -> None:
        self.tokens_since_fired += len(x) * self.ranks.count
        self.tokens_since_fired.masked_fill_(loss.fired > 0, 0)
        now = torch.full_like(self._first_bad, self.step)
        is_first = ~torch.isfinite(loss.total.detach()) & (self._first_bad < 0)
        self._first_bad = torch.where(is_first, now, self._first_bad)
        with batch_shared_by(self.ranks):
            share = total_variance(x)
        varies = has_variance(x, share)
        equal = ~varies & torch.isfinite(share)
        self._without_variance = torch.where(is_first, equal, self._without_variance)
        variance = torch.where(varies, share, 0.0) * self.ranks.count
        self.curve.count(
            loss=loss.total,
            squared_error=loss.squared_error,
            variance=variance,
            l0=loss.l0,
            **loss.parts,
        )
