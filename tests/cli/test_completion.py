"""Completion as shells ask for it: by variables of the environment, and in a real bash."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.bundles import Published, publish_photos

ISTHMUS = Path(sys.executable).with_name("isthmus")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Published:
    published = publish_photos(tmp_path_factory.mktemp("completion"))
    published.registry.move_alias("photos", "canary", "1")
    return published


def isthmus(environment: dict[str, str], *arguments: str) -> str:
    done = subprocess.run(
        [ISTHMUS, *arguments], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert done.stderr == ""
    return done.stdout


def complete(line: str, shell: str, registry: str) -> set[str]:
    """The words that a shell gets for a line whose cursor is at its end."""
    words = line.split(" ")
    asked = {
        "bash": {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)},
        "zsh": {"_TYPER_COMPLETE_ARGS": line},
        "fish": {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
    }[shell]
    output = isthmus({"_ISTHMUS_COMPLETE": f"complete_{shell}", "ISTHMUS_REGISTRY": registry, **asked})
    if shell == "zsh":
        return {word.split('"')[1].replace(r"\\:", ":") for word in output.splitlines() if '"' in word}
    return {word.partition("\t")[0] for word in output.splitlines() if word}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("isthmus ro", {"rollback"}),
        ("isthmus to", {"top"}),
        ("isthmus promote photos:1 --as ca", {"canary"}),
        ("isthmus infer --local --model ph", {"photos", "photos:1", "photos:canary", "photos:prod"}),
        ("isthmus cut photos --cut ", {"1", "3", "4", "6"}),
        ("isthmus package photos --cut 1/", {"1/3", "1/4", "1/6"}),
        ("isthmus explain nobody", set()),
        ("isthmus codec nobody --cut ", set()),
        ("isthmus plan photos --edge-s", {"--edge-slowdown"}),
    ],
)
def test_the_words_that_fit_complete_a_line(line: str, words: set[str], photos: Published) -> None:
    assert complete(line, "fish", str(photos.folder)) == words


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_models_with_their_versions_and_aliases(shell: str, photos: Published) -> None:
    expected = {"photos", "photos:1", "photos:canary", "photos:prod"}
    assert complete("isthmus show ", shell, str(photos.folder)) == expected


@pytest.mark.parametrize("registry", ["nowhere", "s3://127.0.0.1:9/none", "ftp://somewhere", "/dev/null/in"])
def test_no_registry_completes_nothing_and_says_nothing(registry: str) -> None:
    assert complete("isthmus show ", "fish", registry) == set()


def test_a_completion_loads_no_other_command(photos: Published) -> None:
    script = "import sys; from isthmus_tools.cli import app\ntry: app(prog_name='isthmus')\nexcept SystemExit: pass\n"
    script += "print(sorted(m for m in sys.modules if m in ('numpy', 'onnx', 'isthmus_tools.cli.plan')))"
    asked = {"_ISTHMUS_COMPLETE": "complete_fish", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    for line in ("isthmus ", "isthmus show "):
        environment = {**os.environ, **asked, "_TYPER_COMPLETE_ARGS": line, "ISTHMUS_REGISTRY": str(photos.folder)}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment
        )
        assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
@pytest.mark.parametrize(
    ("words", "completed"),
    [
        (["isthmus", "show", "pho"], ["photos", "photos:1", "photos:canary", "photos:prod"]),
        # bash takes a colon for a word of its own, and replaces what follows the colon alone.
        (["isthmus", "show", "photos", ":"], ["1", "canary", "prod"]),
        (["isthmus", "show", "photos", ":", "p"], ["prod"]),
        (["isthmus", "cut", "photos", ":", "1", "--cut", "3"], ["3"]),
    ],
)
def test_bash_completes_with_the_script_that_is_shown(
    words: list[str], completed: list[str], photos: Published, tmp_path: Path
) -> None:
    script = tmp_path / "completion.sh"
    script.write_text(isthmus({"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}, "--show-completion", "bash"))
    quoted = " ".join(f'"{word}"' for word in words)
    run = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _isthmus_completion {ISTHMUS}"
    done = subprocess.run(
        ["bash", "--norc", "-c", f'{run}; printf "%s\\n" "${{COMPREPLY[@]}}"'],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "ISTHMUS_REGISTRY": str(photos.folder)},
    )
    assert done.stdout.split() == completed


@pytest.mark.parametrize(
    ("shell", "file"), [("bash", ".bashrc"), ("zsh", ".zshrc"), ("fish", ".config/fish/completions/isthmus.fish")]
)
def test_completion_is_installed_for_each_shell(shell: str, file: str, tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    isthmus(environment, "--install-completion", shell)
    assert (tmp_path / file).read_text()
    assert any("_ISTHMUS_COMPLETE" in path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_registry_on_s3_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell waits for each Tab."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        for name in ("S3_ENDPOINT", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "key")
        assert complete("isthmus show ph", "bash", "s3://bucket/registry") == set()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
