"""The docs name what there is: links that resolve, commands and options that exist, verbs of the Makefile."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from isthmus_tools.cli import app
from support.paths import ROOT

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_of_a_page_resolves(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_command_of_a_page_exists_with_its_options(page: Path) -> None:
    for line in re.findall(r"(?:^|[`$(/ ])isthmus ((?:[a-z]+)(?: [^`\n#|]*)?)", page.read_text(), re.MULTILINE):
        name, *rest = line.split()
        if name not in COMMANDS:
            continue
        known = {option for p in COMMANDS[name].params for option in p.opts} | {"--help"}
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used <= known, line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_verb_of_make_exists(page: Path) -> None:
    verbs = set(re.findall(r"^([a-z-]+)%?:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for verb in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE):
        bench = verb.startswith("bench-")
        assert (ROOT / "bench" / f"{verb.removeprefix('bench-')}.py").exists() if bench else verb in verbs, verb


def test_the_readme_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert {p.name for p in PAGES[1:] if p.parent.name == "docs"} <= set(re.findall(r"docs/(\w+\.md)", text))
