"""Malformed inputs of every kind, as data: overrides, configuration files, texts, models, SAEs."""

# ruff: noqa: E501

from __future__ import annotations

import dataclasses
import gzip
import importlib
import io
import json
import os
import random
import struct
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
import zstandard
from foreign_saes import foreign_cases
from judge import Case
from safetensors.torch import save

from reseed.cli.hydra_app import conf_dir
from reseed.config import Config

WORLD = ("model=world_easy", "sae.num_latents=64", "training.tokens=4096",
         "training.batch_size=64", "runtime.threads=1", "runtime.progress=false")  # fmt: skip
"""Overrides that train in a moment, without a model or a text."""
TEXT = ("model=embedded", "layer=1", "dataset=text_files", "dataset.path={shared}/text.txt",
        "dataset.context_length=32", "dataset.chunk_tokens=2048", "dataset.held_out_tokens=512",
        *WORLD[1:])  # fmt: skip
GRID = ("comparison=base", "comparison.name=mine",
        "comparison.grid={sae: [topk], seed: [0, 1]}")  # fmt: skip
_MODEL = Path(conf_dir()).parent / "src" / "reseed" / "assets" / "model"


def make_shared(folder: Path) -> None:
    """Write a valid text, for cases in which something else is malformed."""
    chosen = random.Random(0)
    words = "the cat sat on a mat and then one small dog ran home".split()  # noqa: SIM905
    documents = (" ".join(chosen.choices(words, k=chosen.randint(5, 55))) for _ in range(400))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "text.txt").write_text("\n<|endoftext|>\n".join(documents))


def cases() -> list[Case]:
    """Return all cases."""
    return [
        *key_cases(),
        *override_cases(),
        *command_cases(),
        *yaml_cases(),
        *text_cases(),
        *activation_cases(),
        *model_cases(),
        *foreign_cases(WORLD),
    ]


# Every configuration key, with wrong values of its kind.

DEEP = "[" * 500 + "]" * 500
DIGITS = "9" * 5_000
_WRONG: dict[Any, tuple[str, ...]] = {
    int: ("word", "1.5", "nan", "true", "[1]", "{a: 1}", "-1", "1e400", DIGITS),
    float: ("word", "nan", "inf", "true", "[1]", "{a: 1}", "-1e400"),
    bool: ("maybe", "3", "[true]", "{a: 1}"),
    str: ("[a]", "{a: 1}", "true", "3"),
    tuple: ("word", "3", "{a: 1}", "[[1]]"),
    dict: ("word", "3", "[]"),
}
_ANY_STRING = {"runtime.sweeps": ("''",), "runtime.outputs": ("''",)}


def key_cases() -> Iterator[Case]:
    """Yield wrong values of every key of conf/: of another type, and out of its bounds."""
    seen: set[str] = set()
    for path in sorted(Path(conf_dir()).glob("*/*.yaml")):
        node, group, option = yaml.safe_load(path.read_text()), path.parent.name, path.stem
        node = node.get("comparison", node) if isinstance(node, dict) else {}
        if "_target_" not in node or group == "recipe":
            continue
        module, _, name = node["_target_"].rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        for i, field in enumerate(dataclasses.fields(kind)):
            key = f"{group}.{field.name}"
            if key in seen or field.name not in node:
                continue
            seen.add(key)
            for value in wrong_values(kind, field, key, i):
                yield Case("values", _command_for(group, option, key, value), message=field.name)
    for key in ("layer", "seed"):
        for value in (*_WRONG[int], "null", "''"):
            yield Case("values", ("train", *WORLD, f"{key}={value}"))
    for key in ("seed_scope", "surrogate"):
        for value in ("unknown", "null", "3", "[cell]", "''"):
            yield Case("values", ("train", *WORLD, f"{key}={value}"), message=key)


def wrong_values(kind: type[Config], field: Any, key: str, rotate: int) -> list[str]:
    """Return values that a field must refuse: two of other types, those out of its bounds, null."""
    hint = typing.get_type_hints(kind)[field.name]
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = {typing.get_origin(part) or part for part in parts}
    optional, plain = type(None) in plain, plain - {type(None)}
    if plain & {Mapping, typing.Mapping} or any("Mapping" in str(part) for part in parts):
        plain = {dict}
    wrong = [value for one in plain for value in _WRONG.get(one, ())]
    if plain == {str, tuple}:
        wrong = ["3", "{a: 1}", "true", "[[1]]"]
    found = [wrong[(rotate + i) % len(wrong)] for i in range(min(2, len(wrong)))]
    limits = field.metadata.get("bounds", {})
    for word, step in (("at least", -1), ("above", 0), ("at most", 1), ("below", 0)):
        if limits.get(word) is not None:
            found.append(f"{limits[word] + step}")
    if field.metadata.get("choices"):
        found.append("unknown")
    if not optional:
        found.append("null")
    return list(dict.fromkeys([*found, *_ANY_STRING.get(key, ())]))


def _command_for(group: str, option: str, key: str, value: str) -> tuple[str, ...]:
    given = f"{key}={value}"
    if group == "comparison":
        return ("run", *WORLD, *(o for o in GRID if not o.startswith(f"{key}=")), given)
    if group == "evaluation":
        return ("run", *WORLD, *GRID, f"evaluation={option}", given)
    base = [o for o in WORLD if not o.startswith((f"{group}=", f"{key}="))]
    if group == "sae":
        base = [o for o in base if not o.startswith("sae.")]
    if group == "dataset" and option != "generated":
        base = [o for o in TEXT if not o.startswith((f"{key}=", "dataset="))]
        base = [o for o in base if not (o.startswith("dataset.path") and option != "text_files")]
    own = f"{group}={option}" if group != "runtime" else "runtime=default"
    return ("train", own, *base, given)


# Overrides.


