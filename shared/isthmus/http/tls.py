"""TLS of connections to functions: whom this side trusts, which certificate it shows, and why a handshake failed.

Files are read again once they were replaced, as Kubernetes does with the files of a secret: rotation needs no restart.
Verification cannot be turned off.
"""

from __future__ import annotations

import logging
import os
import ssl
import stat
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import SettingsError
from isthmus.files import file_stamp
from isthmus.settings import RegistrySettings

# The system's bundle has some 220 kB.
MAX_FILE_BYTES = 4 * 2**20
# Between looks at the files; a look is three system calls.
_LOOK_S = 1.0
_log = logging.getLogger(__name__)

_UNKNOWN_CA = (
    "unknown_ca",
    "its certificate is signed by no CA that is trusted here",
    "give the CA's certificate in PEM as the secret hop-ca, or name its file in the setting hop_ca",
)
_WRONG_HOST = (
    "wrong_host",
    "its certificate is for another host",
    "call the function by a name that its certificate holds, or have the certificate made for this name",
)
# By OpenSSL's X509_V_ERR_…, which `SSLCertVerificationError.verify_code` holds.
_UNTRUSTED = {
    9: ("not_yet_valid", "its certificate is not valid yet", "compare the clocks of this machine and of the CA's"),
    10: ("expired", "its certificate has expired", "renew the certificate of the gateway or proxy there"),
    18: _UNKNOWN_CA,
    19: _UNKNOWN_CA,
    20: _UNKNOWN_CA,
    21: _UNKNOWN_CA,
    23: ("revoked", "its certificate was revoked", "renew the certificate of the gateway or proxy there"),
    62: _WRONG_HOST,
    64: _WRONG_HOST,
}
DEMANDED = (
    "certificate_demanded",
    "it takes no connection without a client certificate",
    "give a certificate and its key in PEM as the secrets hop-client-cert and hop-client-key",
)
_REFUSED = (
    "certificate_refused",
    "it refuses this side's client certificate",
    "have the secret hop-client-cert signed by a CA that the server trusts, and renew it before it expires",
)
_NO_TLS = ("no_tls", "what listens there does not speak TLS", "is its URL one of http://, or another port?")
_PROTOCOL = (
    "protocol",
    "no version or cipher of TLS is common to both sides",
    "the server must speak TLS 1.2 or later; one of TLS 1.2 may refuse a client without a certificate in this way",
)
# By OpenSSL's reasons: alerts of the peer, and what a peer without TLS looks like.
_BY_REASON = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": DEMANDED,
    "TLSV1_ALERT_UNKNOWN_CA": _REFUSED,
    "TLSV1_ALERT_ACCESS_DENIED": _REFUSED,
    "TLSV1_ALERT_DECRYPT_ERROR": _REFUSED,
    "SSLV3_ALERT_BAD_CERTIFICATE": _REFUSED,
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": _REFUSED,
    "SSLV3_ALERT_CERTIFICATE_REVOKED": _REFUSED,
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": _REFUSED,
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": _REFUSED,
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "HTTP_REQUEST": _NO_TLS,
    "PACKET_LENGTH_TOO_LONG": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": _PROTOCOL,
    "TLSV1_ALERT_PROTOCOL_VERSION": _PROTOCOL,
    "TLSV1_ALERT_INSUFFICIENT_SECURITY": _PROTOCOL,
    "UNSUPPORTED_PROTOCOL": _PROTOCOL,
    "NO_PROTOCOLS_AVAILABLE": _PROTOCOL,
}


@dataclass(frozen=True)
class TlsProblem:
    """Why two sides do not trust each other.

    `reason` is one word of docs/how-to/tls.md, `text` the predicate of a sentence about the server.
    """

    reason: str
    text: str
    hint: str


