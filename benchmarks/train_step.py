"""Tokens per second of a TopK training step: reseed against eai-sparsify and sae-lens.

    python benchmarks/train_step.py [--threads 2] [--quick] [--json FILE]

One step is forward, backward and update on a batch of 4,096 activations, k = 32, float32, Adam with
one learning rate, no AuxK, each library by its own training step:

- reseed: `TopK.training_loss`, `backward`, `SAEAdam.step`, as the product runs them;
- sparsify: `SparseCoder.forward` and what its `Trainer` does around it with `optimizer=adam`;
- sae-lens: `SAETrainer.step` with dense latents (its default) and with sparse ones. It always clips
  gradients, so reseed is shown with clipping too.

All contenders run in one process at one number of threads, on the same activations, taking turns,
and the median over the rounds counts. Before that, eight steps from the same weights must give the
weights that sparsify gives, row by row to 1e-5, so that the time is of the same work. Peak memory
is taken in a process of its own for each contender: resident memory above what parameters and
Adam's two moments take. Everything is done twice: with malloc's defaults, and with its mmap and
trim thresholds raised, which spares all contenders page faults and helps sparsify most.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZES = ((128, 4_096), (768, 16_384))
BATCH = 4_096
K = 32
LEARNING_RATE = 2e-4
POOL = 4
"""Batches of activations, used in turn."""
AGREEMENT = 1e-5
"""Relative difference of a row of weights, after eight steps, that counts as none."""
AGREEING_ROWS = 0.99
AGREEMENT_IN_ALL = 1e-4
PEERS = {"sparsify": "eai-sparsify==1.3.3", "sae_lens": "sae-lens==6.54.0"}
INSTALL = "pip install -e '.[bench]' -c constraints.txt"
RAISED = {"MALLOC_MMAP_THRESHOLD_": str(2**34), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


class Contender(ABC):
    """A TopK SAE of some library and its training step."""

    needs: str | None = None

    @abstractmethod
    def __init__(self, d_in: int, num_latents: int) -> None: ...

    @abstractmethod
    def step(self, x: Any) -> None: ...


class Reseed(Contender):
    """The product's own path, without clipping: sparsify's recipe."""

    max_grad_norm: float | None = None

    def __init__(self, d_in: int, num_latents: int) -> None:
        import torch

        from reseed.sae.topk import TopKConfig
        from reseed.train.optim import SAEAdam

        config = TopKConfig(num_latents=num_latents, k=K, aux_alpha=0.0)
        self.sae = config.build(d_in, torch.Generator().manual_seed(0))
        self.optimizer = SAEAdam(self.sae, LEARNING_RATE, max_grad_norm=self.max_grad_norm)
        self.dead = torch.zeros(num_latents, dtype=torch.bool)
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64)
        self.index = 0

    def step(self, x: Any) -> None:
        from reseed.sae.base import Step

        if self.index == 0:
            self.sae.initialise_b_dec(x.mean(0))
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.sae.training_loss(x, Step(self.index, 1_000_000), self.dead)
        loss.total.backward()
        self.optimizer.step()
        self.tokens_since_fired.add_(len(x)).masked_fill_(loss.fired > 0, 0)
        self.index += 1

    def weights(self) -> dict[str, Any]:
        return {name: p.detach() for name, p in self.sae.named_parameters()}


class ReseedClipped(Reseed):
    """With the gradient clipped, as reseed and sae-lens do by default."""

    max_grad_norm = 1.0


class Sparsify(Contender):
    """`sparsify.Trainer`'s loop body for one SAE with `optimizer=adam`, `loss_fn=fvu`."""

    needs = "sparsify"

    def __init__(self, d_in: int, num_latents: int) -> None:
        import torch
        from sparsify import SparseCoder, SparseCoderConfig

        self.sae = SparseCoder(d_in, SparseCoderConfig(num_latents=num_latents, k=K))
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=LEARNING_RATE)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64)
        self.did_fire = torch.zeros(num_latents, dtype=torch.bool)
        self.index = 0

    def step(self, x: Any) -> None:
        sae = self.sae
        if self.index == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        out = sae(x=x, y=x, dead_mask=None, total_variance=(x - x.mean(0)).pow(2).sum())
        self.did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[self.did_fire] = 0
        self.did_fire.zero_()
        self.index += 1

    def copy_from(self, weights: dict[str, Any]) -> None:
        self.sae.encoder.weight.data.copy_(weights["W_enc"])
        self.sae.encoder.bias.data.copy_(weights["b_enc"])
        self.sae.W_dec.data.copy_(weights["W_dec"])
        self.sae.b_dec.data.copy_(weights["b_dec"])

    def weights(self) -> dict[str, Any]:
        # The trainer renormalises at the start of the next step, reseed at the end of this one.
        self.sae.set_decoder_norm_to_unit_norm()
        return {
            "W_enc": self.sae.encoder.weight.detach(),
            "b_enc": self.sae.encoder.bias.detach(),
            "W_dec": self.sae.W_dec.detach(),
            "b_dec": self.sae.b_dec.detach(),
        }