def override_cases() -> Iterator[Case]:
    """Yield command lines whose overrides are malformed, or ask for the impossible."""
    wrong = partial(_train, "overrides")
    for text in (
        "=1", "seed", "seed==", "sae.k=[1,2", "sae.k=1]", "sae.k={a:1", "sae.k='1", 'sae.k="1',
        "sae.k=1,,2", "sae.k=choice(", "sae.k=range(1,2,3,4,5)", "sae.k=nosuch(1)", "sae k=1",
        "sae.k=${", "sae.k=${nosuch}", "sae.k=${oc.env:NO_SUCH_VARIABLE}", "sae.k=${sae.k}",
        "sae.k=${nosuch:1}", "+", "~", "++", "~~sae", "+sae.k=1", "~sae.nosuch", "~seed",
        "~sae", "~training.tokens", "sae.k=int(word)", "sae.k=float()", "sae.k=(1)", "sae.k=\\",
        "sae.k=a:b:c=", "@sae=topk", "sae@=topk", "sae@x.y=topk", "sae..k=1", ".sae.k=1",
        "sae.k.=1", "sae.k.x=1", "sae.[k]=1", "sae.k=\x00", "sae.k=\x1b[31m", "sae.k=\r\n1",
        "sae.k=a\tb", "s\x07eed=1", "seed=\x7f", "seed=\ud800", "sae.k=\udcff", "s\ud800=1",
        "seed=٣", "seed=１", "seed=−1", "seed=0x10", "seed=1;2", "seed=1 2", "seed=1=2",
        "nosuch=1", "nosuch.key=1", "nosuch/group=1", "sae/topk.k=1", "+nosuch=1", "++nosuch=1",
        "sae=nosuch", "sae=/sae/topk", "sae=null", "sae=[topk]",
        "sae=''", "sae=topk,relu", "seed=0,1", "seed=range(3)", "seed=interval(0,1)",
        "model=null", "dataset=null", "training=null", "runtime=null", "hookpoint=null",
        "model=3", "dataset=3", "hookpoint=[]",
        f"seed={DIGITS}", f"seed=-{DIGITS}", f"sae.k={DEEP}", f"seed={'{a:' * 500}1{'}' * 500}",
        f"seed={'(' * 500}", f"seed={'a' * 100_000}", f"{'a' * 5_000}=1", f"sae={'a' * 300}",
        f"sae={'ä' * 200}", f"runtime.outputs={'a' * 300}", f"runtime.outputs={'a/' * 3_000}b",
        f"runtime.sweeps={'ö' * 200}", "runtime.outputs=''",
        "runtime.sweeps=''", "runtime.outputs=/dev/null", "runtime.outputs=/dev/null/x",
        "runtime.outputs=/proc/x", "runtime.outputs=\"a\x00b\"",
        "dataset.chunk_tokens=1e18", "dataset.held_out_tokens=1e18", "training.batch_size=1e18",
        "training.tokens=1e30", "training.tokens=1e300", "sae.num_latents=1e12",
        "sae.num_latents=1e18", "sae.num_latents=1e30",         "sae.k=1e12", "sae.k_aux=1e30", "runtime.threads=1e9", "runtime.threads=100000",
        "runtime.threads=1e30", "runtime.ranks=2", "runtime.ranks=65", "runtime.ranks=1e9",
        "runtime.device=cuda:99", "runtime.device=tpu",
        "runtime.device=''", "runtime.device=cpu:7", "runtime.loggers=[nosuch]",
        "runtime.activation_cache=/dev/null", "runtime.strategy=nosuch", "seed=1e30", "layer=99",
        "dataset.order_seed=1e30", "model.seed=1e30", "hydra.launcher._target_=x", "hydra=x",
        "hydra/launcher=nosuch", "hydra/launcher=null", "hydra/sweeper=nosuch", "hydra.nosuch=1",
        "hydra.run.dir=x", "hydra.searchpath=[nosuch]", "hydra.searchpath=3", "hydra.job.env_set=3",
        "hydra.sweep.dir=x", "hydra.output_subdir=x", "hydra.job.chdir=true", "hydra.verbose=true",
        "hydra/job_logging=nosuch", "hydra.mode=MULTIRUN", "hydra.launcher=3", "plan_only=maybe",
        "wait=maybe", "wait=false", "objective=x", "source=x", "comparison=nosuch",
        "evaluation=reconstruction", "sae=pretrained", "training=nosuch", "sae.source=x",
    ):  # fmt: skip
        yield wrong(text)
    for texts in (
        ("runtime=ddp", "runtime.ranks=65", "runtime.device=cpu"),
        ("runtime=spread", "runtime.ranks=65", "runtime.device=cpu"),
        ("runtime=spread", "runtime.ranks=1e6", "runtime.device=cpu"),
        ("runtime=ddp", "runtime.ranks=3", "runtime.device=cpu"),
        ("runtime=ddp", "runtime.device=cuda:1"),
        ("runtime=ddp", "runtime.device=cuda", "runtime.ranks=8"),
        
    ):  # fmt: skip
        yield Case("overrides", ("train", *WORLD, *texts))
    for text in ("hydra.launcher._target_=x", "hydra.launcher._target_=os.system",
                 "hydra.launcher.nosuch=1", "hydra.sweeper._target_=x", "hydra/launcher=nosuch",
                 "hydra.sweeper.max_batch_size=3", "hydra.sweep.dir=x", "seed=choice()",
                 "seed=range(0,0)", "seed=interval(0,1)", "seed=range(1e9)", "sae=topk,nosuch",
                 "sae.k=4,word", f"seed=0,{DIGITS}", "seed=glob(*)", "sae=glob([)",
                 "sae.num_latents=64,1e12", "runtime.threads=1,1e9", "layer=0,1e30"):  # fmt: skip
        yield Case("overrides", ("train", "-m", *WORLD, text))


def _train(kind: str, *texts: str) -> Case:
    own = {text.partition("=")[0] for text in texts if "=" in text}
    kept = [o for o in WORLD if o.partition("=")[0] not in own]
    return Case(kind, ("train", *kept, *texts))


# Flags, words and files of the other commands.