def problem_of(error: OSError) -> TlsProblem | None:
    """What a failed handshake, or an alert after it, says about certificates; None for any other error."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if known := _UNTRUSTED.get(error.verify_code):
            return TlsProblem(*known)
        return TlsProblem("untrusted", f"its certificate is not accepted: {error.verify_message}"[:200], _UNKNOWN_CA[2])
    known = _BY_REASON.get(error.reason or "") if isinstance(error, ssl.SSLError) else None
    return TlsProblem(*known) if known else None


def demand_in(status: int, body: bytes | bytearray) -> TlsProblem | None:
    """What a response says of client certificates: nginx has handshakes succeed without one, and answers 400."""
    if status != 400 or b"SSL certificate" not in body:
        return None
    return TlsProblem(*(DEMANDED if b"No required SSL certificate" in body else _REFUSED))


@dataclass(frozen=True)
class TlsFiles:
    """PEM files: CAs that alone are trusted (empty means the system's), and a client certificate with its key.

    The key may be in the certificate's file.
    """

    ca: str = ""
    certificate: str = ""
    key: str = ""

    def open(self) -> ssl.SSLContext:
        """A context for clients: certificates and host names are verified, TLS 1.2 or later.

        Raises:
            SettingsError: a file cannot be read, or is none of its kind. The message never holds its content.
        """
        for path in filter(None, (self.ca, self.certificate, self.key)):
            _check_file(path)
        if self.key and not self.certificate:
            raise _unusable(self.key, "a client key needs its certificate: give both")
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except (OSError, ValueError) as e:
            raise _unusable(self.ca, "it holds no CA certificate in PEM") from e
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certificate:
            try:
                # Without a function OpenSSL would ask the terminal for the passphrase of an encrypted key.
                context.load_cert_chain(self.certificate, self.key or None, password=lambda: "-")
            except (OSError, ValueError) as e:
                why = "it and its key are no certificate and key in PEM that belong together, without a passphrase"
                raise _unusable(self.certificate, why) from e
        return context

    def identity(self) -> tuple[tuple[int, int, int] | None, ...]:
        """What changes where a file is replaced: the stamp of each, None for one without a name."""
        return tuple(file_stamp(path) if path else None for path in (self.ca, self.certificate, self.key))


class TlsTrust:
    """The present context of some files; thread-safe. Connections under way keep theirs.

    Raises:
        SettingsError: as `TlsFiles.open`.
    """

    def __init__(self, files: TlsFiles = TlsFiles(), *, look_s: float = _LOOK_S) -> None:
        self._files, self._look_s = files, look_s
        self._identity = files.identity()
        # The system's CAs take some 10 ms and a MB, which a process with http hops alone does not pay.
        self._context = files.open() if files != TlsFiles() else None
        self._looked = time.monotonic()
        self._lock = threading.Lock()

    def context(self) -> ssl.SSLContext:
        """The context; a new one once a file was replaced. Where the new files are unusable, the old ones serve on."""
        with self._lock:
            if self._context is None:
                self._context = self._files.open()
            if (now := time.monotonic()) - self._looked < self._look_s:
                return self._context
            self._looked = now
            if (identity := self._files.identity()) == self._identity:
                return self._context
            self._identity = identity
            try:
                self._context = self._files.open()
                _log.info("the certificates of https hops were read again")
            except SettingsError as e:
                # A certificate that was written before its key: the next look may find both.
                _log.warning("certificates of https hops stay as they were: %s", e.message)
            return self._context


def open_trust(settings: RegistrySettings) -> TlsTrust:
    """The trust of hops: settings that name files, else the secrets hop-ca, hop-client-cert and hop-client-key.

    Raises:
        SettingsError: as `TlsFiles.open`.
    """
    return TlsTrust(files_of(settings))


def files_of(settings: RegistrySettings) -> TlsFiles:
    """The files that the settings name, or that are among the secrets."""
    folder = Path(settings.secrets_dir)
    secrets = {name: folder / name for name in ("hop-ca", "hop-client-cert", "hop-client-key")}
    present = {name: str(path) for name, path in secrets.items() if os.path.lexists(path)}
    certificate = settings.hop_client_cert or present.get("hop-client-cert", "")
    # The key of a secret belongs to the certificate of a secret.
    own_key = "" if settings.hop_client_cert else present.get("hop-client-key", "")
    return TlsFiles(settings.hop_ca or present.get("hop-ca", ""), certificate, settings.hop_client_key or own_key)


def _check_file(path: str) -> None:
    """Refuse what OpenSSL would read without end, or wait for."""
    try:
        found = os.stat(path)
        with open(path, "rb"):
            pass
    except OSError as e:
        raise _unusable(path, f"it cannot be read: {e.strerror}") from e
    if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_FILE_BYTES:
        raise _unusable(path, f"it is no file of at most {MAX_FILE_BYTES} bytes")


def _unusable(path: str, why: str) -> SettingsError:
    return SettingsError(
        f"the file {path} for TLS of hops cannot be used: {why}",
        variable="hop_ca, hop_client_cert, hop_client_key",
        value=path,
        hint="docs/how-to/tls.md has the three files and how to make them",
    )
