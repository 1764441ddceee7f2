"""A mask travels with its level: nobody else asks which level it is, or guesses it from a length."""

import ast
import re
from pathlib import Path

import pytest

import oa_train

PACKAGE = Path(oa_train.__file__).parent
# Here levels are made, named or run.
EXEMPT = ("models", "engine/levels.py", "circuits/circuit.py")
LEVELS = {"Graph", "Nodes", "EdgeLayout"}
MASK = re.compile(r"\b(mask|masks|circuit_masks)\b")


def sources() -> list[Path]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [path for path in paths if not str(path.relative_to(PACKAGE)).startswith(EXEMPT)]


def is_length_of_a_mask(node: ast.expr) -> bool:
    text = ast.unparse(node)
    length = re.fullmatch(r"len\(.+\)|.+\.shape(\[-?\d\])?|.+\.numel\(\)|.+\.size\((-?\d)?\)", text)
    # Rows of a mask are circuits; its last dimension are entries.
    rows = re.fullmatch(r"len\(masks\)|.+\.shape\[0\]|.+\.size\(0\)", text)
    return bool(length) and not rows and bool(MASK.search(text))


def questions(text: str) -> list[str]:
    """What asks for the level of something, in the code of one file."""
    asked = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            named = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
            asked += [ast.unparse(node)] if named & LEVELS else []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
            by_type = any(isinstance(part, ast.Name) and part.id in LEVELS for part in parts)
            asked += [ast.unparse(node)] if by_type or any(map(is_length_of_a_mask, parts)) else []
    return asked


@pytest.mark.parametrize(
    ("code", "is_question"),
    [
        ("isinstance(level, Graph)", True),
        ("isinstance(x, (Graph, int))", True),
        ("type(level) is Nodes", True),
        ("len(mask) == graph.n_edges", True),
        ("masks.shape[1] == len(level)", True),
        ("len(circuit.mask) != 15", True),
        ("masks.shape[0] > 1", False),
        ("len(masks) == 1", False),
        ("isinstance(module, CircuitModule)", False),
        ("level.has_one_stream", False),
    ],
)
def test_questions_are_told_from_others(code, is_question):
    assert bool(questions(code)) == is_question


def test_nobody_asks_for_a_level():
    asked = {str(path.relative_to(PACKAGE)): questions(path.read_text()) for path in sources()}
    assert {path: found for path, found in asked.items() if found} == {}
    constructor = ast.parse((PACKAGE / "training" / "circuit_masks.py").read_text())
    made = [ast.unparse(node) for node in ast.walk(constructor) if isinstance(node, ast.Compare)]
    assert [text for text in made if "Graph.kind" in text] == ["kind == Graph.kind"]
