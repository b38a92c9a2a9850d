"""The compiled loops against float64 dense autograd, plain PyTorch, and other thread counts."""

import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_examples import leaves, near

from reseed.sae import kernels, selection
from reseed.sae.base import Step
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.kernels import buffers
from reseed.sae.kernels.select import select, select_in_batch
from reseed.sae.losses import total_variance
from reseed.sae.matryoshka import MatryoshkaConfig
from reseed.sae.sparse import batch_topk_encode, sparse_decode, sparse_error, topk_encode
from reseed.sae.topk import TopKConfig
from reseed.system import compiling
from reseed.train.optim.adam import SAEAdam


@pytest.fixture(autouse=True)
def kernels_on():
    with kernels.override_enabled(True):
        yield


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


drawn = partial(leaves, dtype=torch.float32)


def chosen(scores, k):
    return [set(row.tolist()) for row in scores.topk(k, dim=1).indices]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 9),
    d_in=st.integers(8, 70),
    num_latents=st.integers(1, 80),
    flat=st.booleans(),
    data=st.data(),
)
def test_loss_and_every_gradient_are_those_of_float64_dense_autograd(
    seed, batch, d_in, num_latents, flat, data
):
    k = data.draw(st.integers(1, num_latents))
    x, W_enc, b_enc, W_dec, b_dec = inputs = drawn(seed, batch, d_in, num_latents)
    encode = batch_topk_encode if flat else topk_encode
    latents = encode(x, W_enc, b_enc, k, b_dec=b_dec)
    squared, error = sparse_error(x, latents, W_dec, b_dec)
    ours = torch.autograd.grad(squared, inputs)

    dx, dW_enc, db_enc, dW_dec, db_dec = exact = [
        leaf.detach().double().requires_grad_() for leaf in inputs
    ]
    active = (latents.dense() > 0).double()
    dense = ((dx - db_dec) @ dW_enc.T + db_enc) * active
    dense_error = dx - (dense @ dW_dec + db_dec)
    theirs = torch.autograd.grad(dense_error.square().sum(), exact, retain_graph=True)

    # Sums may cancel, so errors are bounded by the sums of their terms' absolute values (a result
    # of n roundings is within n·2⁻²⁴ of them), through all sums that lead to a result.
    x_, W_enc_, b_enc_, W_dec_, b_dec_ = (leaf.detach().abs() for leaf in exact)
    rows = (dx - db_dec).detach().abs()
    f = active * (rows @ W_enc_.T + b_enc_)
    e = x_ + f @ W_dec_ + b_dec_
    g = active * (2 * e @ W_dec_.T)
    to_x = 2 * e + g @ W_enc_
    found = [squared, error, sparse_decode(latents, W_dec), *ours]
    expected = [dense_error.square().sum(), dense_error, dense @ dW_dec, *theirs]
    terms = [
        e.square().sum(),
        e,
        f @ W_dec_,
        to_x,
        g.T @ rows,
        g.sum(0),
        f.T @ (2 * e),
        to_x.sum(0),
    ]
    # No result has more: at most three sums over D, two over F, one over B and a few single steps.
    roundings = 4 * (batch + d_in + num_latents)
    for a, b, size in zip(found, expected, terms, strict=True):
        assert (a.double() - b).norm() <= roundings * 2.0**-24 * size.norm()
    assert torch.equal(latents.fired(), active.long().sum(0))


def test_the_decoders_gradient_is_that_of_dense_autograd():
    """The loss is not ‖e‖², so the gradient goes through `sparse_decode`."""
    x, W_enc, b_enc, W_dec, _ = drawn(1, 40, 33, 100)
    latents = topk_encode(x, W_enc, b_enc, 7)
    ours = torch.autograd.grad(sparse_decode(latents, W_dec).pow(3).sum(), [x, W_enc, W_dec])
    exact = [leaf.detach().double().requires_grad_() for leaf in (x, W_enc, W_dec)]
    pre = exact[0] @ exact[1].T + b_enc.detach().double()
    dense = pre.relu() * (latents.dense() > 0)
    theirs = torch.autograd.grad((dense @ exact[2]).pow(3).sum(), exact)
    for a, b in zip(ours, theirs, strict=True):
        near(a, b)


