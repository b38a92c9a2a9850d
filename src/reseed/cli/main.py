"""The command ``reseed``, which runs a sub-command. Slow imports are delayed until needed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from reseed import __version__
from reseed.cli import COMMANDS
from reseed.errors import did_you_mean, is_unicode
from reseed.system.console import STREAMS, open_streams

_HELP = """\
reseed - would I have found these features with another seed?

usage: reseed COMMAND [KEY=VALUE ...] [-m]

{commands}

The five knobs:
  model=embedded|path|pythia-160m|...   layer=2   dataset=docstrings|text_files|pile|...
  sae=topk|batch_topk|matryoshka|jumprelu|gated|relu   seed=0
Every other key can be overridden too: `reseed train --cfg job` shows them all.

  reseed run comparison=quickstart
  reseed train model=pythia-160m layer=6 dataset=pile sae=topk seed=0
  reseed train -m layer=0,1,2,3 sae=topk,relu seed=0,1,2
  reseed run comparison=seeds model=path model.path=FOLDER \\
             dataset=text_files dataset.path=FILE sae=topk,relu seed=0,1,2

See also `reseed COMMAND --help`. Version {version}.
"""


def _use_utf8() -> None:
    """Restart the interpreter in its UTF-8 mode unless the locale has this encoding.

    Runs are named and listed in UTF-8, so that a folder can be used under every locale. Only the
    streams keep the locale's encoding.
    """
    if sys.flags.utf8_mode or sys.getfilesystemencoding() == "utf-8" or not sys.executable:
        return
    if "PYTHONIOENCODING" not in os.environ and sys.stdout is not None:
        os.environ["PYTHONIOENCODING"] = f"{sys.stdout.encoding}:replace"
    os.environ["PYTHONUTF8"] = "1"  # for the processes that this one starts
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a sub-command and exit with its status.

    Args:
        arguments: given by a caller in Python, whose process goes on: its signal handlers stay.
            None: those of the command line.
    """
    if arguments is None:
        _use_utf8()
        open_streams()
    try:
        status = _status(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except OSError as error:
        if error.filename not in STREAMS:
            raise
        print(f"error: cannot write to {error.filename}: {error.strerror}", file=sys.stderr)
        status = 1
    if arguments is None and status > 128:
        # The message is printed already; a second Ctrl-C ends the process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.exit(status)


def _status(arguments: Sequence[str]) -> int:
    """Run a sub-command and return its status."""
    for word in arguments:
        if not is_unicode(word):
            print(f"error: an argument is not UTF-8 text: {word!a}", file=sys.stderr)
            return 2
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h", "help"):
        listed = "\n".join(f"  {name:11s} {text}" for name, text in COMMANDS.items())
        print(_HELP.format(commands=listed, version=__version__))
        return 0
    if command in ("--version", "-V"):
        print(f"reseed {__version__}")
        return 0
    if command not in COMMANDS:
        names = ", ".join(COMMANDS)
        print(
            f"error: there is no command `{command}`.{did_you_mean(command, COMMANDS)} "
            f"The commands are {names}.",
            file=sys.stderr,
        )
        return 2
    # If idle OpenMP threads spin for long, a shared machine is slower; if they sleep at once, an
    # idle machine is slower (measured: benchmarks/README.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    return _run(command, arguments[1:])


# Hydra completes the words after the sub-command, so the script cuts the sub-command off first.
_BASH = """\
_reseed_completion() {{
    local first="${{COMP_WORDS[1]}}"
    if [ "$COMP_CWORD" -le 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$first"))
        return
    fi
    local rest="${{COMP_LINE#*"$first"}}"
    local found
    found=$(COMP_LINE="reseed$rest" reseed "$first" -sc query=bash 2>/dev/null)
    COMPREPLY=($found)
}}
COMP_WORDBREAKS=${{COMP_WORDBREAKS//=}}
COMP_WORDBREAKS=${{COMP_WORDBREAKS//:}}
complete -o nospace -o default -F _reseed_completion reseed
"""

_ELSEWHERE = {"cancel": ("status", "cancel"), "push": ("convert", "push")}
_OWN_HELP = ("convert", "power", "push")
_WITHOUT_HYDRA = ("convert", "push")


def _dispatch(command: str, arguments: Sequence[str]) -> int:
    """Print help, configuration or completion if requested; else run the command's module."""
    if command == "completion":
        return _print_completion(arguments[0] if arguments else "bash")
    if command in _OWN_HELP and {"-h", "--help"} & set(arguments):
        from reseed.cli import arguments as parsers

        getattr(parsers, f"{command}_parser")().print_help()
        return 0
    if command not in _WITHOUT_HYDRA:
        from reseed.cli import hydra_app
        from reseed.cli.errors import run_and_report

        if hydra_app.asks_to_show(arguments):
            return run_and_report(lambda: hydra_app.show(command, arguments))
    module, function = _ELSEWHERE.get(command, (command, "main"))
    return getattr(import_module(f"reseed.cli.{module}"), function)(arguments)


def _print_completion(shell: str) -> int:
    """Print the code that `eval "$(reseed completion bash)"` runs in the user's shell."""
    if shell not in ("bash", "zsh"):
        print(f"error: completion supports bash and zsh; got {shell}", file=sys.stderr)
        return 2
    if shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(_BASH.format(commands=" ".join(COMMANDS)))
    return 0


def _run(command: str, arguments: Sequence[str]) -> int:
    try:
        return _dispatch(command, arguments)
    except KeyboardInterrupt:  # during the imports, before the command has its own handler
        print("interrupted; nothing was started", file=sys.stderr)
        return 128 + signal.SIGINT
