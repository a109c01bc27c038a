"""Where the functions are that a command measures on, and what calls to them need."""

from __future__ import annotations

from dataclasses import dataclass

from isthmus.http.tls import TlsTrust, open_trust
from isthmus.security.protected_call import CallProtection, open_protection
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.profiling.slow_edge import AT_FULL_SPEED, SlowEdge


@dataclass(frozen=True)
class FunctionUrls:
    """URLs of the function at the edge and of the function in the cloud, and the secret that allows profiling.

    An empty URL leaves that tier out. Work at the edge counts as that of `edge`. `protection` is that of calls to
    functions that share the secret `hop-keys`, and `trust` that of https URLs.
    """

    head: str = ""
    tail: str = ""
    token: str = ""
    edge: SlowEdge = AT_FULL_SPEED
    protection: CallProtection | None = None
    trust: TlsTrust | None = None


def functions_at(head: str, tail: str, registry: RegistrySettings, token: str = "") -> FunctionUrls:
    """Deployed functions, called with the secret `hop-keys` and the certificates that `registry` names, if any.

    Raises:
        SettingsError: the secret or a certificate cannot be used.
    """
    # Functions that sign take sealed calls as well, so one kind does for both.
    protection = open_protection(SegmentSettings(**vars(registry)))
    return FunctionUrls(head, tail, token, protection=protection, trust=open_trust(registry))
