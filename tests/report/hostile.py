"""Names, tokens and a report made of text that attacks the formats in which it is shown."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pyarrow as pa
from large import hostile_contexts

from reseed.config import digest
from reseed.report.figures import write_figures
from reseed.report.page.content import ReportData
from reseed.report.page.write import data_file_names
from reseed.report.table_files import write_tables
from reseed.store.sweeps import Sweep

SCRIPT = "alert(document.domain)"
NAMES = [
    f"[click]( javascript:{SCRIPT})",
    f"[click](javascript:{SCRIPT})",
    "[click](data:text/html,<script>alert()</script>)",
    "[click](//elsewhere.example/x)",
    f"<img src=x onerror={SCRIPT}>",
    f"</title></style></script><script>{SCRIPT}</script>",
    f'"><b onmouseover="{SCRIPT}" style="position:fixed">\'',
    "<link rel=stylesheet href=https://elsewhere.example/x.css>",
    f"<javascript:{SCRIPT}>",
    "[ref]: javascript:alert",
    "![picture](https://elsewhere.example/x.png)",
    "a | b || c",
    "a `b` ``c`` ```",
    "*a* **b** ***",
    "_a_ __b__ a_b",
    "# a",
    "> a",
    "- a",
    "1. a",
    "&lt;b&gt; &amp; &#60;",
    "~~a~~ $x^2$ \\alpha \\* \\",
    "a\n\n# b\n- c\r\n    d",
    r"\input{/etc/passwd} \write18{id} ^^5cinput{x} %",
    r"}\end{tabular}\end{document}",
    "?` !` a\x1b[31mb\x00c\u202ed\u2028e",
]


def hostile_report(make_cell, folder: Path, figures: bool = False) -> ReportData:
    """Return the data of a report whose labels, paths, tokens and messages are `NAMES`.

    Args:
        figures: whether to draw figures, which takes seconds.
    """
    cells = []
    for i in range(5):
        # matplotlib would fail at this formula if it read one.
        name = " ".join(NAMES[i::5]) + " $\\frac$"
        knobs, cell = make_cell(n=2, sae=name, **{"model.path": NAMES[i]})
        renamed = {run: f"{name}-{i}-{run}" for run in cell.runs["run"]}
        latents = cell.latents.to_pandas()
        latents["run"] = latents["run"].map(renamed)
        latents["others"] = [[renamed[run] for run in others] for others in latents["others"]]
        runs = cell.runs.assign(run=cell.runs["run"].map(renamed))
        table = pa.Table.from_pandas(latents, schema=cell.latents.schema)
        cells.append((knobs, dataclasses.replace(cell, runs=runs, latents=table)))
    sweep = Sweep(folder / f"<img src=x onerror={SCRIPT}>`[x](javascript:x)-0123")
    sweep.path.mkdir(parents=True)
    identity = {"sae": "topk"}
    run = folder / f"<script>{SCRIPT}<b>[x](javascript:x)-{digest(identity)}"
    run.mkdir()
    record = {
        "identity": identity,
        "status": "running",
        "experiment": {"path": NAMES},
        "tokens": 5,
        "environment": {"command": "reseed run " + "\n".join(NAMES), "platform": NAMES[4]},
        "device": NAMES[5],
    }
    (run / "run.json").write_text(json.dumps(record))
    row = {"axes": {}, "overrides": [], "signature": digest(identity), "run": f"../{run.name}"}
    (sweep.path / "manifest.jsonl").write_text(json.dumps(row) + "\n")
    (sweep.path / "comparison.json").write_text(json.dumps({"name": NAMES[0], "grid": NAMES}))
    write_tables(cells, sweep.path, [f"incomplete: {name}" for name in NAMES])
    drawn = sorted({p.stem for p in write_figures(cells, sweep.path)}) if figures else []
    contexts = hostile_contexts(folder / "contexts", 48)
    own = {run: contexts for _, cell in cells[:2] for run in cell.runs["run"]}
    data = data_file_names(sweep.path, cells, {})
    return ReportData(sweep, cells, {}, [f"incomplete: {n}" for n in NAMES], drawn, data, own)
