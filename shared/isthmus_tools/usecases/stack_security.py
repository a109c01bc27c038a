"""Security of a deployment as its stack file describes it: secrets, hops, settings, images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from isthmus.http.addresses import is_near
from isthmus.settings import urls_of
from isthmus_tools.engine.stack import FunctionSpec, Stack
from isthmus_tools.usecases.security_findings import SecurityFinding, judged

HOP_KEYS, PROFILE_TOKEN, TRUSTED_KEYS = "hop-keys", "profile-token", "trusted-keys"
# By the variable's name alone: what a value means cannot be seen in it.
_SECRET_NAME = re.compile(r"secret|passw|token|api_?key|access_?key|private_?key|credential", re.IGNORECASE)
# As isthmus.settings reads them.
_TRUE = ("true", "1")


def is_router(function: FunctionSpec) -> bool:
    """Whether the function calls hops."""
    return "hops" in function.environment


def is_trigger(function: FunctionSpec) -> bool:
    """Whether the function reads a queue."""
    return "trigger_config" in function.environment


def is_segment_function(function: FunctionSpec) -> bool:
    """Whether the function runs segments for routers."""
    return not is_router(function) and not is_trigger(function)


def stack_findings(stack: Stack) -> Iterator[SecurityFinding]:
    """What the stack file leaves open."""
    functions = list(stack.functions.values())
    yield _hop_keys(functions)
    yield _open_to_anyone(functions)
    yield from _hops(functions)
    yield _trusted_keys(functions)
    yield _secrets_in_environment(functions)
    yield _details(functions)
    yield _profiling(functions)
    yield _image_user(stack)
    yield judged(
        "read-only-root",
        "medium",
        [f.name for f in functions if not f.readonly_root_filesystem],
        "the root file system can be written to",
        "set readonly_root_filesystem: true; functions write to /tmp alone",
        right="the root file systems are read-only",
    )


def _hop_keys(functions: list[FunctionSpec]) -> SecurityFinding:
    needing = [f for f in functions if is_segment_function(f) or _remote_hops(f)]
    return judged(
        "hop-keys",
        "high",
        [f.name for f in needing if HOP_KEYS not in f.secrets],
        "no secret hop-keys: segment functions refuse the router, or run every segment for anyone by access=anyone",
        "create the secret and name it in ISTHMUS_SECRETS, for all of these functions: docs/reference/sealing.md",
        right="every function that calls or runs segments has the secret hop-keys",
    )


def _open_to_anyone(functions: list[FunctionSpec]) -> SecurityFinding:
    return judged(
        "access",
        "critical",
        [f.name for f in functions if f.environment.get("access") == "anyone"],
        "access=anyone: whoever reaches the function may use it",
        "leave access unset, and give the function the secret callers: docs/how-to/callers.md",
        right="no function is open to anyone by its settings",
    )


def _hops(functions: list[FunctionSpec]) -> Iterator[SecurityFinding]:
    """Hops over http between hosts; sealed ones still show who calls which function, and when."""
    http = [(f, url) for f in functions for url in _remote_hops(f) if url.startswith("http://")]
    plain = [(f, url) for f, url in http if not is_near(urlsplit(url).hostname or "")]
    # Sealing hides content from everybody on the way, signing only keeps it from being altered.
    sealed = [url for f, url in plain if HOP_KEYS in f.secrets and f.environment.get("hop_security") != "signed"]
    readable = [url for _, url in plain if url not in sealed]
    advice = "give the gateway a certificate and the hop an https URL: docs/how-to/tls.md"
    right = "hops between hosts are https"
    if sealed:
        yield judged("tls", "low", sealed, "sealed, but over http: the path and sizes are visible", advice, right=right)
    if readable or not sealed:
        yield judged("tls", "high", readable, "activations travel readable, over http", advice, right=right)


def _trusted_keys(functions: list[FunctionSpec]) -> SecurityFinding:
    """Of functions that read models; a keyring named by the setting counts, `none` does not."""
    named = [f for f in functions if f.environment.get("trusted_keys", "") not in ("", "none")]
    # The secret is looked for where the setting is empty: `none` turns it off.
    by_secret = [f for f in functions if TRUSTED_KEYS in f.secrets and f.environment.get("trusted_keys") != "none"]
    readers = [f for f in functions if not is_trigger(f)]
    return judged(
        "trusted-keys",
        "medium",
        [f.name for f in readers if f not in named and f not in by_secret],
        "whoever may write to the registry decides what the function runs: it demands no signatures",
        "sign versions, and give functions the secret trusted-keys: docs/how-to/signing.md",
        right="functions run signed models alone",
    )


def _remote_hops(function: FunctionSpec) -> list[str]:
    tiers = [tier.strip() for tier in function.environment.get("hops", "").split(",")]
    return [url for tier in tiers for url in urls_of(tier) if url not in ("", "local")]


def _secrets_in_environment(functions: list[FunctionSpec]) -> SecurityFinding:
    wrong = []
    for f in functions:
        for name, value in f.environment.items():
            # A variable may hold a secret's name, which is one of the function's secrets.
            named = bool(_SECRET_NAME.search(name)) and bool(value) and value not in f.secrets
            # A user's password in a URL, as RFC 3986 writes it.
            if named or re.search(r"://[^/\s:@]*:[^/\s@]+@", value):
                wrong.append(f"{f.name}: {name}")
    return judged(
        "secrets-in-environment",
        "high",
        wrong,
        "the variable seems to hold a secret, which everybody who may describe the function can read",
        "give it as a secret: faas-cli secret create; functions read secrets from files",
        right="no variable holds a secret",
    )


def _details(functions: list[FunctionSpec]) -> SecurityFinding:
    return judged(
        "expose-details",
        "medium",
        [f.name for f in functions if f.environment.get("expose_details", "").lower() in _TRUE],
        "errors tell callers the URLs of functions, the registry and the names of models",
        "leave expose_details unset; the function's log has the details",
        right="errors tell callers no details",
    )


def _profiling(functions: list[FunctionSpec]) -> SecurityFinding:
    return judged(
        "profiling",
        "low",
        [f.name for f in functions if PROFILE_TOKEN in f.secrets],
        "holders of profile-token can have segments run and measured",
        "take the secret out of ISTHMUS_SECRETS once profiles are stored",
        right="profiling is off",
    )


def _image_user(stack: Stack) -> SecurityFinding:
    wrong, unread = [], []
    for f in stack.functions.values():
        path = stack.root / "template" / f.lang / "Dockerfile"
        try:
            users = re.findall(r"^USER\s+(\S+)", path.read_text(), re.MULTILINE)
        except OSError:
            unread.append(f.name)
            continue
        # The last USER counts; Kubernetes takes a number alone as proof that it is not root.
        if not users or users[-1].partition(":")[0] in ("root", "0"):
            wrong.append(f.name)
    if unread and not wrong:
        text = f"no Dockerfile of {', '.join(unread)} is here"
        return SecurityFinding("image-user", "unknown", "high", ", ".join(unread), text, "run this beside template/")
    return judged(
        "image-user",
        "high",
        wrong,
        "the image's last USER is root, or it has none",
        "end the template's Dockerfile with USER and a number above 0",
        right="images run as a user without rights",
    )
