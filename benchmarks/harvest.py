"""Speed of harvesting activations, against the bare model.

    python benchmarks/harvest.py [--models embedded FOLDER/stories260K ...] [--threads 1] [--quick]
    python benchmarks/harvest.py --training      # with and without computing the next chunk ahead

- bare: a tight loop over prepared token tensors, in whole batches of `batch_sequences` (the model's
  option) sequences, in inference mode, stopped at the hookpoint by the same kind of early stop.
  Nothing is stored.
- reseed: `ChunkStream.chunk`, the whole path: documents are ordered, packed and read by the model;
  activations are gathered without first positions and special tokens, dealt and permuted.
- reseed, cached: the same chunks from `runtime.activation_cache`, checksums included. The files are
  in the page cache, as after a first run.

All take turns in one process with one number of threads. A turn is one chunk of 65,536 activations;
medians over the rounds are reported. Speeds count the activations that an SAE would see, so the
bare model gets no credit for positions that are left out. Cached chunks have to equal computed
ones. Peak memory is measured for each in a separate process, above the resident memory after the
model is loaded and has run.

`--training` trains a TopK SAE (batches of 4,096, k = 32) on the same stream, in turns with and
without a thread that computes the next chunk ahead.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import measuring

WARM_UP = 1
CONTENDERS = ("bare", "reseed", "reseed, cached")
CACHED_CHUNKS = 2
"""Cached chunks, read in turn."""
TRAINED_CHUNKS = 4
CACHE = Path(tempfile.gettempdir()) / "reseed-benchmarks"


class Harvest:
    """One model at one layer, with three ways to get its activations."""

    def __init__(self, model: str, layer: int, folder: str) -> None:
        import torch

        from reseed.activations.cache import ActivationCache
        from reseed.activations.hookpoints import Hookpoint
        from reseed.activations.model_source import EmbeddedModelConfig, PathModelConfig
        from reseed.activations.text import DocstringsConfig, TextFilesConfig

        if model == "embedded":
            config, text = EmbeddedModelConfig(), DocstringsConfig()
        else:
            stories = Path(model).parents[1] / "text" / "tinystories_train.txt"
            config, text = PathModelConfig(path=model), TextFilesConfig(path=str(stories))
        self.resolved = config.resolve(CACHE)
        self.data = self.resolved.data(text, CACHE)
        self.hook = Hookpoint("resid_post", layer)
        device = torch.device("cpu")
        self.source: Any = self.data.open(device, 0)
        self.stream = self.source.stream([self.hook])
        self.tokens = self.stream.config.chunk_tokens
        cached: Any = self.data.open(device, 0, ActivationCache(folder, 1 << 40))
        self.kept = cached.stream([self.hook])

    def check(self) -> None:
        """Fill the cache, and check that cached chunks equal computed ones."""
        import torch

        for read in ("computed", "from the disk"):
            for c in range(CACHED_CHUNKS):
                found, own = self.kept.chunk(c)[self.hook], self.stream.chunk(c)[self.hook]
                if not torch.equal(found, own):
                    raise SystemExit(f"chunk {c}, {read}, differs from the stream's chunk")

    def turns(self, name: str) -> Callable[[], object]:
        """Return a function that makes about a chunk of activations per call."""
        if name == "bare":
            return self._bare()
        stream, numbers = self.stream, count()
        if name == "reseed, cached":
            stream, numbers = self.kept, (i % CACHED_CHUNKS for i in count())
        return lambda: stream.chunk(next(numbers))

    @property
    def bare_tokens(self) -> int:
        """Activations per turn of the bare model that an SAE would see."""
        length, rows = self.stream.config.context_length, self.source.model.batch_sequences
        return self.tokens // (length * rows) * (length - 1) * rows

    def _bare(self) -> Callable[[], object]:
        import torch

        model, length = self.source.model.model, self.stream.config.context_length
        module = model.get_submodule(self.source.model.place(self.hook).module)
        rows = self.source.model.batch_sequences
        packing = self.stream._packing
        sequences = torch.from_numpy(packing.sequences(0, self.tokens // length).astype("int64"))
        batches = sequences.split(rows)

        class Stop(Exception):
            pass

        def stop(*rest: object) -> None:
            raise Stop

        def turn() -> None:
            handle = module.register_forward_hook(stop)
            with torch.inference_mode():
                for batch in batches:
                    with contextlib.suppress(Stop):
                        model(input_ids=batch, use_cache=False)
            handle.remove()

        return turn


def worker(task: dict[str, Any]) -> None:
    """Run one measurement in this process and print its result as the last line."""
    import torch

    torch.set_num_threads(task["threads"])
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        harvest = Harvest(task["model"], task["layer"], folder)
        measure = {"time": measure_time, "memory": measure_memory, "training": measure_training}
        print(json.dumps(measure[task["what"]](harvest, task)))


def measure_time(harvest: Harvest, task: dict[str, Any]) -> dict[str, Any]:
    """Measure nanoseconds of wall and of CPU time per activation, taking turns."""
    harvest.check()
    turns = {name: harvest.turns(name) for name in CONTENDERS}
    tokens = dict.fromkeys(CONTENDERS, harvest.tokens) | {"bare": harvest.bare_tokens}
    return taking_turns(turns, tokens, task["rounds"])


def measure_memory(harvest: Harvest, task: dict[str, Any]) -> int:
    """Measure the peak bytes above the resident memory after the model has run."""
    if task["name"] == "reseed, cached":
        harvest.check()
    harvest.turns("bare")()
    harvest.stream.chunk(0)
    turn = harvest.turns(task["name"].removesuffix(", ahead"))
    harvest.stream._latest = harvest.kept._latest = (-1, {})
    measuring._return_free_memory()
    before = measuring._resident()
    measuring._reset_peak()
    if task["name"].endswith("ahead"):
        with harvest.stream.prefetching([(1000, harvest.tokens)], True):
            for _ in range(3):
                turn()
                time.sleep(2)  # lets the thread advance with the next chunk
    else:
        for _ in range(3):
            turn()
    return measuring._peak() - before


def measure_training(harvest: Harvest, task: dict[str, Any]) -> dict[str, Any]:
    """Measure nanoseconds per activation of training, with and without computing chunks ahead."""
    from contenders import ARCHITECTURES
    from contenders.base import BATCH

    d_in = harvest.resolved.d_in(harvest.hook)
    steps = TRAINED_CHUNKS * harvest.tokens // BATCH

    def trained(ahead: bool) -> Callable[[], None]:
        sae = ARCHITECTURES["topk"]["reseed"]("topk", d_in, task["latents"])

        def turn() -> None:
            stream = harvest.source.stream([harvest.hook])
            with stream.prefetching([(steps, BATCH)], ahead):
                batches: Iterator[Any] = stream.batches(BATCH)
                for _ in range(steps):
                    sae.step(next(batches)[harvest.hook])

        return turn

    turns = {"one after the other": trained(False), "ahead": trained(True)}
    return taking_turns(turns, dict.fromkeys(turns, steps * BATCH), task["rounds"])


def taking_turns(
    turns: dict[str, Callable[[], object]], tokens: dict[str, int], rounds: int
) -> dict[str, Any]:
    """Return the median nanoseconds per token of each contender."""
    wall: dict[str, list[float]] = {name: [] for name in turns}
    cpu: dict[str, list[float]] = {name: [] for name in turns}
    for number in range(-WARM_UP, rounds):
        for name, turn in turns.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            turn()
            if number >= 0:
                wall[name].append(1e9 * (time.perf_counter() - started) / tokens[name])
                cpu[name].append(1e9 * (time.process_time() - started_cpu) / tokens[name])
    median = statistics.median
    return {
        "wall": {name: median(values) for name, values in wall.items()},
        "cpu": {name: median(values) for name, values in cpu.items()},
    }


def in_process(task: dict[str, Any]) -> Any:
    """Run `worker` in a fresh process."""
    environment = {
        **os.environ, "OMP_NUM_THREADS": str(task["threads"]), "GOMP_SPINCOUNT": "10000",
    }  # fmt: skip
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{task} failed:\n{done.stderr[-4000:]}{done.stdout[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def show(title: str, measured: dict[str, Any], memory: dict[str, int], beside: str) -> None:
    """Print one table; ratios are speeds over that of ``beside``."""
    print(f"\n{title}")
    print(
        f"{'':20}{'tokens/s':>11}{'of ' + beside:>22}{'by CPU time':>13}{'CPU ns/token':>14}"
        f"{'peak MiB':>10}"
    )
    wall, cpu = measured["wall"], measured["cpu"]
    for name in wall:
        mib = f"{memory[name] / 2**20:,.0f}" if name in memory else ""
        print(
            f"{name:20}{1e9 / wall[name]:11,.0f}{wall[beside] / wall[name]:22.1%}"
            f"{cpu[beside] / cpu[name]:13.1%}{cpu[name]:14,.0f}{mib:>10}",
            flush=True,
        )


def layers(model: str) -> list[int]:
    """Return the middle and the last layer."""
    from reseed.activations.model_source import EmbeddedModelConfig, PathModelConfig

    config = EmbeddedModelConfig() if model == "embedded" else PathModelConfig(path=model)
    there = config.resolve(CACHE).num_layers
    return [(there - 1) // 2, there - 1]


def default_models() -> list[str]:
    """Return the embedded model and those of RESEED_TEST_DATA."""
    data = os.environ.get("RESEED_TEST_DATA")
    found = sorted(Path(data).glob("models/*/config.json")) if data else []
    return ["embedded", *(str(path.parent) for path in found)]


def measure(model: str, layer: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run all measurements of one model at one layer."""
    task = {
        "model": model, "layer": layer, "threads": options.threads, "rounds": options.rounds,
        "latents": options.latents,
    }  # fmt: skip
    title = f"{Path(model).name}, layer {layer}, {options.threads} threads"
    if options.training:
        measured = in_process({**task, "what": "training"})
        title += f", TopK with {options.latents:,} latents"
        show(title, measured, {}, "one after the other")
        return {**task, **measured}
    measured = in_process({**task, "what": "time"})
    names = [*CONTENDERS, "reseed, ahead"]
    memory = {n: in_process({**task, "what": "memory", "name": n}) for n in names}
    show(title, measured, memory, "bare")
    print(f"(with the next chunk computed ahead: {memory['reseed, ahead'] / 2**20:,.0f} MiB)")
    return {**task, **measured, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--models", nargs="+", help="embedded, or model folders (text in ../../text)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns per contender")
    parser.add_argument("--training", action="store_true", help="measure training instead")
    parser.add_argument("--latents", type=int, default=1_024, help="latents for --training")
    parser.add_argument("--quick", action="store_true", help="smoke run: one layer, 2 rounds")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    if options.task:
        worker(json.loads(options.task))
        return
    models = options.models or default_models()
    chosen = [(model, layer) for model in models for layer in layers(model)]
    if options.quick:
        chosen, options.rounds = chosen[:1], 2
    results = [measure(model, layer, options) for model, layer in chosen]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
