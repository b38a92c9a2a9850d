"""The tables of evaluations: one for each, a row per cell of a comparison or per run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from reseed.compare.cell import CellResult
from reseed.report.axes import Cell
from reseed.report.cell_tables import Column, cell_table, measured, run_mean
from reseed.report.evaluations import ORPHAN, OVERLAP, SHARED, Runs
from reseed.report.wording import Wording, number, paired


@dataclass(frozen=True)
class Spec:
    """What a table of one evaluation shows.

    Attributes:
        title: the question that it answers.
        heads: head of a column → column of the runs.
        with_interval: the heads whose interval is shown, too; it is in summary.csv for all.
        footnotes: how to read it.
        counts: the heads that are numbers of things.
        spare: heads that a narrow window can do without, those of least use first.
        latents: head → column of the latents, whose mean among shared ones and among orphans is
            shown.
        about_latents: what these are.
    """

    title: str
    heads: Mapping[str, str]
    with_interval: tuple[str, ...] = ()
    footnotes: tuple[str, ...] = ()
    counts: tuple[str, ...] = ("letters", "L0", "L1")
    spare: tuple[str, ...] = ()
    latents: Mapping[str, str] = field(default_factory=dict)
    about_latents: str = ""


SPECS: dict[str, Spec] = {
    "reconstruction": Spec(
        "What is lost of the activations?",
        {
            "FVU": "reconstruction_fvu",
            "EV\nuncentred": "reconstruction_explained_variance_uncentred",
            "cosine": "reconstruction_cosine",
            "L0": "reconstruction_l0",
            "L1": "reconstruction_l1",
            "never\nfired": "reconstruction_silent_fraction",
            "dense": "reconstruction_dense_fraction",
            "‖x̂‖/‖x‖": "reconstruction_shrinkage",
            "relative\nbias": "reconstruction_relative_bias",
        },
        with_interval=("FVU",),
        footnotes=(
            "**FVU**: fraction of variance unexplained; **EV uncentred**: 1 − squared error / "
            "Σ‖x‖², which a large mean alone brings near 1. **cosine** of x and x̂. **L0**, **L1**: "
            "latents active per token, and the sum of their activations.",
            "**never fired**, **dense** (on over a tenth of the tokens): fractions of latents.",
            "**‖x̂‖/‖x‖**: mean over tokens, below 1 where reconstructions are too short. "
            "**relative bias**: E‖x̂‖²/E[x̂·x], below 1 where x̂ should be longer (Rajamanoharan et "
            "al.).",
        ),
        spare=("L1", "relative\nbias", "EV\nuncentred", "dense"),
    ),
    "faithfulness": Spec(
        "What does the model lose?",
        {
            "CE\nclean": "faithfulness_ce_clean",
            "CE\nspliced": "faithfulness_ce",
            "increase": "faithfulness_ce_increase",
            "recovered,\nzero": "faithfulness_ce_recovered_zero",
            "recovered,\nmean": "faithfulness_ce_recovered_mean",
            "KL": "faithfulness_kl",
            "KL recovered,\nzero": "faithfulness_kl_recovered_zero",
            "KL recovered,\nmean": "faithfulness_kl_recovered_mean",
        },
        with_interval=("increase",),
        footnotes=(
            "**CE**: cross-entropy of the next token in nats, of the **clean** model and with the "
            "SAE's reconstruction **spliced** in; **increase**: the difference. **KL**: of the "
            "clean prediction to that one. Put in, and counted, at the positions that SAEs are "
            "trained on.",
            "**recovered**: the part of what ablating the activations costs that the SAE gives "
            "back; ablated to **zero**, or to their **mean**, which is the harder of the two.",
        ),
        spare=("KL recovered,\nzero", "CE\nspliced", "recovered,\nzero"),
    ),
    "splitting": Spec(
        "How many latents stand for a letter?",
        {
            "letters": "splitting_letters",
            "splits": "splitting_splits",
            "probe\nF1": "splitting_probe_f1",
            "latent\nF1": "splitting_f1",
            "precision": "splitting_precision",
            "recall": "splitting_recall",
            "L0": "l0",
        },
        with_interval=("splits", "latent\nF1"),
        footnotes=(
            "**letters**: classes of words of which the model's activations tell (probe F1 above "
            "its gate); all means are over these. **splits**: latents that stand for a letter, "
            "less one (k-sparse probing).",
            "**latent F1**, **precision**, **recall**: of the firing of its first latent on words "
            "that it was not chosen by, beside the **probe** on the activations themselves. Low "
            "recall at high precision is what absorption looks like here. Compare at one **L0**.",
        ),
        spare=("L0",),
    ),
    "absorption": Spec(
        "How much is hidden by absorption?",
        {
            "letters": "absorption_letters",
            "fraction": "absorption_fraction",
            "full": "absorption_full",
            "permuted": "absorption_fraction_null",
            "untrained": "absorption_fraction_untrained",
            "derived": "absorption_fraction_derived",
            "derived,\npermuted": "absorption_fraction_derived_null",
            "FVU": "fvu",
            "L0": "l0",
        },
        with_interval=("fraction", "derived"),
        footnotes=(
            "**fraction**: of what the probe finds of a letter in words of it, the part that other "
            "latents carry in the place of the letter's own; **full**: words on which these are "
            "silent and one other does it. Chanin et al., with their thresholds, over **letters** "
            "whose probe is good enough. Lower is better.",
            "**permuted**: the same of letters given to words at random; **untrained**: of the SAE "
            "as it was born. What is no higher than these is no absorption. **derived**: with "
            "thresholds that directions without meaning do not reach in this dictionary. An SAE "
            "that reconstructs little may score well: read it beside **FVU** and **L0**.",
        ),
        spare=("derived,\npermuted", "L0", "full", "FVU"),
        latents={"absorbers": "absorption_is_absorber"},
        about_latents="**absorbers**: the fraction that has a part in absorbing some word.",
    ),
    "contexts": Spec(
        "What do latents fire on?",
        {"never\nfired": "contexts_silent_fraction"},
        footnotes=(
            "**never fired**: the fraction of latents that were silent on all tokens that were "
            "read. The others have contexts: `reseed show RUN LATENT`.",
        ),
    ),
}


def evaluation_tables(cells: Sequence[Cell]) -> list[Wording]:
    """The tables of all evaluations that cells have results of, in the order of `SPECS`."""
    made = []
    for name in _names([cell.evaluated for _, cell in cells]):
        own = [(knobs, cell) for knobs, cell in cells if name in cell.evaluated]
        spec = _spec(name, {c: None for _, cell in own for c in cell.evaluated[name]})
        made.append(_table(own, spec))
        if spec.latents:
            made.append(_among(own, spec))
    return [*made, *_overlaps(cells)]


def run_tables(runs: Runs) -> list[Wording]:
    """The same for runs that are in no comparison: a row per run."""
    made = []
    for name in _names([run.results for run in runs.values()]):
        own = [run for run in runs.values() if name in run.results]
        spec = _spec(name, {c: None for run in own for c in run.metrics if c.startswith(name)})
        knobs = _telling([run.about for run in own])
        rows = tuple(
            (
                *(str(run.about.get(knob, "")) for knob in knobs),
                *(number(run.numbers.get(of, float("nan"))) for of in spec.heads.values()),
            )
            for run in own
        )
        header = (*knobs, *spec.heads)
        made.append(Wording(header, rows, len(knobs), spec.title, spec.footnotes, spec.spare))
    return made


def _names(each: Sequence[Mapping[str, Any]]) -> list[str]:
    """The evaluations, those of ours first."""
    found = dict.fromkeys(name for names in each for name in names)
    return [name for name in SPECS if name in found] + [n for n in found if n not in SPECS]


def _spec(name: str, columns: Mapping[str, None]) -> Spec:
    """Of an evaluation that is not ours all columns are shown."""
    if name in SPECS:
        return SPECS[name]
    return Spec(name, {c.removeprefix(f"{name}_").replace("_", " "): c for c in columns})


def _table(cells: Sequence[Cell], spec: Spec) -> Wording:
    made: dict[str, Column] = {}
    for head, name in spec.heads.items():
        if head in spec.with_interval:
            made |= measured({head: name})
        else:
            made[head] = run_mean(name) if head in spec.counts else _mean(name)
    words = cell_table(cells, made, *spec.footnotes)
    return replace(words, caption=spec.title, spare=spec.spare)


def _among(cells: Sequence[Cell], spec: Spec) -> Wording:
    """Means over latents among those that others share and among orphans."""
    made: dict[str, Column] = {}
    for head, name in spec.latents.items():
        made |= measured({f"{head},\nshared": name + SHARED, f"{head},\norphan": name + ORPHAN})
    one = paired(cells, plural=False)
    words = cell_table(
        cells,
        made,
        f"{spec.about_latents} Of live latents that another {one} has, too (**shared**), and of "
        "those that none has (**orphan**); mean over runs.",
    )
    return replace(words, caption=f"{spec.title} Among shared latents and orphans")


def _overlaps(cells: Sequence[Cell]) -> list[Wording]:
    """Whether runs of a cell absorb the same words; nothing where that was not asked."""
    own = [(knobs, cell) for knobs, cell in cells if OVERLAP in cell.estimates]
    if not own:
        return []
    made: dict[str, Column] = measured({"same words": OVERLAP})
    made |= {
        "by\nchance": lambda cell: number(cell.pair_mean(f"{OVERLAP}_expected")),
        "pairs\np < .05": _significant,
        "letters": lambda cell: f"{cell.pair_mean('absorbed_classes'):.1f}",
    }
    words = cell_table(
        own,
        made,
        f"**same words**: absorbed in both of two {paired(cells)} / in either, over **letters** "
        "whose latents are matched by the decoder; mean over pairs. **by chance**: words of the "
        "same letter and about the same frequency permuted; **p** of each pair against that.",
    )
    return [replace(words, caption="Do they absorb the same words?")]


def _significant(cell: CellResult) -> str:
    p = cell.pairs["absorbed_p"].dropna().to_numpy(dtype=np.float64)
    return f"{np.count_nonzero(p < 0.05)} of {len(p)}"


def _mean(name: str) -> Column:
    def column(cell: Any) -> str:
        found = cell.estimates.get(name)
        return number(float("nan") if found is None else found.mean)

    return column


def _telling(about: Sequence[Mapping[str, Any]]) -> list[str]:
    """What differs between runs; their names where nothing does."""
    names = dict.fromkeys(name for own in about for name in own if name != "run")
    found = [n for n in names if len({str(own.get(n)) for own in about}) > 1]
    # An SAE that is no run has nothing but its folder.
    return found if found and all(own.keys() >= set(found) for own in about) else ["run"]
