"""Files of transformers models: checks before use, and loading.

A folder is refused if a file is missing or damaged, if it holds anything but a causal language
model, or if a weight is missing or has another shape than the model's. Loading checks again what it
loads, and that every weight is finite.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from reseed.errors import ConfigError
from reseed.system.console import counted, say

GGUF = ".gguf"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
_LISTED = 3
_SILENT = 50
"""Level of python's logging: critical messages only."""


def check_folder(folder: Path) -> None:
    """Raise `ConfigError` if a folder lacks a transformers model or some of its weights."""
    if not folder.is_dir():
        raise ConfigError(f"{{key}} must be an existing folder; got {folder}", "path")
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{{key}} must hold a transformers model: there is no config.json in {folder}", "path"
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ConfigError(f"{{key}} must hold weights as *.safetensors: none in {folder}", "path")
    if (folder / "adapter_config.json").exists():
        raise ConfigError(
            f"{{key}}: {folder} holds an adapter (adapter_config.json), which reseed does not "
            "apply. Merge it into its model, and save that",
            "path",
        )
    for file in weights:
        _check_weights(file)
    for file in folder.glob("*.safetensors.index.json"):
        _check_index(file)
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{{key}}: {folder / 'config.json'} is not JSON: {error}", "path"
        ) from None
    chosen = config.get("transformers_weights") if isinstance(config, dict) else None
    if chosen is not None and chosen not in [file.name for file in weights]:
        raise ConfigError(
            f"{{key}}: `transformers_weights` of {folder / 'config.json'} must name one of its "
            f"*.safetensors; got {chosen!r}",
            "path",
        )


def _check_index(file: Path) -> None:
    """Raise `ConfigError` unless an index maps weights to files of its folder that hold them."""
    try:
        places = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        lost = [p for p in places.values() if Path(p).name != p or not (file.parent / p).is_file()]
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{{key}}: {file} is not an index of weights: {error}", "path") from None
    if lost:
        raise ConfigError(f"{{key}}: {file} names {min(lost)}, no file of its folder", "path")
    for place in sorted(set(places.values())):
        with safe_open(file.parent / place, "pt") as tensors:
            names = set(tensors.keys())
        for name in (name for name, its in places.items() if its == place and name not in names):
            raise ConfigError(f"{{key}}: {file} names `{name}`, which is not in {place}", "path")


def _check_weights(file: Path) -> None:
    """Raise `ConfigError` if a safetensors file is shorter or longer than its header says."""
    try:
        with safe_open(file, "pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{{key}}: {file} is damaged: {error}", "path") from None


def check_architecture(config: Any, place: Path) -> None:
    """Raise `ConfigError` if a configuration is not that of a causal language model that loads.

    A checkpoint of the model without its unembedding (``LlamaModel``) is one, too.

    Args:
        config: the transformers configuration.
        place: folder or file of the model, for the message.
    """
    from transformers.models.auto import modeling_auto

    family = str(config.model_type)
    declared = list(config.architectures or ())
    base: Any = modeling_auto.MODEL_MAPPING_NAMES.get(family, ())
    known = {modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(family)}
    known |= {base} if isinstance(base, str) else set(base)
    unlike = declared and not any(d in known or str(d).endswith(_CAUSAL) for d in declared)
    masked = family in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    both_ways = (
        (masked and getattr(config, "is_decoder", True) is False)
        or getattr(config, "causal", True) is False
        or getattr(config, "attn_type", None) == "bi"
    )
    if None in known or unlike or both_ways or config.is_encoder_decoder:
        named = ", ".join(map(str, declared)) or family
        reason = ", whose tokens attend to later ones" if both_ways and not unlike else ""
        raise ConfigError(
            f"{{key}} must be a causal language model; {place} holds {named} (model_type "
            f"{family}){reason}",
            "model",
        )
    _check_quantization(config, place)


def _check_quantization(config: Any, place: Path) -> None:
    """Raise `ConfigError` if the weights are quantised in a way that cannot be loaded here."""
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        with quiet():
            quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
    except Exception as error:
        found = quantization if isinstance(quantization, dict) else quantization.to_dict()
        raise ConfigError(
            f"{{key}}: the weights in {place} are quantised ({found.get('quant_method')}), and "
            f"cannot be loaded here: {first_line(error)}. Save the model without quantisation",
            "model",
        ) from error


