"""The command line: one module for each command, which parses, calls the work and prints.

`main` dispatches. A command's module is imported when it is called, because most of them load
torch; `reseed --help`, `reseed COMMAND --help` and tab completion load neither.
"""

COMMANDS = {
    "train": "train SAEs: one, or with -m a sweep",
    "run": "train the missing runs of a comparison, compare them, print the tables",
    "compare": "compare the trained runs of a comparison, without training",
    "evaluate": "evaluate SAEs: RUN, SWEEP or SAE folders, evaluation=reconstruction,...",
    "show": "show what a latent fires on, and its matches: RUN 3,17; --partners",
    "power": "tell how many seeds and tokens a difference needs: SWEEP --difference 0.05",
    "report": "write the report of a SWEEP: --format html|md|tex, --out FOLDER",
    "check": "check whether latents replicate: LATENTS.csv or --latents 3,17; --train, --out",
    "convert": "convert an SAE to another library's format: SOURCE --to FORMAT OUT",
    "push": "push a run's SAE to the hub, with a card: RUN OWNER/NAME; --dry-run OUT",
    "status": "list runs and sweeps; --verify reads every file; SWEEP, --watch: its progress",
    "cancel": "cancel the SLURM jobs of a SWEEP",
    "cache": "list the activations in runtime.activation_cache; --clear [NAME] removes them",
    "completion": "print the shell code for tab completion (bash, zsh)",
}
"""The commands with what their one-line help says."""
