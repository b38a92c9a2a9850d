"""Tab completion: ``eval "$(reseed completion bash)"``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from reseed.cli import COMMANDS

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


def main(arguments: Sequence[str]) -> int:
    shell = arguments[0] if arguments else "bash"
    if shell not in ("bash", "zsh"):
        print(f"error: completion supports bash and zsh; got {shell}", file=sys.stderr)
        return 2
    if shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(_BASH.format(commands=" ".join(COMMANDS)))
    return 0
