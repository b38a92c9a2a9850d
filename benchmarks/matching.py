"""Exact matching of two dictionaries: reseed against scipy's dense solver and a lower bound.

    python benchmarks/matching.py                                  # up to 16,384 × 768, scipy too
    python benchmarks/matching.py --sizes 131072x768 131072x4096   # too large for scipy
    python benchmarks/matching.py --runs outputs/a outputs/b      # two runs: encoders, decoders
    python benchmarks/matching.py --kinds tight --sizes 3000x64    # a case where scipy is faster

The lower bound ("floor") is one pass of bfloat16 products over all pairs, extrapolated from some
tiles timed in the same process; every method that reads all pairs needs it. Every measurement runs
in a separate process. Its peak memory includes the rows, the products and the rest of the process.

Kinds of data, with rows in random order:
    half      half of the latents have a counterpart on the other side (cosines .4 to .99), the
              others lie around common centres, a dozen around each
    split     the same with forty around each centre, and nearer to it: heavy splitting
    random    nothing in common
    tight     (only on request) two clusters of nearly equal rows, noise 1e-6; one side has two
              thirds and one third of its rows in them, the other one third and two thirds
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float

from reseed.compare.dictionary import unit_rows
from reseed.compare.matching import match
from reseed.sae.checkpoint import load_sae

KINDS = ("half", "split", "random", "tight")


def dictionaries(
    kind: str, n: int, d_in: int, seed: int = 0
) -> tuple[Float[np.ndarray, "n d_in"], Float[np.ndarray, "n d_in"]]:
    """Make two dictionaries of one kind, float32."""
    rng = np.random.default_rng(seed)

    def normal(rows: int) -> Float[np.ndarray, "rows d_in"]:
        return rng.standard_normal((rows, d_in), dtype=np.float32)

    if kind == "random":
        return normal(n), normal(n)
    if kind == "tight":
        centres, many = normal(2), 2 * n // 3
        sizes = (many, n - many), (n - many, many)
        a, b = (np.repeat(centres, size, axis=0) + np.float32(1e-6) * normal(n) for size in sizes)
        return a[rng.permutation(n)], b[rng.permutation(n)]
    shared, tail = normal(n // 2), n - n // 2
    noise = rng.uniform(0.1, 0.8, (n // 2, 1)).astype(np.float32)
    around, weight, spread = (40, 1.0, 0.6) if kind == "split" else (12, 0.7, 1.0)
    centres = normal(max(1, tail // around))
    sides = []
    for _ in range(2):
        own = normal(n)
        own[: n // 2] *= noise
        own[: n // 2] += shared
        own[n // 2 :] *= spread
        own[n // 2 :] += weight * centres[rng.integers(0, len(centres), tail)]
        sides.append(own[rng.permutation(n)])
    return sides[0], sides[1]


def floor(n: int, m: int, d_in: int, tiles: int = 8) -> float:
    """Estimate the seconds of one pass of bfloat16 products over all pairs, from some tiles."""
    left, right = (torch.randn(rows, d_in).to(torch.bfloat16) for rows in (2048, 4096))
    times = []
    with torch.inference_mode():
        for _ in range(tiles):
            start = time.perf_counter()
            left @ right.T
            times.append(time.perf_counter() - start)
    return float(np.median(times)) * n * m / (2048 * 4096)


def measure(a: np.ndarray, b: np.ndarray, threads: int, device: str) -> dict[str, Any]:
    """Run one matching and measure its cost."""
    torch.set_num_threads(threads)
    some = dictionaries("random", 2048, a.shape[1])
    match(*(rows.astype(a.dtype) for rows in some), device=device)  # compiles
    before = floor(len(a), len(b), a.shape[1])
    start, used = time.perf_counter(), time.process_time()
    found = match(a, b, device=device)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    after = floor(len(a), len(b), a.shape[1])
    return {
        "wall": wall,
        "cpu": cpu,
        "floor": (before + after) / 2,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "cosine": float(found.cosines.mean()),
        "sum": float(found.cosines.sum()),
        "gap": found.gap,
        "ambiguous": found.ambiguous,
    }


def by_scipy(a: np.ndarray, b: np.ndarray, threads: int) -> dict[str, Any]:
    """Run scipy's solver on the dense matrix and measure its cost."""
    from scipy.optimize import linear_sum_assignment

    torch.set_num_threads(threads)
    start, used = time.perf_counter(), time.process_time()
    cost = (torch.from_numpy(unit_rows(a)) @ torch.from_numpy(-unit_rows(b)).T).numpy()
    i, j = linear_sum_assignment(cost)
    total = -float(cost[i, j].sum())
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"wall": wall, "cpu": cpu, "peak": peak, "sum": total}