def command_cases() -> Iterator[Case]:
    """Yield malformed command lines of every command."""
    wrong = partial(Case, "commands")
    for words in (
        ("nosuch",), ("",), ("train", "--nosuch"), ("train", "--seed=1"), ("train", "--sae.k", "1"),
        ("train", "-x"), ("train", "--config-dir"), ("train", "--config-dir", "nosuch"),
        ("train", "--config-name", "nosuch"), ("train", "--config-path", "."), ("train", "word"),
        ("train", ""), ("train", "--multirun=3"), ("train", "--package"), ("completion", "fish"),
        ("run",), ("run", "comparison=nosuch"), ("run", "comparison=base"), ("run", "quickstart"),
        ("run", *WORLD, *GRID, "sae.k=word"), ("run", *WORLD, *GRID, "evaluation=nosuch"),
        ("run", *WORLD, *GRID, "evaluation.nosuch=1"), ("run", *WORLD, "comparison=seeds", "seed=0"),
        ("run", *WORLD, "comparison=seeds", "comparison.pair_by=nosuch"),
        ("run", *WORLD, "comparison=seeds", "seed=0,0"), ("run", *WORLD, *GRID, "comparison.arms=3"),
        ("run", *WORLD, *GRID[:2], "comparison.grid=3"), ("run", *WORLD, *GRID[:2]),
        ("run", *WORLD, *GRID[:2], "comparison.grid={}"),
        ("run", *WORLD, *GRID[:2], "comparison.grid={seed: 0}"),
        ("run", *WORLD, *GRID[:2], "comparison.grid={seed: []}"),
        ("run", *WORLD, *GRID[:2], "comparison.grid={seed: [0, 0]}"),
        ("run", *WORLD, *GRID[:2], "comparison.grid={seed: [[0], 1]}"),
        ("run", *WORLD, *GRID[:2], "comparison.grid={seed: [{a: 1}, 1]}"),
        ("run", *WORLD, *GRID[:2], "comparison.grid={nosuch: [0, 1], seed: [0, 1]}"),
        ("run", *WORLD, *GRID[:2], f"comparison.grid={{seed: [0, {DIGITS}]}}"),
        ("run", *WORLD, *GRID[:2], "comparison.grid={seed: [0, 1], '': [1]}"),
        ("run", *WORLD, *GRID, "comparison.name=a/b"), ("run", *WORLD, *GRID, "comparison.name=''"),
        
        ("run", *WORLD, *GRID, "comparison.name=\"a\x00b\""),
        ("run", *WORLD, *GRID, "comparison.primary=nosuch"),
        ("run", *WORLD, *GRID, "comparison.arms={a: 3}"),
        ("run", *WORLD, *GRID, "comparison.arms={a: {runtime.threads: 1}}"),
        ("run", *WORLD, *GRID, "comparison.arms={a: {seed: {b: 1}}}"),
        ("run", *WORLD, *GRID, "comparison.arms={'': {layer: 1}}"),
        ("run", *WORLD, *GRID, "sae.num_latents=1e12"),
        ("run", *WORLD, *GRID, "comparison.null_draws=1e18"),
        ("compare",), ("compare", "comparison=nosuch"), ("compare", *WORLD, *GRID),
        ("compare", "sources=3"), ("compare", "sources=[]"), ("compare", "sources=[a]"),
        ("compare", "sources=[a,a]"), ("compare", "sources=[a,b]"), ("compare", "sources=[1,2]"),
        ("compare", "sources={a: 1}"), ("compare", "sources=a,b"), ("compare", "sources=[[a],[b]]"),
        ("compare", "sources=[hub:x,hub:y]"), ("compare", "sources=[null,true]"),
        ("compare", "sources=['',' ']"), ("compare", "sources=[a,b]", "seed=1"),
        ("compare", "sources=[a,b]", "nosuch=1"), ("compare", "sources=[a,b]", *WORLD[:1]),
        ("compare", f"sources=[{'a' * 300},b]"), ("compare", "sources=[\"a\x00\",b]"),
        ("compare", "sources=[/dev/null,/dev/zero]"),
        ("check",), ("check", "nosuch.csv"), ("check", "--latents"), ("check", "--latents", "x"),
        ("check", "--latents", "-1", *WORLD), ("check", "--latents", "1", "sae=nosuch"),
        ("check", "--latents", DIGITS, *WORLD), ("check", "--latents", "1", *WORLD, "seed=0,1"),
        ("check", "--latents", "1", "--out", "/dev/null", *WORLD, "seed=0,1"),
        ("evaluate",), ("evaluate", "nosuch"), ("evaluate", "nosuch", "evaluation=nosuch"),
        ("evaluate", "nosuch", "evaluation=reconstruction"),
        ("evaluate", ".", "evaluation=reconstruction"),
        ("evaluate", "a" * 300, "evaluation=reconstruction"),
        ("evaluate", "\x00", "evaluation=reconstruction"),
        ("evaluate", *WORLD, "evaluation=reconstruction", "evaluation.tokens=1e18"),
        ("evaluate", *WORLD, "evaluation=splitting", "evaluation.nosuch=1"),
        ("show",), ("show", "nosuch"), ("show", "nosuch", "x"), ("show", "nosuch", "1"),
        ("show", "nosuch", "1,,2"), ("show", "nosuch", "-1"), ("show", "nosuch", DIGITS),
        ("show", "a" * 300, "1"), ("show", "\x00", "1"), ("show", ".", "1"),
        ("show", "nosuch", "1", "seed=3"), ("show", "nosuch", "1", "-m"),
        ("report",), ("report", "nosuch"), ("report", "nosuch", "--format", "pdf"),
        ("report", "--out"), ("report", "."), ("report", "a" * 300), ("report", "\x00"),
        ("status", "nosuch"), ("status", "--nosuch"), ("status", "a" * 300), ("status", "\x00"),
        ("status", "runtime.outputs=''"), ("status", "nosuch=1"),
        ("cancel",), ("cancel", "nosuch"), ("cancel", "\x00"),
        ("cache", "--clear", "nosuch"), ("cache", "nosuch"), ("cache", "--nosuch"),
        ("cache", "runtime.activation_cache=/dev/null"),
        ("convert",), ("convert", "a"), ("convert", "a", "b"), ("convert", "a", "b", "--to", "x"),
        ("convert", "nosuch", "out", "--to", "sparsify"), ("convert", ".", "out", "--to", "reseed"),
        ("convert", "hub:x", "out", "--to", "reseed"), ("convert", "", "out", "--to", "reseed"),
        ("convert", "a" * 300, "out", "--to", "reseed"), ("convert", "\x00", "o", "--to", "reseed"),
        ("convert", ".", "out", "--to", "reseed", "--format", "nosuch"),
        ("convert", ".", "out", "--to", "reseed", "--revision", "x"),
        ("convert", "/dev/null", "out", "--to", "reseed"),
        ("push",), ("push", "nosuch", "a/b"), ("push", "nosuch", "b"), ("push", ".", "a/b"),
        ("push", "\x00", "a/b"), ("push", "a" * 300, "a/b"),
    ):  # fmt: skip
        yield wrong(words)
    seeds = ("sae=topk", "seed=0,1", *WORLD)
    for name, content in {
        "empty.csv": b"", "header.csv": b"latent\n", "columns.csv": b"a,b\n1,2\n",
        "word.csv": b"latent\nword\n", "ragged.csv": b"latent\n1,2,3\n", "gap.csv": b"latent\n\n,\n",
        "negative.csv": b"latent\n-1\n", "binary.csv": bytes(range(256)), "nul.csv": b"latent\n\x00",
        "utf16.csv": "latent\n1\n".encode("utf-16"), "twice.csv": b"latent,latent\n1,2\n",
        "run.csv": b"latent,run\n1,nosuch\n", "seed.csv": b"latent,seed\n1,9\n",
        "digits.csv": b"latent\n" + b"9" * 5_000, "quote.csv": b'latent\n"1\n',
        "long.csv": b"latent\n" + b"1" * 200_000, "untrained.csv": b"latent\n1\n",
    }.items():  # fmt: skip
        yield Case("latent lists", ("check", name, *seeds), _writes(name, content))
    yield Case(
        "latent lists", ("check", "folder.csv", *seeds), lambda f: (f / "folder.csv").mkdir()
    )
    for name, content in {
        "empty.csv": b"", "columns.csv": b"a,b\n1,2\n", "binary.csv": bytes(range(256)),
        "ragged.csv": b"token,label\nthe\n", "utf16.csv": "token,label\n".encode("utf-16"),
        "unknown.csv": b"token,label\nqwertzuiop,a\n", "one.csv": b"token,label\nthe,a\n",
        "nul.csv": b"token,label\n\x00,a\n", "long.csv": b"token,label\n" + b"a" * 200_000,
    }.items():  # fmt: skip
        words = ("evaluate", *TEXT, "evaluation=absorption", f"evaluation.task_file={name}",
                 "evaluation.task=file")  # fmt: skip
        yield Case("latent lists", words, _writes(name, content))


