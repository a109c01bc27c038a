"""`isthmus audit`: who changed what in a registry, and whether the log of it is whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from isthmus_tools.cli.console import errors, print_json, progress_bars, say, table, tell
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, registry_settings

if TYPE_CHECKING:
    from isthmus.security.audit import ChainCheck

_MAX_FACT = 60
_DIGEST_START = len("sha256:") + 12


def audit(
    *,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that every entry follows the one before; exits with 1 otherwise.")
    ] = False,
    checkpoint: Annotated[
        str,
        typer.Option(
            metavar="NUMBER@DIGEST",
            help="Verify through this entry as well: what an earlier --verify printed, and was stored elsewhere.",
        ),
    ] = "",
    last: Annotated[int, typer.Option(min=0, max=100_000, help="How many of the latest entries to show.")] = 20,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """List who changed what in a registry; with --verify, check the chain of entries.

    Example: `isthmus audit --verify`
    """
    from isthmus_tools.usecases.audit import AuditRequest, read_audit

    with errors(as_json):
        request = AuditRequest(settings=registry_settings(registry), last=last, verify=verify, checkpoint=checkpoint)
        with progress_bars(as_json) as progress:
            progress(f"reading the audit log of {registry}")
            result = read_audit(request)
        if as_json:
            print_json(result.document())
        elif result.entries:
            rows = [(e.number, e.at, e.who, e.what, _text(e.facts)) for e in result.entries]
            table(
                f"audit log of {registry}: {result.count} entries",
                ("entry", "time", "who", "what", "facts"),
                rows,
                numbers=("entry",),
                drop=("time",),
            )
        else:
            say(f"the audit log of {registry} has {result.count} entries")
        if result.check is not None:
            _show_check(result.check, quiet=as_json)


def _show_check(check: ChainCheck, *, quiet: bool) -> None:
    """The verdict; a broken chain ends the command with status 1."""
    if check.broken is None:
        if not quiet:
            say(f"the chain is whole: {check.verified.number} entries")
            say(f"checkpoint: {check.verified}")
        return
    if not quiet:
        tell(f"error: the chain breaks at entry {check.broken.number}: {check.broken.reason}")
        tell(f"hint: compare the entries after {check.verified.number} with a backup or the store's own versions")
    raise typer.Exit(1)


def _text(facts: dict[str, object]) -> str:
    return ", ".join(f"{name}={_shortened(str(value))}" for name, value in facts.items())


def _shortened(text: str) -> str:
    # As in the tables of versions; --json has digests whole.
    bound = _DIGEST_START if text.startswith("sha256:") else _MAX_FACT
    return text if len(text) <= bound else f"{text[:bound]}…"
