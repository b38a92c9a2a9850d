"""Secrets of a command stay out of every record, and reach the work all the same."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from reseed.cli import train
from reseed.cli.hydra_app import conf_dir
from reseed.report.page.provenance import command
from reseed.store.runs import RunStore
from reseed.study.train import train_missing
from reseed.system.environment import (
    environment,
    is_secret,
    mask_command,
    mask_values,
    mask_words,
    record_command,
)

HF, AWS, GITHUB = "hf_" + "aB3" * 11, "AKIA" + "ABCD1234" * 2, "ghp_" + "x1Y2" * 9
OPENAI, JWT = "sk-proj-" + "a1B2" * 8, "eyJhbGciOiJI.eyJzdWIiOiIx.SflKxwRJSMeKKF"


@pytest.mark.parametrize(
    ("word", "masked"),
    [
        ("+api_key=abc", "+api_key=***"),
        ("hub.HF_TOKEN=abc", "hub.HF_TOKEN=***"),
        ("db.password=a=b", "db.password=***"),
        ("++client_secret='a b'", "++client_secret=***"),
        ("hydra.job.env_set.PLAIN=abc", "hydra.job.env_set.PLAIN=***"),
        ("+hydra.job.env_set={PLAIN:abc}", "+hydra.job.env_set=***"),
        ("hydra={job:{env_set:{PLAIN:abc}}}", "hydra=***"),
        ("hydra.launcher.setup=[export HF_TOKEN=abc,ls]",
         "hydra.launcher.setup=[export HF_TOKEN=***,ls]"),
        ("+login={user:me,password:'a,b',tries:2}", "+login={user:me,password:***,tries:2}"),
        ("+x={api_keys:[a,b],y:1}", "+x={api_keys:***,y:1}"),
        ('+x={"token": "a\\"b", "y": 1}', '+x={"token": ***, "y": 1}'),
        (f"model.path={HF}", "model.path=***"),
        (f"+note=see {GITHUB}, {AWS}", "+note=see ***, ***"),
        (f"--option={OPENAI}", "--option=***"),
        (f"+header=Bearer {JWT}", "+header=Bearer ***"),
        (JWT, "***"),
        ("dataset.path=https://me:word@host/x", "dataset.path=https://***@host/x"),
    ],
)  # fmt: skip
def test_secrets_are_masked(word: str, masked: str) -> None:
    assert mask_words([word]) == [masked]
    assert mask_words([masked]) == [masked]
    assert mask_command(shlex.join(["reseed", word, "seed=1"])) == shlex.join(
        ["reseed", masked, "seed=1"]
    )


@pytest.mark.parametrize(
    "word",
    ["training.tokens=1e6", "dataset.chunk_tokens=4096", "model.path=/data/hf_models/pythia-160m",
     "model.path=EleutherAI/pythia-160m", "dataset.path=https://host:8080/a@b", "seed=0,1,2",
     "comparison.grid={training.tokens:[1,2],seed:[0,1]}", "sae=topk", "~recipe@_global_",
     "runtime.outputs=s3://bucket/x", "model.revision=0123456789abcdef0123456789abcdef01234567",
     "dataset.exclude_special_tokens=true", "dataset.token_field=ids",
     "comparison.arms={a:{sae.k:3}}", "-m"],
)  # fmt: skip
def test_other_words_are_not_masked(word: str) -> None:
    assert mask_words([word]) == [word]


def test_the_word_after_a_flag_is_masked() -> None:
    words = ["study.py", "--api-key", "abc", "--verbose", "--token", "--keep", "x"]
    masked = ["study.py", "--api-key", "***", "--verbose", "--token", "--keep", "x"]
    assert mask_words(words) == masked


def keys(values: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted key of every setting."""
    if isinstance(values, Mapping):
        for name, inner in values.items():
            yield f"{key}.{name}".lstrip(".")
            yield from keys(inner, f"{key}.{name}".lstrip("."))


def test_no_setting_of_our_own_counts_as_secret() -> None:
    found: set[str] = set()
    for path in Path(conf_dir()).rglob("*.yaml"):
        group = "" if path.parent == Path(conf_dir()) else path.parent.name
        found |= set(keys(yaml.safe_load(path.read_text()), group))
    assert {"training.tokens", "dataset.chunk_tokens", "sae.k"} <= found
    assert [key for key in sorted(found) if is_secret(key)] == []


def test_nested_values_are_masked_and_the_rest_is_equal() -> None:
    values = {"a": [1, {"api_key": "x", "n": None}], "job": {"env_set": {"A": 1}}, "t": [f"b={HF}"]}
    assert mask_values(values) == {
        "a": [1, {"api_key": "***", "n": None}], "job": {"env_set": {"A": "***"}}, "t": ["b=***"],
    }  # fmt: skip


def test_the_recorded_command_has_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/bin/study.py", "--password", "word", "x=1"])
    assert environment()["command"] == "study.py --password '***' x=1"
    with record_command(f"reseed train hydra.job.env_set.A={HF}"):
        assert environment()["command"] == "reseed train 'hydra.job.env_set.A=***'"
    old = {"environment": {"command": "reseed run sae=topk +my_key=abc"}}
    assert "abc" not in command(old)


@pytest.mark.parametrize("launcher", ["fused", "basic"])
def test_a_secret_reaches_the_work_and_no_file(
    launcher: str, tiny_overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    seen: list[str | None] = []

    def noting(*arguments: Any) -> Any:
        seen.append(os.environ.get("OWN_TOKEN"))
        return train_missing(*arguments)

    for module in ("study.study", "cli.hydra_jobs"):
        monkeypatch.setattr(f"reseed.{module}.train_missing", noting)
    line = ["-m", *tiny_overrides, "training.tokens=2048", "runtime.threads=1", "seed=0,1",
            "+hydra.job.env_set.OWN_TOKEN=pa55word", f"hydra/launcher={launcher}"]  # fmt: skip
    assert train.main(line) == 0
    assert set(seen) == {"pa55word"}
    assert [run.status for run in RunStore("outputs").runs()] == ["finished"] * 2
    records = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in records}
    assert {"run.json", "manifest.jsonl"} <= names
    assert ("multirun.yaml" in names) == (launcher == "basic")
    assert [path for path in records if b"pa55word" in path.read_bytes()] == []
    (manifest,) = tmp_path.rglob("manifest.jsonl")
    rows = [json.loads(row) for row in manifest.read_text().splitlines()]
    for seed, row in enumerate(rows):
        assert {f"seed={seed}", "+hydra.job.env_set.OWN_TOKEN=***"} <= set(row["overrides"])


def test_the_record_of_hydra_s_jobs_is_refused(
    tiny_overrides: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["-m", *tiny_overrides, "seed=0,1", "hydra/launcher=basic", "hydra.output_subdir=own"]
    assert train.main(line) == 1
    assert "`hydra.output_subdir` must be null, as run.json holds" in capsys.readouterr().err
