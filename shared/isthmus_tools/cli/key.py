"""`isthmus key`: create signing keys, and keep the keyring of trusted ones."""

from __future__ import annotations

from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from isthmus.errors import RequestMalformed
from isthmus_tools.cli.console import errors, print_json, say, say_command, table
from isthmus_tools.cli.options import AsJson
from isthmus_tools.usecases.keys import KeyKind


class KeyAction(StrEnum):
    """What to do with a key."""

    NEW = "new"
    LIST = "list"
    TRUST = "trust"
    REVOKE = "revoke"


def key(
    action: Annotated[
        KeyAction,
        typer.Argument(
            help="new FILE creates a key; list KEYRING shows the keys of a keyring; trust KEYRING PUBLIC.pem adds a key"
            " to it; revoke KEYRING ID lets a key's signatures count for nothing."
        ),
    ],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="The new key's file, or the keyring.")],
    subject: Annotated[
        str, typer.Argument(metavar="[PUBLIC.pem|ID]", help="The public key to trust, or the id to revoke.")
    ] = "",
    *,
    kind: Annotated[
        KeyKind,
        typer.Option(
            help="Of new: a key that signs, or a recipient's, which reads encrypted versions; RSA for modules."
        ),
    ] = KeyKind.SIGNING,
    name: Annotated[str, typer.Option(help="A name of the trusted key, for readers.")] = "",
    not_before: Annotated[
        datetime | None, typer.Option("--from", help="Trust the key from this time on (UTC).", metavar="DATE")
    ] = None,
    not_after: Annotated[
        datetime | None, typer.Option("--until", help="Trust the key until this time (UTC).", metavar="DATE")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Create a key of a signer or a recipient, or change the keyring that functions trust.

    Example: `isthmus key new release.pem`
    """
    from isthmus_tools.usecases import keys

    with errors(as_json):
        _check_subject(action, subject)
        if kind is not KeyKind.SIGNING and action is not KeyAction.NEW:
            raise RequestMalformed("--kind is of isthmus key new; keyrings hold keys that sign", option="--kind")
        if action is KeyAction.NEW:
            new = keys.new_key(path, kind)
            if as_json:
                print_json({"id": new.id, "private": str(new.private), "public": str(new.public)})
                return
            if kind is not KeyKind.SIGNING:
                say(f"recipient {new.id}: {new.private} is secret and reads, {new.public} is public and encrypts")
                say_command("next", f"isthmus encrypt NAME --for {new.public}@head --for …")
                return
            say(f"key {new.id}: {new.private} is secret and signs, {new.public} is public and verifies")
            say_command("next", f"isthmus key trust trusted-keys.json {new.public}")
        elif action is KeyAction.LIST:
            listed = keys.list_keys(path)
            if as_json:
                print_json({"keys": [each.document() for each in listed]})
                return
            rows = [(each.id, each.name, each.state, _date(each.not_before), _date(each.not_after)) for each in listed]
            table(f"keys of {path}", ("id", "name", "state", "from", "until"), rows, drop=("from", "until"))
        else:
            if action is KeyAction.TRUST:
                key_id = keys.trust_key(path, Path(subject), name, _utc(not_before), _utc(not_after))
            else:
                key_id = keys.revoke_key(path, subject)
            if as_json:
                print_json({"id": key_id, "keyring": str(path), "action": action.value})
                return
            say(f"{path} {'trusts' if action is KeyAction.TRUST else 'has revoked'} {key_id}")
            state = next((each.state for each in keys.list_keys(path) if each.id == key_id), "")
            # A window of the past or future: said at once, not by the functions' refusals.
            if action is KeyAction.TRUST and state != "trusted":
                say(f"its signatures do not count now: {state}, by --from and --until")
            say_command("next", f"faas-cli secret create trusted-keys --from-file={path}")


def _check_subject(action: KeyAction, subject: str) -> None:
    needs = {KeyAction.TRUST: "the file of a public key", KeyAction.REVOKE: "the id of a key"}.get(action, "")
    if bool(needs) != bool(subject):
        raise RequestMalformed(
            f"isthmus key {action.value} takes {needs or 'nothing more'} after the file"
            + (f"; {subject!r} is more" if subject else "")
        )


def _utc(at: datetime | None) -> datetime | None:
    return None if at is None else at.replace(tzinfo=UTC)


def _date(at: datetime | None) -> str:
    return "" if at is None else f"{at:%Y-%m-%d %H:%M}"
