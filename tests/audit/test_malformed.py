"""A malformed input is refused in one line, and nothing is written; `make audit` tries all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from judge import Case, import_all, judge, table
from malformed import WORLD, cases, make_shared

CASES = cases()
OF_KINDS = [
    [case for case in CASES if case.kind == kind] for kind in {case.kind: 0 for case in CASES}
]
SAMPLE = [case for group in OF_KINDS for case in group[len(group) // 2 % 110 :: 110]]
SLOW_SAMPLE = CASES[3::20]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("audit")
    make_shared(root / "shared")
    import_all()
    return root


def test_there_are_500_of_them_of_every_kind() -> None:
    strict = [case for case in CASES if not case.may_pass]
    assert len(strict) >= 500
    assert {case.kind for case in SAMPLE} == {case.kind for case in CASES}


@pytest.mark.parametrize("case", SAMPLE, ids=lambda case: ascii(str(case))[1:61])
def test_a_malformed_input_is_refused_in_one_line(case: Case, root: Path) -> None:
    assert judge(case, root).problem == ""


@pytest.mark.slow
def test_a_twentieth_of_them_is_refused(root: Path) -> None:
    found = [judge(case, root) for case in SLOW_SAMPLE]
    assert [f"{v.case}: {v.problem}" for v in found if v.problem] == []


@pytest.mark.parametrize(
    ("case", "problem"),
    [
        (Case("x", ("status",)), "was accepted"),
        (Case("x", ("train", *WORLD, "seed=word"), message="nosuch"), "does not say 'nosuch'"),
        (Case("x", ("completion", "fish"), lambda f: (f / "a").write_text("a")), ""),
    ],
)
def test_the_judge_sees_what_is_not_refused(case: Case, problem: str, root: Path) -> None:
    verdict = judge(case, root)
    assert verdict.problem.startswith(problem)
    assert bool(verdict.problem) == bool(problem)
    assert table([verdict]).splitlines()[-1].split()[4] == str(int(bool(problem)))
