"""A latent on the terminal: its contexts, logits, neighbours and matches in other runs.

Only the rows of the latent are read from a sweep's ``latents.parquet``, and from ``pairs.csv``
whether the activations of its run were compared.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from reseed.compare.registry import ALIKE, NOT_ASKED, NOTE, TOKENS
from reseed.report.format import MISSING, format_bounds, format_number
from reseed.store.contexts import TOP, Context, Contexts, LatentContexts

FILE, PAIRS = "latents.parquet", "pairs.csv"
_OWN = ("run", "seed", "latent", "shared_with", "others", "shared")
_PARTNERS = ("partner_decoder", "partner_encoder")
_OF_MATCHES = ("cosine_encoder", "cosine_decoder", "pearson", "jaccard")
_CHANCE = ("reproducibility", "reproducibility_low", "reproducibility_high")


_SHADES = ("#12261c", "#164a2f", "#1a6e43", "#1f9357", "#2ec27e")
"""Background colours of tokens, from the smallest activation to the latent's largest."""
_DARK = 3
"""Number of shades, from the first, that need white letters."""
_WIDEST = 120
"""Maximum width of a passage in characters when the output is a file."""


@dataclass(frozen=True)
class Partner:
    """Match of a latent in another run, by decoder.

    Attributes:
        run: id of the other run.
        name: its name within the cell: ``seed 1``.
        latent: index of the match; None if there is none.
        by_encoder: index of the match by encoder, which may be another latent; None if there is
            none.
        cosine_encoder, cosine_decoder: cosine with the match by encoder, and by decoder; None if
            rows cannot be compared.
        pearson, jaccard: correlation of the activations of both, and overlap of the tokens on which
            they fire; None if activations were not compared, or if it is undefined.
        shared: whether the other run shares the latent by the strict rule.
    """

    run: str
    name: str
    latent: int | None
    by_encoder: int | None
    cosine_encoder: float | None
    cosine_decoder: float | None
    pearson: float | None
    jaccard: float | None
    shared: bool


@dataclass(frozen=True)
class LatentMatches:
    """Matches of a latent in the other runs of its cell.

    Attributes:
        shared_with: number of other runs that share it.
        reproducibility: probability that one more run shares it, and the bounds of its interval;
            None if the runs differ in more than the seed.
        partners: a match per other run.
        tokens: number of held-out tokens on which activations were compared.
        reason: why they were not compared; empty if they were.
    """

    shared_with: int
    reproducibility: tuple[float, float, float] | None
    partners: tuple[Partner, ...]
    tokens: int
    reason: str


def matches_of(sweep: Path, run: str, latents: Sequence[int]) -> dict[int, LatentMatches]:
    """Return latent → its matches, for those latents of a run that the sweep's table has. Only
    their rows are read."""
    path = sweep / FILE
    there = pq.read_schema(path).names
    wanted = [name for name in (*_OWN, *_PARTNERS, *_OF_MATCHES, *_CHANCE) if name in there]
    rows = pq.read_table(
        path, columns=wanted, filters=[("run", "==", run), ("latent", "in", list(latents))]
    ).to_pylist()
    if not rows:
        return {}
    first = pq.read_table(path, columns=["run", "seed"], filters=[("latent", "==", 0)])
    seeds = {row["run"]: row["seed"] for row in first.to_pylist()}
    cell = [run, *rows[0]["others"]]
    distinct = len({seeds[each] for each in cell}) == len(cell)
    names = {each: f"seed {seeds[each]}" if distinct else each for each in cell}
    on_tokens = _on_tokens(sweep, cell)
    return {row["latent"]: _matches(row, names, *on_tokens) for row in rows}


def _on_tokens(sweep: Path, cell: Sequence[str]) -> tuple[int, str]:
    """Return the number of tokens on which the activations of a cell were compared, and the reason
    why they were not."""
    with (sweep / PAIRS).open(newline="", encoding="utf-8") as file:
        pairs = (row for row in csv.DictReader(file) if {row["a"], row["b"]} <= set(cell))
        first = next(pairs, {})
    # The column is also there, but empty, if another cell of the sweep has it.
    tokens = int(float(first.get(TOKENS) or 0))
    return tokens, "" if tokens else first.get(NOTE) or NOT_ASKED


