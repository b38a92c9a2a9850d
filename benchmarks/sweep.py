"""Cost of a whole sweep: fused, as separate runs, and with eai-sparsify and sae-lens.

    python benchmarks/sweep.py                  # embedded model, and stories260K if available
    python benchmarks/sweep.py --model FOLDER --text FILE --tokens 4194304
    python benchmarks/sweep.py --growth 1,2,4,8,16,32 --figure docs/images/sweep-growth.png
    python benchmarks/sweep.py --dry            # smoke run of a minute or two

12 SAEs: TopK and ReLU × 3 seeds × 2 layers, on the same tokens, with the same width, k, batch size,
context length, learning rate and number of threads, in float32:

- reseed, fused: one command `reseed train -m …`;
- reseed, separate: twelve commands `reseed train …`, each in a fresh process;
- sae-lens: its multi-SAE runner, and its single-SAE runner twelve times in fresh processes;
- the TopK half: reseed's command for it, and eai-sparsify's one job (`layers` × `init_seeds`).

Every measurement runs in a separate process, which makes its peak memory measurable. Training lasts
from the model's first pass to the end of the last step. Start-up (imports, configuration, loading
of model and tokens) and the time after training (reseed measures and writes its results; for the
peers this is turned off) are shown separately. Text is tokenised once for all, before the timing.
Contenders take turns, and medians over the rounds are reported. reseed's code compares the FVU of
all SAEs on the same held-out activations, to check that the work is the same.

`--growth` measures a fused sweep of TopK SAEs of one layer by their number, against as many single
runs and against its parts: one pass of the bare model, and every SAE's steps, each timed alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from contenders import missing
from sweeps import ours, parts, peers, tables
from sweeps.plan import CHUNK, Plan, Sae
from sweeps.processes import Clock, FailedError, in_process

REAL = ("models/stories260K", "text/tinystories_train.txt")
"""Paths in the folder RESEED_TEST_DATA of the second model and its text."""
PEERS = {
    "sparsify": peers.sparsify,
    "saelens_multi": peers.saelens_multi,
    "saelens_single": peers.saelens_single,
}
CONTENDERS = {
    "fused": ("all", "reseed, fused"),
    "separate": ("all", "reseed, separate"),
    "saelens_multi": ("all", "sae-lens, multi"),
    "saelens_single": ("all", "sae-lens, one by one"),
    "fused_topk": ("topk", "reseed, fused"),
    "sparsify": ("topk", "eai-sparsify, one job"),
}
"""Name → set of SAEs, name in the table. Ratios are relative to the first contender of each set."""
ALONE = ("separate", "saelens_single")
"""Contenders that train one SAE per process."""


def worker(task: dict[str, Any]) -> None:
    """Run one measurement in this process and write its result."""
    plan = Plan.of(task["plan"])
    folders = [Path(folder) for folder in task.get("folders", ())]
    if task["what"] == "prepare":
        result: Any = parts.prepare(plan)
    elif task["what"] == "fvu":
        result = parts.fvu(folders, plan)
    elif task["what"] == "model_pass":
        result = parts.model_pass(plan)
    elif task["what"] == "sae_step":
        result = parts.sae_step(plan, task["architecture"])
    else:
        saes = [Sae(**values) for values in task["saes"]]
        clock, weights, told = Clock(task["spawned"]), {}, {}
        if task["what"] == "reseed":
            told = ours.train(plan, saes, folders[0], clock)
        else:
            weights = PEERS[task["what"]](plan, saes, clock)
        result = {**clock.phases(), **told}
        parts.save(weights, folders[0], plan)  # of a peer; not timed
    Path(task["result"]).write_text(json.dumps(result))


def run(what: str, plan: Plan, **task: Any) -> Any:
    """Run `worker` in a fresh process."""
    return in_process(__file__, {"what": what, "plan": plan.plain(), **task}, plan.threads)


def train(contender: str, plan: Plan, saes: Sequence[Sae], folder: Path) -> dict[str, Any]:
    """Run all processes of a contender in sequence; return summed times and the highest peak."""
    ours.forget(folder)
    what = contender if contender in PEERS else "reseed"
    jobs = [[sae] for sae in saes] if contender in ALONE else [list(saes)]
    found = [
        run(what, plan, saes=[vars(sae) for sae in job], folders=[str(folder)]) for job in jobs
    ]
    total: dict[str, Any] = {
        phase: {unit: sum(each[phase][unit] for each in found) for unit in ("wall", "cpu")}
        for phase in ("start", "training", "after")
    }
    return total | {
        "processes": len(found),
        "peak": max(each["peak"] for each in found),
        "groups": found[0].get("groups"),
    }


def median(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the median over rounds of every number."""
    return {
        key: {unit: statistics.median(r[key][unit] for r in rounds) for unit in value}
        if isinstance(value, dict)
        else (statistics.median(r[key] for r in rounds) if value is not None else None)
        for key, value in rounds[0].items()
    }


