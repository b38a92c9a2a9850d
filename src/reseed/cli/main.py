"""The command ``reseed``, which picks a sub-command. Heavy imports wait until they are needed."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

from reseed import __version__

COMMANDS = {
    "train": "train SAEs: one, or with -m a sweep",
    "run": "train the missing runs of a comparison, compare them, print the tables",
    "compare": "compare the trained runs of a comparison, without training",
    "evaluate": "evaluate SAEs: RUN, SWEEP or SAE folders, evaluation=reconstruction,...",
    "show": "show what a latent fires on, and its matches: RUN 3,17; --partners",
    "report": "write the report of a SWEEP: --format html|md|tex, --out FOLDER",
    "check": "check whether latents replicate: LATENTS.csv or --latents 3,17; --train, --out",
    "convert": "convert an SAE to another library's format: SOURCE --to FORMAT OUT",
    "push": "push a run's SAE to the hub, with a card: RUN OWNER/NAME; --dry-run OUT",
    "status": "list runs and sweeps, or the runs of a SWEEP (--watch: refresh until it ends)",
    "cancel": "cancel the SLURM jobs of a SWEEP",
    "cache": "list the activations in runtime.activation_cache; --clear [NAME] removes them",
    "completion": "print the shell code for tab completion (bash, zsh)",
}

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


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a sub-command and exit with its status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = arguments[0] if arguments else "--help"
    if command in ("--help", "-h", "help"):
        listed = "\n".join(f"  {name:11s} {text}" for name, text in COMMANDS.items())
        print(_HELP.format(commands=listed, version=__version__))
        sys.exit(0)
    if command in ("--version", "-V"):
        print(f"reseed {__version__}")
        sys.exit(0)
    if command not in COMMANDS:
        from reseed.errors import nearest

        names = ", ".join(COMMANDS)
        print(
            f"error: there is no command `{command}`.{nearest(command, COMMANDS)} "
            f"The commands are {names}.",
            file=sys.stderr,
        )
        sys.exit(2)
    # Idle OpenMP threads that spin for long slow a shared machine down; threads that sleep at once
    # slow a quiet machine down (measured: benchmarks/README.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    sys.exit(_run(command, arguments[1:]))


def _run(command: str, arguments: Sequence[str]) -> int:
    try:
        module = import_module(f"reseed.cli.{command}")
        status = module.main(arguments)
    except KeyboardInterrupt:  # during the imports, before the command has its own handler
        print("interrupted; nothing was started", file=sys.stderr)
        status = 128 + signal.SIGINT
    if status > 128:
        # The message is printed already; a second Ctrl-C ends the process without a traceback.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status
