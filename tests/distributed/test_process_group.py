"""Tests of several processes that share a batch: their exchanges, and equality to one process."""

from __future__ import annotations

import copy
import math
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as processes
from torch import Tensor

from reseed.distributed.process_group import ALONE, ProcessGroup, batch_shared_by
from reseed.sae import load_all
from reseed.sae.base import SAE, SAEConfig, Step
from reseed.sae.losses import total_variance
from reseed.sae.selection import select_in_batch

BATCH, D, F = 64, 12, 96
LONGEST_S = 240.0
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "topk": {"k": 4},
    "topk+multi": {"type": "topk", "k": 3, "multi_topk": True},
    "batch_topk": {"k": 2.4},
    "matryoshka": {"k": 4},
    "relu": {"l1_coefficient": 2.0},
    "relu+auxk": {"type": "relu", "aux_alpha": 0.5},
    "gated": {"l1_coefficient": 0.5},
    "jumprelu": {"l0_coefficient": 0.01},
    "jumprelu+quadratic": {"type": "jumprelu", "penalty": "quadratic", "target_l0": 5.0},
}


def run_with(count: int, law: Callable[..., None], *given: Any) -> None:
    """Call ``law(ranks, …)`` in each of ``count`` connected processes."""
    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_one, (count, folder, law, *given), nprocs=count)  # pyright: ignore


def _one(index: int, count: int, folder: str, law: Callable[..., None], *given: Any) -> None:
    # A process that waits too long fails the test.
    limit = threading.Timer(LONGEST_S, os._exit, (1,))
    limit.daemon = True
    limit.start()
    from reseed.distributed.launcher import join, leave, open_store

    torch.set_num_threads(1)
    law(join(open_store(Path(folder)), index, count, "cpu"), *given)
    leave()


def exchanges(ranks: ProcessGroup) -> None:
    i, n = ranks.index, ranks.count
    assert ranks.sum_(torch.tensor([1.0, float(i)])).tolist() == [n, n * (n - 1) / 2]
    assert int(ranks.max_(torch.tensor(i))) == n - 1
    large, small = torch.full((2**18,), float(i)), torch.tensor([[1.0, 2.0 * i]])
    ranks.mean_([small, large])
    assert small.tolist() == [[1.0, n - 1.0]]
    assert set(large.tolist()) == {(n - 1) / 2}
    assert ranks.broadcast_(torch.tensor([10 * i]), 1).tolist() == [10]
    lengths = [len(x) for x in ranks.gather(torch.arange(i))]  # rank 0 gives nothing
    assert lengths == list(range(n))
    assert ranks.gather(torch.arange(i))[-1].tolist() == list(range(n - 1))
    told = {"text": ["λ", "\udc80", ""], "ints": [-(2**63), 10**40], "none": None}
    told |= {"floats": [0.1, -0.0, 5e-324, 1e308, math.inf, -math.inf, math.nan]}
    assert repr(ranks.broadcast_json(told if ranks.leads else None)) == repr(told)
    assert ranks.gather_json(f"rank {i}") == [f"rank {j}" for j in range(n)]
    assert ranks.gather_json([] if i else None) == [None] + [[]] * (n - 1)
    apart = ranks.channel()
    assert int(apart.sum_(torch.tensor(1))) == n


def test_one_process_exchanges_nothing() -> None:
    x = torch.tensor([3.0, 4.0])
    assert ALONE.sum_(x) is x
    assert ALONE.max_(x) is x
    assert ALONE.broadcast_json("said") == "said"
    assert ALONE.gather_json("had") == ["had"]
    assert ALONE.gather(x) == [x]
    assert ALONE.channel() is ALONE


def batch() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Rows differ in size, so that ranks hold very different numbers of the largest values.
    sizes = torch.linspace(0.1, 3, BATCH)[:, None]
    return torch.randn(BATCH, D, generator=generator) * sizes + 5


def part(x: Tensor, ranks: ProcessGroup) -> Tensor:
    return x.chunk(ranks.count)[ranks.index]