def _writes(name: str, content: bytes) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return make


# Configuration files in a user's folder.


def yaml_cases() -> Iterator[Case]:
    """Yield malformed files of options in ``--config-dir``."""
    bomb = "a0: &a0 [x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
    )
    broken: dict[str, bytes] = {
        "tab": b"_target_: x\n\tk: 3\n", "binary": bytes(range(256)), "nul": b"k: \x00\n",
        "list": b"[1, 2]\n", "word": b"word\n", "number": b"3\n", "empty": b"", "null": b"null\n",
        "unclosed": b"{a: 1\n", "quote": b"a: 'x\n", "indent": b"a: 1\n  b: 2\n",
        "twice": b"k: 1\nk: 2\n", "anchor": b"k: *nosuch\n", "bomb": bomb.encode(),
        "utf16": "k: 1\n".encode("utf-16"), "latin1": b"k: \xe4\n", "two": b"k: 1\n---\nk: 2\n",
        "tag": b"k: !!python/object/apply:os.system [touch made]\n", "key": b"? [1, 2]\n: 3\n",
        "deep": b"k: " + b"[" * 2_000 + b"]" * 2_000, "none": b"k: {}\n", "colon": b"a: b: c\n",
        "defaults": b"defaults: [nosuch]\n", "defaults_word": b"defaults: nosuch\n",
        "defaults_number": b"defaults: [3]\n", "defaults_deep": b"defaults: [[a], {b: {c: 1}}]\n",
        "defaults_self": b"defaults: [mine, _self_]\n", "package": b"# @package nosuch.x\nk: 1\n",
        "interpolation": b"_target_: ${nosuch}\n", "broken_interpolation": b"_target_: ${\n",
        "no_target": b"k: 3\n", "target_list": b"_target_: [a]\n", "target_number": b"_target_: 3\n",
        "target_word": b"_target_: nosuch\n", "target_module": b"_target_: nosuch.Nosuch\n",
        "target_function": b"_target_: os.system\n", "target_class": b"_target_: pathlib.Path\n",
        "target_empty": b"_target_: ''\n", "target_dots": b"_target_: ..\n",
        "target_null": b"_target_: null\n", "target_digits": b"_target_: a.9\n",
        "target_abstract": b"_target_: reseed.sae.base.SAEConfig\n",
        "target_other": b"_target_: reseed.train.config.RuntimeConfig\n",
        "bom": b"\xef\xbb\xbf_target_: nosuch.Nosuch\n", "digits": b"k: " + b"9" * 5_000,
        "number_key": b"3: 4\n", "mapping_key": b"{a: 1}: 2\n", "date": b"_target_: 2024-01-01\n",
    }  # fmt: skip
    for group in ("sae", "model", "dataset", "training"):
        for name, content in broken.items():
            if group in ("sae", "model") or name in (
                "list",
                "binary",
                "twice",
                "no_target",
                "bomb",
            ):
                given = tuple(o for o in WORLD if not o.startswith((f"{group}=", f"{group}.")))
                words = ("train", "--config-dir", "conf", *given, f"{group}=mine")
                yield Case("yaml files", words, _writes(f"conf/{group}/mine.yaml", content))
    for group, command in (("comparison", "run"), ("evaluation", "run")):
        for name in ("tab", "binary", "list", "word", "twice", "bomb", "no_target", "target_function",
                     "target_list", "interpolation", "deep", "bom"):  # fmt: skip
            other = GRID if group == "evaluation" else ()
            words = (command, "--config-dir", "conf", *WORLD, *other, f"{group}=mine")
            yield Case("yaml files", words, _writes(f"conf/{group}/mine.yaml", broken[name]))
    topk = (Path(conf_dir()) / "sae" / "topk.yaml").read_text()
    for content in (
        topk.replace("k: 32", "k: word"), topk.replace("k: 32", "k: [32]"),
        topk + "nosuch: 3\n", topk.replace("unit_norm_decoder: true", ""),
        topk.replace("k: 32", "k: ???"), topk.replace("k: 32", "k: ${k}"),
        topk.replace("k: 32", "k: 2024-01-01"), topk.replace("k: 32", "k: 0o17x"),
        topk.replace("activation: topk", "activation: no"), topk + "3: 4\n",
        topk.replace("k: 32", "k: .nan"), topk.replace("k: 32", "k: -.inf"),
    ):  # fmt: skip
        words = ("train", "--config-dir", "conf", *WORLD, "sae=mine")
        yield Case("yaml files", words, _writes("conf/sae/mine.yaml", content.encode()))
    for name in ("tab", "binary", "list", "twice", "bomb", "empty", "no_target"):
        words = ("train", "--config-dir", "conf", "--config-name", "mine", *WORLD)
        yield Case("yaml files", words, _writes("conf/mine.yaml", broken[name]))
    words = ("train", "--config-dir", "conf", *WORLD, "sae=mine")
    yield Case("yaml files", words, lambda f: (f / "conf/sae/mine.yaml").mkdir(parents=True))
    yield Case("yaml files", words, _writes("conf", b""))


# Texts.