def _child(pipe: Any, task: str, source: Any, threads: int, device: str) -> None:
    if isinstance(source[0], Path):
        from reseed.store.runs import load_run

        saes = [load_sae(load_run(path).path) for path in source[:2]]
        a, b = (getattr(sae, source[2]).detach().numpy() for sae in saes)
    else:
        a, b = dictionaries(*source)
    scipy = task == "scipy"
    pipe.send(by_scipy(a, b, threads) if scipy else measure(a, b, threads, device))


def in_own_process(task: str, source: Any, threads: int, device: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_child, args=(theirs, task, source, threads, device))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError:
        raise SystemExit(f"the process of {task} ended without a result: {source}") from None
    finally:
        process.join()


def report(name: str, ours: dict[str, Any], dense: dict[str, Any] | None) -> None:
    line = (
        f"{name:>28} {ours['wall']:8.1f} s (CPU {ours['cpu']:7.1f})  "
        f"{ours['wall'] / ours['floor']:4.2f} passes of {ours['floor']:6.1f} s  "
        f"peak {ours['peak']:5.2f} GiB  gap {ours['gap']:8.1e}  ambiguous {ours['ambiguous']:,}  "
        f"mean cosine {ours['cosine']:.3f}"
    )
    if dense is not None:
        off = abs(ours["sum"] - dense["sum"])
        line += (
            f"\n{'scipy, dense':>28} {dense['wall']:8.1f} s (CPU {dense['cpu']:7.1f})  "
            f"peak {dense['peak']:5.2f} GiB  "
            f"reseed is {dense['wall'] / ours['wall']:.1f}× faster "
            f"(CPU {dense['cpu'] / ours['cpu']:.1f}×), "
            f"sums differ by {off:.1e}"
        )
        assert off < 1e-9 * max(1.0, ours["sum"]), "the sum differs from scipy's optimum"
    print(line, flush=True)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot time against the number of latents, a line for each kind of data and d_in."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for kind, d_in in sorted({(row["kind"], row["d_in"]) for row in rows}):
        own = sorted((r["n"], r["wall"]) for r in rows if (r["kind"], r["d_in"]) == (kind, d_in))
        axis.plot(*zip(*own, strict=True), "o-", label=f"reseed, {kind}, {d_in:,}")
    dense = sorted((r["n"], r["scipy"]["wall"]) for r in rows if r["scipy"] and r["kind"] == "half")
    if dense:
        axis.plot(*zip(*dense, strict=True), "s--", color="grey", label="scipy, dense, half")
    axis.set(xscale="log", yscale="log", xlabel="latents of each side", ylabel="seconds")
    sizes = sorted({row["n"] for row in rows})
    axis.set_xticks(sizes, [f"{n:,}" for n in sizes], rotation=30)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    print(f"drawn: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=["4096x768", "8192x768", "16384x768"])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS[:3]), choices=KINDS)
    parser.add_argument(
        "--scipy-up-to", type=int, default=16_384, help="most latents for scipy; 0: never"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="device of the products")
    parser.add_argument("--runs", nargs=2, type=Path, help="match two runs (folders) instead")
    parser.add_argument("--figure", type=Path, help="plot time against size into this file")
    parser.add_argument("--keep", type=Path, help="append the numbers to this file (JSON lines)")
    options = parser.parse_args()
    print(f"{options.threads} threads, torch {torch.__version__}, products on {options.device}")
    sources: list[tuple[str, Any, int, int, str]] = []
    if options.runs:
        for part in ("W_enc", "W_dec"):
            sources.append((part, (*options.runs, part), 0, 0, part))
    else:
        for size in options.sizes:
            n, d_in = map(int, size.split("x"))
            for kind in options.kinds:
                sources.append((f"{n:,} × {d_in:,} {kind}", (kind, n, d_in), n, d_in, kind))
    rows = []
    for name, source, n, d_in, kind in sources:
        ours = in_own_process("reseed", source, options.threads, options.device)
        with_scipy = n <= options.scipy_up_to
        dense = in_own_process("scipy", source, options.threads, "cpu") if with_scipy else None
        report(name, ours, dense)
        rows.append({"n": n, "d_in": d_in, "kind": kind, **ours, "scipy": dense})
        if options.keep:
            options.keep.parent.mkdir(parents=True, exist_ok=True)
            with options.keep.open("a") as file:
                file.write(json.dumps({"threads": options.threads, **rows[-1]}) + "\n")
    if options.figure:
        kept = options.keep.read_text().splitlines() if options.keep else []
        draw([json.loads(line) for line in kept] or rows, options.figure)


if __name__ == "__main__":
    main()
