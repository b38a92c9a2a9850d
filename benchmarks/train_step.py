"""Time and memory of a training step of each architecture: reseed against its peers.

    python benchmarks/train_step.py [--architecture batch_topk|...|all] [--threads 2] [--quick]

One step is forward, backward and update on a batch of 4,096 activations in float32, with Adam at
one learning rate, no AuxK and no warm-ups. Each library runs its own training step:

- reseed: `SAE.training_loss`, `backward`, `SAEAdam.step`, as in training;
- sparsify (TopK only): `SparseCoder.forward` and the rest of its `Trainer`'s loop body;
- sae-lens: `SAETrainer.step`. It always clips gradients. So does reseed here, except for TopK,
  which follows sparsify's recipe. sae-lens does not keep decoder rows at norm 1; reseed does in
  these timings, except for ReLU, whose recipe does not normalise them;
- dictionary_learning (all but TopK): `update` of its trainers.

All contenders of an architecture take turns in one process, with one number of threads and the same
activations; medians over the rounds are reported. reseed runs with compiled loops (numba), as in
training, and for TopK also without them ("plain"); BatchTopK is also compared with reseed's TopK.
First, in another process, each peer gets reseed's weights and has to give the same loss, gradients,
and weights after eight steps, so that the times are of the same work (`agreement.py`, which also
lists the differences by design). Peak memory is measured in a separate process for each contender:
resident memory above that of the parameters and Adam's two moments. Everything runs twice: with
malloc's defaults, and with its mmap and trim thresholds raised, which saves page faults on large
matrices.

Initially half of the latents of ReLU, JumpReLU and Gated are active. With `--trained 300` reseed
trains first, at ten times the learning rate, and all contenders get its weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import agreement
import measuring
from contenders import ARCHITECTURES, installed, missing
from contenders.base import BATCH

SIZES = ((128, 4_096), (768, 16_384), (768, 32_768))
MALLOC = {
    "default": {},
    "raised": {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)},
}


def worker(task: dict[str, Any]) -> None:
    """Run one measurement in this process and print its result as the last line."""
    import torch

    torch.set_num_threads(task["threads"])
    architecture, size, names = task["architecture"], tuple(task["size"]), task["names"]
    if task["what"] == "agreement":
        batches = measuring.activations(architecture, size[0], measuring.POOL)
        result = agreement.compare(architecture, names[0], size, batches)
    elif task["what"] == "time":
        result = measuring.measure_time(architecture, size, names, task["rounds"], task["trained"])
    else:
        result = measuring.measure_memory(architecture, size, names[0])
    print(json.dumps(result))


def in_process(task: dict[str, Any], environment: dict[str, str]) -> Any:
    """Run `worker` in a fresh process."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    base = {
        "OMP_NUM_THREADS": str(task["threads"]),
        "OMP_WAIT_POLICY": "PASSIVE",
        "SPARSIFY_DISABLE_TRITON": "1",
    }
    done = subprocess.run(
        command, env={**os.environ, **base, **environment}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{task} failed:\n{done.stderr[-4000:]}{done.stdout[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    architecture: str, size: tuple[int, int], options: argparse.Namespace
) -> dict[str, Any]:
    """Run all measurements of one architecture at one size."""
    names = [name for name in installed(architecture) if name not in options.without]
    peers = [name for name in names if not name.startswith("reseed")]
    task = {"architecture": architecture, "size": size, "threads": options.threads}
    out: dict[str, Any] = {**task, "names": names, "peers": peers, "agreement": {}, "malloc": {}}
    for peer in [] if options.no_checks else peers:
        checked = in_process({**task, "what": "agreement", "names": [peer]}, {})
        out["agreement"][peer] = checked
        print(agreement.told(f"{_title(out)}: {peer}", checked), flush=True)
    for malloc in options.malloc:
        timing = {**task, "what": "time", "names": names, "rounds": options.rounds}
        timing["trained"] = options.trained
        measured = in_process(timing, MALLOC[malloc])
        measured["memory"] = {
            name: in_process({**task, "what": "memory", "names": [name]}, MALLOC[malloc])
            for name in names
            if not options.no_checks
        }
        out["malloc"][malloc] = measured
        show(out, malloc)
    return out


def show(result: dict[str, Any], malloc: str) -> None:
    """Print one table."""
    measured = result["malloc"][malloc]
    print(f"\n{_title(result)}, {result['threads']} threads, malloc: {malloc}")
    print(f"{measured['active']:.1%} of the latents are active")
    print(
        f"{'':20}{'wall ms':>9}{'CPU ms':>9}{'tokens/s':>11}"
        f"{'reseed is':>11}{'(CPU)':>8}{'memory MiB':>12}"
    )
    for name in result["names"]:
        wall, cpu = measured["wall"][name], measured["cpu"][name]
        print(
            f"{name:20}{wall * 1e3:9.0f}{cpu * 1e3:9.0f}{BATCH / wall:11,.0f}"
            f"{wall / measured['wall']['reseed']:10.2f}×{cpu / measured['cpu']['reseed']:7.2f}×"
            f"{measured['memory'].get(name, 0) / 2**20:12,.0f}",
            flush=True,
        )


def summary(result: dict[str, Any]) -> str:
    """Return a line per malloc setting: reseed against the better peer."""
    lines = []
    for malloc, measured in result["malloc"].items():
        wall, cpu, memory = measured["wall"], measured["cpu"], measured["memory"]
        for other in ("reseed, TopK", "reseed, plain"):
            if other in wall:
                lines.append(
                    f"{_title(result)}, malloc {malloc}: a step is "
                    f"{wall['reseed'] / wall[other]:.2f} of {other} "
                    f"(CPU {cpu['reseed'] / cpu[other]:.2f})"
                )
        if not result["peers"]:
            continue
        best = min(result["peers"], key=lambda name: wall[name])
        line = (
            f"{_title(result)}, malloc {malloc}: reseed is {wall[best] / wall['reseed']:.2f}× the "
            f"better peer ({best}; CPU {cpu[best] / cpu['reseed']:.2f}×)"
        )
        if memory:
            least = min(memory[name] for name in result["peers"])
            line += f", with {memory['reseed'] / least:.0%} of the least memory of a peer"
        lines.append(line)
    return "\n".join(lines)


def _title(result: dict[str, Any]) -> str:
    d_in, num_latents = result["size"]
    return f"{result['architecture']}, {d_in} × {num_latents:,}"


def _sizes(text: str) -> list[tuple[int, int]]:
    """Parse sizes such as ``128x4096,768x16384``."""
    return [(int(d), int(f)) for d, f in (size.split("x") for size in text.split(","))]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--architecture", choices=[*ARCHITECTURES, "all"], default="topk")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for every contender")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per contender")
    parser.add_argument(
        "--trained", type=int, default=0, help="untimed first steps, at 10× the learning rate"
    )
    parser.add_argument("--no-checks", action="store_true", help="skip agreement and memory")
    parser.add_argument("--sizes", type=_sizes, default=SIZES, help="d_in x latents: 128x4096,…")
    parser.add_argument(
        "--without", nargs="+", default=[], help="contenders to leave out, by their printed names"
    )
    parser.add_argument(
        "--malloc", choices=MALLOC, nargs="+", default=[*MALLOC], help="settings (default: both)"
    )
    parser.add_argument("--quick", action="store_true", help="smoke run: one small size, 2 rounds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        worker(json.loads(options.task))
        return
    if options.quick:
        options.sizes, options.rounds = [(64, 1_024)], 2
    chosen = [*ARCHITECTURES] if options.architecture == "all" else [options.architecture]
    for line in missing(chosen):
        print(line)
    results = [measure(each, size, options) for each in chosen for size in options.sizes]
    print("\n" + "\n".join(filter(None, map(summary, results))))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
