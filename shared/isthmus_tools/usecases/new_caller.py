"""A caller of functions: a new API key, and the line of the secret `callers` that lets it in."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from isthmus.artifacts.bundle import is_model_name
from isthmus.errors import RequestMalformed
from isthmus.security.caller_keys import NAME, SECRET, CallerEntry, key_digest, new_key, parse_caller_keys
from isthmus.security.callers import ALL_MODELS, Role


@dataclass(frozen=True, kw_only=True)
class NewCallerRequest:
    """Name, roles and models of the caller; no models are all. `file`: a list of callers to which the line goes.

    Units: requests and bytes of bodies per second, 0 for no limit; `burst_s` seconds of these at once.
    """

    name: str
    roles: Sequence[str] = ("infer",)
    models: Sequence[str] = ()
    requests_per_s: float = 0.0
    bytes_per_s: int = 0
    burst_s: float = 10.0
    file: Path | None = None


@dataclass(frozen=True)
class NewCaller:
    """The key, which is stored nowhere, and its line."""

    key: str
    line: str
    file: Path | None

    @property
    def following(self) -> str:
        """The command that usually follows."""
        return f"faas-cli secret create {SECRET} --from-file={self.file or 'callers.jsonl'}"

    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"key": self.key, "entry": msgspec.json.decode(self.line), "next": self.following}

    def __repr__(self) -> str:
        """Without the key."""
        return f"NewCaller({self.line})"


def new_caller(request: NewCallerRequest) -> NewCaller:
    """Make a key, and append its line to the file where the request names one.

    Raises:
        RequestMalformed: a name, role or model that is none, or a name that the file has already.
        SettingsError: the file is no list of callers.
    """
    key = new_key()
    rates: dict[str, Any] = {"requests_per_s": request.requests_per_s, "bytes_per_s": request.bytes_per_s}
    if any(rates.values()):
        rates["burst_s"] = request.burst_s
    entry = CallerEntry(
        name=_name(request.name),
        key=key_digest(key),
        roles={_role(role): _models(request.models) for role in request.roles or ("infer",)},
        **{name: value for name, value in rates.items() if value},
    )
    line = msgspec.json.encode(entry).decode()
    if request.file is not None:
        _append(request.file, line)
    return NewCaller(key, line, request.file)


def _append(file: Path, line: str) -> None:
    text = file.read_text("ascii", "replace") if file.exists() else ""
    lines = [each for each in text.splitlines() if each.strip()]
    parse_caller_keys(lines, where=str(file))
    name = msgspec.json.decode(line)["name"]
    if name in [msgspec.json.decode(each)["name"] for each in lines]:
        raise RequestMalformed(
            f"{file} has a caller {name} already",
            parameter="name",
            hint="replace a key under another name first; then remove the line of the old one",
        )
    parse_caller_keys([*lines, line], where=str(file))
    # Nobody else need read who may call; the digests of keys are of no use.
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "a", encoding="ascii") as f:
        # An editor may have left the last line without its end.
        f.write("\n" * bool(text and not text.endswith("\n")) + line + "\n")


def _name(text: str) -> str:
    if not re.fullmatch(NAME, text):
        raise RequestMalformed(
            f"{text[:80]!r} cannot name a caller: 1 to 64 letters, digits, '.', '_', '@' and '-'", parameter="name"
        )
    return text


def _role(text: str) -> Role:
    try:
        return Role(text)
    except ValueError as e:
        raise RequestMalformed(
            f"{text[:40]!r} is no role", parameter="role", hint=f"the roles are {', '.join(Role)}"
        ) from e


def _models(names: Sequence[str]) -> list[str]:
    for name in names:
        if name != ALL_MODELS and not is_model_name(name):
            raise RequestMalformed(
                f"{name[:80]!r} is no model's name", parameter="model", hint="roles are for all versions of a model"
            )
    return sorted(set(names)) or [ALL_MODELS]
