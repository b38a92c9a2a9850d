"""Results of a sweep: tables, notes and the figure."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

SAME_FVU = 1.5
"""Largest ratio of a contender's FVU to reseed's for which both count as the same work."""
ALLOWED = 1.10
"""Largest accepted ratio of a fused sweep's time to that of its parts."""
GOALS = {"sae-lens": 3, "sparsify": 2}
"""Target ratio of each peer's time to reseed's."""
NOTES = """\
Notes
- The same for all: tokens and their packing (including first positions, which sparsify cannot leave
  out, and special tokens), Adam with a learning rate that rises and then falls linearly, tokens per
  step, no active AuxK, TopK's initial gain (sparsify's 1/√3, which it has no option for), threads
  (GOMP_SPINCOUNT=10000, as reseed sets it).
- Order: reseed shuffles within 65,536 tokens, sae-lens in its buffer (its default: 20 sequences),
  sparsify not at all.
- sparsify runs the model to its last layer, has no ReLU, trains on unscaled activations, does not
  clip gradients, starts b_dec at the first batch's mean. Its final checkpoint is turned off.
- sae-lens clips gradients, as reseed does, starts b_dec at 0 and does not keep decoder rows at norm
  1. It takes the scale of the inputs from 16 batches (its default: 1,000), which it reads only for
  that; they come again at the end. Its TopK has sparse latents, which are faster than its default.
- reseed logs its curve, saves the finished state, then measures 4,096 held-out tokens and writes
  its records; the peers do none of this."""


def possible(contender: str) -> bool:
    """Return True if the library of a contender is installed."""
    needs = {"sparsify": "sparsify", "saelens_multi": "sae_lens", "saelens_single": "sae_lens"}
    return importlib.util.find_spec(needs.get(contender, "json")) is not None


def title(result: dict[str, Any]) -> str:
    plan = result["plan"]
    layers = ", ".join(map(str, plan["layers"]))
    return (
        f"{result['label']}, layers {layers}: {' and '.join(plan['architectures'])} × "
        f"{len(plan['seeds'])} seeds, {result['d_in']} × {plan['num_latents']:,}, "
        f"{plan['tokens']:,} tokens in batches of {plan['batch']:,}, {plan['threads']} threads "
        f"(tokenised in {result['tokenising_s']:.1f} s)"
    )


def compared(result: dict[str, Any], contenders: dict[str, tuple[str, str]]) -> str:
    """Return the table of a sweep, the check for the same work, and the cost of the parts."""
    lines = [
        f"\n{'':28}{'training s':>11}{'CPU s':>9}{'reseed is':>11}{'(CPU)':>8}"
        f"{'start s':>9}{'after s':>9}{'processes':>11}{'peak MiB':>10}"
    ]
    yardstick: dict[str, dict[str, Any]] = {}
    for name, found in result["measured"].items():
        which, called = contenders[name]
        ours = yardstick.setdefault(which, found)
        training = found["training"]
        ratio = {unit: training[unit] / ours["training"][unit] for unit in ("wall", "cpu")}
        part = f"{result['saes'][name]} SAEs" if which == "all" else f"{result['saes'][name]} TopK"
        lines.append(
            f"{part:8}{called:20.28}{training['wall']:11,.1f}{training['cpu']:9,.1f}"
            f"{ratio['wall']:10.2f}×{ratio['cpu']:7.2f}×{found['start']['wall']:9.1f}"
            f"{found['after']['wall']:9.1f}{found['processes']:11.0f}{found['peak'] / 2**20:10,.0f}"
        )
        if (found["groups"] or 1) > 1:
            lines.append(f"{'':8}(in {found['groups']:.0f} groups in a process)")
    return "\n".join([*lines, "", *same_work(result, contenders), *of_its_parts(result)])


def summary(result: dict[str, Any]) -> str:
    """Return a line with the speed of the fused sweep against the others, and the goals."""

    def ratio(other: str, own: str) -> str:
        ours, theirs = (result["measured"][name]["training"] for name in (own, other))
        return f"{theirs['wall'] / ours['wall']:.2f}× (CPU {theirs['cpu'] / ours['cpu']:.2f}×)"

    measured = result["measured"]
    told = []
    if {"fused", "separate"} <= set(measured):
        told.append(f"{ratio('separate', 'fused')} separate runs")
    runners = [name for name in ("saelens_multi", "saelens_single") if name in measured]
    if runners and "fused" in measured:
        better = min(runners, key=lambda name: measured[name]["training"]["wall"])
        called = "runner of many" if better == "saelens_multi" else "single runs"
        told.append(f"{ratio(better, 'fused')} sae-lens' {called} (goal {GOALS['sae-lens']}×)")
    if {"fused_topk", "sparsify"} <= set(measured):
        told.append(
            f"TopK half {ratio('sparsify', 'fused_topk')} eai-sparsify (goal {GOALS['sparsify']}×)"
        )
    return f"{result['label']}: fused is {', '.join(told)}" if told else ""


