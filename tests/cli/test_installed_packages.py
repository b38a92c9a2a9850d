"""Options that an installed package brings by the entry-point group ``reseed.conf``."""

from __future__ import annotations

import pytest

MODULE = """
raise AssertionError("composing imports no package that is not chosen")
"""

APP = """
import hydra

@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(config):
    pass

main()
"""


@pytest.fixture
def line(made_up_package) -> list[str]:
    files = {
        "made_up/__init__.py": MODULE,
        "made_up/conf/sae/mine.yaml": "defaults: [topk, _self_]\nk: 5\n",
        "made_up/conf/sae/topk.yaml": "k: 6\n",
    }
    made_up_package.write(files, {"reseed.conf": "mine = made_up.conf"})
    return ["train", "--cfg", "job", "--package", "sae"]


def test_an_installed_package_adds_options_but_replaces_none(made_up_package, line) -> None:
    shown = made_up_package.reseed(*line, "sae=mine")
    assert "k: 5\n" in shown
    assert "_target_: reseed.sae.topk.TopKConfig\n" in shown
    assert "k: 8\n" in made_up_package.reseed(*line, "sae=topk")
    refused = made_up_package.reseed("train", "sae=meine", succeeds=False)
    assert "`sae` has no option `meine`. Did you mean `mine`?" in refused


def test_a_package_without_its_folder_is_named(made_up_package, line) -> None:
    made_up_package.write({}, {"reseed.conf": "mine = made_up.options"})
    for arguments in (["train", "sae=mine"], line):
        assert made_up_package.reseed(*arguments, succeeds=False).splitlines() == [
            "error: the installed package made-up 1.0 cannot be used: its entry point `mine = "
            "made_up.options` in the group reseed.conf fails (there is no folder made_up.options). "
            "Mend or uninstall the package"
        ]


def test_other_programs_that_use_hydra_do_not_see_the_options(made_up_package, line) -> None:
    files = {
        "app/config.yaml": "mine: 1\n",
        "app/main.py": APP,
    }
    made_up_package.write(files, {"reseed.conf": "mine = made_up.conf"})
    # The word is a plain value for that program, not an option of a group.
    shown = made_up_package.python("app/main.py", "--cfg", "job", "+sae=mine")
    assert shown == "mine: 1\nsae: mine\n"
