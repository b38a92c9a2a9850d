"""The sparse encoder and decoder against dense autograd in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_examples import leaves

from reseed.sae.kernels import select as compiled
from reseed.sae.pairs import PairsByLatent
from reseed.sae.selection import topk_select
from reseed.sae.sparse import sparse_decode, topk_encode


def dense_topk(x, W_enc, b_enc, k, b_dec=None, among=None):
    """Return TopK_k(ReLU(π)) by its definition, in autograd."""
    centred = x if b_dec is None else x - b_dec
    pre = centred @ W_enc.T + b_enc
    allowed = torch.zeros(len(W_enc), dtype=torch.bool)
    allowed[slice(None) if among is None else among] = True
    chosen = torch.where(allowed, pre, -torch.inf).topk(k, dim=1).indices
    mask = torch.zeros_like(pre).scatter(1, chosen, 1.0)
    return pre.relu() * mask


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 9),
    d_in=st.integers(1, 7),
    num_latents=st.integers(1, 40),
    data=st.data(),
)
def test_values_and_every_gradient_are_those_of_the_dense_formulation(
    seed, batch, d_in, num_latents, data
):
    k = data.draw(st.integers(1, num_latents))
    x, W_enc, b_enc, W_dec, b_dec = leaves(seed, batch, d_in, num_latents)
    target = torch.randn(batch, d_in, dtype=torch.float64)

    latents = topk_encode(x, W_enc, b_enc, k, b_dec=b_dec)
    ours = sparse_decode(latents, W_dec) + b_dec
    dense = dense_topk(x, W_enc, b_enc, k, b_dec)
    theirs = dense @ W_dec + b_dec
    close(latents.dense(), dense)
    close(ours, theirs)
    everything = (x, W_enc, b_enc, W_dec, b_dec)
    for a, b in zip(
        torch.autograd.grad((ours - target).square().sum(), everything),
        torch.autograd.grad((theirs - target).square().sum(), everything),
        strict=True,
    ):
        close(a, b)


@pytest.mark.parametrize(("batch", "num_latents", "k"), [(600, 256, 8), (5, 512, 3), (1, 64, 64)])
def test_blocks_and_tournament_choose_what_topk_chooses(batch, num_latents, k):
    for dtype in (torch.float32, torch.float64):
        x, W_enc, b_enc, *_ = leaves(0, batch, 16, num_latents, dtype)
        latents = topk_encode(x, W_enc, b_enc, k, descending=True)
        pre = x.double() @ W_enc.double().T + b_enc.double()
        expected = pre.topk(k, dim=1).values.relu().to(dtype)
        torch.testing.assert_close(latents.values, expected, rtol=1e-5, atol=1e-5)
        chosen = pre.gather(1, latents.indices).relu().to(dtype)
        torch.testing.assert_close(latents.values, chosen, rtol=1e-5, atol=1e-5)
        assert all(len(set(row.tolist())) == k for row in latents.indices)


def test_rows_with_fewer_than_k_positive_preactivations_pass_no_gradient_through_zeros():
    x = torch.eye(2, dtype=torch.float64)
    W_enc = torch.tensor([[1.0, -1.0], [-1.0, -2.0], [-3.0, -1.0]], dtype=torch.float64)
    W_enc.requires_grad_()
    latents = topk_encode(x, W_enc, torch.zeros(3, dtype=torch.float64), 2)
    # By hand: π of token 0 is (1, −1, −3), one positive; of token 1 (−1, −2, −1), none.
    assert latents.values.sort(1, descending=True).values.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert latents.fired().tolist() == [1, 0, 0]
    latents.values.sum().backward()
    assert W_enc.grad.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


def test_with_ties_k_latents_are_chosen_and_the_choice_repeats():
    x, W_enc = torch.ones(4, 3), torch.ones(128, 3)
    first = topk_encode(x, W_enc, torch.zeros(128), 5)
    assert [len(set(row.tolist())) for row in first.indices] == [5] * 4
    assert torch.equal(first.values, torch.full((4, 5), 3.0))
    assert torch.equal(first.indices, topk_encode(x, W_enc, torch.zeros(128), 5).indices)


def test_a_choice_among_some_latents_leaves_out_the_others():
    x, W_enc, b_enc, W_dec, b_dec = leaves(3, 6, 5, 20)
    among = torch.tensor([1, 4, 7, 19])
    latents = topk_encode(x, W_enc, b_enc, 2, b_dec=b_dec, among=among)
    dense = dense_topk(x, W_enc, b_enc, 2, b_dec, among)
    assert set(latents.indices.flatten().tolist()) <= set(among.tolist())
    close(latents.dense(), dense)
    everything = (W_enc, b_enc, W_dec, b_dec)
    ours = torch.autograd.grad((sparse_decode(latents, W_dec) + b_dec).pow(3).sum(), everything)
    theirs = torch.autograd.grad((dense @ W_dec + b_dec).pow(3).sum(), everything)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    others = torch.ones(20, dtype=torch.bool)
    others[among] = False
    assert ours[0][others].abs().max() == 0


def test_noncontiguous_x_gives_the_same_latents():
    x, W_enc, b_enc, *_ = leaves(4, 6, 5, 20)
    wide = x.detach().repeat(1, 3)[:, 5:10]
    assert not wide.is_contiguous()
    a = topk_encode(wide, W_enc, b_enc, 3).dense()
    assert torch.equal(a, topk_encode(wide.contiguous(), W_enc, b_enc, 3).dense())


@pytest.mark.parametrize("k", [0, 9])
def test_k_out_of_range_is_refused(k):
    x, W_enc, b_enc, *_ = leaves(0, 2, 3, 8)
    with pytest.raises(ValueError, match=rf"`k` \(={k}\) must be between 1 and .* \(=8\)"):
        topk_encode(x, W_enc, b_enc, k)


@pytest.mark.parametrize("num_latents", [300, 2**15 + 8])
def test_sums_by_latent_equal_a_loop_over_pairs(num_latents):
    """Sorting keys are narrow or wide; the largest index is included."""
    indices = torch.randint(0, num_latents, (50, 4))
    indices[0, 0] = num_latents - 1
    by_latent = PairsByLatent(indices, num_latents)
    weights, rows = torch.randn(50, 4).double(), torch.randn(50, 3).double()
    expected = torch.zeros(num_latents, 3).double()
    totals = torch.zeros(num_latents).double()
    for token in range(50):
        for place in range(4):
            expected[indices[token, place]] += weights[token, place] * rows[token]
            totals[indices[token, place]] += weights[token, place]
    close(by_latent.weighted_sum(weights, rows), expected)
    close(by_latent.sum(weights), totals)


def test_gradients_repeat_bit_for_bit():
    def gradients():
        x, W_enc, b_enc, W_dec, b_dec = leaves(5, 700, 24, 512, torch.float32)
        out = sparse_decode(topk_encode(x, W_enc, b_enc, 8, b_dec=b_dec), W_dec)
        return torch.autograd.grad(out.square().sum(), (W_enc, b_enc, W_dec, b_dec))

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))


def test_no_tensor_has_the_size_of_a_dense_batch():
    """Neither pass makes a tensor of B × F elements, so memory scales with k and not F."""
    batch, d_in, num_latents = 1024, 8, 2048
    x, W_enc, b_enc, W_dec, b_dec = leaves(6, batch, d_in, num_latents, torch.float32)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:
                    sizes.append(tensor.untyped_storage().nbytes() // tensor.element_size())
            return out

    with Watch():
        out = sparse_decode(topk_encode(x, W_enc, b_enc, 4, b_dec=b_dec), W_dec)
        (out + b_dec).square().sum().backward()
    assert W_enc.grad is not None
    assert max(sizes) <= batch * num_latents // 4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), width=st.integers(1, 300), data=st.data())
def test_the_tournament_equals_topk(seed, width, data):
    k = data.draw(st.integers(1, width))
    # Few distinct values give many ties at every level.
    rows = torch.randint(-20, 20, (5, width), generator=torch.Generator().manual_seed(seed))
    for dtype in (torch.float32, torch.int16):
        values, indices = topk_select(rows.to(dtype), k, descending=True)
        assert torch.equal(values, rows.to(dtype).topk(k, dim=1).values)
        assert torch.equal(values, rows.to(dtype).gather(1, indices))
        assert all(len(set(row.tolist())) == k for row in indices)


def screening_case(name):
    """Return rows, encoder and bias of a named case that is hard for the bfloat16 screen."""
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 32, generator=generator) for n in (600, 512))
    b = 0.1 * torch.randn(512, generator=generator)
    if name == "near ties":  # differences below the resolution of bfloat16
        W = W[:1] + 1e-4 * W
    elif name == "all negative":
        b = b - 100
    elif name == "few positive":
        b = b - 18
    elif name == "heavy tails":
        x = x * torch.randn(600, 1, generator=generator).exp().pow(3)
        W = W * torch.randn(512, 1, generator=generator).exp()
    elif name == "zero rows":
        x[::2] = 0
        W[::3] = 0
    elif name == "large bias":
        b = 1000 + b
    elif name == "equal rows":
        W = W[:32].repeat(16, 1)
    elif name == "huge and tiny":
        x[:300] *= 1e20
        x[300:] *= 1e-20
    return x, W, b


@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "near ties",
        "all negative",
        "few positive",
        "heavy tails",
        "zero rows",
        "large bias",
        "equal rows",
        "huge and tiny",
    ],
)
@pytest.mark.parametrize("k", [1, 8, 64])
def test_the_bfloat16_screen_keeps_the_float32_top_k(name, k):
    x, W, b = screening_case(name)
    values, indices = compiled.select(x, W, b, k, descending=True, screened=True)
    pre = x.double() @ W.double().T + b.double()
    # Tolerance: D + 2 float32 roundings of sums of terms of this size.
    slack = 34 * 2.0**-23 * (x.norm(dim=1)[:, None] * W.norm(dim=1).max() + b.abs().max()).double()
    expected = pre.topk(k, dim=1).values
    assert ((values.double() - expected).abs() <= slack).all()
    assert ((pre.gather(1, indices) - values.double()).abs() <= slack).all()
    assert all(len(set(row.tolist())) == k for row in indices)


def test_the_bfloat16_screen_propagates_nan():
    x, W, b = screening_case("plain")
    x[7, 3] = torch.nan
    values, _ = compiled.select(x, W, b, 4, descending=False, screened=True)
    assert values[7].isnan().all()
    assert torch.isfinite(values[8]).all()


def test_the_screen_decides_ordinary_rows(monkeypatch):
    """Otherwise the float32 product would run, slowly, and the screen would be untested."""
    x, W, b = screening_case("plain")

    def unexpected(*args):
        raise AssertionError("took the float32 product")

    monkeypatch.setattr(compiled, "_exact", unexpected)
    compiled.select(x, W, b, 8, descending=False, screened=True)


def test_the_error_bound_bounds_the_error():
    x, W, b = screening_case("heavy tails")
    *_, bound = compiled.rough_product(x, W, b)
    rough = x.bfloat16().double() @ W.bfloat16().double().T + b.bfloat16().double()
    error = (rough - (x.double() @ W.double().T + b.double())).abs().amax(1).numpy()
    assert (error <= bound).all()
    assert error.max() > bound.max() / 100  # the bound is not far too wide