def text_cases() -> Iterator[Case]:
    """Yield texts that cannot be read, have the wrong columns, or are too short."""
    whole = json.dumps({"text": "the cat sat"})
    broken: dict[str, bytes] = {
        "empty.txt": b"", "blank.txt": b" \n\n ", "binary.txt": bytes(range(256)) * 40,
        "utf16.txt": ("the cat sat " * 400).encode("utf-16"), "latin1.txt": b"caf\xe9 " * 400,
        "short.txt": b"the cat sat", "late.txt": b"the cat sat " * 5_000 + b"\xff\xfe",
        "late_document.txt": b"the cat sat<|endoftext|>" * 5_000 + b"\xff", "late.jsonl": (whole + "\n").encode() * 5_000 + b"{", "separators.txt": b"<|endoftext|>" * 100, "word.csv": b"a,b\n1,2\n", "nosuffix": b"x",
        "ragged.csv": b"a,b\n1,2,3\n4\n", "word.pdf": b"%PDF-1.4", "word.json": b"{}",
        "list.jsonl": b"[1, 2]\n", "word.jsonl": b"word\n", "cut.jsonl": b'{"text": "the\n',
        "column.jsonl": b'{"content": "x"}\n', "number.jsonl": b'{"text": 3}\n',
        "null.jsonl": b'{"text": null}\n', "empty.jsonl": b"", "blank.jsonl": b"\n\n",
        "later.jsonl": f"{whole}\n{{}}\n".encode(), "utf16.jsonl": whole.encode("utf-16"),
        "bom.jsonl": b"\xef\xbb\xbf" + whole.encode(), "deep.jsonl": b"[" * 100_000,
        "digits.jsonl": b'{"text": ' + b"9" * 5_000 + b"}\n", "binary.jsonl": bytes(range(256)),
        "surrogate.jsonl": b'{"text": "\\ud800 cat"}\n' * 2_000, "nul.jsonl": b"\x00" * 100,
        "empty.parquet": b"", "word.parquet": b"word", "magic.parquet": b"PAR1" * 10,
        "binary.parquet": bytes(range(256)) * 10,
        "nul.txt": b"the cat\x00 sat " * 900, "utf16le.txt": ("the cat sat " * 400).encode("utf-16-le"),
        "quote.csv": b'text,n\n"the cat,1\nsat,2\n', "twice.csv": b"text,text\na,b\n",
        "cells.csv": b"text,n\na,1\nb\n", "late.csv": b"text\n" + b"the cat\n" * 3_000 + b"caf\xe9\n",
        "empty.csv": b"", "header.csv": b"text\n", "nul.csv": b"text\na\x00b\n",
        "binary.csv": bytes(range(256)), "deep_key.jsonl": b'{"text": "a", "n": ' + b"[" * 50_000 + b"\n",
        "digits_key.jsonl": b'{"text": "a", "n": ' + b"9" * 10_000 + b"}\n",
        "empty.txt.gz": b"", "word.txt.gz": b"word", "cut.jsonl.gz": gzip.compress(whole.encode() * 90)[:-9],
        "flipped.txt.gz": b"\x1f\x8b" + bytes(range(200)), "empty.jsonl.zst": b"", "word.txt.zst": b"word",
        "cut.txt.zst": zstandard.compress(bytes(range(256)) * 900)[:-5], "word.parquet.gz": b"word",
        "binary.txt.zst": zstandard.compress(bytes(range(256)) * 40),
        "broken.csv.zst": zstandard.compress(b'text\n"a'), "text.gz": b"word", "x.tar.gz": b"word",
    }  # fmt: skip
    given = tuple(o for o in TEXT if not o.startswith("dataset.path="))
    for name, content in broken.items():
        yield Case("texts", ("train", *given, f"dataset.path={name}"), _writes(name, content))
    for name, make in {
        "column.parquet": partial(_parquet, columns={"content": ["x"]}),
        "number.parquet": partial(_parquet, columns={"text": [1, 2, 3]}),
        "bytes.parquet": partial(_parquet, columns={"text": [b"\xff", b"a"]}),
        "list.parquet": partial(_parquet, columns={"text": [["a"], ["b"]]}),
        "null.parquet": partial(_parquet, columns={"text": [None, None]}),
        "none.parquet": partial(_parquet, columns={"text": []}),
        "cut.parquet": partial(_parquet, columns={"text": ["a" * 50] * 500}, cut=0.6),
        "struct.parquet": partial(_parquet, columns={"text": [{"a": 1}]}),
        "a_folder": lambda path: path.mkdir(),
        "a_folder.txt": lambda path: path.mkdir(),
        "mixed": lambda path: [path.mkdir(), (path / "a.txt").write_bytes(b"\xff" * 9)],
        "dangling.txt": lambda path: path.symlink_to("nosuch"),
        "circle.txt": lambda path: path.symlink_to(path),
        "pipe.txt": os.mkfifo,
        "readme_only": partial(_folder, files={"README.md": b"the cat", ".a.txt": b"the cat"}),
        "all_empty": partial(_folder, files={"a.txt": b"", "b.jsonl": b"", "c.csv": b""}),
        "state_only": partial(_folder, files={"state.json": b"{}", "dataset_info.json": b"{}"}),
        "state_outside": partial(
            _folder,
            files={
                "dataset_info.json": b"{}",
                "state.json": b'{"_data_files": [{"filename": "../x.arrow"}]}',
            },
        ),
        "state_binary": partial(
            _folder,
            files={
                "dataset_info.json": b"{}",
                "x.arrow": bytes(range(99)),
                "state.json": b'{"_data_files": [{"filename": "x.arrow"}]}',
            },
        ),
        "state_deep": partial(
            _folder, files={"dataset_info.json": b"{}", "state.json": b"[" * 50_000}
        ),
        "no_split": partial(_folder, files={"dataset_dict.json": b'{"splits": []}'}),
        "linked": lambda path: [
            path.mkdir(),
            (path / "a.txt").write_text("the cat " * 9),
            (path / "b.txt").symlink_to("a.txt"),
        ],
        "hard_linked": lambda path: [
            path.mkdir(),
            (path / "a.txt").write_text("the cat " * 9),
            (path / "b.txt").hardlink_to(path / "a.txt"),
        ],
    }.items():
        words = ("train", *given, f"dataset.path={name}")
        yield Case("texts", words, lambda folder, make=make, name=name: make(folder / name))
    for value in ("nosuch.txt", "''", "[]", "[[a]]", "3", "{a: 1}", "null", "[nosuch.txt]",
                  "\"a\x00b\"", "a" * 300 + ".txt", "/dev/zero", "/dev/null", "~nosuch/x.txt",
                  "/proc/self/mem"):  # fmt: skip
        yield Case("texts", ("train", *given, f"dataset.path={value}"))
    for own in ("training.tokens=1e9", "dataset.held_out_tokens=1e9", "dataset.context_length=1e9",
                "dataset.context_length=100000", "dataset.field=3", "dataset.separator=[a]",
                "dataset.held_out_fraction=1", "dataset.held_out_fraction=1e-12",
                "dataset.held_out_fraction=0.999", "dataset.chunk_tokens=2049",
                "dataset.chunk_tokens=1e18", "runtime.cache=/dev/null", f"runtime.cache={'a' * 300}",
                "runtime.cache=/proc/x", "runtime.cache=~nosuch/x"):  # fmt: skip
        kept = [o for o in TEXT if o.partition("=")[0] != own.partition("=")[0]]
        yield Case("texts", ("train", *kept, own))
    rows: dict[str, bytes] = {
        "chat": b'{"m": [{"role": "user", "content": "the cat"}]}\n', "half": b'{"m": [{"role": "user"}]}\n',
        "word": b'{"m": "the cat"}\n', "mixed": b'{"m": [1, "a"]}\n', "large": b'{"m": [99999999]}\n',
        "float": b'{"m": [1.5]}\n', "negative": b'{"m": [-1]}\n', "huge": b'{"m": [' + b"9" * 400 + b"]}\n",
        "true": b'{"m": [true]}\n', "empty": b'{"m": []}\n', "null": b'{"m": null}\n', "key": b'{"n": 1}\n',
    }  # fmt: skip
    for name, row in rows.items():
        for kind in (("dataset.chat=true", "dataset.field=m"), ("dataset.token_field=m",)):
            words = ("train", *given, f"dataset.path={name}.jsonl", *kind)
            yield Case("texts", words, _writes(f"{name}.jsonl", row * 5))
    for own in ("dataset.encoding=utf9", "dataset.encoding=hex", "dataset.encoding=''",
                "dataset.encoding=undefined", "dataset.encoding=utf-16", "dataset.encoding=utf-32",
                "dataset.token_field=ids", "dataset.chat=true", "dataset.token_field=''"):  # fmt: skip
        yield Case("texts", ("train", *TEXT, own))
    both = ("dataset.chat=true", "dataset.token_field=ids")
    yield Case("texts", ("train", *TEXT, *both), message="dataset.token_field")
    twice = "dataset.path=[{shared}/text.txt,{shared}/text.txt]"
    yield Case("texts", ("train", *given, twice), message="twice")
    for own in ("dataset.path=[]", "dataset=generated", "dataset=pile"):
        yield Case("texts", ("train", *given, own))


