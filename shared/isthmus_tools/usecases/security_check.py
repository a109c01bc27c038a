"""What is open in a deployment: a stack file and its secrets as they would be deployed, and running gateways."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.errors import IsthmusError, LocalError
from isthmus.settings import RegistrySettings
from isthmus_tools.engine.stack import read_stack
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.gateway_security import gateway_findings
from isthmus_tools.usecases.secret_checks import registry_findings, secret_findings
from isthmus_tools.usecases.security_findings import SEVERITIES, STATES, SecurityFinding, unknown
from isthmus_tools.usecases.stack_security import stack_findings

# A deployment with one of these open is not for a network with strangers.
_FAILING = ("critical", "high")


@dataclass(frozen=True, kw_only=True)
class SecurityRequest:
    """A deployment to check.

    `variables` fill the stack file's `${…}`. `settings` name the folder with copies of the functions' secrets, the
    registry (empty: not tried), and the certificates of https gateways. Functions of the stack are called behind each
    of `gateways`, such as http://127.0.0.1:8080. Units: `timeout_s`, in seconds, bounds each call.
    """

    stack: Path
    settings: RegistrySettings
    variables: Mapping[str, str]
    gateways: Sequence[str] = ()
    timeout_s: float = 10.0


@dataclass(frozen=True)
class SecurityResult:
    """Findings: what is open by severity, then what could not be checked, then what is in order."""

    findings: tuple[SecurityFinding, ...]

    @property
    def is_safe(self) -> bool:
        """Whether nothing of the severities critical and high is open."""
        return not any(f.state == "open" and f.severity in _FAILING for f in self.findings)


def check_security(request: SecurityRequest, progress: Progress = silent) -> SecurityResult:
    """Check a deployment as its stack file describes it and, with gateways, as a stranger sees it.

    Nothing is changed, but for an object that a check of a registry in S3 writes and deletes.

    Raises:
        LocalError: the stack file cannot be read, or a gateway is no URL.
    """
    stack = read_stack(request.stack, request.variables)
    findings: list[SecurityFinding] = [*stack_findings(stack), *secret_findings(request.settings)]
    progress("trying to write to the registry with the functions' keys")
    findings += _tried("registry", registry_findings(request.settings))
    for gateway in request.gateways:
        if not gateway.startswith(("http://", "https://")):
            raise LocalError(f"{gateway!r} is no URL of a gateway", hint="a URL is such as http://127.0.0.1:8080")
        progress(f"calling the functions behind {gateway} as a stranger")
        findings += _tried(gateway, gateway_findings(gateway.rstrip("/"), stack, request.settings, request.timeout_s))
    # A stack file says what is meant to be; only a call shows what is.
    if not request.gateways:
        findings.append(unknown("strangers", "high", "gateway", "no running gateway was named", "add --gateway URL"))
    order = {f: (STATES.index(f.state), SEVERITIES.index(f.severity)) for f in findings}
    return SecurityResult(tuple(sorted(findings, key=lambda f: order[f])))


def _tried(where: str, findings: Iterator[SecurityFinding]) -> Iterable[SecurityFinding]:
    """The findings up to the first error, and that as one of its own."""
    # Findings made before the error stand: a gateway may end in mid-check.
    collected: list[SecurityFinding] = []
    try:
        collected.extend(findings)
    except IsthmusError as e:
        collected.append(unknown("reachable", "high", where, e.message, e.hint))
    return collected
