"""GGUF files (llama.cpp's format): configuration, tokenizer and weights through transformers.

transformers reads a GGUF file leniently: it leaves out what it does not know, and takes its own
values where the file has none. So a file is checked when it is first used: its weights are loaded
once, and every value of its metadata is compared with the model that transformers builds.
Configuration and tokenizer are then kept in the cache, because reading them takes seconds; their
record says that the file has passed.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from reseed.activations.gguf_header import Header, Length, read_header
from reseed.activations.model_files import (
    check_architecture,
    check_tokenizer,
    foreign,
    load_trained,
    quiet,
    read_light,
)
from reseed.config import digest
from reseed.errors import ConfigError
from reseed.system.console import say
from reseed.system.files import atomic_folder
from reseed.system.integrity import (
    DamagedFileError,
    check_record,
    describe_files,
    read_record,
    write_record,
)

VERSION = 2
"""Increase this when a GGUF file is checked or its tokenizer read in another way."""
_PACKAGES = ("gguf", "accelerate")
_RECORD = "gguf.json"
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
"""Tokenizers (``tokenizer.ggml.pre``) that split text as GPT-2's does, and every digit off."""
_GPT2 = ("gpt-2", "phi-2", "mpt", "olmo", "jais")
_HARMLESS = (
    "context_length",  # limits the length of sequences
    "pooling_type",  # of the last layer's output
    "tensor_data_layout", "rope.scaling.finetuned",  # about the model's history
    "feed_forward_length", "expert_feed_forward_length", "expert_shared_feed_forward_length",
    "vocab_size",  # weights of another shape do not load
)  # fmt: skip
"""Keys, after the architecture's name, that change no activation."""
_OFF = {
    "rope.scale_linear": (0, 1), "embedding_scale": (0, 1), "residual_scale": (0, 1),
    "logit_scale": (0, 1), "expert_weights_scale": (0, 1), "attention.scale": (0,),
    "attention.output_scale": (0, 1), "attention.clamp_kqv": (0,), "attention.head_count_kv": (0,),
    "attention.max_alibi_bias": (0,), "attention.head_count": (0,), "expert_count": (0,),
    "expert_used_count": (0,), "expert_shared_count": (0,), "leading_dense_block_count": (0,),
    "ssm.dt_b_c_rms": (0,), "nextn_predict_layers": (0,),
}  # fmt: skip
"""Key → values with which llama.cpp does nothing; state space models have no heads."""
_ABSENT = {"rope.freq_base": 10_000, "rope.scaling.type": "none", "attention.sliding_window": 0}
"""Key → llama.cpp's value for files without it."""
_EPSILON = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
_REAL = ("epsilon", "freq_base", "freq_base_swa", "scale", "softcapping", "factor")
_ARRAYS = (
    "lfm2.attention.head_count_kv", "qwen35.rope.dimension_sections",
    "qwen35moe.rope.dimension_sections",
)  # fmt: skip
"""Arrays that transformers reads; all other values that it reads are numbers."""
_LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
"""Architecture → number of blocks of the size whose queries are scaled by the mean head width."""


def read_gguf(file: Path, fingerprint: str, cache: Path) -> tuple[Path, bool]:
    """Check a GGUF file on its first use, and read its configuration and tokenizer.

    Args:
        fingerprint: hash of the file's content.
        cache: folder of derived data, into which they are written.

    Returns:
        the folder with config.json and tokenizer.json, and False if the file lacks the unembedding.

    Raises:
        ConfigError: a package is missing, the file is damaged, or transformers cannot read it
            exactly.
    """
    lacking = [name for name in _PACKAGES if find_spec(name) is None]
    if lacking:
        raise ConfigError(
            f"{{key}}: a GGUF file is read with the packages {' and '.join(_PACKAGES)}: "
            f"pip install {' '.join(lacking)}",
            "path",
        )
    read_by = {name: metadata.version(name) for name in ("transformers", "tokenizers", "gguf")}
    folder = cache / "gguf" / f"{fingerprint}-{digest([VERSION, read_by])}"
    with suppress(FileNotFoundError, DamagedFileError):
        check_record(folder / _RECORD, quick=True)
        return folder, read_record(folder / _RECORD)["has_unembedding"]
    header = read_header(file)
    used_keys = _used_keys(header.architecture, file)
    _check_values(header, used_keys, file)
    from transformers import AutoConfig, AutoTokenizer

    config = read_light(AutoConfig, file)
    check_architecture(config, file)
    _check_meaning(config, header, used_keys, file)
    _check_size(config, header, file)
    tokenizer = read_light(AutoTokenizer, file)
    _split_digits(tokenizer, header, file)
    # The widest exponent: a weight that is not finite here is not finite in the file.
    model, fit = load_trained(file, torch.bfloat16, "eager", config)
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    there = header.size
    used = sum(weights.numel() for weights in model.state_dict(keep_vars=True).values())
    if there > used:
        say(f"{file}: the model does not use {there - used:,} of its {there:,} weights")

    def fill(new: Path) -> None:
        config.save_pretrained(new)
        tokenizer.save_pretrained(new)
        _drop_additions(new / "tokenizer.json", header)
        check_tokenizer(read_light(AutoTokenizer, new), rows, file)
        written = describe_files(new, sorted(path.name for path in new.iterdir()))
        write_record(new / _RECORD, {"has_unembedding": fit.unembedding, "files": written})

    with foreign(file, "its configuration and tokenizer cannot be written"):
        atomic_folder(folder, fill)
    return folder, fit.unembedding