def _folder(path: Path, files: Mapping[str, bytes]) -> None:
    path.mkdir()
    for name, content in files.items():
        _writes(name, content)(path)


def _parquet(path: Path, columns: Mapping[str, Sequence[Any]], cut: float = 1.0) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path)
    content = path.read_bytes()
    path.write_bytes(content[: int(cut * len(content))])


# Activations in files.


def activation_cases() -> Iterator[Case]:
    """Yield files and folders that hold no activations, or other activations than they must."""
    given = ("model=activations", "dataset.chunk_tokens=256", "dataset.held_out_tokens=64",
             "dataset.held_out_fraction=0.3", "training.tokens=256", *WORLD[1:2], *WORLD[3:])  # fmt: skip
    x = np.random.default_rng(0).standard_normal((1_024, 8), dtype=np.float32)
    whole = {ending: _saved(ending, x) for ending in ("npy", "pt", "safetensors", "parquet")}
    files: dict[str, bytes] = {
        "x.npz": b"x",
        "x.csv": b"1,2\n",
        "x.txt": b"1 2\n",
        "x": b"1",
        "x.h5": b"1",
    }
    for ending, content in whole.items():
        files |= {f"empty.{ending}": b"", f"word.{ending}": b"word", f"text.{ending}": b"1.0 2.0\n" * 99,
                  f"binary.{ending}": bytes(range(256)) * 20, f"cut.{ending}": content[:-999],
                  f"begun.{ending}": content[:40], f"nuls.{ending}": bytes(9_999),
                  f"headless.{ending}": content[7:], f"late.{ending}": content[:-8] + b"\xff" * 8}  # fmt: skip
        if ending == "pt":  # its last bytes are not used
            del files["late.pt"]
        for other in whole:
            if other != ending:
                files[f"{other}_as.{ending}"] = whole[other]
    bad = x.copy()
    for name, value in (("nan", np.nan), ("inf", np.inf), ("minus", -np.inf)):
        bad[1_000, 3] = value
        files |= {f"{name}.{ending}": _saved(ending, bad) for ending in whole}
    for name, y in (
        ("int", x.astype(np.int32)), ("uint8", x.astype(np.uint8)), ("bool", x > 0), ("row", x[0]),
        ("four", x.reshape(2, 2, 256, 8)), ("none", x[:0]), ("thin", x[:, :0]), ("few", x[:5]),
        ("scalar", x[0, 0]), ("double", x.astype(np.float64) * 1e300),
    ):  # fmt: skip
        files |= {f"{name}.{ending}": _saved(ending, y) for ending in ("npy", "pt", "safetensors")}
    for name, y in (("complex", x + 1j), ("long", x.astype(np.longdouble)), ("object", x.astype(object)),
                    ("words", np.array(["a", "b"])), ("big", x.astype(">f4")),
                    ("struct", np.zeros(9, dtype=[("a", "f4")])), ("dates", x.astype("M8[s]"))):  # fmt: skip
        files[f"{name}.npy"] = _saved("npy", y)
    deep: list[Any] = []
    for _ in range(300):
        deep = [deep]
    tensor = torch.from_numpy(x)
    for name, value in (("code", {"x": os.system}), ("list", [tensor]), ("number", 3), ("none", None), ("deep", deep),
                        ("sparse", tensor.to_sparse()), ("two", {"a": tensor, "b": tensor}), ("empty", {}),
                        ("meta", tensor.to("meta")), ("words", {"a": "b"}), ("module", torch.nn.Linear(2, 2))):  # fmt: skip
        buffer = io.BytesIO()
        torch.save(value, buffer)
        files[f"{name}.pt"] = buffer.getvalue()
    files["header.safetensors"] = (2**62).to_bytes(8, "little") + b"{}"
    files["offsets.safetensors"] = _safetensors(
        b'{"x": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 8]}}'
    )
    files["huge.safetensors"] = _safetensors(
        b'{"x": {"dtype": "F32", "shape": [4611686018427387904, 9], "data_offsets": [0, 8]}}'
    )
    files["kind.safetensors"] = _safetensors(
        b'{"x": {"dtype": "I4", "shape": [1, 2], "data_offsets": [0, 8]}}'
    )
    for name, content in files.items():
        yield Case("activations", ("train", *given, f"model.path={name}"), _writes(name, content))
    for name, columns in {
        "ints": {"x": [1, 2]}, "words": {"x": ["a", "b"]}, "nulls": {"x": [None, None]}, "one_null": {"x": [[1.0], None]},
        "inner_null": {"x": [[1.0, None]]}, "ragged": {"x": [[1.0], [1.0, 2.0]]}, "lists_of_ints": {"x": [[1], [2]]},
        "structs": {"x": [{"a": 1.0}]}, "nested": {"x": [[[1.0]]]}, "two": {"x": [[1.0]], "y": [[1.0]]},
        "index": {"i": [1], "y": [1.0]}, "none": {}, "no_rows": {"x": []}, "no_numbers": {"x": [[], []]},
        "nan": {"x": [[1.0, float("nan")]] * 999}, "few": {"x": [[1.0, 2.0]] * 99},
    }.items():  # fmt: skip
        words = ("train", *given, f"model.path={name}.parquet")
        yield Case(
            "activations", words, partial(_parquet_in, name=f"{name}.parquet", columns=columns)
        )
    good, other = whole["npy"], _saved("npy", x[:, :5])
    for name, inside in {
        "nothing": {}, "unknown": {"a.txt": b"x", "README.md": b"x"}, "hidden": {".a.npy": good},
        "mixed": {"a.npy": good, "b.pt": whole["pt"]}, "widths": {"a.npy": good, "b.npy": other},
        "kinds": {"a.npy": good, "b.npy": _saved("npy", x.astype(np.float16))},
        "dimensions": {"a.npy": good, "b.npy": _saved("npy", x.reshape(128, 8, 8))},
        "below": {"inner/a.npy": good}, "empties": {"a.npy": _saved("npy", x[:0])},
        "twice": {"a.npy": good + good}, "late": {"a.npy": good, "b.npy": _saved("npy", bad)}, "cut": {"a.npy": good, "b.npy": good[:-1]},
    }.items():  # fmt: skip
        yield Case(
            "activations",
            ("train", *given, f"model.path={name}"),
            lambda folder, name=name, files=inside: _folder(folder / name, files),
        )
    for link in (Path.symlink_to, Path.hardlink_to):
        words = ("train", *given, "model.path=linked")
        yield Case(
            "activations",
            words,
            lambda folder, link=link: [
                _folder(folder / "linked", {"a.npy": good}),
                link(folder / "linked" / "b.npy", folder / "linked" / "a.npy"),
            ],
            message="twice",
        )
    for value in ("nosuch", "''", "[]", "[a]", "3", "null", "a" * 300 + ".npy", "/dev/zero", "/dev/null",
                  "~nosuch/x.npy", "/proc/self/mem", "\"a\x00b\""):  # fmt: skip
        yield Case("activations", ("train", *given, f"model.path={value}"))
    for own in ("layer=1", "hookpoint=mlp_out", "surrogate=random_weights", "model.tensor=x", "model.field=x",
                "model.origin=nosuch", "dataset=docstrings", "dataset=generated", "training.start=truth",
                "training.tokens=1e6", "dataset.held_out_tokens=1e6", "dataset.held_out_fraction=1",
                "dataset.held_out_fraction=1e-9", "dataset.held_out_fraction=0.999", "model.nosuch=1"):  # fmt: skip
        kept = [o for o in given if o.partition("=")[0] != own.partition("=")[0]]
        yield Case("activations", ("train", *kept, "model.path=x.npy", own), _writes("x.npy", good))
    yield Case("activations", ("train", *given))
    yield Case("activations", ("train", *WORLD, "dataset=stored"))


