"""Loss of a language model when an SAE's reconstruction replaces its activations.

The reconstruction replaces the activations at every position that the SAE is trained on: all
positions except the first of a sequence and special tokens, unless the dataset's options include
these. Other positions keep the model's own activations. The losses count the next-token predictions
at the replaced positions; the last position of a sequence has none.

Shapes: S sequences, L context length, V vocabulary, n counted predictions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.intervention import Edit, logits
from reseed.activations.language_model import LanguageModel
from reseed.activations.text_source import TextSource
from reseed.config import setting
from reseed.evaluate.base import (
    EvaluationConfig,
    EvaluationInput,
    LoadedRun,
    Metric,
    Result,
    RunSource,
    needs_language_model,
    needs_unembedding,
)
from reseed.sae.base import SAE

_RUNS_PER_PASS = 8
"""Maximum number of SAEs that share a forward pass of the clean model."""
_LOGITS = 2**26
"""Maximum number of logits of one forward pass with several sequences: 256 MiB in float32."""
_MEAN, _ZERO = "mean", "zero"


@dataclass(frozen=True)
class FaithfulnessConfig(EvaluationConfig, name="faithfulness"):
    """Cross-entropy and KL with the SAE in the model, and with the same activations ablated."""

    with_untrained: ClassVar[bool] = False
    title = "What does the model lose?"
    metrics = (
        Metric("ce_clean", "CE\nclean", "cross-entropy of the next token, in nats, of the model"),
        Metric("ce", "CE\nspliced", "cross-entropy with the SAE's reconstruction in place of the "
               "activations", source="Bricken et al. 2023"),
        Metric("ce_increase", "increase", "increase in cross-entropy caused by the SAE",
               interval=True, formula="CE spliced − CE clean", source="Bricken et al. 2023",
               advice="It shows what the SAE costs the model. Do not compare it with that of "
               "another model or text."),
        Metric("ce_recovered_zero", "recovered,\nzero", "fraction of the harm of an ablation to "
               "zero that the SAE avoids; empty if the ablation does no harm",
               formula="(CE ablated − CE spliced) / (CE ablated − CE clean)",
               advice="The literature reports this one. In the residual stream it says little, "
               "because zeros do great harm there, so that poor SAEs can come close to 1."),
        Metric("ce_recovered_mean", "recovered,\nmean", "fraction of the harm of an ablation to "
               "the mean that the SAE avoids", advice="The harder test."),
        Metric("kl", "KL", "divergence of the predictions with the SAE from those of the model, in "
               "nats", formula="KL(clean ‖ spliced)", advice="It counts every change of the "
               "predictions, not only of the probability of the right token."),
        Metric("kl_recovered_zero", "KL recovered,\nzero", "fraction of the divergence caused by "
               "an ablation to zero that the SAE avoids; empty if the ablation causes none",
               formula="1 − KL / KL ablated"),
        Metric("kl_recovered_mean", "KL recovered,\nmean", "fraction of the divergence caused by "
               "an ablation to the mean that the SAE avoids"),
        Metric("ce_zero", help="cross-entropy with activations ablated to zero"),
        Metric("ce_mean", help="cross-entropy with activations ablated to their mean"),
        Metric("kl_zero", help="divergence of the predictions with activations ablated to zero",
               formula="KL(clean ‖ ablated)"),
        Metric("kl_mean", help="divergence of the predictions with activations ablated to their "
               "mean"),
        Metric("tokens", help="held-out tokens at which activations were replaced"),
    )  # fmt: skip
    spare = ("kl_recovered_zero", "ce", "ce_recovered_zero")
    footnotes = (
        "**CE**: cross-entropy of the next token in nats, of the **clean** model and with the "
        "SAE's reconstruction **spliced** in; **increase**: the difference. **KL**: KL(clean ‖ "
        "spliced) of the predictions. The reconstruction is spliced in, and the loss counted, "
        "at the positions that SAEs are trained on.",
        "**recovered**: the fraction of the cost of ablating the activations that the SAE "
        "recovers; ablated to **zero**, or to their **mean**, the harder test.",
    )

    tokens: int = setting(16_384, at_least=1)
    """Number of held-out activations, in whole sequences; the same for every SAE of one model."""

    def check(self, source: RunSource) -> None:
        needs_language_model(self, source)
        needs_unembedding(self, source)

    def evaluate(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        source = inputs.source
        assert isinstance(source, TextSource)
        text = _HeldOutText(source.model, *source.held_out_sequences(self.tokens))
        inputs.progress(f"mean activations of {text.activations:,} positions")
        means = text.means([run.hook for run in runs])
        for first in range(0, len(runs), _RUNS_PER_PASS):
            some = runs[first : first + _RUNS_PER_PASS]
            inputs.progress(f"SAEs {first + 1}-{first + len(some)} of {len(runs)}")
            edits: dict[tuple[Hookpoint, str], Edit] = {}
            for run in some:
                edits[run.hook, _ZERO] = torch.zeros_like
                edits[run.hook, _MEAN] = partial(_constant, means[run.hook])
                edits[run.hook, f"sae {run.id}"] = partial(_reconstructed, run.sae)
            losses = text.losses(edits)
            for run in some:
                yield run.id, _result(losses, run, text)


@dataclass
class _Losses:
    """Cross-entropy and KL(clean ‖ edited) in nats: for each sequence, the sum over its counted
    predictions, float64."""

    ce: list[Float[Tensor, " some"]] = field(default_factory=list)
    kl: list[Float[Tensor, " some"]] = field(default_factory=list)

    def mean(self, of: str, counted: int) -> float:
        """Return the mean per prediction."""
        return float(torch.cat(getattr(self, of)).sum()) / counted


_CLEAN = None
"""The key of the clean model's losses."""
_LossesByEdit = Mapping[tuple[Hookpoint, str] | None, _Losses]


