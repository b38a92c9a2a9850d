"""Settings that identify cells, from the records of their runs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from reseed.compare.cell import cell_settings, unify_sparsity


def run(sae: dict[str, Any], sparsity: str) -> Any:
    """Make a run with the record of an SAE."""
    hookpoint = {"site": "resid_post", "module": None}
    experiment = {"layer": 2, "hookpoint": hookpoint, "sae": sae, "training": {"recipe": "short"}}
    return SimpleNamespace(record={
        "experiment": experiment, "labels": {"model": "m", "dataset": "d"}, "num_latents": 64,
        "sparsity": sparsity, "tokens": 1_000,
    })  # fmt: skip


def topk(k: int, **more: Any) -> Any:
    return run({"type": "topk", "k": k, **more}, f"k={k}")


def relu(target: float | None) -> Any:
    return run({"type": "relu", "target_l0": target}, "λ=5" if target is None else f"L0*={target}")


def test_a_k_is_shown_as_k_whether_set_as_k_or_as_target_l0() -> None:
    for one in (topk(8), topk(8, target_l0=None), topk(8, target_l0=8)):  # the last: old records
        assert cell_settings([one], {"sae": "topk"})["sparsity"] == "k=8"
    assert cell_settings([topk(8, target_l0=8), topk(8)], {})["sparsity"] == "k=8"
    assert cell_settings([topk(8)], {"sae.target_l0": "8"}) == cell_settings([topk(8)], {})
    assert cell_settings([topk(8)], {"sae.k": "8"}) == cell_settings([topk(8)], {})
    assert cell_settings([relu(8)], {"sae.target_l0": "8"})["sparsity"] == "L0≈8"


def sparsities(*cells: list[Any]) -> list[str]:
    return [
        k["sparsity"]
        for k, _ in unify_sparsity([(cell_settings(runs, {}), None) for runs in cells])
    ]


def test_a_k_is_shown_as_l0_if_another_cell_is_calibrated_to_an_l0() -> None:
    assert sparsities([topk(8)], [relu(8)]) == ["L0≈8", "L0≈8"]
    assert sparsities([topk(8), relu(8)]) == ["L0≈8"]
    assert sparsities([topk(8)], [relu(None)]) == ["k=8", "λ=5"]
    assert sparsities([topk(8)], [topk(16)]) == ["k=8", "k=16"]