def _matches(
    row: Mapping[str, Any], names: Mapping[str, str], tokens: int, reason: str
) -> LatentMatches:
    others = row["others"]
    partners = []
    for i, other in enumerate(others):
        match, by_encoder = (_index(row[name][i]) for name in _PARTNERS)
        there, shared = match is not None, bool(row["shared"][i])
        numbers = {n: row[n][i] if there and n in row else None for n in _OF_MATCHES}
        found = Partner(other, names[other], match, by_encoder, shared=shared, **numbers)
        partners.append(found)
    mean, low, high = _CHANCE
    chance = (row[mean], row[low], row[high]) if row.get(mean) is not None else None
    return LatentMatches(row["shared_with"], chance, tuple(partners), tokens, reason)


def _index(partner: int | None) -> int | None:
    return None if partner is None or partner < 0 else partner


@dataclass(frozen=True, eq=False)
class LatentView:
    """A latent, with its run and its contexts.

    Attributes:
        run: the run's id.
        matches: its matches in other runs; None if it is in no comparison.
    """

    run: str
    contexts: Contexts
    latent: LatentContexts
    matches: LatentMatches | None = None


def print_latent(view: LatentView, console: Console) -> None:
    """Print everything known about a latent."""
    latent = view.latent
    console.print(Text.assemble((view.run, "bold"), "  latent ", (str(latent.latent), "bold")))
    console.print(_fires(view))
    _print_matches(view.matches, console)
    for name, pairs in (("promotes", latent.promoted), ("suppresses", latent.suppressed)):
        texts = view.contexts.text([token for token, _ in pairs])
        items = (f"{quoted(t)} {value:.2f}" for t, (_, value) in zip(texts, pairs, strict=True))
        _print_list(name, list(items), console)
    near = [f"{other} ({format_number(cosine)})" for other, cosine in latent.neighbours]
    _print_list("neighbours", near, console)
    _print_contexts(view, latent.contexts, console)


def print_partner(partner: Partner, view: LatentView | None, console: Console) -> None:
    """Print the strongest contexts of a latent's partner in another run.

    Args:
        view: the partner with its contexts; None if its run has no contexts yet.
    """
    console.print(Text(f"in {partner.name}: {_in_words(partner)}", style="bold"))
    if partner.latent is None:
        return
    if view is None:
        console.print(Text(f"no contexts yet: reseed evaluate {partner.run} evaluation=contexts"))
        return
    console.print(_fires(view))
    _print_contexts(view, [c for c in view.latent.contexts if c.kind == TOP], console)


def quoted(text: str) -> str:
    """Quote a token, so that its spaces are visible, on one line."""
    return f"'{one_line(text)}'"


def one_line(text: str) -> str:
    """Replace newlines and tabs by visible signs, and other unprintable characters by �."""
    signs = {"\n": "↵", "\r": "↵", "\t": "→"}
    return "".join(signs.get(c, c if c.isprintable() else "�") for c in text)


def _fires(view: LatentView) -> Text:
    latent = view.latent
    if not latent.firing:
        return Text(f"fires on none of {view.contexts.tokens:,} tokens")
    return Text(
        f"fires on {latent.firing:,} of {view.contexts.tokens:,} tokens "
        f"({latent.density:.2%}), largest activation {latent.largest:.3g}, mean {latent.mean:.3g}"
    )


def _print_matches(matches: LatentMatches | None, console: Console) -> None:
    if matches is None:
        console.print(Text("not compared with other runs yet"))
        return
    if matches.reproducibility is not None:
        mean, low, high = matches.reproducibility
        console.print(Text(f"reproducibility {format_number(mean)} {format_bounds(low, high)}"))
    count = f"shared with {matches.shared_with} of {len(matches.partners)}"
    _print_list(count, [f"{p.name}: {_in_words(p)}" for p in matches.partners], console)
    if any(p.latent is not None for p in matches.partners):
        console.print(Text(" ".join(_legend(matches)), style="dim"))