def same_work(result: dict[str, Any], contenders: dict[str, tuple[str, str]]) -> list[str]:
    """Return lines with the mean FVU and L0 of every contender's SAEs, compared with reseed's."""
    cells: dict[str, dict[str, tuple[float, float]]] = {}
    for contender, saes in result["fvu"].items():
        for name in saes:
            cell = name.rpartition("-seed")[0]
            cells.setdefault(contender, {}).setdefault(cell, (0.0, 0.0))
            of_cell = [m for n, m in saes.items() if n.startswith(f"{cell}-")]
            cells[contender][cell] = (
                sum(m["fvu"] for m in of_cell) / len(of_cell),
                sum(m["l0"] for m in of_cell) / len(of_cell),
            )
    names = list(next(iter(cells.values())))
    lines = [f"{'held-out FVU (L0)':28}" + "".join(f"{name:>20}" for name in names)]
    reference: dict[str, tuple[float, float]] = next(iter(cells.values()))
    for contender, found in cells.items():
        which, called = contenders[contender]
        line = f"{'all' if which == 'all' else 'TopK':8}{called:20}"
        for name in names:
            if name not in found:
                line += f"{'':20}"
                continue
            fvu, l0 = found[name]
            ratio = fvu / reference[name][0]
            mark = " " if 1 / SAME_FVU <= ratio <= SAME_FVU else "!"
            line += f"{fvu:11.4f} ({l0:5.1f}){mark}"
        lines.append(line)
    if any("!" in line for line in lines[1:]):
        lines.append(
            f"! FVU differs by more than {SAME_FVU}×: NOT THE SAME WORK, so times do not compare"
        )
    if "identical" in result:
        same, both = result["identical"]
        lines.append(f"bit-identical in fused and separate: {same} of {both} SAEs")
    return lines


def of_its_parts(result: dict[str, Any]) -> list[str]:
    """Compare the fused sweep with the model's pass plus the steps of every SAE."""
    if "fused" not in result["measured"]:
        return []
    floor, plan = result["floor"], result["plan"]
    of_each = len(plan["layers"]) * len(plan["seeds"])
    lines = []
    for unit, called in (("wall", "wall"), ("cpu", "CPU")):
        steps = {a: of_each * floor[a][unit] for a in plan["architectures"]}
        least = floor["model_pass"][unit] + sum(steps.values())
        told = " + ".join(f"{of_each} × {floor[a][unit]:.1f} ({a})" for a in steps)
        ratio = result["measured"]["fused"]["training"][unit] / least
        model = floor["model_pass"][unit]
        lines.append(
            f"parts alone, {called} s: model {model:.1f} + {told} = {least:.1f}; "
            f"fused takes {ratio:.2f}× (goal: {ALLOWED:.2f}×)"
        )
    return ["", *lines]


def grown(result: dict[str, Any]) -> str:
    """Return the table of a fused sweep's cost by the number of SAEs."""
    found = result["growth"]
    fused, floor = found["fused"], found["floor"]
    single = fused["1"]["training"]
    lines = [
        f"\nTopK SAEs of layer {result['plan']['layers'][0]} of {result['label']}, "
        f"{found['tokens']:,} tokens; alone: model {floor['model_pass']['wall']:.1f} s, "
        f"steps of one {floor['topk']['wall']:.1f} s",
        f"{'SAEs':>6}{'fused s':>10}{'CPU s':>9}{'singles take':>14}{'(CPU)':>8}"
        f"{'of its parts':>14}{'(CPU)':>8}{'peak MiB':>10}",
    ]
    for count, measured in sorted(fused.items(), key=lambda item: int(item[0])):
        training, number = measured["training"], int(count)
        times = {unit: number * single[unit] / training[unit] for unit in ("wall", "cpu")}
        parts = {
            unit: training[unit] / (floor["model_pass"][unit] + number * floor["topk"][unit])
            for unit in ("wall", "cpu")
        }
        lines.append(
            f"{number:6}{training['wall']:10,.1f}{training['cpu']:9,.1f}"
            f"{times['wall']:13.2f}×{times['cpu']:7.2f}×{parts['wall']:13.2f}×{parts['cpu']:7.2f}×"
            f"{measured['peak'] / 2**20:10,.0f}"
        )
    return "\n".join(lines)


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Plot time against the number of SAEs: fused, as single runs, and the parts alone."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    results = [result for result in results if "growth" in result]
    figure, axis = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    counts = sorted({int(count) for result in results for count in result["growth"]["fused"]})
    for number, result in enumerate(results):
        found, colour = result["growth"], f"C{number}"
        own = sorted((int(n), each["training"]["wall"]) for n, each in found["fused"].items())
        single, numbers = own[0][1], [count for count, _ in own]
        model, step = (found["floor"][part]["wall"] for part in ("model_pass", "topk"))
        label = f"{result['label']}, {result['d_in']} × {result['plan']['num_latents']:,}"
        axis.plot(*zip(*own, strict=True), "o-", color=colour, label=f"fused, {label}")
        axis.plot(numbers, [n * single for n in numbers], "--", color=colour, label="single runs")
        parts = [model + n * step for n in numbers]
        axis.plot(numbers, parts, ":", color=colour, label="model's pass + steps, alone")
    axis.set(xscale="log", yscale="log", xlabel="SAEs", ylabel="seconds of training")
    axis.set_xticks(counts, [f"{n:,}" for n in counts])
    axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
    print(f"drawn: {path}")
