"""``python tests/audit/all_architectures.py``: check every site of every architecture.

Compares the outcome with the table in docs/models.md; ``--write`` writes the table. Other words on
the command line select the architectures whose names contain one of them.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from transformers.utils import logging

from architectures import ALL, outcome, save_tiny
from reseed.activations.language_model import LanguageModel
from tiny_tokenizer import save_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
START, END = (
    "<!-- table: python tests/audit/all_architectures.py --write -->",
    "<!-- end of table -->",
)
SITES = ("resid_pre", "resid_post", "embed", "attn_out", "mlp_out", "resid_mid", "attn_z")
SHOWN = SITES[3:]
"""The sites that some architectures lack; every architecture has the others."""


def outcomes(kind: str, folder: Path) -> dict[str, str]:
    """Return the outcome of each site: its reason where a layer lacks it, else ``exact``."""
    tokenizer = folder / "tokenizer"
    if not tokenizer.is_dir():
        save_tokenizer(tokenizer)
    model = LanguageModel(save_tiny(kind, tokenizer, folder / "model"))
    said = {}
    for site in SITES:
        layers = [0] if site == "embed" else range(model.resolved.num_layers)
        per_layer = [_short(outcome(model, site, layer)) for layer in layers]
        refused = sorted(set(per_layer) - {"exact"})
        some = "in some layers: " if "exact" in per_layer else ""
        said[site] = some + "; ".join(refused) if refused else "exact"
    return said


def _short(said: str) -> str:
    return said.partition("has no such site: ")[2].partition(". Name")[0] or said


def table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Return a markdown table with one row for the architectures whose outcomes are equal."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for kind, said in found.items():
        alike.setdefault(tuple(said[site] for site in SHOWN), []).append(kind)
    rows = sorted(alike.items(), key=lambda row: (-row[0].count("exact"), -len(row[1])))
    lines = [f"| architectures | {' | '.join(f'`{site}`' for site in SHOWN)} |", "|---" * 5 + "|"]
    lines += [f"| {', '.join(kinds)} | {' | '.join(said)} |" for said, kinds in rows]
    return "\n".join(lines)


def main(words: Iterable[str]) -> int:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    write = "--write" in words
    words = [word for word in words if word != "--write"]
    found: dict[str, dict[str, str]] = {}
    failed = False
    for kind in ALL:
        if words and not any(word in kind for word in words):
            continue
        with tempfile.TemporaryDirectory() as folder:
            try:
                found[kind] = outcomes(kind, Path(folder))
            except Exception:
                failed = True
                print(f"{kind}: WRONG\n{traceback.format_exc()}", flush=True)
            else:
                refused = {s: said for s, said in found[kind].items() if said != "exact"}
                print(f"{kind}: {refused or 'exact'}", flush=True)
    if failed or words:
        return int(failed)
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    made = f"{before}{START}\n\n{table(found)}\n\n{END}{rest.partition(END)[2]}"
    if write:
        PAGE.write_text(made, encoding="utf-8")
    elif made != PAGE.read_text(encoding="utf-8"):
        print("the table of docs/models.md is not what was found: run this with --write")
        return 1
    print(f"{len(found)} architectures: every site is exact or refused")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
