"""Contender of eai-sparsify."""

from __future__ import annotations

from typing import Any

from contenders.base import LEARNING_RATE, Contender, K, Matched


class Sparsify(Contender):
    """Loop body of `sparsify.Trainer` for one SAE with `optimizer=adam`, `loss_fn=fvu`."""

    needs = "sparsify"

    def __init__(self, architecture: str, d_in: int, num_latents: int) -> None:
        import torch
        from sparsify import SparseCoder, SparseCoderConfig

        self.module = SparseCoder(d_in, SparseCoderConfig(num_latents=num_latents, k=K))
        self.optimizer = torch.optim.Adam(self.module.parameters(), lr=LEARNING_RATE)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.tokens_since_fired = torch.zeros(num_latents, dtype=torch.int64)
        self.did_fire = torch.zeros(num_latents, dtype=torch.bool)
        self.index = 0

    def matched(self, d_in: int, num_latents: int) -> Matched:
        return Matched(optimizer={"max_grad_norm": None})

    def step(self, x: Any) -> None:
        if self.index == 0:
            self.module.b_dec.data = x.mean(0)
        self.module.set_decoder_norm_to_unit_norm()
        out = self._forward(x)
        self.did_fire[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        self.module.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scheduler.step()
        self.tokens_since_fired += len(x)
        self.tokens_since_fired[self.did_fire] = 0
        self.did_fire.zero_()
        self.index += 1

    def loss(self, x: Any) -> Any:
        return self._forward(x).fvu

    def parameters(self) -> dict[str, Any]:
        return {
            "W_enc": self.module.encoder.weight,
            "b_enc": self.module.encoder.bias,
            "W_dec": self.module.W_dec,
            "b_dec": self.module.b_dec,
        }

    def weights(self) -> dict[str, Any]:
        # The trainer renormalises at the start of the next step, reseed at the end of this one.
        self.module.set_decoder_norm_to_unit_norm()
        return super().weights()

    def _forward(self, x: Any) -> Any:
        variance = (x - x.mean(0)).pow(2).sum()
        return self.module(x=x, y=x, dead_mask=None, total_variance=variance)