@pytest.mark.parametrize("screened", [True, False])
@pytest.mark.parametrize(
    ("batch", "d_in", "num_latents", "k"),
    [(300, 70, 1050, 8), (130, 33, 61, 1), (5, 7, 40, 40), (1, 1, 1, 1), (260, 96, 4096, 200)],
)
def test_the_choice_is_that_of_float64(screened, batch, d_in, num_latents, k):
    x, W, b, *_ = (leaf.detach() for leaf in drawn(2, batch, d_in, num_latents))
    values, indices = select(x, W, b, k, True, screened=screened)
    exact = x.double() @ W.double().T + b.double()
    assert [set(row.tolist()) for row in indices] == chosen(exact, k)
    near(values, exact.gather(1, indices))
    assert (values.diff(dim=1) <= 0).all()


@pytest.mark.parametrize("screened", [True, False])
def test_rows_with_few_positive_numbers_ties_or_zeros_are_chosen_by_hand(screened):
    W = torch.eye(8).repeat(8, 1)  # gives every pre-activation eight times
    x = torch.stack([torch.arange(8.0), -torch.arange(8.0), torch.zeros(8)])
    values, indices = select(x, W, torch.zeros(64), 20, True, screened=screened)
    # By hand: 7 and 6 eight times each, then 5s; 0 and -1 eight times each, then -2s; all 0.
    assert values[0].tolist() == [7.0] * 8 + [6.0] * 8 + [5.0] * 4
    assert values[1].tolist() == [0.0] * 8 + [-1.0] * 8 + [-2.0] * 4
    assert values[2].tolist() == [0.0] * 20
    assert all(len(set(row.tolist())) == 20 for row in indices)
    again = select(x, W, torch.zeros(64), 20, True, screened=screened)
    assert torch.equal(again[1], indices)