def _in_words(partner: Partner) -> str:
    """Return ``471 (0.82 enc, 0.85 dec, Pearson 0.93, Jaccard 0.71) *``, with a star if it is
    shared; with ``0.62 enc with 696`` if the match by encoder is another latent."""
    if partner.latent is None:
        return "none"
    numbers = []
    if partner.by_encoder is None:
        numbers.append("no match by enc")
    elif partner.cosine_encoder is not None:
        other = f" with {partner.by_encoder}" * _differ(partner)
        numbers.append(f"{format_number(partner.cosine_encoder)} enc{other}")
    if partner.cosine_decoder is not None:
        numbers.append(f"{format_number(partner.cosine_decoder)} dec")
    for name, value in (("Pearson", partner.pearson), ("Jaccard", partner.jaccard)):
        numbers.append(f"{name} {MISSING if value is None else format_number(value)}")
    unlike = " not alike" * _is_unlike(partner)
    return f"{partner.latent} ({', '.join(numbers)})" + f" *{unlike}" * partner.shared


def _differ(partner: Partner) -> bool:
    return partner.by_encoder not in (None, partner.latent)


def _is_unlike(partner: Partner) -> bool:
    return partner.shared and partner.pearson is not None and partner.pearson < ALIKE


def _legend(matches: LatentMatches) -> Iterator[str]:
    """Yield sentences that explain the matches."""
    there = [p for p in matches.partners if p.latent is not None]
    if any(p.shared for p in there):
        yield "*: shared by weights."
    if any(map(_is_unlike, there)):
        yield f"not alike: Pearson below {ALIKE:g}: they fire differently."
    if any(map(_differ, there)):
        yield "enc with: cosine with the match by encoder, which is another latent."
    if matches.reason:
        yield f"Pearson, Jaccard: activations were not compared: {matches.reason}."
        return
    yield f"Pearson, Jaccard: activations on {matches.tokens:,} held-out tokens."
    if any(None in (p.pearson, p.jaccard) for p in there):
        yield f"{MISSING}: undefined, because the latent or its match is constant on them."


def _print_list(name: str, items: Sequence[str], console: Console) -> None:
    """Print a name and its items, if there are any; lines break between items."""
    line = Text(name, style="bold")
    for item in items:
        if line.cell_len + 2 + cell_len(item) > console.width:
            console.print(line)
            line = Text()
        line = Text.assemble(line, "  ", item)
    if items:
        console.print(line)


def _print_contexts(view: LatentView, contexts: Sequence[Context], console: Console) -> None:
    marked = console.color_system is None or console.no_color
    width = console.width if console.is_terminal else min(console.width, _WIDEST)
    for i, context in enumerate(contexts):
        if i == 0 or context.kind != contexts[i - 1].kind:
            named = "fires most" if context.kind == TOP else "sampled, by quantile of activation"
            console.print(Text(named, style="bold"))
        place = "" if context.quantile is None else f"{context.quantile:.2f}"
        head = f"{place:>6}{context.activations[context.peak]:>8.3g}  "
        tokens = _tokens(view, context, marked)
        around = _around(tokens, context.peak, width - cell_len(head))
        console.print(Text.assemble((head, "dim"), around))


def _tokens(view: LatentView, context: Context, marked: bool) -> list[Text]:
    """Return each token with its activation: as a background colour, or, if ``marked``, as a number
    beside it."""
    found = []
    texts = view.contexts.text(context.tokens)
    for text, value in zip(texts, context.activations.tolist(), strict=True):
        text = one_line(text)
        if value == 0:
            found.append(Text(text))
        elif marked:
            word = text.lstrip(" ")
            found.append(Text(f"{text[: len(text) - len(word)]}«{word}·{value:.3g}»"))
        else:
            found.append(Text(text, style=_shade(value / view.latent.largest)))
    return found


def _shade(share: float) -> Style:
    step = min(int(share * len(_SHADES)), len(_SHADES) - 1)
    return Style(color="white" if step < _DARK else "black", bgcolor=_SHADES[step])


def _around(tokens: Sequence[Text], peak: int, width: int) -> Text:
    """Lay out the peak token so that it begins in the middle of the line, with as many tokens as
    fit before and after it, and … for those left out."""
    middle = width // 2
    begin, room = peak, middle - 1
    while begin > 0 and tokens[begin - 1].cell_len <= room:
        begin -= 1
        room -= tokens[begin].cell_len
    end, left = peak + 1, width - middle - 1 - tokens[peak].cell_len
    while end < len(tokens) and tokens[end].cell_len <= left:
        left -= tokens[end].cell_len
        end += 1
    before = "…" if begin > 0 else " "
    after = "…" if end < len(tokens) else ""
    return Text.assemble(" " * room, before, *tokens[begin:end], after)
