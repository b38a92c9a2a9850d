"""Odd files of saved SAEs in every format: weights, configuration, and both."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from judge import Case
from safetensors.torch import load_file, save_file

from reseed.sae.checkpoint import save_sae
from reseed.sae.topk import TopKConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "sae" / "formats"))
import foreign
from foreign import D, F, K, draws

_POINT = "blocks.9.hook_resid_post"


@dataclass(frozen=True)
class Layout:
    """A format: a valid example, and the names of its files of weights and configuration."""

    make: Callable[[Path], Any]
    weights: str
    config: str | None


def _topk(folder: Path, kind: str, **more: Any) -> Path:
    tensors = foreign.linear(draws(), encoder__bias="b_enc", b_dec="b_dec")
    return foreign.dictionary(folder, tensors | more, kind, k=K)


def _reseed(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    save_sae(TopKConfig(num_latents=F, k=K).build(D, generator), folder)


LAYOUTS = {
    "reseed": Layout(_reseed, "sae.safetensors", "sae.json"),
    "sparsify": Layout(lambda f: foreign.sparsify(f, draws()), "sae.safetensors", "cfg.json"),
    "saelens": Layout(
        lambda f: foreign.saelens(f, draws(), "jumprelu"), "sae_weights.safetensors", "cfg.json"
    ),
    "dictionary_learning": Layout(
        lambda f: _topk(f, "BatchTopKSAE", threshold=torch.tensor(0.1)), "ae.pt", "config.json"
    ),
    "gemma_scope": Layout(lambda f: foreign.gemma_scope(f, draws()), "params.npz", None),
    "gemma_scope_2": Layout(
        lambda f: foreign.gemma_scope_2(f, draws()), "params.safetensors", "config.json"
    ),
    "llama_scope": Layout(
        lambda f: foreign.llama_scope(f, draws(), {_POINT: 3.0}),
        "sae_weights.safetensors",
        "config.json",
    ),
}
_Change = Callable[[dict[str, Any]], Any]


def foreign_cases(world: Sequence[str]) -> Iterator[Case]:
    """Yield odd SAEs of every format, read by ``convert``, ``sae=pretrained`` and ``sources=``."""
    world = [o for o in world if not o.startswith("sae.")]
    commands = (
        ("convert", "sae", "out", "--to", "reseed"),
        ("train", *world, "sae=pretrained", "sae.source=sae"),
        ("compare", "sources=[sae,other]"),
    )
    turn = 0
    for layout in LAYOUTS.values():
        for make in (*_odd_weights(layout), *_odd_bytes(layout.weights)):
            turn += 1
            yield Case("foreign SAEs", commands[turn % 3], _made(layout, make))
        if layout.config is not None:
            for make in _odd_bytes(layout.config, text=True):
                turn += 1
                optional = layout is LAYOUTS["gemma_scope_2"]  # the file may be missing
                words = commands[0] if optional else commands[turn % 3]
                yield Case("foreign SAEs", words, _made(layout, make), may_pass=optional)
            for make in _odd_settings(layout):
                yield Case("SAE settings", commands[0], _made(layout, make), may_pass=True)


def _made(layout: Layout, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        layout.make(folder / "sae")
        layout.make(folder / "other")
        change(folder / "sae")

    return make


def _odd_bytes(name: str, text: bool = False) -> Iterator[Callable[[Path], object]]:
    """Yield changes of a file's bytes: truncated, replaced, by a folder, unreadable."""

    def replaced(content: bytes) -> Callable[[Path], object]:
        return lambda folder: (folder / name).write_bytes(content)

    def cut(part: float) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            whole = (folder / name).read_bytes()
            (folder / name).write_bytes(whole[: int(part * len(whole))])

        return change

    yield from (cut(0.0), cut(0.5), cut(0.99))
    yield from map(replaced, (b"word", bytes(range(256)) * 4))

    def folder_instead(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    yield folder_instead
    yield lambda folder: (folder / name).unlink()
    if text:
        yield lambda f: (f / name).write_bytes(b"\xef\xbb\xbf" + (f / name).read_bytes())
        yield lambda f: (f / name).write_bytes((f / name).read_text().encode("utf-16"))
        yield from map(replaced, (b"[1]", b"3", b"null", b"[" * 100_000, b"{}", b'{"a": NaN}',
                                  b'{"d_in": ' + b"9" * 5_000 + b"}"))  # fmt: skip


def _odd_weights(layout: Layout) -> Iterator[Callable[[Path], object]]:
    """Yield changes of the tensors that the file's kind can hold."""
    suffix = Path(layout.weights).suffix
    changes = [*_COMMON, *(_PICKLED if suffix == ".pt" else _NPZ if suffix == ".npz" else ())]
    for change in changes:
        yield lambda folder, change=change: _rewrite(folder / layout.weights, change)


def _first(tensors: dict[str, Any], at_least: int = 2) -> str:
    """Return the name of a matrix."""
    return next(name for name, t in tensors.items() if t.ndim >= at_least)


def _with(function: Callable[[torch.Tensor], Any], ndim: int = 2) -> _Change:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        name = _first(tensors, ndim)
        return tensors | {name: function(tensors[name])}

    return change


_COMMON: list[_Change] = [
    _with(lambda t: t * torch.nan),
    _with(lambda t: t / 0),
    _with(lambda t: t[:-1].contiguous()),
    _with(lambda t: t[None]),
    _with(lambda t: t[:0].contiguous()),
    _with(lambda t: t[:, 0].contiguous()),
    _with(lambda t: t.long()),
    _with(lambda t: t > 0),
    _with(lambda t: t.T.contiguous()),
    _with(lambda t: torch.tensor(1.0)),
    _with(lambda t: t.repeat(2, 1)),
    lambda tensors: {},
    lambda tensors: {name: t for name, t in tensors.items() if name != _first(tensors)},
    lambda tensors: tensors | {"nosuch": torch.ones(3)},
    lambda tensors: {f"model.{name}": t for name, t in tensors.items()},
    lambda tensors: {name: t[None] for name, t in tensors.items()},
]
_PICKLED: list[_Change] = [
    _with(lambda t: t.to_sparse()),
    _with(lambda t: t.to_sparse_csr()),
    _with(lambda t: t.to("meta")),
    _with(lambda t: torch.zeros(1).expand(t.shape)),
    _with(lambda t: torch.zeros(1).expand(10**6, 10**6)),
    _with(lambda t: torch.nested.nested_tensor([t, t[:1]])),
    _with(lambda t: torch.nested.nested_tensor([t, t[:1]], layout=torch.jagged)),
    _with(lambda t: torch.complex(t, t)),
    _with(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    _with(lambda t: t.tolist()),
    _with(lambda t: {"weight": t}),
    _with(lambda t: None),
    _with(lambda t: "word"),
    _with(lambda t: t.to(torch.uint8)),
    lambda tensors: dict(enumerate(tensors.values())),
    lambda tensors: tensors | {3: torch.ones(3)},
    lambda tensors: tensors | {None: torch.ones(3), ("a", 1): torch.ones(2)},
    lambda tensors: list(tensors.values()),
    lambda tensors: tensors[_first(tensors)],
    lambda tensors: "word",
    lambda tensors: 3,
    lambda tensors: None,
    lambda tensors: {"state_dict": tensors},
    lambda tensors: {"ae": tensors, "step": [1]},
    lambda tensors: tensors | {"k": torch.tensor([4, 4])},
    lambda tensors: tensors | {"k": torch.tensor(torch.nan)},
    lambda tensors: tensors | {"k": torch.tensor(torch.inf)},
    lambda tensors: tensors | {"k": torch.tensor(2 + 1j)},
    lambda tensors: tensors | {"k": torch.tensor(1).to("meta")},
    lambda tensors: tensors | {"k": torch.tensor([4]).to_sparse()},
    lambda tensors: tensors | {"k": torch.tensor(4.5)},
    lambda tensors: tensors | {"threshold": torch.tensor(torch.nan)},
    lambda tensors: tensors | {"threshold": torch.tensor(0.1 + 1j)},
    lambda tensors: tensors | {"threshold": torch.tensor(0.1).to("meta")},
]  # fmt: skip
_NPZ: list[_Change] = [
    _with(lambda t: np.array(t.tolist(), dtype=object)),
    _with(lambda t: t.numpy().astype(np.complex64)),
    _with(lambda t: t.numpy().astype("U4")),
    _with(lambda t: t.numpy().astype([("a", "f4")])),
    _with(lambda t: np.array("word")),
    _with(lambda t: np.array(["2024-01-01"], dtype="M8[D]")),
    _with(lambda t: np.array([], dtype=np.float32)),
    _with(lambda t: t.numpy().astype(">f4") * np.nan),
    _with(lambda t: t.numpy().astype(np.uint16)),
]


def _rewrite(file: Path, change: _Change) -> None:
    """Read a file of weights, change its tensors, and write it again."""
    if file.suffix == ".pt":
        with warnings.catch_warnings():  # torch deprecates some kinds of tensors
            warnings.simplefilter("ignore")
            torch.save(change(torch.load(file, weights_only=True)), file)
    elif file.suffix == ".npz":
        with np.load(file) as found:
            tensors = {name: torch.from_numpy(found[name]) for name in found.files}
        np.savez(file, **{n: np.asarray(t) for n, t in change(tensors).items()})
    else:
        save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file)


_ODD: tuple[Any, ...] = ([], {}, [[1]], "word", "", -1, 0, 1e400, 10**30, 2.5, True, {"a": [1]})


def _odd_settings(layout: Layout) -> Iterator[Callable[[Path], object]]:
    """Yield a wrong value of each entry of the configuration; a reader may ignore the entry."""

    def at(where: tuple[str, ...], value: Any) -> Callable[[Path], object]:
        def change(folder: Path) -> None:
            file = folder / (layout.config or "")
            whole = json.loads(file.read_text())
            node = whole
            for key in where[:-1]:
                node = node[key]
            node[where[-1]] = value
            file.write_text(json.dumps(whole))

        return change

    for number, where in enumerate(_ENTRIES[Path(layout.weights).stem, layout.config or ""]):
        for i in range(4):
            yield at(where, _ODD[(3 * i + number) % len(_ODD)])


def _paths(*entries: str) -> list[tuple[str, ...]]:
    return [tuple(entry.split("/")) for entry in entries]


_ENTRIES = {
    ("sae", "sae.json"): _paths(
        "format_version", "type", "config", "d_in", "num_latents", "metadata", "config/k",
        "config/num_latents", "config/activation", "config/nosuch",
    ),
    ("sae", "cfg.json"): _paths(
        "activation", "num_latents", "k", "multi_topk", "transcode", "d_in", "metadata", "signed",
        "expansion_factor",
    ),
    ("sae_weights", "cfg.json"): _paths(
        "architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations",
        "reshape_activations", "metadata", "finetuning_scaling_factor", "activation_fn",
        "activation_fn_kwargs", "hook_name", "d_out",
    ),
    ("ae", "config.json"): _paths(
        "trainer", "trainer/dict_class", "trainer/k", "trainer/lm_name", "trainer/layer", "reseed",
        "trainer/submodule_name",
    ),
    ("params", "config.json"): _paths(
        "architecture", "model_name", "hf_hook_point_in", "hf_hook_point_out", "nosuch",
    ),
    ("sae_weights", "config.json"): _paths(
        "sae_type", "d_model", "expansion_factor", "act_fn", "norm_activation", "d_sae", "top_k",
        "sparsity_include_decoder_norm", "hook_point_in", "hook_point_out", "use_glu_encoder",
        "model_name", "dataset_average_activation_norm", "jump_relu_threshold",
    ),
}  # fmt: skip
