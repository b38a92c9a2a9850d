"""Evaluations on words, end to end: a hundred words and the embedded model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from evaluation_helpers import assert_declared

from reseed.activations.hookpoints import Hookpoint
from reseed.activations.language_model import LanguageModel
from reseed.cli.hydra_app import CommandLine
from reseed.cli.plan import check_jobs
from reseed.errors import ConfigError
from reseed.evaluate.absorption import causal, evaluation
from reseed.evaluate.absorption.evaluation import AbsorptionConfig
from reseed.evaluate.absorption.records import word_records
from reseed.evaluate.absorption.result import _lack
from reseed.evaluate.base import EvaluationInput, LoadedRun, ModelCache, Result
from reseed.evaluate.sparse_latents import SparseLatents, encode
from reseed.evaluate.splitting import SplittingConfig, _result, find_fold_splits
from reseed.evaluate.word_classes import probe_quality
from reseed.evaluate.word_task import ProbedTask, WordTaskConfig, word_activations
from reseed.evaluate.words import make_prompts
from reseed.sae.batch_topk import BatchTopKConfig
from reseed.sae.relu import ReLUConfig
from reseed.sae.topk import TopKConfig

HOOK = Hookpoint("resid_post", 1)


@pytest.fixture(scope="module")
def resolved(tiny_text: Path) -> Any:
    line = CommandLine("train", [
        "model=embedded", "dataset=text_files", f"dataset.path={tiny_text}", "layer=1",
        "dataset.context_length=32", "dataset.chunk_tokens=2048", "dataset.held_out_tokens=1024",
        "training.tokens=8192", "training.batch_size=64",
    ])  # fmt: skip
    jobs, _ = check_jobs(line, line.overrides, multirun=False)
    return jobs[0].resolved


@pytest.fixture(scope="module")
def inputs(resolved: Any, tmp_path_factory: pytest.TempPathFactory) -> EvaluationInput:
    source = resolved.open("cpu", needed=1_000)
    return EvaluationInput(source, ModelCache(tmp_path_factory.mktemp("shared")))


@pytest.fixture(scope="module")
def table(inputs: EvaluationInput, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Words labelled by their appearance, which a probe predicts easily, and a class of three
    words."""
    texts = WordTaskConfig.words(AbsorptionConfig(), inputs.tokenizer).texts
    spaced = [t for t in texts if t.startswith(" ") and t.islower() and len(t) > 4]
    capital = [t for t in texts if t[0].isupper() and len(t) > 2]
    chosen = [*((t, "word") for t in spaced[:60]), *((t, "name") for t in capital[:50])]
    chosen += [(t, "rare") for t in spaced[100:103]]
    path = tmp_path_factory.mktemp("table") / "kinds.csv"
    pd.DataFrame(chosen, columns=["token", "label"]).to_csv(path, index=False)
    return str(path)


@pytest.fixture(scope="module")
def settings(table: str) -> dict[str, Any]:
    return {
        "task": "labelled", "task_file": table, "icl_words": 3, "folds": 2, "prompt_seeds": (0, 1)
    }  # fmt: skip


