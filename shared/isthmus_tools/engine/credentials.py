"""Credentials of the system API (OpenFaaS's basic auth), and OpenFaaS secrets, as files of this user alone."""

from __future__ import annotations

import base64
import hmac
import os
import secrets
import stat
from pathlib import Path

from isthmus.errors import LocalError, Missing
from isthmus.settings import is_secret
from isthmus_tools.engine.stack import is_name

USER = "admin"
PASSWORD_FILE = "admin-password"  # noqa: S105 - the file's name
MAX_PASSWORD_BYTES = 1024  # a wrong file, such as a device, is not read to its end


def ensure_password(folder: Path) -> str:
    """Read the password in `folder`, generated at random on first use.

    The file is created atomically with mode 0600: engines that start at the same time agree on a password.

    Raises:
        LocalError: the file belongs to another user, is readable by other users, or holds no password.
    """
    path = folder / PASSWORD_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(path):
        _create(path, secrets.token_urlsafe(32))
    return _read(path)


def authorizes(header: str, password: str) -> bool:
    """Whether a request's Authorization header holds USER and `password`, compared in constant time."""
    scheme, _, credentials = header.partition(" ")
    expected = base64.b64encode(f"{USER}:{password}".encode())
    return scheme.lower() == "basic" and hmac.compare_digest(credentials.strip().encode(errors="replace"), expected)


def _create(path: Path, password: str) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as f:
            f.write(password + "\n")
        # Linking fails if the name exists; renaming would overwrite the password of another engine.
        os.link(part, path)
    except FileExistsError:
        pass  # another engine was first; use its password
    except OSError as e:
        raise LocalError(f"cannot write {path}: {e.strerror or e}") from e
    finally:
        part.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as f:
            about = os.fstat(f.fileno())
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid():
                raise LocalError(f"{path} is no plain file of this user; delete it, and the next start writes another")
            if about.st_mode & 0o077:
                raise LocalError(
                    f"{path} can be read or written by others (mode {about.st_mode & 0o777:o})",
                    hint="delete it: the next start writes another password; or chmod 600, if nobody has read it",
                )
            data = f.read(MAX_PASSWORD_BYTES + 1)
            password = data.decode("ascii").strip()
    except OSError as e:
        raise LocalError(f"cannot read {path}: {e.strerror or e}") from e
    except UnicodeDecodeError as e:
        raise LocalError(f"{path} is not plain text; delete it, and the next start writes another") from e
    if len(data) > MAX_PASSWORD_BYTES:
        raise LocalError(f"{path} is longer than {MAX_PASSWORD_BYTES} bytes")
    if not password:
        raise LocalError(f"{path} is empty; delete it, and the next start writes another")
    return password


MAX_SECRET_BYTES = 1 << 20  # of Kubernetes


class SecretFolder:
    """Secrets by name, for functions at the path of the setting `secrets_dir`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)

    def names(self) -> list[str]:
        """Every secret's name, sorted."""
        return sorted(p.name for p in self.path.iterdir() if p.is_file() and is_name(p.name))

    def put(self, name: str, value: bytes) -> None:
        """Write a secret atomically.

        Raises:
            LocalError: `name` is no DNS label, or `value` is longer than 1 MiB.
        """
        self._check(name)
        if len(value) > MAX_SECRET_BYTES:
            raise LocalError(f"the secret {name} has {len(value)} bytes; at most {MAX_SECRET_BYTES} are kept")
        part = self.path / f".{name}.part"
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
            f.write(value)
        part.replace(self.path / name)

    def ensure(self, name: str) -> str:
        """Read a secret's text, generated at random on first use.

        Raises:
            LocalError: `name` is no DNS label, or the secret is no token.
        """
        self._check(name)
        try:
            text = (self.path / name).read_text(encoding="ascii").strip()
        except FileNotFoundError:
            text = ""
        except UnicodeDecodeError as e:
            raise LocalError(f"the secret {name} is not plain text") from e
        if text and not is_secret(text):
            # The secret travels in a header, and a line break would end the header.
            raise LocalError(
                f"the secret {name} is no token: it holds a space, a line break or another character that no token has",
                hint=f"remove it, and another is made: faas-cli secret remove {name}",
            )
        if not text:
            text = secrets.token_urlsafe(32)
            self.put(name, text.encode())
        return text

    def read(self, name: str) -> str:
        """A secret's text.

        Raises:
            Missing: no secret has that name.
            LocalError: the secret is not plain text.
        """
        self._check(name)
        try:
            return (self.path / name).read_text(encoding="ascii")
        except FileNotFoundError as e:
            raise Missing(f"there is no secret {name!r}", kind="secret", name=name, exists=self.names()) from e
        except UnicodeDecodeError as e:
            raise LocalError(f"the secret {name} is not plain text") from e

    def delete(self, name: str) -> None:
        """Remove a secret.

        Raises:
            Missing: no secret has that name.
        """
        self._check(name)
        try:
            (self.path / name).unlink()
        except FileNotFoundError as e:
            raise Missing(f"there is no secret {name!r}", kind="secret", name=name, exists=self.names()) from e

    def _check(self, name: str) -> None:
        if not is_name(name):
            raise LocalError(f"{name!r} cannot name a secret; it must be a DNS label")
