"""Declarations of evaluations: what they refuse, and results that differ from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from reseed.cli.hydra_app import conf_dir
from reseed.evaluate import load_all
from reseed.evaluate.base import EvaluationConfig, EvaluationInput, LoadedRun, Metric, Result
from reseed.store.results import L0, EvaluationDeclaration, EvaluationError, declaration

NAMES = sorted(path.stem for path in Path(conf_dir(), "evaluation").glob("*.yaml"))


@dataclass(frozen=True)
class Declared(EvaluationConfig):
    metrics = (Metric("score"), Metric("now_and_then", optional=True))
    latents = (Metric("score"),)

    def evaluate(
        self, runs: Sequence[LoadedRun], inputs: EvaluationInput
    ) -> Iterator[tuple[str, Result]]:
        raise NotImplementedError


def test_a_result_has_the_declared_metrics_and_latents() -> None:
    one = {"score": np.zeros(3)}
    Declared().check_result(Result({"score": None}, latents=one))
    Declared().check_result(Result({"score": 1, "now_and_then": 2}, latents=one))
    with pytest.raises(
        EvaluationError, match=r"`size`, which `Declared\.metrics` does not declare"
    ):
        Declared().check_result(Result({"score": 1, "size": 2}, latents=one))
    with pytest.raises(EvaluationError, match=r"not return `score`, which `Declared\.metrics` "):
        Declared().check_result(Result({"now_and_then": 1}, latents=one))
    with pytest.raises(EvaluationError, match=r"not return `score`, which `Declared\.latents` "):
        Declared().check_result(Result({"score": 1}))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"metrics": (Metric("a"), Metric("a"))}, r"several metrics have the name \['mine_a'\]"),
        # Both would be the column `mine_a`.
        ({"metrics": (Metric("a"), Metric("mine_a"))}, r"have the name \['mine_a'\]"),
        ({"latents": (Metric("a"), Metric("a"))}, r"have the name of latents \['mine_a'\]"),
        (
            {"metrics": (Metric("l0", "L0"),), "run_metrics": (L0,)},
            r"several metrics have the heading \['L0'\]",
        ),
        ({"metrics": (Metric("a"),), "spare": ("a",)}, r"spare: the table has no metrics \['a'\]"),
    ],
)
def test_a_contradictory_declaration_is_refused_at_its_definition(attributes, message) -> None:
    with pytest.raises(TypeError, match=message):
        type("Mine", (EvaluationDeclaration,), attributes | {"name": "mine"})


@pytest.mark.parametrize("name", NAMES)
def test_footnotes_explain_every_heading(name: str) -> None:
    load_all()
    declared = declaration(name, ())
    assert declared.title.endswith("?")
    assert declared.shown()
    notes = " ".join(declared.notes())
    for metric in declared.shown().values():
        words = metric.heading.replace("\n", " ").partition(",")[0].split()
        assert any(word in notes for word in (" ".join(words), words[0], words[-1])), metric


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_has_a_definition_without_full_stop_and_advice_in_sentences(name: str) -> None:
    load_all()
    declared = declaration(name, ())
    for metric in (*declared.metrics, *declared.latents):
        assert metric.help, metric
        assert not metric.help.endswith("."), metric
        assert not metric.advice or metric.advice.endswith("."), metric


def test_an_evaluation_that_is_not_installed_shows_all_its_columns() -> None:
    found = declaration("gone", ["gone_score", "gone_mean_size"])
    assert {c: metric.heading for c, metric in found.shown().items()} == {
        "gone_score": "score", "gone_mean_size": "mean size",
    }  # fmt: skip
    assert (found.title, found.notes()) == ("gone", ())