def sae(seed: int, k: int = 8):
    return TopKConfig(num_latents=200, k=k).build(128, torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def result(inputs: EvaluationInput, settings: dict[str, Any]) -> Result:
    config = AbsorptionConfig(**settings, causal=True)
    run = LoadedRun("one", sae(0), HOOK, untrained=sae(1))
    [(name, found)] = config.evaluate([run], inputs)
    assert name == "one"
    return found


def test_a_class_that_cannot_be_evaluated_has_a_reason(result: Result) -> None:
    letters = result.tables["letters"].set_index("class")
    assert list(letters.index) == ["name", "rare", "word"]
    counts = {name: result.metrics[f"absorption_{name}"] for name in
              ("letters", "weak_probes", "few_words")}  # fmt: skip
    assert counts == {"letters": 2, "weak_probes": 0, "few_words": 1}
    assert letters.loc["rare", "reason"] == "3 test words, fewer than 20"
    assert np.isnan(letters.loc["rare", "fraction"])
    kept = letters[letters["reason"] == ""]
    assert list(kept.index) == ["name", "word"]
    assert kept["fraction"].mean() == pytest.approx(result.metrics["absorption_fraction"])
    assert kept["causal"].between(0, 1).all()
    for what in ("fraction", "full", "causal", "fraction_excess", "fraction_untrained_excess"):
        low, mean, high = (kept[f"{what}{end}"] for end in ("_low", "", "_high"))
        there = low.notna()
        assert ((low <= mean) & (mean <= high))[there].all()
    assert kept["test_words"].to_dict() == {"name": 50, "word": 60}
    assert (kept["right_words"] <= kept["test_words"]).all()
    assert result.metrics["absorption_test_words"] == kept["right_words"].sum()


def test_first_letters_are_always_26_classes(inputs: EvaluationInput) -> None:
    words = AbsorptionConfig().words(inputs.tokenizer)
    assert len(words.classes) == 26


def test_metrics_are_numbers_or_none(result: Result) -> None:
    wanted = {
        f"absorption_{name}"
        for what in ("fraction", "full")
        for name in (what, f"{what}_derived", f"{what}_untrained", f"{what}_untrained_excess")
    }
    wanted |= {
        f"absorption_fraction_{name}{end}"
        for name in ("null", "excess", "derived_null", "derived_excess", "untrained_excess")
        for end in ("", "_words_low", "_prompts_high")
    }
    wanted |= {f"absorption_{n}" for n in ("letters", "causal", "cosine_derived")}
    assert wanted <= set(result.metrics)
    for name, value in result.metrics.items():
        if name.endswith(("prompts_low", "prompts_high")):
            assert value is None  # two prompt seeds are too few for an interval
        elif value is None:
            # Words that are all equal have no interval.
            mean = name.removesuffix("_low").removesuffix("_high").removesuffix("_words")
            assert "_words_" in name
            assert result.metrics[mean] in (0, 1), name
        else:
            assert isinstance(value, int | float), name
            assert np.isfinite(value), name
    assert_declared(AbsorptionConfig(), result)
    assert not [name for name in result.metrics if "full" in name and "null" in name]


def test_the_excess_is_that_of_the_letters_and_words(result: Result) -> None:
    """The untrained SAE is measured on the same words of both letters."""
    kept = result.tables["letters"].query("reason == ''")
    m = result.metrics
    for what in ("fraction_untrained", "full_untrained", "fraction_null"):
        value = what.partition("_")[0]
        excess = what.replace("_null", "") + "_excess"
        paired = (kept[value] - kept[what]).to_numpy()
        assert kept[excess].to_numpy() == pytest.approx(paired)
        assert m[f"absorption_{excess}"] == pytest.approx(paired.mean())
    assert m["absorption_excess_letters"] == m["absorption_untrained_excess_letters"] == 2


def test_tables_and_latent_columns_agree_on_absorbed_words(result: Result) -> None:
    words, absorbers = result.tables["words"], result.tables["absorbers"]
    kept = result.tables["letters"].query("reason == ''")["class"]
    absorbed = words[(words["fraction"] > 0) & words["class"].isin(kept)]
    assert len(absorbed) > 0
    named = {
        (row["class"], latent, row.token)
        for _, row in absorbed.iterrows()
        for latent in row.absorbers
        if latent >= 0
    }
    counts = absorbers.set_index(["class", "latent"])["words"]
    assert len(named) == counts.sum()
    assert {key[:2] for key in named} == set(counts.index)
    columns = result.latents
    assert {name: c.shape for name, c in columns.items()} == dict.fromkeys(
        ["absorption_class", "absorption_is_absorber", "absorption_words"], (200,)
    )
    assert columns["absorption_words"].sum() == counts.sum()
    assert (columns["absorption_is_absorber"] == (columns["absorption_words"] > 0)).all()
    assert (absorbers["share"] > 0).all()
    assert (absorbers["cosine"] > 0).mean() > 0.9  # averaged over probes; one exceeds the bound
    mains = result.tables["letters"].query("reason == ''")["main"]
    listed = {j for each in mains for main in each for j in main}
    assert set(np.flatnonzero(columns["absorption_class"] >= 0)) == listed
    assert (words["frequency"] >= 0).all()


def test_metrics_are_none_if_no_class_can_be_evaluated(
    inputs: EvaluationInput, settings: dict[str, Any]
) -> None:
    config = AbsorptionConfig(**settings, probe_f1=0.9999999, min_test_words=2)
    [(_, found)] = config.evaluate([LoadedRun("one", sae(0), HOOK)], inputs)
    reasons = found.tables["letters"]["reason"]
    if (reasons != "").all():  # holds unless the probes are perfect
        assert reasons.str.fullmatch(r"F1 of the probe \d\.\d\d, not above 1").all()
        assert found.metrics["absorption_weak_probes"] == 3
        assert found.metrics["absorption_letters"] == 0
        assert found.metrics["absorption_fraction"] is None
        assert len(found.tables["absorbers"]) == 0


@pytest.mark.parametrize("kind", [AbsorptionConfig, SplittingConfig])
def test_letters_with_too_few_words_are_listed_with_the_reason(
    inputs: EvaluationInput, settings: dict[str, Any], kind: type[WordTaskConfig]
) -> None:
    config = kind(**settings, min_test_words=61)
    run = LoadedRun("one", sae(0), HOOK, untrained=sae(1))
    [(_, found)] = config.evaluate([run], inputs)
    reasons = found.tables["letters"].set_index("class")["reason"]
    assert reasons["word"] == "60 test words, fewer than 61"
    assert reasons["name"] == "50 test words, fewer than 61"
    counts = [found.metrics[f"{kind.name}_{name}"] for name in
              ("letters", "weak_probes", "few_words")]  # fmt: skip
    assert counts == [0, 0, 3]
    numbers = {name: float(value) for name, value in found.metrics.items() if value is not None}
    assert config.remark(numbers) == (
        "no letter can be evaluated: the F1 of the probe is not above `probe_f1` for 0, and fewer "
        "than `min_test_words` words are measured for 3; the table `letters` has each "
        "letter's reason"
    )
    assert config.remark({f"{kind.name}_letters": 1.0}) == ""


def test_the_model_runs_once_for_each_prompt_seed(
    inputs: EvaluationInput, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(SplittingConfig(**settings).repetitions(inputs, HOOK))

    def never(*arguments: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(LanguageModel, "activations", never)
    again = list(AbsorptionConfig(**settings).repetitions(inputs, HOOK))
    assert [p.prompt_seed for p in again] == [0, 1]
    assert not again[0].x.equal(again[1].x)
    other = SplittingConfig(**(settings | {"prompt_seeds": (7,)}))
    with pytest.raises(AssertionError, match="read again"):
        list(other.repetitions(inputs, HOOK))
    with pytest.raises(AssertionError, match="read again"):
        list(AbsorptionConfig(**settings).repetitions(inputs, Hookpoint("resid_post", 0)))


def test_one_pass_of_the_model_reads_all_hookpoints(
    inputs: EvaluationInput, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SplittingConfig(**settings | {"prompt_seeds": (3,)})
    passes, activations = [], LanguageModel.activations

    def counted(model: LanguageModel, tokens: Any, hooks: Any) -> Any:
        passes.append(list(hooks))
        return activations(model, tokens, hooks)

    monkeypatch.setattr(LanguageModel, "activations", counted)
    hooks = [Hookpoint("resid_post", 0), HOOK]
    [[first], [second]] = [list(config.repetitions(inputs, h, hooks)) for h in hooks]
    assert passes == [hooks]
    monkeypatch.undo()
    there = replace(inputs, model_cache=ModelCache(inputs.model_cache.cache / "alone"))
    assert not first.x.equal(second.x)
    [again] = config.repetitions(there, HOOK)
    assert again.x.equal(second.x)


def repetition(inputs: EvaluationInput, settings: dict[str, Any]) -> ProbedTask:
    return next(iter(SplittingConfig(**settings).repetitions(inputs, HOOK)))


def test_activations_are_taken_at_the_words_token_and_the_hookpoint(
    inputs: EvaluationInput, settings: dict[str, Any]
) -> None:
    """Compare with transformers' hidden states of the whole prompt; later tokens change nothing."""
    model, probed = inputs.model, repetition(inputs, settings)
    assert model is not None
    chosen = np.array([0, 5, 60, 112])
    prompts = make_prompts(
        probed.words, probed.template, chosen, probed.part, 3, np.random.default_rng(2), ask=True
    )
    with torch.no_grad():
        states = model.model(prompts.tokens, output_hidden_states=True).hidden_states
    found = word_activations(model, [HOOK], prompts)[HOOK]
    for i, place in enumerate(prompts.word_position):
        assert prompts.tokens[i, place] == probed.words.tokens[chosen[i]]
        assert torch.allclose(found[i], states[HOOK.layer + 1][i, place], atol=1e-4)
        assert not torch.allclose(found[i], states[HOOK.layer][i, place], atol=1e-2)


def test_every_word_is_tested_by_probes_not_trained_on_it(
    inputs: EvaluationInput, settings: dict[str, Any]
) -> None:
    probed = repetition(inputs, settings)
    assert not probed.test_scores.isnan().any()
    weight, bias = probed.probes["weight"][1], probed.probes["bias"][1]
    test = probed.folds[1].test
    assert torch.allclose(probed.test_scores[test], probed.x[test] @ weight.T + bias)
    for fold, permuted in zip(probed.folds, probed.probes["permuted"], strict=True):
        for part in (fold.train, fold.test):
            assert permuted[part].sort().values.equal(probed.words.labels[part].sort().values)
    assert not probed.probes["permuted"][0].equal(probed.words.labels)


def test_a_second_evaluation_gives_equal_metrics(
    inputs: EvaluationInput, settings: dict[str, Any], result: Result
) -> None:
    config = AbsorptionConfig(**settings)
    [(_, again)] = config.evaluate([LoadedRun("one", sae(0), HOOK, untrained=sae(1))], inputs)
    causal = {name for name in result.metrics if name.startswith("absorption_causal")}
    assert_declared(config, again, *causal)
    for name, value in again.metrics.items():
        assert value == result.metrics[name], name


def test_an_untrained_sae_is_as_sparse_as_its_k(
    inputs: EvaluationInput, settings: dict[str, Any]
) -> None:
    """Its threshold is set on the words: k·n latents are active on n words."""
    config = AbsorptionConfig(**settings | {"prompt_seeds": (0,)})
    born = BatchTopKConfig(num_latents=200, k=5.5).build(128, torch.Generator().manual_seed(3))
    [(_, found)] = config.evaluate([LoadedRun("one", sae(0), HOOK, untrained=born)], inputs)
    words = len(config.words(inputs.tokenizer))
    assert found.metrics["absorption_l0"] == 8
    assert found.metrics["absorption_l0_untrained"] == pytest.approx(5.5, abs=2 / words)


def test_a_latent_equal_to_the_probe_has_its_f1_and_no_splits(
    inputs: EvaluationInput, settings: dict[str, Any]
) -> None:
    probed = repetition(inputs, settings)
    made = sae(0, k=40)
    word = probed.words.classes.index("word")
    with torch.no_grad():
        # Ten times the probe: the latent is among the k largest wherever it is positive.
        weight, bias = (10 * probed.probes[n].mean(0)[word] for n in ("weight", "bias"))
        made.W_enc[0], made.b_enc[0] = weight, bias + weight @ made.b_dec
    [(_, found)] = SplittingConfig(**settings).evaluate([LoadedRun("one", made, HOOK)], inputs)
    row = found.tables["letters"].set_index("class").loc["word"]
    assert row["f1_low"] < row["f1"] < row["f1_high"]
    assert row["f1"] > row["probe_f1"] - 0.1
    assert row["splits"] < 1
    assert row["main"][0][0] == 0
    assert_declared(SplittingConfig(), found)
    assert found.latents["splitting_class"][0] == word
    curve = found.tables["f1_by_k"].query("`class` == 'word'")
    assert curve["k"].tolist() == list(range(1, 11))
    assert found.metrics["splitting_letters"] == 2
    kept = found.tables["letters"].query("reason == ''")
    for name in ("f1", "precision", "recall", "probe_f1"):
        assert found.metrics[f"splitting_{name}"] == pytest.approx(kept[name].mean()), name


def test_a_main_latent_that_never_fires_has_a_precision_of_0_in_the_mean(
    inputs: EvaluationInput, settings: dict[str, Any]
) -> None:
    """The only latent that fires says `word`, and no latent of the other class does."""
    probed = repetition(inputs, settings)
    made = ReLUConfig(num_latents=20).build(128, torch.Generator().manual_seed(0))
    word = probed.words.classes.index("word")
    with torch.no_grad():
        made.b_enc.fill_(-1e6)
        weight, bias = (probed.probes[n].mean(0)[word] for n in ("weight", "bias"))
        made.W_enc[0], made.b_enc[0] = weight, bias + weight @ made.b_dec
    config = SplittingConfig(**settings)
    quality = probe_quality([probed], config.probe_f1)
    codes, kept = encode(made, probed.x), [[0, 2]] * 2
    splits = []
    for fold, classes in enumerate(kept):
        found = find_fold_splits(config, probed, codes, fold, classes, probed.members)[0]
        assert found[0]
        found[0] = replace(found[0], main=torch.tensor([7]))
        splits.append(found)
    result = _result([(probed, codes, splits)], quality, ["", "few", ""], 0.95)
    precision = result.tables["letters"].set_index("class")["precision"]
    assert precision["name"] == 0
    assert precision["word"] > 0.5
    assert result.metrics["splitting_precision"] == pytest.approx(precision["word"] / 2)


def test_the_causal_sample_is_over_all_folds_and_scaled_up(
    inputs: EvaluationInput, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """If every measured word is absorbed, the words that they represent are the silent ones."""
    measured: list[torch.Tensor] = []

    def gradient(*given: Any) -> torch.Tensor:
        measured.append(given[4])
        return torch.zeros(len(given[4]), 128)

    def absorbed(codes: SparseLatents, *_: Any) -> torch.Tensor:
        return torch.ones(len(codes), dtype=torch.bool)

    monkeypatch.setattr(causal, "integrated_gradient", gradient)
    monkeypatch.setattr(causal, "is_absorbed", absorbed)
    sums = {}
    for sample in (3, 1_000):
        measured.clear()
        config = AbsorptionConfig(**settings, causal=True, causal_sample=sample)
        [(_, found)] = config.evaluate([LoadedRun("one", sae(0, k=2), HOOK)], inputs)
        words = found.tables["words"]
        assert len(measured) == 2, "once for each prompt seed, not for each fold"
        assert all(labels.bincount().max() <= sample for labels in measured)
        sums[sample] = words.groupby(["class", "prompt_seed"])["causal"].sum()
        several = words[words["causal"] > 0].groupby(["class", "prompt_seed"])["fold"].nunique()
        if sample > 3:
            assert several.max() == 2
            assert sums[sample].max() > 3 * 2
    assert sums[3].to_dict() == pytest.approx(sums[1_000].to_dict())


@pytest.mark.parametrize(("least", "draws", "rows"), [(20, 4, 4), (2, 1, 60), (2, 4, 60)])
def test_a_letter_without_enough_permuted_words_or_draws_is_not_in_the_excess(
    inputs: EvaluationInput, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch,
    least: int, draws: int, rows: int,
) -> None:  # fmt: skip
    """The class `name` has only a few records with permuted letters, in a few draws."""

    def cut(*given: Any, permuted: bool = False) -> pd.DataFrame:
        table = word_records(*given, permuted=permuted)
        if not permuted:
            return table
        name, draw = table["class"] == 0, 2 * given[1].prompt_seed + given[2]
        return table[~name | (name.cumsum() <= rows) & (draw < draws)]

    monkeypatch.setattr(evaluation, "word_records", cut)
    config = AbsorptionConfig(**settings, min_test_words=least)
    [(_, found)] = config.evaluate([LoadedRun("one", sae(0), HOOK)], inputs)
    letters = found.tables["letters"].set_index("class")
    assert letters.loc[["name", "word"], "reason"].tolist() == ["", ""]
    assert 2 <= letters.loc["name", "fraction_null_words"] <= 4 * rows
    excess, null = letters["fraction_excess"].dropna(), letters["fraction_null"].dropna()
    assert ("name" in excess.index) == ((least, draws) == (2, 4))
    assert "word" in excess.index
    assert list(null.index) == list(excess.index)
    assert found.metrics["absorption_excess_letters"] == len(excess)
    assert found.metrics["absorption_fraction_excess"] == pytest.approx(excess.mean())
    assert found.metrics["absorption_fraction_null"] == pytest.approx(null.mean())


@pytest.mark.parametrize(
    ("words", "split", "reason"),
    [
        (0, False, "too few words to choose latents"),
        (0, True, "0 test words that the probe gets right, fewer than 20"),
        (19, True, "19 test words that the probe gets right, fewer than 20"),
        (20, True, ""),
    ],
)
def test_a_refused_letter_has_the_reason_that_is_true(words: int, split: bool, reason: str) -> None:
    assert _lack(words, split, AbsorptionConfig()) == reason


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "labelled"}, "`task_file` is required with task=labelled"),
        ({"task_file": "x.csv"}, "`task_file` is only for task=labelled"),
        ({"prompt_seeds": ()}, "`prompt_seeds` must be one or more distinct seeds"),
        ({"prompt_seeds": (1, 1)}, "`prompt_seeds` must be one or more distinct seeds"),
        ({"prompt_seeds": (-1,)}, "`prompt_seeds` must be at least 0; got -1"),
        ({"line": "first letter of {word}: {answer}"}, "`line` must begin with {word} and contain"),
        ({"share": 0}, "`share` must be a number, above 0"),
        ({"min_test_words": 1}, "`min_test_words` must be an integer, at least 2"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AbsorptionConfig(**changes)
    assert message in str(caught.value)


def test_worlds_and_indistinct_answers_are_refused_before_anything_is_computed(
    resolved: Any, tmp_path: Path
) -> None:
    line = CommandLine("train", ["model=world_easy"])
    jobs, _ = check_jobs(line, line.overrides, multirun=False)
    with pytest.raises(ConfigError, match="evaluation=absorption needs a language model"):
        AbsorptionConfig().check(jobs[0].resolved.source)
    AbsorptionConfig(causal=True).check(resolved.source)
    path = tmp_path / "alike.csv"
    path.write_text("token,label\n the,return\n a,return it\n")
    alike = AbsorptionConfig(task="labelled", task_file=str(path))
    alike.check(resolved.source)
    with pytest.raises(ConfigError, match="`causal` needs answers that differ"):
        replace(alike, causal=True).check(resolved.source)
