"""Credentials of the system API: OpenFaaS's basic auth, with the password in a file that only its user reads."""

from __future__ import annotations

import base64
import hmac
import os
import secrets
import stat
from pathlib import Path

from isthmus.errors import LocalError

USER = "admin"
PASSWORD_FILE = "admin-password"  # noqa: S105 - the file's name
MAX_PASSWORD_BYTES = 1024


def ensure_password(folder: Path) -> str:
    """The password in `folder`; a random one is generated where there is none yet.

    The file appears whole, with mode 0600, or not at all: engines that start at the same time agree on one password.

    Raises:
        LocalError: the file belongs to another user, others can read it, or it holds no password.
    """
    path = folder / PASSWORD_FILE
    folder.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(path):
        _create(path, secrets.token_urlsafe(32))
    return _read(path)


def authorizes(header: str, password: str) -> bool:
    """Whether a request's Authorization header holds USER and `password`, compared in constant time."""
    scheme, _, given = header.partition(" ")
    expected = base64.b64encode(f"{USER}:{password}".encode())
    return scheme.lower() == "basic" and hmac.compare_digest(given.strip().encode(errors="replace"), expected)


def _create(path: Path, password: str) -> None:
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as f:
            f.write(password + "\n")
        # A hard link fails where the name exists, which a rename would overwrite.
        os.link(part, path)
    except FileExistsError:
        pass  # another engine was first: its password holds
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
