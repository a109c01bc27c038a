"""`isthmus send`: files to the queue that a trigger reads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from isthmus.errors import RequestMalformed
from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, progress_bars, say
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, registry_settings


def send(
    configuration: Annotated[Path, typer.Argument(help="The configuration of the trigger that reads the queue.")],
    files: Annotated[list[Path], typer.Argument(help="Files, or folders for all files in them.")],
    *,
    header: Annotated[
        list[str] | None, typer.Option("--header", "-H", help="NAME=VALUE, sent along with each; repeatable.")
    ] = None,
    key: Annotated[str, typer.Option(help="What order is kept by, where the trigger keeps one.")] = "",
    as_json: AsJson = False,
) -> None:
    """Send files to the queue that a trigger reads; by reference where they are too large for its broker.

    A file's name and content make the id of its message: what is sent again is not done again.

    Example: `isthmus send trigger.toml photos/`
    """
    from isthmus.events.configuration import read_configuration
    from isthmus_tools.usecases.send import SendRequest, send_files

    with errors(as_json):
        headers = dict(map(_read_header, header or []))
        paths = [path for given in files for path in _listed(given)]
        request = SendRequest(
            configuration=read_configuration(configuration, dict(os.environ)),
            settings=registry_settings(DEFAULT_REGISTRY),
            files=paths,
            headers=headers,
            key=key,
        )
        sent = []
        with progress_bars(as_json) as progress:
            for result in send_files(request):
                sent.append(result)
                progress("sending", len(sent), len(paths))
        failed = [result for result in sent if result.error is not None]
        if as_json:
            print_json(
                {
                    "sent": [
                        {"file": r.file, "id": r.id, "bytes": r.size, "by_claim": r.by_claim}
                        for r in sent
                        if r.error is None
                    ],
                    "failed": [{"file": r.file, **r.error.document()} for r in failed if r.error is not None],
                }
            )
        else:
            for result in failed:
                say(f"{result.file}: {result.error}")
            by_claim = sum(r.by_claim for r in sent)
            say(
                f"{len(sent) - len(failed)} of {len(paths)} files sent, {format_size(sum(r.size for r in sent))}"
                + (f", {by_claim} by reference" if by_claim else "")
            )
    if failed:
        raise typer.Exit(1)


def _listed(path: Path) -> list[Path]:
    """The file, or the files of a folder by name; hidden ones are left out."""
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.iterdir() if each.is_file() and not each.name.startswith("."))


def _read_header(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name or not text.isprintable():
        raise RequestMalformed(f"--header is {text!r}; it is NAME=VALUE", option="--header")
    return name.strip().lower(), value.strip()