class SAELens(Contender):
    """`sae_lens.SAETrainer.step` on its TopK training SAE."""

    needs = "sae_lens"
    sparse = False

    def __init__(self, d_in: int, num_latents: int) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        config = TopKTrainingSAEConfig(
            d_in=d_in,
            d_sae=num_latents,
            k=K,
            use_sparse_activations=self.sparse,
            rescale_acts_by_decoder_norm=False,
        )
        trainer_config = SAETrainerConfig(
            total_training_samples=BATCH * 1_000_000,
            train_batch_size_samples=BATCH,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE,
        )
        sae = TopKTrainingSAE(config)
        self.trainer = SAETrainer(trainer_config, sae, data_provider=iter(()))

    def step(self, x: Any) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1


class SAELensSparse(SAELens):
    """The same with `use_sparse_activations`."""

    sparse = True


CONTENDERS: dict[str, type[Contender]] = {
    "reseed": Reseed,
    "reseed, clipped": ReseedClipped,
    "eai-sparsify": Sparsify,
    "sae-lens": SAELens,
    "sae-lens, sparse": SAELensSparse,
}


def activations(d_in: int, count: int) -> list[Any]:
    """Batches with something to learn: sparse sums of 4·D planted directions, and some noise."""
    import torch

    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(4 * d_in, d_in, generator=generator)
    truth /= truth.norm(dim=1, keepdim=True)
    batches = []
    for _ in range(count):
        active = torch.rand(BATCH, len(truth), generator=generator) < 16 / len(truth)
        size = torch.rand(BATCH, len(truth), generator=generator) + 0.5
        noise = torch.randn(BATCH, d_in, generator=generator)
        batches.append((active * size) @ truth + 0.05 * noise)
    return batches


def agreement(d_in: int, num_latents: int) -> dict[str, float]:
    """How far the weights are from sparsify's after eight steps from the same start.

    Adam's first steps have the full size whatever the gradient's: where one of the 25 million
    gradients cancels to nothing but rounding, or the k-th latent and the next are equal to the last
    bits, two sums in another order move a weight apart by up to a step. So a few rows may differ.
    """
    ours, theirs = Reseed(d_in, num_latents), Sparsify(d_in, num_latents)
    theirs.copy_from(ours.weights())
    batches = activations(d_in, POOL)
    for index in range(8):
        ours.step(batches[index % POOL])
        theirs.step(batches[index % POOL])
    expected = theirs.weights()
    rows, total = [], []
    for name, tensor in ours.weights().items():
        difference = tensor - expected[name]
        total.append(float(difference.norm() / expected[name].norm()))
        if tensor.ndim == 2:
            rows.append(difference.norm(dim=1) / expected[name].norm(dim=1))
    same = min(float((row < AGREEMENT).double().mean()) for row in rows)
    if same < AGREEING_ROWS or max(total) > AGREEMENT_IN_ALL:
        raise SystemExit(
            f"not one work: after 8 steps {same:.2%} of the rows are sparsify's within "
            f"{AGREEMENT:.0e}, all together within {max(total):.0e}"
        )
    return {"relative difference": max(total), "agreeing rows": same}