def _saved(ending: str, x: Any) -> bytes:
    """Return an array as the bytes of a file."""
    buffer = io.BytesIO()
    if ending == "npy":
        np.save(buffer, x, allow_pickle=True)
    elif ending == "pt":
        torch.save(torch.as_tensor(x), buffer)
    elif ending == "safetensors":
        return save({"x": torch.as_tensor(x).contiguous()})
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"x": x.tolist()}), buffer)
    return buffer.getvalue()


def _safetensors(header: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + bytes(8)


def _parquet_in(folder: Path, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
    _parquet(folder / name, columns)


# Folders of language models.


def model_cases() -> Iterator[Case]:
    """Yield model folders without, or with malformed, configuration, weights or tokenizer."""
    text = json.loads((_MODEL / "config.json").read_text())

    def changed(**values: Any) -> bytes:
        return json.dumps({**text, **values}).encode()

    configs: dict[str, bytes | None] = {
        "none": None, "empty": b"", "word": b"word", "list": b"[1]", "number": b"3",
        "null": b"null", "cut": json.dumps(text).encode()[:100], "binary": bytes(range(256)),
        "bom": b"\xef\xbb\xbf" + json.dumps(text).encode(), "deep": b"[" * 100_000,
        "utf16": json.dumps(text).encode("utf-16"), "digits": b'{"a": ' + b"9" * 5_000 + b"}",
        "empty_mapping": b"{}", "unknown": changed(model_type="nosuch"),
        "type_list": changed(model_type=["gpt_neox"]), "type_null": changed(model_type=None),
        "own_code": changed(model_type="nosuch", auto_map={"AutoConfig": "code.Config"}),
        "no_lm": changed(model_type="vit"), "layers_word": changed(num_hidden_layers="x"),
        "layers_negative": changed(num_hidden_layers=-1), "layers_zero": changed(num_hidden_layers=0),
        "layers_many": changed(num_hidden_layers=9), "layers_float": changed(num_hidden_layers=2.5),
        "hidden_zero": changed(hidden_size=0), "hidden_other": changed(hidden_size=132),
        "hidden_huge": changed(hidden_size=10**9), "hidden_list": changed(hidden_size=[1]),
        "heads_zero": changed(num_attention_heads=0), "heads_seven": changed(num_attention_heads=7),
        "heads_null": changed(num_attention_heads=None), "vocab": changed(vocab_size=7),
        "vocab_negative": changed(vocab_size=-5), "intermediate": changed(intermediate_size=9),
        "positions_word": changed(max_position_embeddings="x"),
        "positions_few": changed(max_position_embeddings=4),
        "activation": changed(hidden_act="nosuch"), "dtype": changed(dtype="nosuch"),
        "layers_huge": changed(num_hidden_layers=10**9),
        "head": changed(architectures=["GPTNeoXForSequenceClassification"]),
        "architectures": changed(architectures=3), "bert": changed(model_type="bert"),
        "other_file": changed(transformers_weights="../text.safetensors"),
        "gptq": changed(quantization_config={"quant_method": "gptq", "bits": 4}),
        "quantised_by_nothing": changed(quantization_config={"bits": 4}),
        "quantised_by_3": changed(quantization_config=3),
    }  # fmt: skip
    for content in configs.values():
        yield _model(**{"config.json": content})
    for content in (
        None, b"", b"word", bytes(range(256)), b"\xff" * 8 + b"{}", b"\x02" + b"\x00" * 7 + b"{}",
        (_MODEL / "model.safetensors").read_bytes()[:100_000],
        (_MODEL / "model.safetensors").read_bytes()[:-1],
        (_MODEL / "model.safetensors").read_bytes() + b"x",
        (_MODEL / "model.safetensors").read_bytes()[:-4] + b"\xff" * 4,  # NaN in any type
    ):  # fmt: skip
        yield _model(**{"model.safetensors": content})
    index = {"metadata": {}, "weight_map": {"a": "../outside.safetensors"}}
    for content in (index, {"weight_map": 3}, [], {"weight_map": {"a": "nosuch.safetensors"}},
                    {"weight_map": {"a": "/etc/passwd"}}, "word"):  # fmt: skip
        text_of = json.dumps(content).encode()
        yield _model(**{"model.safetensors.index.json": text_of, "model.safetensors": None})
        yield _model(**{"model.safetensors.index.json": text_of, "model.safetensors": None,
                        "model-00001-of-00002.safetensors": b"\x02" + b"\x00" * 7 + b"{}"})  # fmt: skip
    for content in (None, b"", b"word", b"[1]", b"{}", bytes(range(256)), b"[" * 100_000,
                    (_MODEL / "tokenizer.json").read_bytes()[:5_000],
                    b'{"model": {"type": "nosuch"}}', b'{"version": "1.0", "model": null}'):  # fmt: skip
        yield _model(**{"tokenizer.json": content, "tokenizer_config.json": None})
    vocabulary = json.loads((_MODEL / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"]["beyond the embedding"] = 10**6
    yield _model(**{"tokenizer.json": json.dumps(vocabulary).encode()})
    yield _model(**{"adapter_config.json": b"{}"})
    lacking = {"weight_map": {"nosuch": "model.safetensors"}}
    yield _model(**{"model.safetensors.index.json": json.dumps(lacking).encode()})
    yield from gguf_cases()
    for content in (b"word", b"[1]", b'{"tokenizer_class": "Nosuch"}', b'{"tokenizer_class": 3}',
                    bytes(range(256)), b'{"auto_map": {"AutoTokenizer": ["a.b", null]}, '
                    b'"tokenizer_class": "Own"}'):  # fmt: skip
        # transformers reads tokenizer.json as it is if it does not know the class.
        may_pass = b"tokenizer_class" in content
        yield dataclasses.replace(_model(**{"tokenizer_config.json": content}), may_pass=may_pass)
    for value in ("nosuch", "''", "3", "[a]", "{shared}/text.txt", "/dev/null", "\"a\x00b\"",
                  "a" * 300, "~nosuch/x", "null"):  # fmt: skip
        given = tuple(o for o in TEXT if o != "model=embedded")
        yield Case("models", ("train", "model=path", f"model.path={value}", *given))
    for own in ("layer=99", "hookpoint=module", "hookpoint.module=x", "hookpoint=nosuch",
                "model.dtype=int8", "model.attention=flash_attention_2", "model.batch_sequences=0",
                "model.path=x", "surrogate=nosuch"):  # fmt: skip
        kept = [o for o in TEXT if o.partition("=")[0] != own.partition("=")[0]]
        yield Case("models", ("train", *kept, own))
    for module in ("nosuch", "", "gpt_neox.layers.*.nosuch", "*", "gpt_neox.layers.*.mlp.act.x",
                   "embed_out.x", "gpt_neox.layers.*.attention.rotary_emb"):  # fmt: skip
        own = ("hookpoint=module", f"hookpoint.module='{module}'")
        yield Case("models", ("train", *TEXT, *own))


def gguf_cases() -> Iterator[Case]:
    """Yield GGUF files that are damaged, or whose metadata are."""
    given = tuple(o for o in TEXT if o != "model=embedded")

    def string(text: bytes) -> bytes:
        return struct.pack("<Q", len(text)) + text

    def value(key: bytes, kind: int, content: bytes) -> bytes:
        return string(key) + struct.pack("<I", kind) + content

    def begin(tensors: int, values: int, version: int = 3) -> bytes:
        return b"GGUF" + struct.pack("<IQQ", version, tensors, values)

    llama = value(b"general.architecture", 8, string(b"llama"))
    blocks = value(b"llama.block_count", 4, struct.pack("<I", 1))
    width = value(b"llama.embedding_length", 4, struct.pack("<I", 2**31))
    epsilon = value(b"llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", 1e-5))
    heads = value(b"llama.attention.head_count_kv", 4, struct.pack("<I", 2**31))
    tensor = string(b"a") + struct.pack("<IQIQ", 1, 32, 0, 0)
    for content in (
        b"", b"word", b"GGUF", bytes(range(256)), begin(0, 0), begin(0, 0, version=1), begin(2**63, 0),
        begin(0, 2**63), begin(0, 1) + llama, begin(0, 1) + llama[:-2],
        begin(0, 1) + value(b"general.architecture", 8, string(b"nosuch")),
        begin(0, 1) + value(b"general.architecture", 9, struct.pack("<IQ", 9, 2**40)),
        begin(0, 1) + value(b"a", 9, struct.pack("<IQ", 4, 2**62)),
        begin(0, 1) + value(b"a", 9, struct.pack("<IQ", 8, 2**62)),
        begin(0, 1) + value(b"a", 99, b""), begin(0, 1) + value(b"\xff", 8, string(b"")),
        begin(0, 2) + llama + blocks, begin(0, 5) + llama + blocks + width + epsilon + heads,
        begin(1, 5) + llama + blocks + width + epsilon + heads + tensor,
        begin(1, 5) + llama + blocks + width + epsilon + heads + tensor + b"\0" * 160,
        begin(1, 1) + llama + string(b"a") + struct.pack("<IQIQ", 1, 32, 999, 0),
        begin(1, 1) + llama + string(b"a") + struct.pack("<IQIQ", 1, 32, 0, 2**60),
    ):  # fmt: skip
        yield Case(
            "models", ("train", "model=path", "model.path=x.gguf", *given),
            _writes("x.gguf", content), message="x.gguf",
        )  # fmt: skip
    for name in ("nosuch-package", "''", "numpy", '"a b"', "../x"):
        own = ("model=smollm2-gguf", f"model.package={name}")
        yield Case("models", ("train", *own, *given), message="`model.package`")


def _model(**files: bytes | None) -> Case:
    """Return a case with a copy of the embedded model, some files of which are replaced."""

    def make(folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        for path in _MODEL.iterdir():
            if path.name not in files:
                (model / path.name).symlink_to(path)
        for name, content in files.items():
            if content is not None:
                (model / name).write_bytes(content)

    given = tuple(o for o in TEXT if o != "model=embedded")
    return Case("models", ("train", "model=path", "model.path=model", *given), make)
