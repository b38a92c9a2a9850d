"""Errors as a person should see them: one message, no traceback, a non-zero exit status."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from hydra.errors import HydraException, MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from reseed.config import ReseedError, nearest


def reported(job: Callable[[], int | None]) -> int:
    """Run ``job``; print what goes wrong.

    Returns:
        0, or what the job returned; 1 for an error of ours or of the configuration; 130 where a
        signal asked for the end.
        Anything else is a defect of reseed, and is shown with its traceback.
    """
    try:
        with _terminable():
            return job() or 0
    except ReseedError as error:
        return _say(str(error))
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (HydraException, OmegaConfBaseException) as error:
        return _say(_in_our_words(error))
    except OSError as error:
        return _say(f"cannot read or write {error.filename}: {error.strerror}")
    except MemoryError as error:
        return _say(f"not enough memory: {error}")
    except KeyboardInterrupt as stop:
        what = str(stop) or "interrupted; what was saved stands, and the same command goes on"
        print(what, file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return _say("this is a defect of reseed: please report it with the traceback above")


@contextmanager
def _terminable() -> Iterator[None]:
    """Within it SIGTERM ends the command at once: what is written is written whole. Training has a
    handler of its own, which saves first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(
            "stopped by SIGTERM; what was saved stands, and the same command goes on"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 1


def _in_our_words(error: Exception) -> str:
    text = str(error)
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, option = error.missing_cfg_file.rpartition("/")
        options = ", ".join(sorted(error.options))
        return (
            f"`{group}` has no option `{option}`.{nearest(option, error.options)} "
            f"Options: {options}."
        )
    missing = re.search(r"Key '([^']*)' is not in struct\s+full_key: (\S+)", text)
    if missing:
        key = missing[2]
        return f"there is no key `{key}`.{nearest(key, _known_keys(key))}"
    sweep = re.search(r"Ambiguous value for argument '(.*?)'", text)
    if sweep:
        return f"`{sweep[1]}` lists several values: add -m to sweep over them"
    unused = re.search(r"Could not override '([^']*)'", text)
    if unused:
        return f"there is no key `{unused[1]}`.{nearest(unused[1], _known_keys(unused[1]))}"
    mandatory = re.search(r"Missing mandatory value: (\S+)", text)
    if mandatory:
        return f"`{mandatory[1]}` is required: give it a value"
    return " ".join(line.strip() for line in text.splitlines() if line.strip())


def _known_keys(key: str) -> Iterable[str]:
    """Keys beside ``key``: those of its group's default option, or those at the root."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig, OmegaConf

    from reseed.cli.app import CONFIG_NAME, conf_dir

    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        config = compose(config_name=CONFIG_NAME)
    parent, _, _ = key.rpartition(".")
    node = OmegaConf.select(config, parent) if parent else config
    if not isinstance(node, DictConfig):
        node, parent = config, ""
    names = [str(name) for name in node if not str(name).startswith("_")]
    return [f"{parent}.{name}" if parent else name for name in names]
