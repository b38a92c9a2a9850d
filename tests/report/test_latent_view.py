"""A latent on the terminal, from a result and a sweep's table made by hand."""

from __future__ import annotations

import io
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from rich.console import Console
from rich.text import Text

from reseed.compare.registry import NOT_ASKED
from reseed.report.latent_view import (
    FILE,
    PAIRS,
    LatentView,
    matches_of,
    one_line,
    print_latent,
    print_partner,
)
from reseed.store.contexts import SCHEMA, Contexts
from reseed.store.results import RowGroups, StoredEvaluation

TEXTS = ["The", " cat", " sat", "\n", " on", "\x07"]
FIRST = {
    "firing": 2, "largest": 4.0, "mean": 3.0,
    "contexts": [
        {"quantile": None, "position": 1, "peak": 1, "tokens": [0, 1, 2, 3, 4, 5],
         "active": [1, 2], "activations": [4.0, 0.5]},
        {"quantile": 0.25, "position": 9, "peak": 0, "tokens": [2, 4], "active": [0],
         "activations": [2.0]},
    ],
    "promoted": [{"token": 1, "logit": 1.5}], "suppressed": [{"token": 3, "logit": -0.25}],
    "neighbours": [{"latent": 1, "cosine": 0.5}],
}  # fmt: skip
SILENT = {"firing": 0, "largest": 0.0, "mean": 0.0}
SILENT |= {name: [] for name in ("contexts", "promoted", "suppressed", "neighbours")}


@pytest.fixture
def contexts(tmp_path: Path) -> Contexts:
    table = pa.Table.from_pylist([FIRST, SILENT], schema=SCHEMA)
    texts = pd.DataFrame({"token": range(len(TEXTS)), "text": TEXTS})
    tables = {"contexts": RowGroups(SCHEMA, [table]), "texts": texts}
    StoredEvaluation("contexts", {}, {"tokens": 200}, tables).write(tmp_path / "result")
    return Contexts.read(tmp_path / "result")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    rows = [
        {"run": f"run{i}", "seed": i, "latent": latent, "shared_with": 1 - latent,
         "reproducibility": 0.5, "reproducibility_low": 0.25, "reproducibility_high": 0.75,
         "others": [f"run{j}" for j in range(3) if j != i],
         "partner_decoder": [7, -1], "partner_encoder": [7, -1],
         "cosine_encoder": [0.8, float("nan")], "cosine_decoder": [0.9, float("nan")],
         "shared": [latent == 0, False], "pearson": [0.31, None], "jaccard": [0.2, None]}
        for i in range(3) for latent in range(2)
    ]  # fmt: skip
    pd.DataFrame(rows).to_parquet(tmp_path / FILE)
    write_pairs(tmp_path, activation_tokens=4096, activation_note="")
    return tmp_path


def write_pairs(sweep: Path, **columns: object) -> None:
    """Write pairs.csv with the pairs of another cell, then those of the runs."""
    pairs = [("x0", "x1"), ("run0", "run1"), ("run0", "run2"), ("run1", "run2")]
    table = pd.DataFrame(pairs, columns=["a", "b"]).assign(**columns)
    table.iloc[0, 2:] = None
    table.to_csv(sweep / PAIRS, index=False)


def printed(show, width: int = 80, **options) -> list[str]:
    """Return the lines that ``show`` prints."""
    file = io.StringIO()
    show(Console(file=file, width=width, **options))
    lines = file.getvalue().splitlines()
    return lines if options.get("color_system") else [Text.from_ansi(x).plain for x in lines]


def test_everything_known_about_a_latent_is_printed(contexts: Contexts, sweep: Path) -> None:
    shown = LatentView("run0", contexts, contexts.latent(0), matches_of(sweep, "run0", [0])[0])
    lines = printed(lambda console: print_latent(shown, console))
    assert lines[:11] == [
        "run0  latent 0",
        "fires on 2 of 200 tokens (1.00%), largest activation 4, mean 3",
        "reproducibility 0.50 [0.25, 0.75]",
        "shared with 1 of 2",
        "  seed 1: 7 (0.80 enc, 0.90 dec, Pearson 0.31, Jaccard 0.20) * not alike",
        "  seed 2: none",
        "*: shared by weights. not alike: Pearson below 0.5: they fire differently. ",
        "Pearson, Jaccard: activations on 4,096 held-out tokens.",
        "promotes  ' cat' 1.50",
        "suppresses  '↵' -0.25",
        "neighbours  1 (0.50)",
    ]
    heads = [lines[11], lines[13]]
    assert heads == ["fires most", "sampled, by quantile of activation"]
    assert lines[12].split(maxsplit=1) == ["4", "The «cat·4» «sat·0.5»↵ on�"]
    assert lines[14].split(maxsplit=2) == ["0.25", "2", "«sat·2» on"]


def test_peaks_are_aligned_and_no_line_is_wider_than_the_window(
    contexts: Contexts,
) -> None:
    shown = LatentView("run0", contexts, contexts.latent(0))
    lines = printed(
        lambda console: print_latent(shown, console), width=40, force_terminal=True, no_color=True
    )
    peaks = [line.index("«") for line in lines if "«" in line]
    assert len(peaks) == 2
    assert len(set(peaks)) == 1
    assert all(len(line) <= 40 for line in lines if "«" in line)
    assert "«cat·4»" in "".join(lines)
    assert any(line.endswith("…") for line in lines), "what does not fit is left out"


