"""Gain of stacking SAEs of one shape: one product x·[E₁; …; E_S]ᵀ and one stacked update.

    python benchmarks/stacked.py
    python benchmarks/stacked.py --device cuda --saes 3,9,27

S SAEs of one shape could share the encoder's product and the step of Adam; everything else in a
step (selection, decoder, gradients) is separate. Both are timed as S calls and as one call on
stacked tensors, in turns; medians over the rounds are reported. A ratio above 1 means that stacking
is faster. The benchmark also checks that the stacked product has the same bits, which is necessary
for runs trained in a group to equal runs trained alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

SHAPES = ((256, 128, 1_024), (4_096, 128, 1_024), (4_096, 128, 4_096), (1_024, 768, 16_384))
"""Activations in a batch, d_in, latents. The first shape is that of the `short` recipe."""


def seconds(what: Callable[[], object], device: torch.device, least: float = 0.1) -> float:
    """Return the seconds of one call, averaged over about a tenth of a second."""
    calls, took = 0, 0.0
    started = time.perf_counter()
    while took < least:
        what()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        calls, took = calls + 1, time.perf_counter() - started
    return took / calls


def adam(parameters: list[torch.Tensor]) -> Callable[[], object]:
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return torch.optim.Adam(parameters, lr=1e-4, fused=True).step


def measure(shape: tuple[int, int, int], saes: int, device: torch.device, rounds: int) -> str:
    batch, d_in, latents = shape
    x = torch.randn(batch, d_in, device=device)
    encoders = [torch.randn(latents, d_in, device=device) / d_in**0.5 for _ in range(saes)]
    stacked = torch.cat(encoders)
    linear = torch.nn.functional.linear
    apart = torch.cat([linear(x, W) for W in encoders], dim=1)
    same = torch.equal(linear(x, stacked), apart)
    ways: dict[str, Callable[[], object]] = {
        "product apart": lambda: [linear(x, W) for W in encoders],
        "product stacked": lambda: linear(x, stacked),
        # Two parameters each, as for encoder and decoder.
        "update apart": adam([W.clone() for W in encoders for _ in range(2)]),
        "update stacked": adam([stacked.clone() for _ in range(2)]),
    }
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, what in ways.items():
            found[name].append(seconds(what, device))
    ms = {name: 1e3 * statistics.median(times) for name, times in found.items()}
    product, update = (ms[f"{w} apart"] / ms[f"{w} stacked"] for w in ("product", "update"))
    return (
        f"| {batch:,} × {d_in} × {latents:,} | {saes} | {ms['product apart']:.2f} | "
        f"{ms['product stacked']:.2f} | {product:.2f}× | {ms['update apart']:.2f} | "
        f"{ms['update stacked']:.2f} | {update:.2f}× | {'yes' if same else 'no'} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--saes", default="3,9")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    print(f"{options.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| batch × d_in × latents | SAEs | products, ms | stacked | stacked is | updates, ms "
          "| stacked | stacked is | same bits |")  # fmt: skip
    print("|---|--:|--:|--:|--:|--:|--:|--:|---|")
    for shape in SHAPES:
        for saes in map(int, options.saes.split(",")):
            print(measure(shape, saes, torch.device(options.device), options.rounds), flush=True)


if __name__ == "__main__":
    main()
