"""Training with eai-sparsify and sae-lens through their public trainers, as documented.

Each function trains in the current process and returns the SAEs' weights under reseed's names and
in reseed's shapes, for raw activations. Evaluation, W&B and checkpoints are off.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from sweeps.plan import CHUNK, L1_WARM_UP, START, WARM_UP, Plan, Sae
from sweeps.processes import Clock

Weights = dict[str, Any]


def sparsify(plan: Plan, saes: Sequence[Sae], clock: Clock) -> dict[str, Weights]:
    """Train in one job: `sparsify.Trainer` with `layers` × `init_seeds` shares the model's pass."""
    import torch
    from datasets import load_from_disk
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import AutoModel

    torch.set_num_threads(plan.threads)
    layers = list(dict.fromkeys(sae.layer for sae in saes))
    seeds = list(dict.fromkeys(sae.seed for sae in saes))
    config = TrainConfig(
        SparseCoderConfig(num_latents=plan.num_latents, k=plan.k),
        batch_size=plan.batch // plan.context,
        optimizer="adam",
        lr=plan.lr,
        lr_warmup_steps=round(WARM_UP * plan.steps),
        layers=layers,
        init_seeds=seeds,
        log_to_wandb=False,
        save_every=10**9,
        save_dir=str(plan.folder("sparsify")),
    )
    # Like sparsify's command line for this loss, load the model without the unembedding.
    model = AutoModel.from_pretrained(_info(plan)["folder"], dtype=torch.float32)
    dataset: Any = load_from_disk(str(plan.folder("tokens"))).with_format("torch")
    trainer = Trainer(config, dataset, model)
    trainer.save = lambda: None  # skips the final checkpoint
    clock.begin()
    trainer.fit()
    clock.end()
    found = {}
    for name, sae in trainer.saes.items():
        hook, _, seed = name.partition("/seed")
        sae.set_decoder_norm_to_unit_norm()
        own = Sae("topk", int(hook.rpartition(".")[2]), int(seed or seeds[0]))
        found[own.name] = {
            "W_enc": sae.encoder.weight,
            "b_enc": sae.encoder.bias,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }
    return found


def saelens_multi(plan: Plan, saes: Sequence[Sae], clock: Clock) -> dict[str, Weights]:
    """Train all SAEs from one pass of the model, with `MultiSAETrainingRunner`."""
    import torch
    from datasets import load_from_disk
    from sae_lens.multi_sae_training_runner import (
        MultiSAETrainingRunner,
        MultiSAETrainingRunnerConfig,
    )

    torch.set_num_threads(plan.threads)
    torch.manual_seed(saes[0].seed)
    info = _info(plan)
    config = MultiSAETrainingRunnerConfig(
        saes={sae.name: _saelens_config(plan, sae, info["d_in"]) for sae in saes},
        hook_names={sae.name: f"{info['layers']}.{sae.layer}" for sae in saes},
        **_saelens_options(plan, info),
    )
    runner = MultiSAETrainingRunner(
        config, override_dataset=load_from_disk(str(plan.folder("tokens")))
    )
    clock.begin()
    trained = runner.run()
    clock.end()
    return {name: _saelens_weights(sae) for name, sae in trained.items()}


def saelens_single(plan: Plan, saes: Sequence[Sae], clock: Clock) -> dict[str, Weights]:
    """Train one SAE with `LanguageModelSAETrainingRunner`."""
    import torch
    from datasets import load_from_disk
    from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner

    torch.set_num_threads(plan.threads)
    (sae,) = saes
    torch.manual_seed(sae.seed)
    info = _info(plan)
    config = LanguageModelSAERunnerConfig(
        sae=_saelens_config(plan, sae, info["d_in"]),
        hook_name=f"{info['layers']}.{sae.layer}",
        is_dataset_tokenized=True,
        verbose=False,
        **_saelens_options(plan, info),
    )
    runner = LanguageModelSAETrainingRunner(
        config, override_dataset=load_from_disk(str(plan.folder("tokens")))
    )
    clock.begin()
    trained = runner.run()
    clock.end()
    return {sae.name: _saelens_weights(trained)}


def _saelens_options(plan: Plan, info: dict[str, Any]) -> dict[str, Any]:
    """Return the options that both runners share."""
    from sae_lens.config import LoggingConfig

    warm_up = round(WARM_UP * plan.steps)
    return {
        "model_name": info["folder"],
        "model_class_name": "AutoModelForCausalLM",
        "streaming": False,
        "context_size": plan.context,
        "prepend_bos": False,
        "exclude_special_tokens": False,
        "training_tokens": plan.steps * plan.batch,
        "train_batch_size_tokens": plan.batch,
        "store_batch_size_prompts": plan.batch // plan.context,
        "lr": plan.lr,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": warm_up,
        "lr_decay_steps": plan.steps - warm_up - 1,
        "n_batches_for_norm_estimate": max(1, min(CHUNK, plan.tokens) // plan.batch),
        "device": "cpu",
        "dtype": "float32",
        "n_checkpoints": 0,
        "checkpoint_path": None,
        "output_path": None,
        "logger": LoggingConfig(log_to_wandb=False),
    }


def _saelens_config(plan: Plan, sae: Sae, d_in: int) -> Any:
    """Configure TopK with sparse latents, the faster kind, or ReLU like reseed (`agreement.py`)."""
    from sae_lens import StandardTrainingSAEConfig, TopKTrainingSAEConfig

    shared: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": plan.num_latents,
        "normalize_activations": "expected_average_only_in",
    }
    if sae.architecture == "topk":
        return TopKTrainingSAEConfig(
            **shared,
            k=plan.k,
            decoder_init_norm=START**0.5,  # the encoder is tied to it
            rescale_acts_by_decoder_norm=False,
            use_sparse_activations=True,
        )
    return StandardTrainingSAEConfig(
        **shared,
        l1_coefficient=plan.l1,
        l1_warm_up_steps=round(L1_WARM_UP * plan.steps),
        apply_b_dec_to_input=False,
    )


def _saelens_weights(sae: Any) -> Weights:
    return {"W_enc": sae.W_enc.T, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}


def _info(plan: Plan) -> dict[str, Any]:
    return json.loads((plan.folder("info.json")).read_text())