def test_colours_replace_brackets_on_a_terminal_with_colour(contexts: Contexts) -> None:
    shown = LatentView("run0", contexts, contexts.latent(0))
    lines = printed(
        lambda console: print_latent(shown, console), force_terminal=True, color_system="truecolor"
    )
    text = "\n".join(lines)
    assert "«" not in text
    strong, weak = "48;2;46;194;126m cat", "48;2;18;38;28m sat"
    assert strong in text
    assert weak in text


def test_silent_latents_and_runs_without_a_comparison_are_reported(contexts: Contexts) -> None:
    shown = LatentView("run0", contexts, contexts.latent(1))
    assert printed(lambda console: print_latent(shown, console)) == [
        "run0  latent 1", "fires on none of 200 tokens", "not compared with other runs yet",
    ]  # fmt: skip


def test_partners_are_printed_or_reported_to_have_no_contexts(
    contexts: Contexts, sweep: Path
) -> None:
    there, none = matches_of(sweep, "run0", [0])[0].partners
    shown = LatentView("run1", contexts, contexts.latent(0))
    lines = printed(lambda console: print_partner(there, shown, console))
    assert lines[0] == ("in seed 1: 7 (0.80 enc, 0.90 dec, Pearson 0.31, Jaccard 0.20) * not alike")
    assert "«cat·4»" in lines[3]
    assert "quantile" not in "".join(lines), "only what it fires on most"
    assert printed(lambda console: print_partner(there, None, console))[1] == (
        "no contexts yet: reseed evaluate run1 evaluation=contexts"
    )
    assert printed(lambda console: print_partner(none, None, console)) == ["in seed 2: none"]


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, NOT_ASKED),
        ({"activation_tokens": 0, "activation_note": "the model is gone"}, "the model is gone"),
    ],
)
def test_a_match_without_activations_has_dashes_and_the_reason(
    contexts: Contexts, sweep: Path, columns: dict[str, object], reason: str
) -> None:
    write_pairs(sweep, **columns)
    table = pd.read_parquet(sweep / FILE)
    table.assign(pearson=[[None] * 2] * 6, jaccard=[[None] * 2] * 6).to_parquet(sweep / FILE)
    shown = LatentView("run0", contexts, contexts.latent(0), matches_of(sweep, "run0", [0])[0])
    lines = printed(lambda console: print_latent(shown, console), width=200)
    assert lines[3] == (
        "shared with 1 of 2  seed 1: 7 (0.80 enc, 0.90 dec, Pearson –, Jaccard –) *  seed 2: none"
    )
    assert lines[4] == (
        "*: shared by weights. Pearson, Jaccard: activations were not compared: " + reason + "."
    )


def test_a_correlation_that_is_undefined_is_explained(contexts: Contexts, sweep: Path) -> None:
    table = pd.read_parquet(sweep / FILE)
    table.assign(pearson=[[None] * 2] * 6).to_parquet(sweep / FILE)
    shown = LatentView("run0", contexts, contexts.latent(0), matches_of(sweep, "run0", [0])[0])
    text = "\n".join(printed(lambda console: print_latent(shown, console), width=200))
    assert "7 (0.80 enc, 0.90 dec, Pearson –, Jaccard 0.20) *  seed 2" in text
    assert "–: undefined, because the latent or its match is constant on them." in text


@pytest.mark.parametrize(
    ("by_encoder", "words"),
    [(696, "0.80 enc with 696, 0.90 dec"), (-1, "no match by enc, 0.90 dec")],
)
def test_an_encoder_cosine_names_the_latent_that_it_is_with(
    contexts: Contexts, sweep: Path, by_encoder: int, words: str
) -> None:
    """The match by decoder is latent 7; the encoder's is another one, or none."""
    table = pd.read_parquet(sweep / FILE)
    table = table.assign(partner_encoder=[[by_encoder, -1]] * 6, shared=[[False] * 2] * 6)
    table.to_parquet(sweep / FILE)
    shown = LatentView("run0", contexts, contexts.latent(0), matches_of(sweep, "run0", [0])[0])
    lines = printed(lambda console: print_latent(shown, console))
    assert lines[4] == f"  seed 1: 7 ({words}, Pearson 0.31, Jaccard 0.20)"
    told = "enc with: cosine with the match by encoder, which is another latent."
    assert (told in " ".join(lines)) == (by_encoder >= 0)


def test_only_the_requested_latents_are_read(sweep: Path) -> None:
    assert matches_of(sweep, "run0", [1]).keys() == {1}
    assert matches_of(sweep, "elsewhere", [0]) == {}


def test_runs_that_differ_in_more_than_the_seed_are_named_by_id(sweep: Path) -> None:
    table = pd.read_parquet(sweep / FILE).assign(seed=0).drop(columns=["cosine_encoder"])
    table.to_parquet(sweep / FILE)
    partner = matches_of(sweep, "run0", [0])[0].partners[0]
    assert (partner.name, partner.cosine_encoder) == ("run1", None)


def test_unprintable_characters_are_replaced_by_a_sign() -> None:
    assert one_line("a\n\tb\x1b[0m") == "a↵→b�[0m"
