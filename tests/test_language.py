"""The language of the code: one meaning a class name, few vague words, names that are nouns, comments.

Bounds are several times what httpx, stamina, onnx-ir and itsdangerous have by the same count.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from support.paths import SHARED

VAGUE = frozenset(re.findall("[a-z]+", "what whatever whose whom who those which it they them one others nobody such"))
"""Words that stand for a noun: a reader has to look for it."""
POINTERS = frozenset(
    re.findall(
        "[a-z]+",
        "found made kept told said taken given held known sent wanted looked chosen fits left named seen asked tried"
        " planned priced merged here ours theirs came again",
    )
)
"""Names that say how a value came about, or where it is, and not what it is."""
MAX_VAGUE, MAX_POINTERS, MIN_COMMENTS = 20, 8, 3


@dataclass
class Language:
    """Counts over a package."""

    lines: int = 0
    comments: int = 0
    words: Counter[str] = field(default_factory=Counter)
    names: Counter[str] = field(default_factory=Counter)
    classes: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, source: str, module: str) -> None:
        tree = ast.parse(source)
        comments = [
            t.string for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT
        ]
        self.lines += source.count("\n")
        self.comments += len(comments)
        for text in (*texts(tree), *comments):
            self.words.update(re.findall(r"[a-z']+", text.lower()))
        self.names.update(names(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                self.classes[node.name].append(module)

    def per_thousand(self, counts: Counter[str], words: frozenset[str]) -> float:
        return 1000 * sum(counts[word] for word in words) / (counts.total() or 1)


def texts(tree: ast.AST) -> Iterator[str]:
    """Docstrings, those of constants included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.value.value


def names(tree: ast.AST) -> Iterator[str]:
    """Names that are defined: functions, classes, variables, parameters."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def read(*packages: Path) -> Language:
    language = Language()
    for package in packages:
        for path in sorted(package.rglob("*.py")):
            language.add(path.read_text(), str(path.relative_to(SHARED.parent)))
    return language


PACKAGES = [SHARED / "isthmus", SHARED / "isthmus_tools"]


@pytest.fixture(scope="module", params=PACKAGES, ids=lambda p: p.name)
def language(request: pytest.FixtureRequest) -> Language:
    return read(request.param)


def test_no_class_name_has_two_meanings() -> None:
    assert {name: where for name, where in read(*PACKAGES).classes.items() if len(set(where)) > 1} == {}


def test_docstrings_and_comments_name_their_nouns(language: Language) -> None:
    assert language.per_thousand(language.words, VAGUE) <= MAX_VAGUE


def test_names_are_nouns(language: Language) -> None:
    assert language.per_thousand(language.names, POINTERS) <= MAX_POINTERS


def test_comments_give_reasons_often_enough(language: Language) -> None:
    assert 100 * language.comments / language.lines >= MIN_COMMENTS


def test_what_the_rules_refuse_is_counted() -> None:
    planted = Language()
    planted.add('class Entry:\n    """What it was."""\n\n\nfound = 1  # those\n', "a")
    planted.add("class Entry:\n    pass\n", "b")
    assert planted.per_thousand(planted.words, VAGUE) == 750
    assert planted.per_thousand(planted.names, POINTERS) == pytest.approx(1000 / 3)
    assert planted.classes["Entry"] == ["a", "b"]
    assert planted.comments == 1