def _used_keys(name: str, file: Path) -> set[str]:
    """Return the keys that transformers reads, without the architecture's name."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
    from transformers.integrations.gguf.gguf_config_mapping import GGUF_CONFIG_ARCHS
    from transformers.integrations.gguf.reader import read_gguf_metadata

    if name not in GGUF_CONFIG_ARCHS:
        plain = name.replace("-", "")
        kinds = {kind.replace("_", ""): keys for kind, keys in GGUF_CONFIG_MAPPING.items()}
        return {key for key, renamed in kinds.get(plain, {}).items() if renamed is not None}
    read: set[str] = set()

    class Recorded(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            read.add(key.removeprefix(f"{name}."))
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            read.add(key.removeprefix(f"{name}."))
            return super().get(key, default)

    with foreign(file, "transformers cannot read its configuration"):
        values, tensors = read_gguf_metadata(str(file))
        GGUF_CONFIG_ARCHS[name](Recorded(values), tensors)
    return read


def _check_values(header: Header, used: set[str], file: Path) -> None:
    """Raise `ConfigError` for values that are missing or have a wrong type."""
    name, values = header.architecture, header.values
    epsilon = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
    for keys in (("block_count",), ("embedding_length",), ("attention.head_count",), epsilon):
        if not any(f"{name}.{key}" in values for key in keys):
            raise _unusable(file, f"it does not give {name}.{keys[0]}")
    for key in sorted(used | {"block_count"}):
        value = values.get(f"{name}.{key}")
        if value is None or (isinstance(value, Length) and f"{name}.{key}" in _ARRAYS):
            continue
        real = key.endswith(_REAL)
        right = isinstance(value, int) and not isinstance(value, bool | Length)
        if not right and not (real and isinstance(value, float) and math.isfinite(value)):
            wanted = "finite" if real else "whole"
            raise _unusable(file, f"{name}.{key} must be a {wanted} number; got {_shown(value)}")
    blocks, tensors = values[f"{name}.block_count"], len(header.tensors)
    if not 0 < blocks <= tensors:
        raise _unlike(f"{blocks} blocks", f"{tensors} tensors", file)
    if rope := [tensor for tensor in header.tensors if tensor.startswith("rope_")]:
        raise _misread(file, f"its rotary positions are scaled ({rope[0]})")
    if name == "llama" and "llama.attention.head_count_kv" not in values:
        # llama.cpp stores the rows of keys in another order, which depends on it.
        raise _misread(
            file, "it does not give the number of key heads (llama.attention.head_count_kv)"
        )


def _check_meaning(config: Any, header: Header, used: set[str], file: Path) -> None:
    """Raise `ConfigError` for values that transformers leaves out, or replaces by its own."""
    name = header.architecture
    start = f"{name}."
    there = {k.removeprefix(start): v for k, v in header.values.items() if k.startswith(start)}
    if there.get("rope.scaling.type") == "linear" and there.get("rope.scaling.factor") == 1:
        there["rope.scaling.type"] = "none"
    window = there.get("attention.sliding_window")
    if isinstance(window, int) and window >= getattr(config, "max_position_embeddings", math.inf):
        there["attention.sliding_window"] = 0  # it hides nothing
    with foreign(file, "its metadata cannot be compared with the model of transformers"), quiet():
        own = _own_values(config)
    for key, value in there.items():
        known = key in _HARMLESS or _is_off(key, value, there)
        same = _equal(value, own[key]) if key in own else key in used
        if known or same or (isinstance(value, Length) and key in used):
            continue
        instead = f"use {own[key]}" if own.get(key) is not None else "leave it out"
        raise _misread(file, f"it has {start}{key}={_shown(value)}", instead)
    for key, value in _ABSENT.items():
        if key in own and key not in there and not _equal(value, own[key]):
            raise _misread(file, f"it does not give {start}{key}", f"use {own[key]}")
    if name in _LARGEST_GEMMA:
        largest = config.num_hidden_layers == _LARGEST_GEMMA[name]
        mean = config.hidden_size // config.num_attention_heads
        wanted, scalar = mean if largest else config.head_dim, config.query_pre_attn_scalar
        if wanted != scalar:
            reason = f"a {name} of its size multiplies queries by 1/sqrt({wanted})"
            raise _misread(file, reason, f"use 1/sqrt({scalar})")


def _is_off(key: str, value: Any, there: Mapping[str, Any]) -> bool:
    """Tell whether llama.cpp ignores a value."""
    if isinstance(value, str | Length):
        return False
    kind = there.get("rope.scaling.type")  # with a factor and without a type it is linear
    if key.startswith("rope.scaling.") and kind in (None, "none"):
        works = key.endswith("attn_factor") or (kind is None and key.endswith(".factor"))
        return not works or value in (0, 1)
    return value in _OFF.get(key, ())


def _own_values(config: Any) -> dict[str, Any]:
    """Return the values that a model of ``config`` uses, by llama.cpp's keys."""
    get = partial(getattr, config)
    default = type(config)()
    epsilon = next((get(name) for name in _EPSILON if hasattr(default, name)), None)
    window, context = get("sliding_window", None) or 0, get("max_position_embeddings", math.inf)
    own = {
        "attention.causal": True,
        "attention.layer_norm_epsilon": epsilon,
        "attention.layer_norm_rms_epsilon": epsilon,
        "attention.sliding_window": window if window < context else 0,
        "attn_logit_softcapping": get("attn_logit_softcapping", None) or 0,
        "final_logit_softcapping": get("final_logit_softcapping", None) or 0,
        "use_parallel_residual": get("use_parallel_residual", None),
        "expert_weights_norm": get("norm_topk_prob", None),
    }
    if not (heads := get("num_attention_heads", 0)):
        return own
    width = get("head_dim", None) or config.hidden_size // heads
    own |= {
        "attention.head_count_kv": get("num_key_value_heads", None) or heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "attention.scale": get("query_pre_attn_scalar", width) ** -0.5,
    }
    if not (rope := get("rope_parameters", None)):
        return own
    rope, local = rope.get("full_attention", rope), rope.get("sliding_attention", rope)
    kind = rope.get("rope_type", "default")
    return own | {
        "rope.dimension_count": round(width * rope.get("partial_rotary_factor", 1)),
        "rope.freq_base": rope["rope_theta"],
        "rope.freq_base_swa": local["rope_theta"],
        "rope.scaling.type": "none" if kind == "default" else kind,
        "rope.scaling.factor": rope.get("factor", 1),
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings"),
        "rope.scaling.yarn_beta_fast": rope.get("beta_fast"),
        "rope.scaling.yarn_beta_slow": rope.get("beta_slow"),
    }


