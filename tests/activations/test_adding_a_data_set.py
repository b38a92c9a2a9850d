"""The example of docs/extend/dataset.md: a package adds a kind of text by a module and a yaml."""

from __future__ import annotations

import hashlib
import json
import runpy

import pytest


@pytest.mark.slow
def test_one_module_and_one_yaml_add_a_data_set(tiny_overrides, made_up_package) -> None:
    made_up_package.write_page("dataset.md")
    line = [o for o in tiny_overrides if not o.startswith(("dataset=", "dataset.path="))]
    line = ["train", *line, "dataset=sentences", "training.tokens=2048"]
    made_up_package.reseed(*line, "dataset.number=2000")
    (path,) = made_up_package.folder.glob("outputs/*/run.json")
    record = json.loads(path.read_text())
    found = record["identity"]["dataset"]
    assert (found["type"], found["number"]) == ("sentences", 2000)
    assert record["labels"]["dataset"] == "sentences"

    module = runpy.run_path(str(made_up_package.folder / "my_text.py"))
    documents = module["SentencesConfig"](number=2000).documents(None, shuffled=False)
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
