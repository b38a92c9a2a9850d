"""Fixture: the tiny model on the tiny text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from reseed.activations.model_source import PathModelConfig
from reseed.activations.text import TextFilesConfig
from reseed.activations.text_source import TextSource, resolve_model_text


@pytest.fixture(scope="module")
def source(
    tiny_model: Path, tiny_text: Path, tmp_path_factory: pytest.TempPathFactory
) -> TextSource:
    cache = tmp_path_factory.mktemp("cache")
    config = PathModelConfig(path=str(tiny_model), batch_sequences=4)
    text = TextFilesConfig(
        path=(str(tiny_text),), context_length=32, chunk_tokens=2048, held_out_tokens=1024,
    )  # fmt: skip
    found = resolve_model_text(config.resolve(cache), text, cache)
    return TextSource(found, torch.device("cpu"), 4096)
