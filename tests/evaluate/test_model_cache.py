"""Shared results about a model: found by their key, computed once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from reseed.evaluate.base import ModelCache


def test_results_are_computed_once_and_found_by_their_key(tmp_path: Path) -> None:
    made = []

    def compute() -> dict[str, Tensor]:
        made.append(1)
        return {"x": torch.arange(6).view(2, 3).T, "y": torch.tensor(1.5)}

    shared = ModelCache(tmp_path)
    first = shared.get("probes", {"layer": 1, "model": "abc"}, compute)
    again = ModelCache(tmp_path).get("probes", {"model": "abc", "layer": 1}, compute)
    assert len(made) == 1
    assert torch.equal(first["x"], again["x"])
    assert again["y"] == 1.5
    shared.get("probes", {"layer": 2, "model": "abc"}, compute)
    shared.get("words", {"layer": 1, "model": "abc"}, compute)
    assert len(made) == 3
    assert len(list((tmp_path / "evaluations").glob("*.safetensors"))) == 3


def test_an_unreadable_file_is_computed_again(tmp_path: Path) -> None:
    shared = ModelCache(tmp_path)
    shared.get("x", {}, lambda: {"a": torch.zeros(2)})
    (file,) = (tmp_path / "evaluations").glob("*.safetensors")
    file.write_bytes(b"cut off")
    assert shared.get("x", {}, lambda: {"a": torch.ones(2)})["a"].tolist() == [1, 1]


def test_only_one_of_two_concurrent_callers_computes(tmp_path: Path) -> None:
    made = []

    def slowly() -> dict[str, Tensor]:
        made.append(1)
        time.sleep(0.1)
        return {"a": torch.zeros(1)}

    both = [threading.Thread(target=ModelCache(tmp_path).get, args=("x", {}, slowly))
            for _ in range(2)]  # fmt: skip
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(made) == 1
