"""The docs name what there is: links that resolve, commands and options that exist, verbs of the Makefile."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import typer

from isthmus_tools.cli import app
from support.paths import ROOT

INDEX = ROOT / "docs" / "index.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")])
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_link_of_a_page_resolves(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith(("http://", "https://")) or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_heading_that_a_page_links_to_exists(page: Path) -> None:
    for target, heading in re.findall(r"\]\(((?!https?:)[^)#]*)#([^)]+)\)", page.read_text()):
        text = (page.parent / target if target else page).read_text()
        assert heading in {slug(each) for each in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}, (target, heading)


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_that_the_code_names_exists() -> None:
    pages = {
        match
        for folder in ("shared", "template", "functions", "bench")
        for source in (ROOT / folder).rglob("*.py")
        for match in re.findall(r"docs/[\w/-]+\.md", source.read_text())
    }
    assert pages
    assert {each for each in pages if not (ROOT / each).is_file()} == set()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_command_of_a_page_exists_with_its_options(page: Path) -> None:
    for line in re.findall(r"(?:^|[`$(/ ])isthmus ((?:[a-z]+)(?: [^`\n#|]*)?)", page.read_text(), re.MULTILINE):
        name, *rest = line.split()
        if name not in COMMANDS:
            continue
        known = {option for p in COMMANDS[name].params for option in p.opts} | {"--help"}
        used = {word.partition("=")[0] for word in rest if word.startswith("--")}
        assert used <= known, line


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_verb_of_make_exists(page: Path) -> None:
    verbs = set(re.findall(r"^([a-z-]+)%?:", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for verb in re.findall(r"(?:`|^)make ([a-z-]+)", page.read_text(), re.MULTILINE):
        bench = verb.startswith("bench-")
        assert (ROOT / "bench" / f"{verb.removeprefix('bench-')}.py").exists() if bench else verb in verbs, verb


def test_every_picture_is_shown_small_and_drawn_by_the_makefile() -> None:
    links = [(page, name) for page in PAGES for name in re.findall(r"!\[[^]]+\]\((.+?)\)", page.read_text())]
    shown = {(page.parent / name).resolve() for page, name in links}
    drawn = re.findall(r"--picture (docs/images/\S+)", (ROOT / "Makefile").read_text())
    assert set((ROOT / "docs" / "images").iterdir()) == shown
    assert {ROOT / name for name in drawn} == {path for path in shown if path.suffix == ".svg"}
    assert all(path.stat().st_size < (60_000 if path.suffix == ".svg" else 150_000) for path in shown)


def test_the_index_leads_to_every_page() -> None:
    linked = {(INDEX.parent / target).resolve() for target in re.findall(r"\]\(([^)#:]+\.md)", INDEX.read_text())}
    assert {page for page in PAGES if page.is_relative_to(INDEX.parent)} - {INDEX} <= linked


def test_the_readme_leads_to_the_index() -> None:
    assert "](docs/index.md)" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_no_line_of_a_page_is_longer_than_120_characters(page: Path) -> None:
    assert [line for line in page.read_text().splitlines() if len(line) > 120 and line[0] != "|"] == []


def test_every_advice_to_install_an_extra_names_one_that_exists() -> None:
    extras = set()
    for package in ("isthmus", "isthmus_tools"):
        project = tomllib.loads((ROOT / "shared" / package / "pyproject.toml").read_text())
        extras |= {f"{package}[{extra}]" for extra in project["project"]["optional-dependencies"]}
    sources = [*PAGES, *(ROOT / "shared").rglob("*.py")]
    advised = {extra for path in sources for extra in re.findall(r"install '?\"?(isthmus\w*\[\w+\])", path.read_text())}
    assert advised
    assert advised <= extras