@pytest.mark.parametrize("screened", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_pre_activations_are_chosen(screened, bad):
    x, W, b, *_ = (leaf.detach() for leaf in drawn(3, 10, 9, 70))
    x[4, 2] = bad
    values, _ = select(x, W, b, 5, False, screened=screened)
    assert not torch.isfinite(values[4]).all()
    others = torch.arange(10) != 4
    assert torch.isfinite(values[others]).all()
    W[11, 3] = float("nan")
    values, indices = select(x, W, b, 5, True, screened=screened)
    assert torch.isnan(values[others][:, 0]).all()
    assert (indices[others] == 11).any(1).all()


@pytest.mark.parametrize("config", [TopKConfig, BatchTopKConfig, MatryoshkaConfig])
def test_a_nan_activation_makes_the_loss_nonfinite(config):
    sae = config(num_latents=1024, k=4).build(64, torch.Generator().manual_seed(0))
    x = torch.randn(300, 64)
    x[7, 3] = float("nan")
    loss = sae.training_loss(x, Step(0, 10), torch.zeros(1024, dtype=torch.bool))
    assert not torch.isfinite(loss.total)


@pytest.mark.parametrize(
    ("batch", "d_in", "num_latents", "k"),
    [(600, 128, 2048, 8), (300, 70, 1050, 3.3), (257, 64, 1030, 0.02)],
)
def test_the_choice_in_a_batch_is_that_of_float64(batch, d_in, num_latents, k, monkeypatch):
    monkeypatch.setattr("reseed.sae.kernels.select.screen_pays", lambda *_: True)
    x, W, b, *_ = (leaf.detach() for leaf in drawn(4, batch, d_in, num_latents))
    x *= torch.linspace(0.1, 2, batch)[:, None][
        torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    ]
    count = max(1, round(k * batch))
    found = select_in_batch(x, W / d_in**0.5, 0.1 * b, count)
    assert found is not None, "the rough product should decide this"
    values, rows, latents = found
    exact = (x.double() @ W.double().T / d_in**0.5 + 0.1 * b.double()).flatten()
    assert (rows * num_latents + latents).tolist() == exact.topk(count).indices.sort()[0].tolist()
    near(values, exact[rows * num_latents + latents])


def test_a_guess_that_is_too_high_falls_back_to_the_plain_choice(monkeypatch):
    monkeypatch.setattr("reseed.sae.kernels.select.screen_pays", lambda *_: True)
    x, W, b, *_ = (leaf.detach() for leaf in drawn(5, 400, 64, 1024))
    x[:128] *= 50  # makes the guess far too high for the other rows
    count = 400 * 64
    assert select_in_batch(x, W, b, count) is None
    _, rows, latents = selection.select_in_batch(x, W, b, 64)
    exact = (x.double() @ W.double().T + b.double()).flatten()
    assert (rows * 1024 + latents).tolist() == exact.topk(count).indices.sort()[0].tolist()


def steps(config, on=True, count=3, dead=40, **options):
    """Return losses, weights and moments after a few steps."""
    with kernels.override_enabled(on):
        generator = torch.Generator().manual_seed(0)
        sae = config.build(72, generator)
        optimizer = SAEAdam(sae, 1e-3, encoder_weight_decay=0.1, **options)
        losses = []
        for index in range(count):
            x = torch.randn(520, 72, generator=generator)
            silent = torch.arange(1056) < dead
            loss = sae.training_loss(x, Step(index, 10), silent)
            optimizer.zero_grad()
            loss.total.backward()
            optimizer.step()
            losses.append(loss.total.detach())
        state = optimizer.state_dict()["state"]
        moments = [t for one in state.values() for t in one.values()]
        return [*losses, *(p.detach().clone() for p in sae.parameters()), *moments]


ARCHITECTURES = [
    TopKConfig(num_latents=1056, k=6, multi_topk=True, k_aux=5),
    BatchTopKConfig(num_latents=1056, k=6.5, weigh_by_decoder_norm=True, unit_norm_decoder=False),
    MatryoshkaConfig(num_latents=1056, k=6),
]


@pytest.mark.parametrize("config", ARCHITECTURES, ids=lambda config: type(config).__name__)
def test_steps_equal_those_of_the_plain_path(config):
    for options in ({}, {"max_grad_norm": None}, {"max_grad_norm": 1e-3}):
        for a, b in zip(steps(config, **options), steps(config, False, **options), strict=True):
            assert (a - b).norm() <= 2e-5 * b.norm().clamp_min(1e-12)


# Matryoshka is left out: it also uses torch's sums, which depend on the number of threads.
@pytest.mark.parametrize("config", ARCHITECTURES[:2], ids=lambda config: type(config).__name__)
def test_steps_are_bit_equal_on_any_number_of_threads(config, monkeypatch, restored_threads):
    monkeypatch.setattr(compiling, "LEAST_WORK", 1)
    found = []
    for count in (1, 3, 2, 3):
        torch.set_num_threads(count)
        found.append(steps(config, dead=0))
        assert torch.get_num_threads() == count
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_noncontiguous_rows_and_weights_give_the_same_error():
    x, W_enc, b_enc, W_dec, b_dec = (leaf.detach() for leaf in drawn(6, 50, 24, 90))
    wide = x.repeat(1, 3)[:, 24:48]
    assert not wide.is_contiguous()
    for rows in (x, wide):
        W = W_dec.T.contiguous().T
        assert not W.is_contiguous()
        latents = topk_encode(rows, W_enc, b_enc, 5, b_dec=b_dec)
        squared, _ = sparse_error(rows, latents, W, b_dec)
        if rows is x:
            expected = squared
    assert torch.equal(squared, expected)


def test_the_variance_is_that_of_float64():
    x = 100 + torch.randn(333, 19)
    exact = (x.double() - x.double().mean(0)).square().sum()
    near(total_variance(x), exact, 1e-5)


@pytest.mark.parametrize(("seed", "eps"), [(0, 1e-8), (1, 0.1)])
def test_a_step_is_adam_in_float64(seed, eps):
    """The reference has projection, clipping by global norm, decay, Adam and norm 1."""
    config = TopKConfig(num_latents=40, k=2)
    sae = config.build(7, torch.Generator().manual_seed(seed))
    optimizer = SAEAdam(sae, 0.01, eps=eps, encoder_weight_decay=0.3, max_grad_norm=0.5)
    names = [name for name, _ in sae.named_parameters()]
    weights = {n: p.detach().double().clone() for n, p in sae.named_parameters()}
    m = {n: torch.zeros_like(w) for n, w in weights.items()}
    v = {n: torch.zeros_like(w) for n, w in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, 4):
        grads = {}
        for name, p in sae.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            grads[name] = p.grad.double()
        optimizer.step()
        D, G = weights["W_dec"], grads["W_dec"]
        grads["W_dec"] = G - (G * D).sum(1, keepdim=True) * D
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        assert optimizer.grad_norm is not None
        near(optimizer.grad_norm, norm)
        for name in names:
            g = grads[name] * min(1.0, 0.5 / float(norm + 1e-6))
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            if name == "W_enc":
                weights[name] *= 1 - 0.01 * 0.3
            hat = m[name] / (1 - 0.9**step), v[name] / (1 - 0.999**step)
            weights[name] -= 0.01 * hat[0] / (hat[1].sqrt() + eps)
        weights["W_dec"] /= weights["W_dec"].norm(dim=1, keepdim=True)
        for name, p in sae.named_parameters():
            near(p.detach(), weights[name], 3e-6)


def test_a_nan_gradient_reaches_the_weights():
    sae = TopKConfig(num_latents=40, k=2).build(7, torch.Generator().manual_seed(0))
    optimizer = SAEAdam(sae, 0.01)
    for p in sae.parameters():
        p.grad = torch.ones_like(p)
    sae.b_enc.grad[3] = float("nan")
    optimizer.step()
    assert not torch.isfinite(sae.W_enc).all()


def test_a_buffer_is_reused_only_once_no_tensor_holds_it():
    shape = (buffers.LEAST_BYTES // 4 + 12, 1)
    first = buffers.empty(shape)
    part = first[5:9]  # a view holds the buffer too
    place = first.data_ptr()
    assert buffers.empty(shape).data_ptr() != place
    del first
    assert buffers.empty(shape).data_ptr() != place
    del part
    again = [buffers.empty(shape), buffers.empty(shape)]
    assert place in {tensor.data_ptr() for tensor in again}
    assert again[0].data_ptr() != again[1].data_ptr()


def test_kernels_serve_float32_unless_switched_off(monkeypatch):
    one = torch.zeros(1)
    assert kernels.supports(one)
    assert not kernels.supports(one, one.double())
    with kernels.override_enabled(False):
        assert not kernels.supports(one)
    monkeypatch.setattr(kernels, "_switch", None)
    monkeypatch.setenv("RESEED_KERNELS", "0")
    assert not kernels.supports(one)
    monkeypatch.delenv("RESEED_KERNELS")
    assert kernels.supports(one)


def test_ranges_cover_everything_once_and_pass_errors_on(monkeypatch, restored_threads):
    monkeypatch.setattr(compiling, "LEAST_WORK", 1)
    torch.set_num_threads(3)
    for run in (
        lambda task, count: compiling.in_ranges(task, count, 1),
        lambda task, count: compiling.in_blocks(task, count, 7),
    ):
        for count in (1, 2, 7, 100):
            seen = np.zeros(count, dtype=int)

            def mark(start, stop, seen=seen):
                seen[start:stop] += 1

            run(mark, count)
            assert (seen == 1).all()

        def fail(start, stop):
            raise RuntimeError("no more")

        with pytest.raises(RuntimeError, match="no more"):
            run(fail, 100)
    inside = []
    compiling.in_blocks(lambda *_: inside.append(torch.get_num_threads()), 30, 10)
    assert inside == [1, 1, 1]


FORKED = """
import os, torch
from reseed.sae.base import Step
from reseed.sae.topk import TopKConfig
from reseed.system import compiling
compiling.LEAST_WORK = 1
torch.set_num_threads(1)  # threads of OpenMP, unlike ours, do not outlive a fork
sae = TopKConfig(num_latents=1024, k=4).build(64, torch.Generator().manual_seed(0))
x = torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
def loss():
    total = sae.training_loss(x, Step(0, 9), torch.zeros(1024, dtype=torch.bool)).total
    total.backward()
    return float(total.detach())
before = loss()
torch.set_num_threads(2)
compiling.in_blocks(lambda *_: None, 10, 1)
assert compiling._pool is not None
child = os.fork()
if child == 0:
    os._exit(0 if loss() == before else 3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_kernels_work_in_a_forked_child():
    done = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "0", done.stderr[-2000:]


def test_numba_is_not_imported_before_its_first_use():
    code = (
        "import sys, reseed.sae as s; s.load_all(); import reseed.train.optim.adam; "
        "print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr[-2000:]


def test_modules_outside_the_package_use_its_interface_alone():
    source = Path(kernels.__file__).parents[2]
    inside = "|".join(path.stem for path in Path(kernels.__file__).parent.glob("[a-z]*.py"))
    imports = re.compile(rf"sae\.kernels(\.| import .*\b)({inside})\b")
    assert imports.search("from reseed.sae.kernels import Pairs, select")
    assert imports.search("from reseed.sae.kernels.update import compiled_step")
    others = (p for p in source.rglob("*.py") if p.parent != Path(kernels.__file__).parent)
    assert [p.name for p in others if imports.search(p.read_text())] == []
