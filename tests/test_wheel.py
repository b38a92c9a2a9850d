"""Test of the wheel in its own environment, outside the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib.metadata import Distribution, PathDistribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    return wheel


def requirements(found: Distribution, extra: str) -> Iterator[Requirement]:
    for text in found.requires or ():
        one = Requirement(text)
        if one.marker is None or one.marker.evaluate({"extra": extra}):
            yield one


def dependencies(
    found: Distribution, extra: str = "", seen: set[tuple[str, str]] | None = None
) -> set[str]:
    """Return the names of all distributions that one needs, directly or not."""
    seen = set() if seen is None else seen
    for requirement in requirements(found, extra):
        for more in ("", *requirement.extras):
            if (requirement.name, more) not in seen:
                seen.add((requirement.name, more))
                dependencies(distribution(requirement.name), more, seen)
    return {name for name, _ in seen}


def link_dependencies(wheel: Path, environment: Path) -> None:
    """Link the packages that the wheel requires, and no others, from this environment.

    Copying them with pip takes minutes.
    """
    (metadata,) = (p for p in zipfile.Path(wheel).iterdir() if p.name.endswith(".dist-info"))
    ours = Path(sysconfig.get_path("purelib"))
    site = environment / ours.relative_to(sys.prefix)
    for name in dependencies(PathDistribution(metadata)):
        for top in {file.parts[0] for file in distribution(name).files or ()}:
            link = site / top
            # Two distributions may share a folder; `..` leads to scripts.
            if top not in ("..", "__pycache__") and not link.is_symlink():
                link.symlink_to(ours / top)


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_configuration_and_its_assets(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "reseed/conf/config.yaml" in names
    assert "reseed/assets/model/model.safetensors" in names
    for asset in ("style.css", "theme.js", "page.js", "list.js", "latent.js", "browser.js"):
        assert f"reseed/report/page/assets/{asset}" in names
    assert "hydra_plugins/reseed_plugins/fused.py" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["linked", pytest.param("installed", marks=pytest.mark.audit)])
def test_the_wheel_works_outside_the_checkout(wheel: Path, how: str, tmp_path: Path) -> None:
    """Its environment holds what it requires, and nothing else."""
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
    install = [*PIP, "--python", str(environment / "bin" / "python"), "install", "--quiet"]
    if how == "linked":
        subprocess.run([*install, "--no-deps", str(wheel)], check=True)
        link_dependencies(wheel, environment)
    else:
        subprocess.run([*install, "-c", str(ROOT / "constraints.txt"), str(wheel)], check=True)
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
