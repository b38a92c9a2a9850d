"""Laws of the source tree: import layers, no cycle, size of files and functions, docstrings."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "reseed"

# From the bottom: a package may import itself and every package that stands in its row.
BASE = {"errors", "config", "system"}
CORE = BASE | {"distributed.process_group", "activations", "sae"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "system": {"errors", "config"},
    "distributed.process_group": BASE,
    "activations": BASE | {"distributed.process_group"},
    "sae": BASE | {"distributed.process_group"},
    "store": CORE,
    "evaluate": CORE | {"store"},
    "train": CORE | {"store", "evaluate", "distributed.launcher"},
    "distributed.launcher": CORE | {"train.config"},
    "experiment": CORE | {"store", "evaluate", "train"},
    "distributed": set(),
    "distributed.worker": CORE | {"store", "train", "experiment", "distributed.launcher"},
    "compare": CORE | {"store"},
    "report": CORE | {"store", "compare"},
    "study": CORE
    | {"store", "evaluate", "train", "experiment", "compare", "report", "distributed"},
}
TOP = {"api", "cli", "__init__", "__main__"}  # these may import everything
# Third-party packages that only some packages may import.
ONLY = {
    "hydra": {"cli"},
    "omegaconf": {"cli"},
    "lightning": {"train", "distributed"},
    "transformers": {"activations"},
    "datasets": {"activations"},
    "numba": {"system", "sae"},
    "fcntl": {"system"},  # `reseed.system.files` opens locks safely
}
# Imported inside functions, as one path of several needs them: optional packages, and packages that
# take seconds to load or reach for the network.
LATE = {"transformers", "datasets", "huggingface_hub", "pyarrow", "safetensors", "submitit", "rich",
        "tokenizers", "gguf"}  # fmt: skip
MAX_FILES, MAX_LINES, MAX_FUNCTION_LINES = 237, 400, 60
QUESTION = re.compile(r"(What|Which|Who|Whose|Whom|Where|How|Whether|When|Why|Of|For whom)\b")


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def imported(tree: ast.AST, modules: Mapping[str, object]) -> set[str]:
    """Return the names of all that a tree imports anywhere, type imports included."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in modules else node.module for name in full}
    return names


def layer(module: str) -> str:
    """Return the row of `ALLOWED` that a module of ours belongs to."""
    inner = module.partition(".")[2] or "__init__"
    package, _, rest = inner.partition(".")
    return f"{package}.{rest}" if package == "distributed" and rest else package


def wrong_imports(module: str, names: set[str]) -> list[str]:
    """List the imports that a module must not make."""
    own = layer(module)
    found = []
    for name in sorted(names):
        root = name.partition(".")[0]
        if root == "reseed" and own not in TOP:
            allowed = ALLOWED.get(own, set()) | {own}
            inner = name.partition(".")[2]
            if inner and not any(inner == a or inner.startswith(f"{a}.") for a in allowed):
                found.append(name)
        elif root in ONLY and own.partition(".")[0] not in ONLY[root]:
            found.append(name)
    return found


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Find the groups of modules that import each other, by Tarjan's algorithm."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1 or node in graph[node]:
                found.append(sorted(group))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def late_imports(tree: ast.AST) -> set[str]:
    """Return the names of what functions of a tree import when they are called."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return {name for function in functions for name in imported(function, MODULES)}


def documented(tree: ast.AST) -> Iterator[str]:
    """Yield every string that stands alone: docstrings, and those below fields and constants."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            text = node.value.value
            if isinstance(text, str):
                yield text.strip()


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    assert layer(module) in ALLOWED or layer(module) in TOP, f"{module} has no layer yet"
    assert wrong_imports(module, imported(TREES[module], MODULES)) == []


def test_no_modules_import_each_other() -> None:
    graph = {m: {n for n in imported(t, MODULES) if n in MODULES} for m, t in TREES.items()}
    assert cycles(graph) == []


@pytest.mark.parametrize("module", MODULES)
def test_functions_import_only_what_is_optional_or_slow(module: str) -> None:
    if layer(module) == "cli":
        pytest.skip("a command imports what it needs once it is known to be needed")
    late = {name for name in late_imports(TREES[module]) if name.partition(".")[0] not in LATE}
    assert late == set()


def test_the_tree_stays_small() -> None:
    assert len(MODULES) <= MAX_FILES
    lines = {m: len(path.read_text().splitlines()) for m, path in MODULES.items()}
    assert {m: n for m, n in lines.items() if n > MAX_LINES} == {}


TEXT = {"read_text", "write_text", "fdopen", "TextIOWrapper", "NamedTemporaryFile"}


def without_encoding(tree: ast.AST) -> Iterator[int]:
    """Yield the lines of calls that read or write text in the encoding of the locale."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        name = function.rpartition(".")[2]
        words = {keyword.arg for keyword in node.keywords}
        constants = [a.value for a in node.args if isinstance(a, ast.Constant)]
        modes = [m for m in constants if isinstance(m, str) and re.fullmatch(r"[rwaxbt+]{1,3}", m)]
        # A source of activations is opened with several arguments and no mode.
        opens = name == "open" and function != "os.open" and (len(node.args) < 2 or modes)
        text = (opens or name in TEXT) and not any("b" in mode for mode in modes)
        runs = name in ("run", "Popen") and words & {"text", "universal_newlines"}
        if (text or runs) and "encoding" not in words:
            yield node.lineno


def test_text_is_read_and_written_as_utf8() -> None:
    found = {module: list(without_encoding(tree)) for module, tree in TREES.items()}
    assert {module: lines for module, lines in found.items() if lines} == {}


@pytest.mark.parametrize("module", MODULES)
def test_functions_can_be_seen_whole(module: str) -> None:
    """A longer function says why in a comment that contains the words `long:`."""
    source = MODULES[module].read_text().splitlines()
    found = []
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False) or ""
            length = (node.end_lineno or 0) - node.lineno + 1 - len(text.splitlines())
            reason = any("# long:" in line for line in source[node.lineno - 1 : node.end_lineno])
            if length > MAX_FUNCTION_LINES and not reason:
                found.append(f"{node.name} ({length} lines)")
    assert found == []


TESTS = sorted(Path(__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("path", [*MODULES.values(), *TESTS], ids=lambda path: path.name)
def test_no_docstring_opens_with_a_question_word(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert [text for text in documented(tree) if QUESTION.match(text)] == []


def test_the_rules_can_fail() -> None:
    tree = ast.parse(
        "import torch\nfrom reseed.config import Config\n"
        "def f():\n    'What it does.'\n    from reseed.train.group import fit_group\n"
        "    import hydra.core\n"
    )
    found = imported(tree, MODULES)
    assert wrong_imports("reseed.sae.x", found) == ["hydra.core", "reseed.train.group"]
    assert wrong_imports("reseed.cli.x", found) == []
    assert wrong_imports("reseed.experiment.x", found) == ["hydra.core"]
    assert late_imports(tree) == {"reseed.train.group", "hydra.core"}
    tree_of_files = ast.parse(
        "open(p)\nopen(p, 'rb')\np.open()\np.open('a')\np.open('ab')\np.read_text()\n"
        "p.write_text(x, encoding='utf-8')\nos.fdopen(h, 'w')\nos.open(p, 0)\n"
        "run(c, text=True)\nrun(c, text=True, encoding='utf-8')\ndata.open(device, 3, cache)\n"
    )
    assert list(without_encoding(tree_of_files)) == [1, 3, 4, 6, 8, 10]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert [text for text in documented(tree) if QUESTION.match(text)] == ["What it does."]
