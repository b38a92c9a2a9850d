"""Comparisons with arms, on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from reseed.cli import run
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import Plan, make_plan
from reseed.errors import ConfigError

ARMS = """
    other init: {}
    other init, other order: { dataset.order_seed: "${seed}" }
    same init:
      seed: 7
      dataset.order_seed: [0, 1]
      pair_by: dataset.order_seed
      sae.num_latents: 32
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Return a function that returns flags for a comparison ``mine`` with given arms."""
    monkeypatch.chdir(tmp_path)

    def own(arms: str = ARMS) -> list[str]:
        folder = tmp_path / "own" / "comparison"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "mine.yaml").write_text(
            "# @package _global_\n"
            "comparison:\n  _target_: reseed.compare.config.ComparisonConfig\n  name: mine\n"
            "  grid: {sae: [topk], seed: [0, 1]}\n  pair_by: seed\n  arms:"
            + (arms or " null\n")
            + "  threshold: 0.7\n  live_at_least: 10\n  confidence: 0.95\n  null_seed: 0\n"
            "  null_draws: 1\n"
        )
        return ["--config-dir", str(tmp_path / "own"), "comparison=mine"]

    return own


def planned(*arguments: str) -> Plan:
    return make_plan(CommandLine("run", arguments))


def told(plan: Plan, arm: str) -> list[tuple]:
    """Return architecture, seed, order seed and width of the runs of an arm."""
    (launch,) = [launch for launch in plan.launches if launch.arm.name == arm]
    found = []
    for job in launch.jobs:
        e = job.resolved.experiment
        found.append((e.sae.name, e.seed, e.dataset.order_seed, e.sae.num_latents))
    return found


def test_each_arm_overrides_the_grid_with_its_own_values(own, tiny_overrides: list[str]) -> None:
    plan = planned(*own(), *tiny_overrides)
    assert told(plan, "other init") == [("topk", s, 0, 64) for s in (0, 1)]
    assert told(plan, "other init, other order") == [("topk", s, s, 64) for s in (0, 1)]
    assert told(plan, "same init") == [("topk", 7, o, 32) for o in (0, 1)]
    # The run with seed 0 and order 0 belongs to the first two arms.
    assert len(plan.jobs) == 6
    assert len(plan.runs) == 5


def test_user_values_replace_axes_that_an_arm_does_not_fix(own, tiny_overrides: list[str]) -> None:
    plan = planned(*own(), *tiny_overrides, "seed=4,5,6", "dataset.order_seed=8,9", "sae=relu")
    assert told(plan, "other init") == [("relu", s, 0, 64) for s in (4, 5, 6)]
    assert told(plan, "same init") == [("relu", 7, o, 32) for o in (8, 9)]
    swept = planned(*own(), *tiny_overrides, "training.tokens=4096,8192")
    assert all(len(launch.jobs) == 4 for launch in swept.launches), "one more axis in every arm"


def test_arms_enter_the_digest_of_the_sweep_folder(own, tiny_overrides: list[str]) -> None:
    """The digest differs between arms of the same runs, and ignores arms if there are none."""
    one = planned(*own("\n    a: {}\n"), *tiny_overrides).sweep.path
    other = planned(*own("\n    b: {}\n"), *tiny_overrides).sweep.path
    plain = planned(*own(""), *tiny_overrides).sweep.path
    seeds = planned("comparison=seeds", *tiny_overrides, "sae=topk", "seed=0,1",
                    "comparison.null_draws=1", "comparison.name=mine").sweep.path  # fmt: skip
    assert len({one, other, plain}) == 3
    assert plain == seeds


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ("\n    a: {sae.kk: 3}\n", "there is no key `sae.kk`"),
        ("\n    a: {sae.k: 400}\n", "(in the arm 'a')"),
        ("\n    a: {runtime.threads: 2}\n", "`comparison.arms.a.runtime.threads` cannot differ"),
        ("\n    a: {seed: 3}\n", "`comparison.arms.a.pair_by` must be an axis of the arm's grid"),
        ("\n    a: {dataset.order_seed: '${sed}'}\n", "sed"),
        (" 3\n", "`comparison.arms` must be a mapping or null; got 3"),
    ],
)
def test_invalid_arms_are_refused_before_anything_is_written(
    own, tiny_overrides: list[str], arms: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*own(arms), *tiny_overrides]) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("error: ")
    assert "Traceback" not in said
    assert not Path("outputs").exists()
    assert not Path("sweeps").exists()


def test_a_key_that_every_arm_fixes_is_refused(own, tiny_overrides: list[str]) -> None:
    arms = "\n    a: { sae.num_latents: 32 }\n    b: { sae.num_latents: 48 }\n"
    with pytest.raises(ConfigError, match=r"`sae.num_latents` is fixed by every arm .* \(a, b\)"):
        planned(*own(arms), *tiny_overrides)  # these overrides give sae.num_latents=64


@pytest.mark.slow
def test_a_comparison_with_arms_trains_shared_runs_once(
    own, tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [*own(), *tiny_overrides, "training.tokens=1024"]
    assert run.main(line) == 0
    said = capsys.readouterr().out
    assert "5 runs in outputs/" in said
    assert len(list(Path("outputs").glob("*/run.json"))) == 5
    (sweep,) = Path("sweeps").iterdir()
    summary = pd.read_csv(sweep / "summary.csv")
    arms = ["other init", "other init, other order", "same init"]
    assert summary["arm"].tolist() == arms
    assert summary["num_latents"].tolist() == [64, 64, 32]
    untrained = summary.set_index("arm")["shared_fraction_untrained"]
    assert untrained["same init"] == 1, "the same initialisation"
    assert untrained.drop("same init").max() < 0.5
    rows = [json.loads(text) for text in (sweep / "manifest.jsonl").read_text().splitlines()]
    assert rows[0]["axes"] == {"arm": "other init", "sae": "topk", "seed": "0"}
    assert {row["axes"]["arm"] for row in rows} == set(arms)
    pairs = pd.read_csv(sweep / "pairs.csv")
    assert pairs["arm"].tolist() == arms
    assert pairs["shared_fraction_correlation"].notna().all(), "every run has its covariance"
    text = (sweep / "summary.md").read_text()
    assert "| arm | shared [95%] |" in text
    assert "- other init; other init, other order: 64 latents · same init: 32 latents\n" in text