def _equal(value: Any, own: Any) -> bool:
    """Compare two values; numbers up to the precision of those in the file."""
    numbers = isinstance(value, int | float) and isinstance(own, int | float)
    if numbers and not isinstance(value, Length):
        return math.isclose(value, own, rel_tol=1e-6)
    return type(value) is type(own) and value == own


def _unusable(file: Path, reason: str) -> ConfigError:
    return ConfigError(f"{{key}}: the model in {file} cannot be used: {reason}", "path")


def _misread(file: Path, reason: str, instead: str = "read it wrongly") -> ConfigError:
    return _unusable(
        file, f"{reason}, and transformers would {instead}. Use the model's safetensors"
    )


def _shown(value: Any) -> str:
    return "an array" if isinstance(value, Length) else reprlib.repr(value)


def _check_size(config: Any, header: Header, file: Path) -> None:
    """Raise `ConfigError` before a model is built that is far larger than its file."""
    from transformers import AutoModelForCausalLM

    with foreign(file, "transformers cannot build the model of its metadata"), quiet():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        wanted = sum(weights.numel() for weights in model.parameters())
    if wanted > 2 * header.size:  # if only some are missing, loading names them
        raise _unlike(f"{wanted:,} weights", f"{header.size:,}", file)


def _unlike(wanted: str, found: str, file: Path) -> ConfigError:
    return _unusable(file, f"its metadata describe {wanted}; the file has {found}")


def _split_digits(tokenizer: Any, header: Header, file: Path) -> None:
    """Let a byte-level tokenizer split text as the file says (``tokenizer.ggml.pre``).

    transformers knows how some split it, and takes GPT-2's way for all others.
    """
    if header.values.get("tokenizer.ggml.model") != "gpt2":
        return
    from tokenizers import pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    way = header.values.get("tokenizer.ggml.pre", "default")
    if way in _DIGITS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    elif way not in (*GGUF_PRE_TOKENIZER_SPLITS, *_GPT2):
        say(f"{file}: some tokens may differ from the model's own, because text is split as by "
            f"GPT-2, and not as the file says (tokenizer.ggml.pre={way})")  # fmt: skip


def _drop_additions(tokenizer: Path, header: Header) -> None:
    """Remove tokens that transformers adds to those of the file: they have no embedding."""
    values = json.loads(tokenizer.read_text(encoding="utf-8"))
    number = header.values.get("tokenizer.ggml.tokens", 0)
    values["added_tokens"] = [one for one in values["added_tokens"] if one["id"] < number]
    tokenizer.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
