"""CPU seconds for the absorption of one SAE, given words and probes: reseed and sae-bench.

    python benchmarks/absorption.py --words 4000 --latents 4096 --d-in 512

Both get the same SAE (TopK, random weights), activations of words and probe. reseed runs its whole
measure. sae-bench's own functions run ``--encodes`` times each, scaled to the number of calls in
sae-bench: by default it encodes all training words in each of 50 epochs of its L1 probe, and again
for each of 10 values of k and 26 letters. Its last stage, new prompts through the whole language
model, is left out, which favours sae-bench.

sae-bench pins an old numpy, but its functions run with newer versions of its dependencies:
``pip install --no-deps sae-bench==0.6.0 sae-lens 'transformer-lens<3' scikit-learn`` and what they
import. Without sae-bench only reseed's seconds are shown.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reseed.evaluate.absorption.evaluation import AbsorptionConfig
from reseed.evaluate.word_split import make_folds, split_words
from reseed.evaluate.word_task import ProbedTask, train_probes
from reseed.evaluate.words import Template, Words
from reseed.sae.base import SAE
from reseed.sae.topk import TopKConfig

LETTERS = 26
EPOCHS, VALUES_OF_K = 50, 10
"""sae-bench encodes all training words in each epoch, and for each k and letter."""
LOOPED = 96
"""Test words over which sae-bench's Python loop is timed."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("words", 32_000), ("latents", 16_384), ("d-in", 2_304), ("k", 64)):
        arguments.add_argument(f"--{name}", type=int, default=default)
    arguments.add_argument("--encodes", type=int, default=1, help="timed encodings of sae-bench")
    arguments.add_argument("--threads", type=int, default=1)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    probed = made_up(given.words, given.d_in)
    config = TopKConfig(num_latents=given.latents, k=given.k)
    sae = config.build(given.d_in, torch.Generator().manual_seed(0))
    measure, every = AbsorptionConfig(prompt_seeds=(0,), folds=1), [range(LETTERS)]
    alone = seconds(lambda: measure.measured(sae, [probed], every, null=False))
    print(f"reseed: {alone:.1f} s per SAE", flush=True)
    with_null = seconds(lambda: measure.measured(sae, [probed], every))
    print(f"reseed, with the null of permuted letters: {with_null:.1f} s", flush=True)
    try:
        stages = sae_bench_stages(sae, probed, given.encodes)
    except ImportError as error:
        print(f"sae-bench cannot be imported ({error}): no ratio")
        return
    for name, value in stages.items():
        print(f"  sae-bench, {name}: {value:,.1f} s")
    total = sum(stages.values())
    print(f"sae-bench: {total:,.0f} s per SAE; reseed is {total / alone:.1f}× as fast")
    print(f"with the null, which sae-bench lacks: {total / with_null:.1f}×")


def seconds(call: Callable[[], Any]) -> float:
    """Return the CPU seconds of a call, which do not depend on other processes."""
    started = time.process_time()
    call()
    return time.process_time() - started


def made_up(n: int, d_in: int) -> ProbedTask:
    """Make words with Zipf-like counts per letter; each letter has a direction of activations."""
    random = torch.Generator().manual_seed(1)
    share = 1 / torch.arange(1, LETTERS + 1) ** 0.7
    labels = torch.multinomial(share, n, replacement=True, generator=random)
    directions = torch.randn(LETTERS, d_in, generator=random)
    x = 0.3 * directions[labels] + torch.randn(n, d_in, generator=random)
    names = tuple("abcdefghijklmnopqrstuvwxyz")
    words = Words(torch.arange(n), tuple(map(str, range(n))), labels, names, names)
    part = split_words(words, 1, 0)
    folds = make_folds(words, part, 1, 0)
    probes = train_probes(words, x, folds, 0)
    return ProbedTask(words, Template((), {}, {}, {}), x, part, folds, 0, probes)


class AsSaeBench(torch.nn.Module):
    """SAE with the interface that sae-bench requires."""

    def __init__(self, sae: SAE) -> None:
        super().__init__()
        self.sae = sae
        self.W_enc, self.W_dec = sae.W_enc.T, sae.W_dec
        self.device, self.dtype = sae.W_dec.device, sae.W_dec.dtype
        self.cfg = SimpleNamespace(d_sae=sae.num_latents)

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)


def sae_bench_stages(sae: SAE, probed: ProbedTask, encodes: int) -> dict[str, float]:
    """Measure the seconds of each stage of sae-bench with its defaults."""
    from sae_bench.evals.absorption import k_sparse_probing as peer
    from sae_bench.evals.absorption.probing import LinearProbe
    from sklearn.linear_model import LogisticRegression

    theirs: Any = AsSaeBench(sae)
    train, test = probed.folds[0].train, probed.folds[0].test
    x, labels = probed.x[train], probed.words.labels[train]
    target = torch.nn.functional.one_hot(labels, LETTERS)

    def epoch() -> None:
        peer.train_sparse_multi_probe(
            x, target, sae.W_dec.device, num_epochs=encodes, show_progress=False,
            map_acts=lambda a: theirs.encode(a).detach(), probe_dim=sae.num_latents,
        )  # fmt: skip

    some = torch.arange(VALUES_OF_K)
    columns: list[Tensor] = []

    def encode() -> None:
        for _ in range(encodes):
            with torch.no_grad():
                columns.append(peer._get_sae_acts(theirs, x, sparse_feat_ids=some))

    of_epochs = seconds(epoch) / encodes * EPOCHS
    of_encodes = seconds(encode) / encodes * VALUES_OF_K * LETTERS

    def fit() -> None:
        for k in range(1, VALUES_OF_K + 1):
            model = LogisticRegression(max_iter=500, class_weight="balanced")
            model.fit(columns[0][:, :k].numpy(), (labels == 0).numpy().astype(np.int64))

    of_fits = seconds(fit) * LETTERS
    probe = LinearProbe(x.shape[1], LETTERS)
    probes = {
        k: {
            letter: peer.KSparseProbe(torch.ones(k), torch.zeros(()), some[:k])
            for letter in range(LETTERS)
        }
        for k in range(1, VALUES_OF_K + 1)
    }
    looped = test[:LOOPED]
    named = [("", int(label)) for label in probed.words.labels[looped]]

    def loop() -> None:
        peer.eval_probe_and_sae_k_sparse_raw_scores(theirs, probe, probes, named, probed.x[looped])

    return {
        "L1 probe": of_epochs,
        "encoding again for each k and letter": of_encodes,
        "logistic regressions": of_fits,
        "scores of test words": seconds(loop) / len(looped) * len(test),
    }


if __name__ == "__main__":
    main()