def measure_time(d_in: int, num_latents: int, names: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of wall and of CPU per step of every contender, taking turns."""
    worst = agreement(d_in, num_latents) if "eai-sparsify" in names else None
    contenders = {name: CONTENDERS[name](d_in, num_latents) for name in names}
    batches = activations(d_in, POOL)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-2, rounds):  # two rounds of warm-up
        for name, contender in contenders.items():
            started, started_cpu = time.perf_counter(), time.process_time()
            contender.step(batches[turn % POOL])
            if turn >= 0:
                wall[name].append(time.perf_counter() - started)
                cpu[name].append(time.process_time() - started_cpu)
    median: Callable[[list[float]], float] = statistics.median
    return {
        "agreement": worst,
        "wall": {name: median(values) for name, values in wall.items()},
        "cpu": {name: median(values) for name, values in cpu.items()},
    }


def measure_memory(d_in: int, num_latents: int, name: str) -> int:
    """Peak bytes of a step beyond the parameters and Adam's moments."""
    batches = activations(d_in, 1)
    contender = CONTENDERS[name](d_in, num_latents)
    # A tiny SAE first, so that lazily loaded libraries are not counted.
    CONTENDERS[name](8, 64).step(batches[0][:, :8].contiguous())
    _return_free_memory()
    before = _resident()
    _reset_peak()
    for _ in range(3):
        contender.step(batches[0])
    parameters = 2 * num_latents * d_in + num_latents + d_in
    return _peak() - before - 2 * 4 * parameters  # the parameters are in `before`


def _return_free_memory() -> None:
    """Give back what the preparation has freed, or a step would use it unseen."""
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # not glibc
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _resident() -> int:
    return _status("VmRSS") if sys.platform == "linux" else 0


def _reset_peak() -> None:
    if sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def worker(task: dict[str, Any]) -> None:
    """Do one measurement in this process; its result is the last line printed."""
    import torch

    torch.set_num_threads(task["threads"])
    size = task["d_in"], task["num_latents"]
    if task["what"] == "time":
        result = measure_time(*size, task["names"], task["rounds"])
    else:
        result = measure_memory(*size, task["names"][0])
    print(json.dumps(result))


def in_process(task: dict[str, Any], environment: dict[str, str]) -> Any:
    """Run `worker` in a fresh process."""
    command = [sys.executable, __file__, "--task", json.dumps(task)]
    threads = str(task["threads"])
    base = {
        "OMP_NUM_THREADS": threads,
        "OMP_WAIT_POLICY": "PASSIVE",
        "SPARSIFY_DISABLE_TRITON": "1",
    }
    done = subprocess.run(
        command, env={**os.environ, **base, **environment}, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise SystemExit(f"{task} failed:\n{done.stderr[-4000:]}{done.stdout[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(size: tuple[int, int], names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """Everything about one size."""
    d_in, num_latents = size
    task = {"d_in": d_in, "num_latents": num_latents, "threads": options.threads}
    out: dict[str, Any] = {**task, "names": names}
    for label, environment in (("default malloc", {}), ("raised malloc", RAISED)):
        timing = {**task, "what": "time", "names": names, "rounds": options.rounds}
        out[label] = in_process(timing, environment)
        out[label]["memory"] = {
            name: in_process({**task, "what": "memory", "names": [name]}, environment)
            for name in names
        }
    return out


def show(result: dict[str, Any]) -> None:
    """One table per size and malloc."""
    for label in ("default malloc", "raised malloc"):
        measured = result[label]
        peers = [name for name in result["names"] if not name.startswith("reseed")]
        print(
            f"\n{result['d_in']} × {result['num_latents']:,}, {result['threads']} threads, {label}"
        )
        if measured["agreement"] is not None:
            same = measured["agreement"]
            print(
                f"after 8 steps {same['agreeing rows']:.2%} of the rows are sparsify's within "
                f"{AGREEMENT:.0e}, all together within {same['relative difference']:.0e}"
            )
        print(
            f"{'':18}{'wall ms':>9}{'CPU ms':>9}{'tokens/s':>11}"
            f"{'reseed is':>11}{'(CPU)':>8}{'memory MiB':>12}"
        )
        for name in result["names"]:
            wall, cpu = measured["wall"][name], measured["cpu"][name]
            print(
                f"{name:18}{wall * 1e3:9.0f}{cpu * 1e3:9.0f}{BATCH / wall:11,.0f}"
                f"{wall / measured['wall']['reseed']:10.2f}×{cpu / measured['cpu']['reseed']:7.2f}×"
                f"{measured['memory'][name] / 2**20:12,.0f}"
            )
        if peers:
            best = min(peers, key=lambda name: measured["wall"][name])
            ratio = measured["wall"][best] / measured["wall"]["reseed"]
            least = min(measured["memory"][name] for name in peers)
            share = measured["memory"]["reseed"] / least
            print(f"reseed: {ratio:.2f}× the better peer ({best}), {share:.0%} of its least memory")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every contender")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps per contender")
    parser.add_argument("--sizes", default="", help="such as 128x4096,768x16384")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: one small size, 2 rounds"
    )
    parser.add_argument("--json", type=Path, help="write the numbers to this file as well")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        worker(json.loads(options.task))
        return
    sizes = SIZES
    if options.sizes:
        sizes = tuple(tuple(map(int, size.split("x"))) for size in options.sizes.split(","))
    if options.quick:
        sizes, options.rounds = ((64, 1_024),), 2
    missing = {peer for peer in PEERS if importlib.util.find_spec(peer) is None}
    for peer in sorted(missing):
        print(f"{PEERS[peer]} is not installed: left out. To compare with it: {INSTALL}")
    names = [name for name, contender in CONTENDERS.items() if contender.needs not in missing]
    results = []
    for size in sizes:
        results.append(measure(size, names, options))
        show(results[-1])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
