"""One module and one yaml add a kind of text, also from another package."""

from __future__ import annotations

import hashlib
import json

import pytest

MODULE = '''
import random
from collections.abc import Iterator
from dataclasses import dataclass

from reseed.activations.text import ResolvedText, TextConfig
from reseed.config import setting
from reseed.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SentencesConfig(TextConfig, name="sentences"):
    """Random sentences of a few words."""

    number: int = setting(at_least=1)
    words: str = "cat dog mat home"

    def documents(self, text: ResolvedText, shuffled: bool) -> Iterator[str]:
        if len(self.words.split()) < 2:
            raise ConfigError(f"{{key}} must be at least two words; got {self.words}", "words")
        chosen = random.Random(0)
        for _ in range(self.number):
            yield " ".join(chosen.choices(self.words.split(), k=20))
'''

YAML = """
defaults: [docstrings, _self_]
_target_: my_text.SentencesConfig
number: ???
words: cat dog mat home
"""


@pytest.mark.slow
def test_one_module_and_one_yaml_add_a_data_set(tiny_overrides, made_up_package) -> None:
    made_up_package.write(
        {"my_text.py": MODULE, "my_conf/dataset/sentences.yaml": YAML},
        {"reseed.datasets": "sentences = my_text", "reseed.conf": "sentences = my_conf"},
    )
    line = [o for o in tiny_overrides if not o.startswith(("dataset=", "dataset.path="))]
    line = ["train", *line, "dataset=sentences", "training.tokens=2048"]
    made_up_package.reseed(*line, "dataset.number=2000")
    (path,) = made_up_package.folder.glob("outputs/*/run.json")
    record = json.loads(path.read_text())
    found = record["identity"]["dataset"]
    assert (found["type"], found["number"]) == ("sentences", 2000)
    assert record["labels"]["dataset"] == "sentences"

    scope: dict = {}
    exec(MODULE, scope)
    documents = scope["SentencesConfig"](number=2000).documents(None, shuffled=False)
    digests = [hashlib.sha256(document.encode()).digest() for document in documents]
    whole = hashlib.sha256(b"".join(digests)).hexdigest()
    assert record["fingerprints"]["text"] == whole[:32]

    again = made_up_package.reseed(*line, "dataset.number=2000")
    assert "nothing to train: 1 run already finished" in again
    # The record names the data set by its stable name.
    evaluation = ("evaluation=reconstruction", "evaluation.tokens=500")
    made_up_package.reseed("evaluate", str(path.parent), *evaluation)
    assert list(path.parent.glob("evaluations/reconstruction-*/result.json"))

    for values, message in {
        ("dataset.number=0",): "`dataset.number` must be an integer, at least 1; got 0",
        ("dataset.number=9", "dataset.words=cat"): "`dataset.words` must be at least two words",
    }.items():
        assert message in made_up_package.reseed(*line, *values, succeeds=False)