def check_tokenizer(tokenizer: Any, rows: int, place: Path) -> None:
    """Raise `ConfigError` for a tokenizer without tokens, or with ids that have no embedding.

    Special tokens may lie beyond the embedding, as those for images do in text-only models.

    Args:
        rows: number of rows of the model's embedding.
    """
    ids = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    if not set(ids.values()) - special:  # transformers makes such a tokenizer if files are missing
        raise ConfigError(
            f"{{key}}: the tokenizer in {place} has no tokens: its files are missing, or "
            "transformers cannot read them",
            "model",
        )
    beyond = {number: token for token, number in ids.items() if number >= rows}
    if ordinary := sorted(beyond.keys() - special):
        raise ConfigError(
            f"{{key}}: the tokenizer in {place} does not fit the model: the id of "
            f"{beyond[ordinary[0]]!r} is {ordinary[0]}, and the embedding has {rows} rows",
            "model",
        )


@dataclass(frozen=True)
class Fit:
    """Comparison of a model's weights with those of its files.

    Attributes:
        missing: weights that the files lack, in the model's order, without the unembedding.
        mismatched: name → shape in the files and in the model.
        unexpected: tensors that the model does not use.
        unembedding: False if the files lack the unembedding.
    """

    missing: Sequence[str]
    mismatched: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    unexpected: Sequence[str]
    unembedding: bool

    @classmethod
    def of(cls, model: nn.Module, report: Mapping[str, Any]) -> Fit:
        """Read transformers' loading report, in which tied weights are not missing."""
        last = model.get_output_embeddings()  # type: ignore[operator]
        ends = {name for name, module in model.named_modules() if module is last}
        order = {name: i for i, name in enumerate(model.state_dict())}
        lacking = sorted(report["missing_keys"], key=lambda name: (order.get(name, -1), name))
        missing = [name for name in lacking if name.rpartition(".")[0] not in ends]
        shapes = {name: (list(there), list(own)) for name, there, own in report["mismatched_keys"]}
        mismatched = {name: shapes[name] for name in sorted(shapes, key=lambda n: order.get(n, -1))}
        return cls(missing, mismatched, sorted(report["unexpected_keys"]), missing == lacking)


def check_fit(folder: Path) -> Fit:
    """Compare a folder's weights with its config.json, without reading the weights.

    Raises:
        ConfigError: a weight is missing, which transformers would draw at random, or has another
            shape than the model's.
    """
    with quiet(), foreign(folder, "transformers cannot load its weights"):
        model, report = _from_pretrained(
            folder, device_map={"": "meta"}, ignore_mismatched_sizes=True
        )
        fit = Fit.of(model, report)
        names = [name for name, _ in model.named_parameters()]
    for name, (there, own) in fit.mismatched.items():
        raise ConfigError(
            f"{{key}}: the weights in {folder} do not fit config.json: `{name}` has shape {there}, "
            f"expected {own}",
            "path",
        )
    if report["missing_keys"] >= set(names):
        raise ConfigError(
            f"{{key}}: the weights in {folder} have no name of the model of config.json, such as "
            f"{names[0]}",
            "path",
        )
    if fit.missing:
        raise ConfigError(
            f"{{key}}: the weights in {folder} do not fit config.json: `{fit.missing[0]}` is "
            "missing",
            "path",
        )
    return fit


_reported: set[str] = set()


def report_unused(fit: Fit, place: Path, fingerprint: str) -> None:
    """Print, once per model, the tensors of its files that the model does not use."""
    if fit.unexpected and fingerprint not in _reported:
        _reported.add(fingerprint)
        names = ", ".join(fit.unexpected[:_LISTED])
        more = ", ..." if len(fit.unexpected) > _LISTED else ""
        say(f"{place}: the model does not use {counted(len(fit.unexpected), 'tensor')} of its "
            f"files: {names}{more}")  # fmt: skip


