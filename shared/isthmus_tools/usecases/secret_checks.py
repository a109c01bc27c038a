"""Security of the secrets' files, and of what the functions' keys may do in the registry."""

from __future__ import annotations

import ssl
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from secrets import token_hex

from isthmus.errors import Denied, IsthmusError, SettingsError
from isthmus.http.tls import files_of
from isthmus.registry import open_blob_store, parse_address
from isthmus.registry.addresses import STORE_SECRETS
from isthmus.security.keyring import KeyringFile
from isthmus.security.keys import SECRET, read_hop_keys
from isthmus.settings import RegistrySettings
from isthmus_tools.usecases.security_findings import SecurityFinding, judged, unknown
from isthmus_tools.usecases.stack_security import TRUSTED_KEYS

DAY_S = 86_400.0
# A key that many deployments have seen is a key that somebody may have copied; certificates are renewed in weeks.
OLD_KEY_DAYS, EXPIRING_DAYS = 180, 30
# Of the secrets those that let their holder do something; hop-ca and certificates are public.
_PRIVATE = (
    *(name for names in STORE_SECRETS.values() for name in names if name != "s3-access-key-id"),
    *(SECRET, "hop-client-key", "profile-token", "recipient-key", "router-key"),
)


def secret_findings(settings: RegistrySettings) -> Iterator[SecurityFinding]:
    """What the folder of secrets shows: keys that cannot be used, that others can read, that are old."""
    folder = Path(settings.secrets_dir)
    try:
        keys = read_hop_keys(settings.secrets_dir)
    except SettingsError as e:
        yield SecurityFinding("key-form", "open", "high", str(folder / SECRET), e.message, e.hint)
        return
    if keys is None:
        text = f"no copy of {SECRET} in {folder}: age and agreement of keys were not checked"
        yield unknown("key-age", "low", str(folder), text, "name a folder with the functions' secrets by --secrets")
    else:
        yield judged(
            "key-rotation",
            "low",
            [str(folder / SECRET)] if len(keys.by_id) > 1 else [],
            f"{len(keys.by_id)} keys are taken: a replacement has not ended",
            "take the old key out once every function has the new one first: docs/reference/sealing.md",
            right="one key is taken",
        )
    present = [folder / name for name in _PRIVATE if (folder / name).is_file()]
    if present:
        yield judged(
            "secret-files",
            "high",
            [str(path) for path in present if path.stat().st_mode & 0o077],
            "others of this machine can read or write the file",
            "chmod 600 the file, and replace the key if others may have read it",
            right="the secrets' files are this user's alone",
        )
        now = time.time()
        # A file's time is that of its writing here, so a fresh copy of an old key looks new.
        old = [path for path in present if now - path.stat().st_mtime > OLD_KEY_DAYS * DAY_S]
        yield judged(
            "key-age",
            "low",
            [str(path) for path in old],
            f"written more than {OLD_KEY_DAYS} days ago",
            "replace the key: docs/reference/sealing.md, Keys",
            right=f"keys are at most {OLD_KEY_DAYS} days old",
        )
    yield from _keyring(folder)
    yield from _authorities(settings)


def registry_findings(settings: RegistrySettings) -> Iterator[SecurityFinding]:
    """Whether the functions' keys may write to a registry on a server, tried by an object that is deleted again.

    Raises:
        RegistryError: the registry does not answer.
        SettingsError: its address or keys cannot be used.
    """
    if not settings.registry or parse_address(settings.registry).folder:
        text = "a registry in a folder: the rights of its files decide" if settings.registry else "no registry is named"
        yield unknown("registry-rights", "medium", settings.registry, text, "give functions a mount that is read-only")
        return
    names = STORE_SECRETS[parse_address(settings.registry).scheme]
    if not any((Path(settings.secrets_dir) / name).is_file() for name in names):
        text = f"no copy of the functions' keys in {settings.secrets_dir}"
        yield unknown("registry-rights", "medium", settings.registry, text, "name a folder with them by --secrets")
        return
    store = open_blob_store(settings.registry, replace(settings, registry_attempts=1, registry_timeout_s=5.0))
    # Outside the registry's own folders: no reader lists it, and gc does not look there.
    key = f"security-check/{token_hex(8)}"
    try:
        store.put_if_absent(key, b"")
        wrong = [settings.registry]
    except Denied:
        wrong = []
    if wrong:
        try:
            store.delete(key)
        except IsthmusError:
            # Rights to write without those to delete: the object is empty, and the finding names it.
            wrong = [f"{settings.registry} (left behind: {key})"]
    yield judged(
        "registry-rights",
        "medium",
        wrong,
        "the functions' keys may write: a function that is taken over could replace models",
        "give functions keys that may only read: docs/reference/registry.md",
        right="the functions' keys may not write to the registry",
    )


def _keyring(folder: Path) -> Iterator[SecurityFinding]:
    """Whether keys for signatures count for some time still; without any that does, no model is run."""
    path = folder / TRUSTED_KEYS
    if not path.is_file():
        return
    try:
        keyring = KeyringFile(path).current()
    except SettingsError as e:
        yield SecurityFinding("keyring", "open", "high", str(path), e.message, e.hint)
        return
    # Signatures of the keys that count then: one such key is enough.
    soon = time.time() + EXPIRING_DAYS * DAY_S
    lasting = [name for name in keyring.keys if not keyring.refusal(name, soon)]
    yield judged(
        "keyring",
        "medium",
        [] if lasting else [str(path)],
        f"no key of it counts in {EXPIRING_DAYS} days: functions will run nothing then",
        "sign with another key, and add that to the keyring: isthmus key trust",
        right=f"{len(lasting)} keys for signatures count for {EXPIRING_DAYS} more days",
    )


def _authorities(settings: RegistrySettings) -> Iterator[SecurityFinding]:
    """Whether the CAs of https hops are still valid, and for how long."""
    files = files_of(settings)
    if not files.ca:
        return
    try:
        authorities = files.open().get_ca_certs()
    except SettingsError as e:
        yield SecurityFinding("tls-files", "open", "high", files.ca, e.message, e.hint)
        return
    # The earliest end counts: a chain holds as long as each of its certificates.
    ends = [ssl.cert_time_to_seconds(str(each["notAfter"])) for each in authorities]
    days = (min(ends, default=time.time()) - time.time()) / DAY_S
    yield judged(
        "ca-expiry",
        "medium",
        [files.ca] if days < EXPIRING_DAYS else [],
        "a CA of it has expired" if days < 0 else f"a CA of it expires in {days:.0f} days",
        "give hops the next CA beside this one: docs/how-to/tls.md, Rotation",
        right=f"the CAs of hops are valid for {days:.0f} more days",
    )