def compare(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Run the sweep with every contender."""
    chosen = [name for name in CONTENDERS if name in options.contenders]
    saes = {
        name: [s for s in plan.saes if CONTENDERS[name][0] in ("all", s.architecture)]
        for name in chosen
    }
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in chosen}
    for number in range(options.rounds):
        for name in list(rounds):
            try:
                rounds[name].append(train(name, plan, saes[name], plan.folder(name)))
            except FailedError as error:  # the results of the others must not be lost
                print(f"{_called(name)} is left out: {error}", flush=True)
                del rounds[name]
                continue
            seconds = rounds[name][-1]["training"]["wall"]
            print(f"  round {number + 1}: {_called(name)}: {seconds:,.1f} s", flush=True)
    if not rounds:
        return {}
    result = {
        "measured": {name: median(found) for name, found in rounds.items()},
        "saes": {name: len(found) for name, found in saes.items()},
        "fvu": run("fvu", plan, folders=[str(plan.folder(name)) for name in rounds]),
    }
    if {"fused", "separate"} <= set(rounds):
        result["identical"] = parts.identical(plan.folder("fused"), plan.folder("separate"))
    return result


def floor(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Time the parts of a sweep alone; return medians over the rounds."""
    found = [
        {"model_pass": run("model_pass", plan)}
        | {a: run("sae_step", plan, architecture=a) for a in plan.architectures}
        for _ in range(options.rounds)
    ]
    return median(found)


def growth(plan: Plan, options: argparse.Namespace) -> dict[str, Any]:
    """Run fused sweeps of increasing numbers of TopK SAEs of the first layer, on fewer tokens."""
    tokens = min(options.growth_tokens, plan.tokens)
    small = replace(plan, tokens=tokens, layers=plan.layers[:1], architectures=("topk",))
    counts = sorted({1, *options.growth})  # 1 is the reference for single runs
    rounds: list[dict[str, Any]] = []
    for number in range(options.rounds):
        rounds.append({})
        for count in counts:
            part = replace(small, seeds=tuple(range(count)))
            rounds[-1][str(count)] = train("fused", part, part.saes, plan.folder("growth"))
            seconds = rounds[-1][str(count)]["training"]["wall"]
            print(f"  round {number + 1}: {count} fused: {seconds:,.1f} s", flush=True)
    fused = {count: median([found[count] for found in rounds]) for count in rounds[0]}
    return {"tokens": small.tokens, "fused": fused, "floor": floor(small, options)}


def _called(name: str) -> str:
    which, title = CONTENDERS[name]
    return title if which == "all" else f"{title} (TopK half)"


def plans(options: argparse.Namespace, work: Path) -> list[Plan]:
    """Return a plan for each model."""
    data = os.environ.get("RESEED_TEST_DATA")
    real = [Path(data) / part for part in REAL] if data else []
    models = options.model or ["embedded", *([str(real[0])] if real and not options.dry else [])]
    made = []
    for number, model in enumerate(models):
        text = options.text
        if text is None and model != "embedded":
            if not real:
                raise SystemExit(f"--text must name a file for --model {model}")
            text = str(real[1])
        folder = work / str(number)
        folder.mkdir()
        made.append(
            Plan(
                model=model if model == "embedded" else str(Path(model).resolve()),
                text=None if text is None else str(Path(text).resolve()),
                layers=options.layers,
                seeds=tuple(range(options.seeds)),
                tokens=options.tokens,
                num_latents=options.num_latents,
                threads=options.threads,
                work=str(folder),
            )
        )
    return made


def measure(plan: Plan, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Run all measurements of one model; yield the results so far after each of them."""
    info = run("prepare", plan)
    result: dict[str, Any] = {"plan": plan.plain(), "label": plan.label, **info}
    print(f"\n{tables.title(result)}", flush=True)
    if options.contenders and (found := compare(plan, options)):
        result |= {**found, "floor": floor(plan, options)}
        print(tables.compared(result, CONTENDERS), flush=True)
        yield result
    if options.growth:
        result["growth"] = growth(plan, options)
        print(tables.grown(result), flush=True)
        yield result


def _chunks(text: str) -> int:
    """Round a number of tokens down to whole chunks, because reseed reads whole chunks."""
    if int(text) < CHUNK:
        raise argparse.ArgumentTypeError(f"must be at least {CHUNK:,}")
    return int(text) - int(text) % CHUNK


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", nargs="+", help="embedded, or folders of transformers models")
    parser.add_argument("--text", help="file of plain text; default for embedded: docstrings")
    parser.add_argument("--layers", type=_numbers, default=(1, 2), help="for example 1,2")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--tokens", type=_chunks, default=2**21, help="tokens that each SAE sees")
    parser.add_argument("--num-latents", type=int, default=4_096)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="for every contender")
    parser.add_argument("--rounds", type=int, default=1, help="medians are over this many rounds")
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=[*CONTENDERS])
    parser.add_argument("--growth", type=_numbers, default=(), help="numbers of SAEs: 1,2,4,8")
    parser.add_argument(
        "--growth-tokens", type=_chunks, default=2**19, help="tokens per SAE for --growth"
    )
    parser.add_argument("--figure", type=Path, help="plot the results of --growth into this file")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--draw", type=Path, help="only plot the numbers of this --json file")
    parser.add_argument("--work", type=Path, help="folder for results; default: deleted at the end")
    parser.add_argument("--dry", action="store_true", help="smoke run: too small for valid numbers")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.dry:
        options.tokens, options.growth_tokens, options.num_latents = CHUNK, CHUNK, 512
        options.seeds, options.layers, options.rounds = 1, options.layers[:1], 1
        options.growth = options.growth or (1, 2)
    if options.figure and not (options.growth or options.draw):
        parser.error("--figure needs --growth, or --draw with its numbers")
    return options


def main() -> None:
    options = arguments()
    if options.task:
        worker(json.loads(options.task))
        return
    if options.draw:
        tables.draw(json.loads(options.draw.read_text()), options.figure)
        return
    there = [name for name in options.contenders if tables.possible(name)]
    if there != options.contenders:
        print("\n".join(missing(["topk"])))
        options.contenders = there
    if options.work is not None:
        options.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="sweep-", dir=options.work))
    try:
        results: dict[str, dict[str, Any]] = {}
        for plan in plans(options, work):
            for result in measure(plan, options):
                results[plan.work] = result
                if options.json:
                    options.json.write_text(json.dumps([*results.values()], indent=2) + "\n")
    except FailedError as error:
        raise SystemExit(str(error)) from None
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    print("\n" + tables.NOTES + "\n")
    print("\n".join(tables.summary(each) for each in results.values() if "measured" in each))
    if options.figure:
        tables.draw([*results.values()], options.figure)


if __name__ == "__main__":
    main()
