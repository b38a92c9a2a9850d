"""Time and memory of gathering the contexts of a wide SAE, relative to encoding.

    python benchmarks/contexts.py
    python benchmarks/contexts.py --device cuda --d-in 4096

1. Blocks of activations are encoded without and with gathering of contexts, in turns. The first
   blocks cost most, because nearly every firing is stored.
2. As many firings as 10 million tokens have are counted. They are drawn, not encoded, with the
   firing rates of the latents in 1. Measured are seconds, and resident memory, which must not grow.
3. The final stage, once per SAE: neighbours and lens (of some rows, scaled up) and the files.

The result is the ratio of the total to the encoding of 10 million tokens.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from measuring import _peak, _reset_peak, _resident

from reseed.evaluate.context_gathering import ContextGatherer, Firings, Ranked, lens, neighbours
from reseed.evaluate.contexts import ContextsConfig, LatentDescriptions
from reseed.sae.base import SAE
from reseed.sae.batch_topk import BatchTopK, BatchTopKConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.selection import select
from reseed.sae.topk import TopKConfig
from reseed.store.results import StoredEvaluation

CONTEXT, BLOCK = 256, 4_096
"""Tokens of a sequence, and of a block, which the evaluation processes at once."""
SETTINGS = ContextsConfig()
SAMPLE = 2_048
"""Rows for which neighbours and lens are timed."""
PATTERNS = 16
"""Blocks of drawn firings, reused with new activations because drawing them takes longest."""


@dataclass(frozen=True)
class Spent:
    """Seconds of wall and of CPU time."""

    wall: float
    cpu: float

    def times(self, factor: float) -> Spent:
        return Spent(self.wall * factor, self.cpu * factor)


def timed(what: Callable[[], object], device: torch.device) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    what()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def median(each: list[Spent]) -> Spent:
    return Spent(
        statistics.median(one.wall for one in each), statistics.median(one.cpu for one in each)
    )


@torch.no_grad()
def made_up(architecture: str, d_in: int, num_latents: int, k: int, device: torch.device) -> SAE:
    """Make an SAE with random rows and about k active latents per token.

    The firing rates of the latents span orders of magnitude.
    """
    generator = torch.Generator().manual_seed(0)
    config = {
        "topk": TopKConfig(num_latents=num_latents, k=k),
        "batch_topk": BatchTopKConfig(num_latents=num_latents, k=k),
        "relu": ReLUConfig(num_latents=num_latents, decoder_init_norm=1.0),
    }[architecture]
    sae = config.build(d_in, generator)
    sae.b_enc.copy_(0.3 * torch.randn(num_latents, generator=generator))
    pre = torch.randn(64, d_in, generator=generator) @ sae.W_enc.T + sae.b_enc
    bound = pre.flatten().topk(64 * k).values[-1]
    if isinstance(sae, BatchTopK):
        sae.threshold.copy_(bound)
    elif architecture == "relu":
        sae.b_enc.sub_(bound)
    return sae.to(device)


def gathering_of(sae: SAE) -> ContextGatherer:
    return ContextGatherer(sae, SETTINGS.top, SETTINGS.reservoir, SETTINGS.window, SETTINGS.seed)


@torch.inference_mode()
def blocks(sae: SAE, gathering: ContextGatherer, count: int) -> tuple[list[Spent], list[Spent]]:
    """Time each block encoded alone, and with contexts gathered."""
    generator = torch.Generator().manual_seed(1)
    kept = torch.ones(BLOCK // CONTEXT, CONTEXT, dtype=torch.bool)
    kept[:, 0] = False
    alone, gathered = [], []
    device = sae.W_dec.device
    for i in range(-1, count):  # the first block compiles and is not counted
        x = torch.randn(*kept.shape, sae.d_in, generator=generator).to(device)
        rows = x[kept.to(device)]
        target = gathering if i >= 0 else gathering_of(sae)
        encoding = timed(lambda rows=rows: sae.encode_sparse(rows), device)
        both = timed(lambda x=x, t=target, i=i: t.add(x, kept, max(i, 0) * BLOCK), device)
        if i >= 0:
            alone.append(encoding)
            gathered.append(both)
    return alone, gathered


def drawn(density: torch.Tensor, k: int, generator: torch.Generator) -> Firings:
    """Draw the firings of a block, each latent with its firing rate."""
    latent = torch.multinomial(density, BLOCK * k, replacement=True, generator=generator)
    key = (latent * BLOCK + torch.arange(BLOCK).repeat_interleave(k)).unique()
    return Firings(key // BLOCK, key % BLOCK, torch.rand(len(key)), 0, CONTEXT)


def at(firings: Firings, block: int, generator: torch.Generator, device: torch.device) -> Firings:
    """Return the same firings with new activations, in another block."""
    value = torch.rand(len(firings.value), generator=generator).clamp(min=1e-6)
    each = (firings.latent, firings.place, value)
    return Firings(*(part.to(device) for part in each), block * BLOCK, CONTEXT)


@torch.inference_mode()
def passing(gathering: ContextGatherer, k: int, tokens: int, begin: int) -> tuple[Spent, list[str]]:
    """Count the firings of further tokens; return the time, and lines with memory on the way."""
    generator = torch.Generator().manual_seed(2)
    density = gathering.firing.cpu().double() + 0.01
    device = gathering.firing.device
    wall = cpu = 0.0
    lines = []
    marks = {round(tokens * tenth / 10 / BLOCK) for tenth in (1, 2, 5)}
    patterns = [drawn(density, k, generator) for _ in range(PATTERNS)]
    for i in range(begin, -(-tokens // BLOCK)):
        firings = at(patterns[i % PATTERNS], i, generator, device)
        spent = timed(lambda f=firings: gathering.count(f), device)
        wall, cpu = wall + spent.wall, cpu + spent.cpu
        if i + 1 in marks or (i + 1) * BLOCK >= tokens:
            lines.append(f"| {(i + 1) * BLOCK:,} | {wall:.1f} | {_resident() / 2**30:.2f} |")
    return Spent(wall, cpu), lines


def at_the_end(sae: SAE, gathering: ContextGatherer, vocabulary: int) -> dict[str, Spent]:
    """Time the final stage, which runs once per SAE."""
    device, rows = sae.W_dec.device, sae.W_dec.detach()
    unit = rows / rows.norm(dim=1, keepdim=True)
    share = len(rows) / SAMPLE
    zeros = rows.new_zeros(len(rows))
    near = timed(lambda: select(unit[:SAMPLE], unit, zeros, SETTINGS.neighbours + 1), device)
    matrix = torch.randn(vocabulary, sae.d_in, device=device)
    logits = timed(lambda: lens(rows[:SAMPLE], matrix, SETTINGS.lens), device)
    found = [Ranked.empty(len(rows))] * 2
    few = neighbours(rows[: 2 * SETTINGS.neighbours], SETTINGS.neighbours)
    index = few.index[:1].expand(len(rows), -1)
    last = int(torch.stack([gathering.top.position.max(), gathering.drawn.position.max()]).max())
    sequences = torch.randint(0, vocabulary, (last // CONTEXT + 1, CONTEXT))
    described = LatentDescriptions(
        gathering, SETTINGS.sampled, *found, Ranked(index, few.value[:1].expand(index.shape)),
        sequences,
    )  # fmt: skip
    result = described.result(len(sequences) * CONTEXT, pd.DataFrame({"token": [], "text": []}))
    with tempfile.TemporaryDirectory() as folder:
        stored = StoredEvaluation("contexts", {}, result.metrics, result.tables, result.latents)
        writing = timed(lambda: stored.write(Path(folder)), device)
        size = sum(file.stat().st_size for file in Path(folder).iterdir())
        print(f"files: {size / 2**20:,.0f} MiB")
    return {"neighbours": near.times(share), "lens": logits.times(share), "files": writing}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--architecture", default="topk", choices=("topk", "batch_topk", "relu"))
    parser.add_argument("--latents", type=int, default=131_072)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--blocks", type=int, default=3, help="number of blocks to encode")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--vocabulary", type=int, default=50_304)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    _reset_peak()
    sae = made_up(options.architecture, options.d_in, options.latents, options.k, device)
    gathering = gathering_of(sae)
    alone, both = blocks(sae, gathering, options.blocks)
    print(f"\n{options.architecture}, {options.latents:,} latents, d_in {options.d_in}, "
          f"k {options.k}, blocks of {BLOCK:,}")  # fmt: skip
    print("| block | encoded, s (CPU) | with contexts | is (CPU) |\n|--:|--:|--:|--:|")
    for i, (a, b) in enumerate(zip(alone, both, strict=True)):
        print(f"| {i + 1} | {a.wall:.2f} ({a.cpu:.2f}) | {b.wall:.2f} ({b.cpu:.2f}) | "
              f"{b.wall / a.wall:.2f}× ({b.cpu / a.cpu:.2f}×) |", flush=True)  # fmt: skip
    print("\n| tokens | counted in, s | resident, GiB |\n|--:|--:|--:|")
    counting, lines = passing(gathering, options.k, options.tokens, options.blocks)
    print("\n".join(lines), flush=True)
    encoding = median(alone).times(options.tokens / BLOCK)
    filling = [Spent(b.wall - a.wall, b.cpu - a.cpu) for a, b in zip(alone, both, strict=True)]
    parts = {"the first blocks": Spent(sum(f.wall for f in filling), sum(f.cpu for f in filling))}
    parts |= {"counting": counting, **at_the_end(sae, gathering, options.vocabulary)}
    print(f"encoding {options.tokens:,} tokens: {encoding.wall:,.0f} s (CPU {encoding.cpu:,.0f})")
    for name, spent in parts.items():
        print(f"  {name}: {spent.wall:,.1f} s (CPU {spent.cpu:,.1f}), "
              f"{spent.wall / encoding.wall:.2%} of it")  # fmt: skip
    wall = 1 + sum(spent.wall for spent in parts.values()) / encoding.wall
    cpu = 1 + sum(spent.cpu for spent in parts.values()) / encoding.cpu
    print(f"contexts take {wall:.3f}× the encoding (CPU {cpu:.3f}×)")
    print(f"peak resident memory: {_peak() / 2**30:.2f} GiB, weights "
          f"{8 * options.latents * options.d_in / 2**30:.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
