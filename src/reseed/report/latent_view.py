"""A latent on the terminal: its contexts, logits, neighbours and matches in other runs.

Only the rows of the latent are read from a sweep's ``latents.parquet``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.cells import cell_len
from rich.console import Console
from rich.style import Style
from rich.text import Text

from reseed.report.format import format_bounds, format_number
from reseed.store.contexts import TOP, Context, Contexts, LatentContexts

FILE = "latents.parquet"
_OWN = ("run", "seed", "latent", "shared_with", "others", "partner_decoder", "shared")
_BY_WEIGHTS = ("cosine_encoder", "cosine_decoder")
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
        cosine_encoder, cosine_decoder: cosines with the match; None if rows cannot be compared.
        shared: whether the other run shares the latent by the strict rule.
    """

    run: str
    name: str
    latent: int | None
    cosine_encoder: float | None
    cosine_decoder: float | None
    shared: bool


@dataclass(frozen=True)
class LatentMatches:
    """Matches of a latent in the other runs of its cell.

    Attributes:
        shared_with: number of other runs that share it.
        reproducibility: probability that one more run shares it, and the bounds of its interval;
            None if the runs differ in more than the seed.
        partners: a match per other run.
    """

    shared_with: int
    reproducibility: tuple[float, float, float] | None
    partners: tuple[Partner, ...]


def matches_of(sweep: Path, run: str, latents: Sequence[int]) -> dict[int, LatentMatches]:
    """Return latent → its matches, for those latents of a run that the sweep's table has. Only
    their rows are read."""
    path = sweep / FILE
    there = pq.read_schema(path).names
    wanted = [name for name in (*_OWN, *_BY_WEIGHTS, *_CHANCE) if name in there]
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
    return {row["latent"]: _matches(row, names) for row in rows}


def _matches(row: Mapping[str, Any], names: Mapping[str, str]) -> LatentMatches:
    others = row["others"]
    partners = []
    for i, other in enumerate(others):
        latent = row["partner_decoder"][i]
        there = latent is not None and latent >= 0
        encoder, decoder = (row[n][i] if there and n in row else None for n in _BY_WEIGHTS)
        match = latent if there else None
        shared = bool(row["shared"][i])
        partners.append(Partner(other, names[other], match, encoder, decoder, shared))
    mean, low, high = _CHANCE
    chance = (row[mean], row[low], row[high]) if row.get(mean) is not None else None
    return LatentMatches(row["shared_with"], chance, tuple(partners))


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


def _in_words(partner: Partner) -> str:
    """Return ``471 (0.82 enc, 0.85 dec) *``, with a star if it is shared."""
    if partner.latent is None:
        return "none"
    both = ((partner.cosine_encoder, "enc"), (partner.cosine_decoder, "dec"))
    cosines = ", ".join(
        f"{format_number(cosine)} {of}" for cosine, of in both if cosine is not None
    )
    words = f"{partner.latent} ({cosines})" if cosines else str(partner.latent)
    return f"{words} *" if partner.shared else words


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