class NoUnembedding(nn.Module):
    """A module in place of the unembedding that a model's files lack.

    Args:
        path: the model's folder or file.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def forward(self, *inputs: Any) -> Any:
        raise ConfigError(f"{{key}}: {no_logits(self.path)}", "model")


def no_logits(path: Path) -> str:
    """Return the reason for which a model without unembedding does not predict tokens."""
    return (
        f"{path} holds no unembedding. Its activations are exact, but it cannot predict tokens: "
        "use the files of the whole causal language model"
    )


def load_trained(
    path: Path, dtype: torch.dtype, attention: str, config: Any = None
) -> tuple[nn.Module, Fit]:
    """Load a model with its weights, on the CPU; an unembedding that the files lack stays away.

    Args:
        path: the model's folder, or its GGUF file.
        config: transformers configuration of a GGUF file, which takes seconds to read from it.

    Raises:
        ConfigError: weights cannot be loaded, are missing, or are not finite in ``dtype``.
    """
    with quiet(), foreign(path, "transformers cannot load its weights"):
        model, report = _from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            **({"config": config} if config else {}),
        )
        fit = Fit.of(model, report)
        if fit.missing:
            raise _unusable(
                path, f"the files lack {len(fit.missing)} of its weights: {fit.missing[0]}, ..."
            )
        if not fit.unembedding:
            model.set_output_embeddings(NoUnembedding(path))  # transformers drew it at random
        for name, weights in model.named_parameters():
            if weights.is_floating_point() and not _is_finite(weights):
                kind = str(dtype).removeprefix("torch.")
                raise _unusable(path, f"its weight `{name}` has NaN or infinite values in {kind}")
    return model, fit


def _from_pretrained(path: Path, **options: Any) -> tuple[Any, dict[str, Any]]:
    from transformers import AutoModelForCausalLM, GgufConfig

    if path.suffix.lower() == GGUF:
        # Weights that stay packed would be rounded in another way, which depends on the machine.
        options |= {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
        path = path.parent
    found: Any = AutoModelForCausalLM.from_pretrained(
        path,
        local_files_only=True,
        use_safetensors=True,  # a pickled checkpoint could run code
        trust_remote_code=False,  # so could Python files in the folder
        output_loading_info=True,
        **options,
    )
    return found


def _is_finite(weights: torch.Tensor) -> bool:
    if not weights.numel():
        return True
    try:
        low, high = torch.aminmax(weights)
    except (NotImplementedError, RuntimeError):  # 8-bit floats
        low, high = torch.aminmax(weights.float())
    return bool(torch.isfinite(low) & torch.isfinite(high))


def read_light(what: Any, path: Path) -> Any:
    """Load a configuration or tokenizer without running Python files of the model folder.

    Args:
        what: transformers' class, such as ``AutoConfig``.
        path: the model's folder, or its GGUF file.

    Raises:
        ConfigError: it cannot be read, or the model requires its own code.
    """
    name = "tokenizer" if "Tokenizer" in what.__name__ else "configuration"
    is_gguf = path.suffix.lower() == GGUF
    folder, options = (path.parent, {"gguf_file": path.name}) if is_gguf else (path, {})
    with foreign(path, f"transformers cannot read its {name}"), quiet():
        try:
            return what.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, **options
            )
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise ConfigError(
                f"{{key}}: {path} needs python code of its own, which reseed does not run; the "
                "architecture must be one of transformers",
                "model",
            ) from error


@contextmanager
def foreign(place: Path, what: str) -> Iterator[None]:
    """Raise `ConfigError` for any error that a model's files cause in transformers."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "")
        raise _unusable(place, f"{what} ({type(error).__name__}: {reason.strip()})") from error


def _unusable(place: Path, reason: str) -> ConfigError:
    return ConfigError(f"{{key}}: the model in {place} cannot be used: {reason}", "model")


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the progress bars and warnings of transformers, whose reports the caller reads."""
    from transformers.utils import logging

    shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(_SILENT)
    try:
        with redirect_stderr(io.StringIO()):  # some bars are tqdm's own
            yield
    finally:
        logging.set_verbosity(level)
        if shown:
            logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
