"""`isthmus trigger`: messages of a queue through the router, results out."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.units import format_size, parse_duration
from isthmus_tools.cli.console import errors, print_json, say, table
from isthmus_tools.cli.options import DEFAULT_REGISTRY, read_option, registry_settings
from isthmus_tools.cli.termination import until_signal

if TYPE_CHECKING:
    from isthmus.events.configuration import TriggerConfiguration
    from isthmus.events.trigger import TriggerStatus
    from isthmus.settings import RegistrySettings

# In a line of text, where they are not 0.
_SHOWN_COUNTS = (
    *("duplicates", "failed", "dead_letters", "refused", "retried", "deferred", "spooled", "drained", "dropped"),
    *("waiting", "in_work"),
)


def trigger(
    configuration: Annotated[Path, typer.Argument(help="The trigger's configuration, docs/reference/trigger.md.")],
    *,
    check: Annotated[bool, typer.Option("--check", help="Connect once to all that it names, and leave.")] = False,
    until_empty: Annotated[
        bool, typer.Option("--until-empty", help="End once nothing waits; exits with 1 where a message failed.")
    ] = False,
    every: Annotated[str, typer.Option(help="How often to print the counts, where they changed.")] = "5s",
    # Not `AsJson`: documents follow each other, one a line, for as long as the trigger runs.
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line instead of text.")] = False,
) -> None:
    """Send messages of a queue through the router and their results on, each once, until Ctrl-C.

    What is in work at Ctrl-C is finished, and the rest goes back to the queue.

    Example: `isthmus trigger trigger.toml --check`, then `isthmus trigger trigger.toml`
    """
    from isthmus.events.configuration import read_configuration

    with errors(as_json):
        every_s = read_option(parse_duration, "--every", every)
        read = read_configuration(configuration, dict(os.environ))
        settings = registry_settings(DEFAULT_REGISTRY)
        if check:
            _check(read, settings, as_json)
            return
        failed = _run(read, settings, until_empty, every_s, as_json)
    if until_empty and failed:
        raise typer.Exit(1)


def _run(
    configuration: TriggerConfiguration,
    settings: RegistrySettings,
    until_empty: bool,
    every_s: float,
    as_json: bool,
) -> int:
    """Run the trigger; the number of failed messages."""
    from isthmus.events.configuration import where_of
    from isthmus_tools.usecases.trigger import TriggerRequest, run_trigger

    _log_to_stderr()
    printer = _Printer(as_json)
    printer.begins(where_of(configuration.source), configuration.router.url)
    with until_signal() as stop:
        request = TriggerRequest(
            configuration=configuration,
            settings=settings,
            stop=stop,
            until_empty=until_empty,
            on_status=printer.status,
            status_every_s=every_s,
        )
        status = run_trigger(request)
    printer.status(status, is_last=True)
    return status.counts["failed"]


def _check(configuration: TriggerConfiguration, settings: RegistrySettings, as_json: bool) -> None:
    from isthmus_tools.usecases.trigger import check_trigger

    checks = check_trigger(configuration, settings)
    if as_json:
        print_json({"ok": not any(c.error for c in checks), "parts": [asdict(c) for c in checks]})
    else:
        rows = [(c.part, c.where, c.error or "answers", c.hint) for c in checks]
        table("Parts of the trigger", ("part", "where", "state", "hint"), rows, drop=("hint",))
    if any(c.error for c in checks):
        raise typer.Exit(1)


class _Printer:
    """Counts, a line at a time: text, or JSON for programs."""

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._began = self._shown_at = time.monotonic()
        self._shown: dict[str, Any] = {}

    def begins(self, source: str, router: str) -> None:
        if self._as_json:
            _print_line({"source": source, "router": router})
        else:
            say(f"{source} → {router}, until Ctrl-C")

    def status(self, status: TriggerStatus, *, is_last: bool = False) -> None:
        now = time.monotonic()
        document = _document(status)
        if document == self._shown and not is_last:
            return
        before = self._shown.get("done", 0) + self._shown.get("failed", 0)
        done = document["done"] + document["failed"] - before
        # The last line has the mean of the whole run.
        since = self._began if is_last else self._shown_at
        if is_last:
            done += before
        rate = done / max(now - since, 1e-3)
        self._shown, self._shown_at = document, now
        if self._as_json:
            _print_line({"at_s": round(now - self._began, 3), **document, "per_s": round(rate, 2)})
        else:
            say(f"{now - self._began:8.1f} s  {_text(document)}, {rate:.1f}/s")
            for name, reason in document["away"].items():
                say(f"            waiting for {name}: {reason}")


def _document(status: TriggerStatus) -> dict[str, Any]:
    oldest = status.backlog.oldest_s
    return {
        **status.counts,
        "in_work": status.in_work,
        "waiting": status.waiting,
        "limit": status.limit,
        "backlog": status.backlog.messages,
        "oldest_s": None if oldest is None else round(oldest, 1),
        **({} if status.spool is None else {"spool": asdict(status.spool)}),
        "away": dict(status.away),
    }


def _text(document: dict[str, Any]) -> str:
    parts = [f"received {document['received']}, done {document['done']}"]
    parts += [f"{name.replace('_', ' ')} {document[name]}" for name in _SHOWN_COUNTS if document[name]]
    if document["backlog"] is not None:
        parts.append(f"backlog {document['backlog']}")
    if document["oldest_s"]:
        parts.append(f"oldest {document['oldest_s']:.1f} s")
    if (spool := document.get("spool")) and spool["entries"]:
        parts.append(f"spool {spool['entries']} ({format_size(spool['bytes'])}), oldest {spool['oldest_s']:.1f} s")
    return ", ".join(parts)


def _print_line(document: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(document) + "\n")
    # Programs read the lines as they come.
    sys.stdout.flush()


def _log_to_stderr() -> None:
    """Show what the trigger waits for, and why messages failed."""
    log = logging.getLogger("isthmus.events")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