def variance_and_choice(ranks: ProcessGroup) -> None:
    x = batch()
    whole = float(total_variance(x.double()))
    with batch_shared_by(ranks):
        assert float(total_variance(part(x, ranks))) * ranks.count == pytest.approx(whole, rel=1e-6)
    generator = torch.Generator().manual_seed(1)
    W, b = torch.randn(F, D, generator=generator), torch.randn(F, generator=generator)
    b = b - 30  # few pre-activations are positive
    cases = [(x, W, b, 0.3), (x, W, b + 30, 2.4), (x, W, b + 30, 20.0), (x, W, b - 300, 3.0)]
    # Ties, more than k allows; then one rank that holds all of the largest values.
    cases += [(x.round(), W.round(), b.round() + 30, 2.0)]
    cases += [(torch.cat([10 * x[:8], 0.01 * x[8:]]), W, 0 * b, 3.0)]
    for x, W, b, k in cases:
        alone = torch.zeros(BATCH, F)
        values, rows, latents = select_in_batch(x, W, b, k)
        alone[rows, latents] = values
        own = torch.zeros(BATCH // ranks.count, F)
        with batch_shared_by(ranks):
            values, rows, latents = select_in_batch(part(x, ranks), W, b, k)
        own[rows, latents] = values
        assert (rows * F + latents).diff().gt(0).all()
        counts = ranks.gather_json(int((own > 0).sum()))
        assert sum(counts) == int((alone > 0).sum())
        found = torch.cat(ranks.gather(own.flatten())).sort().values
        torch.testing.assert_close(found, alone.flatten().sort().values, rtol=1e-5, atol=1e-5)


def loss_of(sae: SAE, x: Tensor) -> Any:
    dead = torch.zeros(F, dtype=torch.bool)
    dead[:30] = True
    loss = sae.training_loss(x, Step(50, 100), dead)
    loss.total.backward()
    return loss


def gradients(ranks: ProcessGroup, config: SAEConfig) -> None:
    """Compare the ranks' mean loss and gradients, and the threshold, with the whole batch's."""
    x = batch() / 5
    whole = config.build(D, torch.Generator().manual_seed(2))
    with torch.no_grad():
        whole.b_enc.add_(0.2)
    shared = copy.deepcopy(whole)
    for _ in range(2):  # the second step uses the threshold that the first has changed
        expected = loss_of(whole, x)
        with batch_shared_by(ranks):
            loss = loss_of(shared, part(x, ranks))
    total = ranks.sum_(loss.total.detach()) / ranks.count
    torch.testing.assert_close(total, expected.total.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(ranks.sum_(loss.fired), expected.fired)
    torch.testing.assert_close(ranks.sum_(loss.squared_error), expected.squared_error)
    ranks.mean_([p.grad for p in shared.parameters() if p.grad is not None])
    for (name, mine), its in zip(shared.named_parameters(), whole.parameters(), strict=True):
        assert (mine.grad is None) == (its.grad is None), name
        if its.grad is not None:
            scale = float(its.grad.abs().max()) + 1e-6
            assert float((mine.grad - its.grad).abs().max()) < 1e-5 * scale, name
    for name, buffer in whole.named_buffers():
        torch.testing.assert_close(shared.get_buffer(name), buffer)


def laws(ranks: ProcessGroup) -> None:
    exchanges(ranks)
    variance_and_choice(ranks)
    load_all()
    for name, options in ARCHITECTURES.items():
        given = {"type": name, "num_latents": F, "aux_alpha": 0.25} | options
        gradients(ranks, SAEConfig.from_dict(given))


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=(pytest.mark.slow, pytest.mark.audit))])
def test_ranks_that_share_a_batch_equal_one_process(count: int) -> None:
    run_with(count, laws)


def left_alone(ranks: ProcessGroup) -> None:
    from reseed.distributed.process_group import ProcessLostError

    if ranks.index == 1:
        os._exit(0)
    with pytest.raises(ProcessLostError, match="another process of the group has ended"):
        ranks.sum_(torch.ones(1))
    os._exit(0)  # skip leaving the group: the other process is gone


def test_a_lost_rank_raises_an_error() -> None:
    run_with(2, left_alone)


def trains_at_its_own_pace(ranks: ProcessGroup) -> None:
    import lightning as L
    from torch.utils.data import DataLoader

    from reseed.train.trainer import trainer_options

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.steps = 0

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            self.steps += 1

        def configure_optimizers(self) -> None:
            return None

    module, steps = Module(), 4 + 3 * ranks.index
    trainer = L.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **trainer_options(ALONE, ranks.device),
    )  # fmt: skip
    trainer.fit(module, DataLoader(torch.zeros(steps, 1), batch_size=None))
    assert module.steps == steps
    assert int(ranks.sum_(torch.tensor(steps))) == 4 + 7


@pytest.mark.slow
def test_ranks_with_their_own_batches_do_not_wait_for_each_other() -> None:
    """Lightning must not know of the ranks: it makes each wait for the first before every batch."""
    run_with(2, trains_at_its_own_pace)
