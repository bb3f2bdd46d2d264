"""Claims about the house: imports point one way, also those inside functions."""

import ast
from pathlib import Path

import pytest

import ril_jax

ROOT = Path(ril_jax.__file__).parent
# What each part stands on, besides the modules that stand alone (errors, files, objectives, ...).
STANDS_ON = {
    "models": set(),
    "data": {"models"},
    "sampling": {"data", "models", "pretrained"},
    "rewards": {"sampling", "data", "models", "pretrained"},
    "generation": {"rewards", "sampling", "data", "models", "pretrained"},
    "evaluation": {"generation", "rewards", "sampling", "data", "models", "pretrained"},
}
PARTS = {*STANDS_ON, "training", "planning", "pretrained"}
ENTRY_POINTS = {"train", "serve", "generate", "evaluate", "compare", "plan", "export"}


def imported(path: Path) -> set[str]:
    """The first names under ril_jax of all imports of a file that run (not those for types alone)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "ril_jax":
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ril_jax."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("ril_jax.")}
    return names


@pytest.mark.parametrize("part", STANDS_ON)
def test_a_part_stands_only_on_those_below(part):
    files = [path for path in (ROOT / part).rglob("*.py") if path.name != "__main__.py"]
    assert files
    above = {str(path): imported(path) & (PARTS - STANDS_ON[part] - {part}) for path in files}
    assert {path: names for path, names in above.items() if names} == {}


def test_nothing_stands_on_an_entry_point():
    users = {str(path.relative_to(ROOT)): imported(path) & ENTRY_POINTS for path in ROOT.rglob("*.py")}
    assert {path: names for path, names in users.items() if names} == {}
