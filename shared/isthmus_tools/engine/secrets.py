"""OpenFaaS secrets as files in a folder that only this user reads."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from isthmus.errors import LocalError, Missing
from isthmus.settings import is_secret
from isthmus_tools.engine.stack import is_name

MAX_SECRET_BYTES = 1 << 20


class SecretFolder:
    """Secrets by name; functions find them through `secrets_dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)

    def names(self) -> list[str]:
        """Every secret's name, sorted."""
        return sorted(p.name for p in self.path.iterdir() if p.is_file() and is_name(p.name))

    def put(self, name: str, value: bytes) -> None:
        """Write a secret, in one step.

        Raises:
            LocalError: no DNS label, or longer than 1 MiB.
        """
        self._check(name)
        if len(value) > MAX_SECRET_BYTES:
            raise LocalError(f"the secret {name} has {len(value)} bytes; at most {MAX_SECRET_BYTES} are kept")
        part = self.path / f".{name}.part"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
            f.write(value)
        part.replace(self.path / name)

    def ensure(self, name: str) -> str:
        """The secret's text; where there is none yet, a random one that is kept from now on.

        Raises:
            LocalError: no DNS label, or a secret that is no text.
        """
        self._check(name)
        try:
            text = (self.path / name).read_text(encoding="ascii").strip()
        except FileNotFoundError:
            text = ""
        except UnicodeDecodeError as e:
            raise LocalError(f"the secret {name} is not plain text") from e
        if text and not is_secret(text):
            # A header would carry it, and end at its line break.
            raise LocalError(
                f"the secret {name} is no token: it holds a space, a line break or another character that no token has",
                hint=f"remove it, and another is made: faas-cli secret remove {name}",
            )
        if not text:
            text = secrets.token_urlsafe(32)
            self.put(name, text.encode())
        return text

    def delete(self, name: str) -> None:
        """Remove a secret.

        Raises:
            Missing: there is none of that name.
        """
        self._check(name)
        try:
            (self.path / name).unlink()
        except FileNotFoundError as e:
            raise Missing(f"there is no secret {name!r}", kind="secret", name=name, exists=self.names()) from e

    def _check(self, name: str) -> None:
        if not is_name(name):
            raise LocalError(f"{name!r} cannot name a secret; it must be a DNS label")