@dataclass(frozen=True, eq=False)
class _HeldOutText:
    """The sequences that the model reads.

    Attributes:
        kept: the positions where activations are replaced.
    """

    model: LanguageModel
    sequences: Int[Tensor, "S L"]
    kept: Bool[Tensor, "S L"]

    @property
    def activations(self) -> int:
        return int(self.kept.sum())

    @property
    def predictions(self) -> int:
        return int(self.kept[:, :-1].sum())

    def means(self, hooks: Sequence[Hookpoint]) -> dict[Hookpoint, Float[Tensor, " d_in"]]:
        """Return the mean activation at each hookpoint, over the replaced positions."""
        sums: dict[Hookpoint, Tensor] = {}
        first = 0
        for found in self.model.activations(self.sequences, hooks):
            last = first + len(next(iter(found.values())))
            kept = self.kept[first:last].to(self.model.device)
            for hook, x in found.items():
                own = x[kept].double().sum(0)
                sums[hook] = sums[hook] + own if hook in sums else own
            first = last
        return {hook: (total / self.activations).float() for hook, total in sums.items()}

    def losses(self, edits: Mapping[tuple[Hookpoint, str], Edit]) -> _LossesByEdit:
        """Return the losses of the clean model, and of the model with each edit."""
        found: dict[tuple[Hookpoint, str] | None, _Losses] = {_CLEAN: _Losses()}
        for tokens, kept in self._batches():
            clean = _log_probabilities(logits(self.model, tokens), kept)
            _add(found[_CLEAN], clean, clean, tokens, kept)
            for (hook, name), edit in edits.items():
                inside = partial(_where, kept, edit)
                edited = _log_probabilities(logits(self.model, tokens, {hook: inside}), kept)
                _add(found.setdefault((hook, name), _Losses()), edited, clean, tokens, kept)
        return found

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield batches of sequences and their replaced positions, on the device."""
        vocabulary = self.model.resolved.transformers_config.get_text_config().vocab_size
        fitting = max(1, _LOGITS // (vocabulary * self.sequences.shape[1]))
        size = min(self.model.batch_sequences, fitting)
        for tokens, kept in zip(self.sequences.split(size), self.kept.split(size), strict=True):
            yield tokens.to(self.model.device), kept.to(self.model.device)


def _log_probabilities(
    said: Float[Tensor, "S L V"], kept: Bool[Tensor, "S L"]
) -> Float[Tensor, "n V"]:
    """Return log-probabilities of only the counted predictions, in float32."""
    return F.log_softmax(said[:, :-1][kept[:, :-1]].float(), dim=-1)


def _add(
    losses: _Losses,
    edited: Float[Tensor, "n V"],
    clean: Float[Tensor, "n V"],
    tokens: Int[Tensor, "S L"],
    kept: Bool[Tensor, "S L"],
) -> None:
    """Add a batch to the losses, sequence by sequence."""
    counted = kept[:, :-1]
    following = tokens[:, 1:][counted]
    ce = -edited.gather(1, following[:, None])[:, 0]
    kl = (clean.exp() * (clean - edited)).sum(1)
    of_sequence = counted.nonzero()[:, 0]
    for found, values in ((losses.ce, ce), (losses.kl, kl)):
        zeros = torch.zeros(len(tokens), dtype=torch.float64, device=values.device)
        found.append(zeros.index_add(0, of_sequence, values.double()).cpu())


def _where(
    kept: Bool[Tensor, "S L"], edit: Callable[[Tensor], Tensor], x: Float[Tensor, "S L d_in"]
) -> Float[Tensor, "S L d_in"]:
    """Return ``x``, edited at the kept positions."""
    out = x.clone()
    out[kept] = edit(x[kept]).to(x.dtype)
    return out


def _constant(value: Float[Tensor, " d_in"], x: Float[Tensor, "some d_in"]) -> Tensor:
    return value.expand(x.shape)


def _reconstructed(sae: SAE, x: Float[Tensor, "some d_in"]) -> Tensor:
    return sae(x.to(sae.W_dec.device, torch.float32)).reconstruction.to(x.device)


def _result(losses: _LossesByEdit, run: LoadedRun, text: _HeldOutText) -> Result:
    counted = text.predictions
    own = losses[run.hook, f"sae {run.id}"]
    clean = losses[_CLEAN]
    ce, ce_clean = own.mean("ce", counted), clean.mean("ce", counted)
    metrics: dict[str, float | int | None] = {
        "tokens": text.activations,
        "ce_clean": ce_clean,
        "ce": ce,
        "ce_increase": ce - ce_clean,
        "kl": own.mean("kl", counted),
    }
    for ablation in (_ZERO, _MEAN):
        worst = losses[run.hook, ablation]
        ce_worst, kl_worst = worst.mean("ce", counted), worst.mean("kl", counted)
        metrics |= {
            f"ce_{ablation}": ce_worst,
            f"kl_{ablation}": kl_worst,
            f"ce_recovered_{ablation}": _recovered(ce, ce_clean, ce_worst),
            f"kl_recovered_{ablation}": _recovered(metrics["kl"], 0.0, kl_worst),
        }
    table = pd.DataFrame(
        {
            "sequence": range(len(text.sequences)),
            "predictions": text.kept[:, :-1].sum(1).numpy(),
            "ce_clean": torch.cat(clean.ce).numpy(),
            "ce": torch.cat(own.ce).numpy(),
            "kl": torch.cat(own.kl).numpy(),
        }
    )
    return Result(metrics, {"sequences": table})


def _recovered(value: float | int | None, clean: float, worst: float) -> float | None:
    """Return (worst − value)/(worst − clean): 1 without loss, 0 at the loss of the ablation.

    None if the ablation does not increase the loss: there is nothing to recover.
    """
    if value is None or worst <= clean:
        return None
    return (worst - value) / (worst - clean)
