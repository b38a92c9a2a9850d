"""Test of the wheel in its own environment, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_works_outside_the_checkout(tmp_path: Path) -> None:
    dist, empty = tmp_path / "dist", tmp_path / "empty"
    empty.mkdir()
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "reseed/conf/config.yaml" in names
    assert "reseed/assets/model/model.safetensors" in names
    for asset in ("style.css", "theme.js", "page.js", "list.js", "latent.js", "browser.js"):
        assert f"reseed/report/page/assets/{asset}" in names
    assert "hydra_plugins/reseed_plugins/fused.py" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]

    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RESEED_CONFIG_DIR")}
    found = subprocess.run(
        [
            str(environment / "bin" / "reseed"), "run", "comparison=quickstart",
            "training.tokens=32768", "dataset.held_out_tokens=4096", "sae.num_latents=128",
        ],
        cwd=empty, env=clean, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr
    (sweep,) = (empty / "sweeps").iterdir()
    for name in ("manifest.jsonl", "summary.csv", "summary.md", "pairs.csv", "latents.parquet"):
        assert (sweep / name).is_file(), name
    assert (sweep / "report" / "browser.js").is_file()
    assert len(list((empty / "outputs").iterdir())) == 6
