"""One module and one yaml add an evaluation, also from another package."""

from __future__ import annotations

import json

import pandas as pd
import pytest

MODULE = '''
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from reseed.config import setting
from reseed.evaluate.base import EvaluationConfig, EvaluationInput, LoadedRun, Metric, Result


@dataclass(frozen=True)
class TopShareConfig(EvaluationConfig, name="top_share"):
    """Evaluation of how much of a token's activation its strongest latent has."""

    with_untrained = False
    title = "How much does the strongest latent carry?"
    metrics = (
        Metric("share", "top\\nshare", "largest activation / sum of activations, mean over tokens",
               interval=True),
        Metric("tokens", help="held-out tokens that were read"),
    )
    latents = (Metric("first", "strongest", "fraction of latents that are the strongest once"),)

    tokens: int = setting(1_000, at_least=1)

    @torch.no_grad()
    def evaluate(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        for run in runs:
            chunks = inputs.source.held_out([run.hook], self.tokens)
            latents = torch.cat([run.sae.encode(chunk[run.hook]) for chunk in chunks])
            share = latents.max(1).values / latents.sum(1)
            first = latents.argmax(1).bincount(minlength=run.sae.num_latents) > 0
            metrics = {"share": float(share.mean()), "tokens": len(latents)}
            yield run.id, Result(metrics, latents={"first": first.numpy()})
'''

YAML = """
_target_: my_evaluation.TopShareConfig
tokens: 1000
"""
NOTE = "top share: largest activation / sum of activations, mean over tokens."


@pytest.mark.slow
def test_one_module_and_one_yaml_add_an_evaluation(tiny_overrides, made_up_package) -> None:
    made_up_package.write(
        {"my_evaluation.py": MODULE, "my_conf/evaluation/top_share.yaml": YAML},
        {"reseed.evaluations": "top_share = my_evaluation", "reseed.conf": "top_share = my_conf"},
    )
    folder = made_up_package.folder
    own = ("comparison=seeds", *tiny_overrides, "training.tokens=2048", "sae.k=1,4", "seed=0,1,2",
           "comparison.activation_tokens=0", "comparison.null_draws=1")  # fmt: skip
    made_up_package.reseed("run", *own)
    run, *_ = sorted(path.parent for path in folder.glob("outputs/*/run.json"))
    evaluation = ("evaluation=top_share", "evaluation.tokens=500")

    shown = made_up_package.reseed("evaluate", str(run), *evaluation)
    assert "How much does the strongest latent carry?" in shown
    assert NOTE in shown
    (path,) = folder.glob("outputs/*/evaluations/top_share-*/result.json")
    alone = json.loads(path.read_text())["metrics"]
    assert alone["tokens"] == 500

    (sweep,) = folder.glob("sweeps/seeds-*")
    shown = made_up_package.reseed("evaluate", sweep.name, *evaluation)
    assert "How much does the strongest latent carry? Among shared latents and orphans" in shown
    assert NOTE in shown
    assert "1 SAE already evaluated" in shown
    runs = pd.read_csv(sweep / "evaluations.csv").set_index("run")
    assert runs.loc[run.name, "top_share_share"] == pytest.approx(alone["share"])
    by_k = runs.groupby("sparsity")["top_share_share"]
    summary = pd.read_csv(sweep / "summary.csv").set_index("sparsity")
    assert by_k.get_group("k=1").tolist() == [1, 1, 1], "a single latent carries everything"
    for sparsity, values in by_k:
        row = summary.loc[sparsity]
        # t(2) at 97.5% is 4.3027.
        reach = 4.302653 * values.std() / 3**0.5
        assert row["top_share_share"] == pytest.approx(values.mean())
        assert row["top_share_share_high"] == pytest.approx(values.mean() + reach)
    text = (sweep / "summary.md").read_text()
    assert "## How much does the strongest latent carry?\n" in text
    assert "| top share |" in text
    assert "- **top share**: largest activation / sum of activations, mean over tokens." in text
    latents = pd.read_parquet(sweep / "latents.parquet")
    assert latents["top_share_first"].dtype == bool
