"""`isthmus doctor`: software and resources of this machine, and missing parts; or what is open in a deployment."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from isthmus.errors import IsthmusError
from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, run, say, table
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, registry_settings, stack_variables

# By module, with the use of each; absent optional packages disable a command at most.
_NEEDED = {
    "onnxruntime": "runs segments",
    "flask": "serves functions",
    "waitress": "serves functions",
    "onnx_ir": "imports and cuts models",
    "onnx": "infers shapes",
}
_OPTIONAL = {
    "torch": "imports torch models: pip install 'isthmus_tools[torch]'",
    "onnxscript": "imports torch models: pip install 'isthmus_tools[torch]'",
    "boto3": "reads registries on S3",
    "matplotlib": "draws cuts: pip install isthmus_tools",
    "PIL": "reads photos",
}
# For the weights of a model of ordinary size, and its segments.
_ROOM_BYTES = 2 * 10**9
_MARKS = {"ok": "✓", "missing": "✗", "absent": "–"}
_SECURITY_MARKS = {"ok": "✓", "open": "✗", "unknown": "–"}


@dataclass(frozen=True)
class Finding:
    """A checked part of the machine: `state` is ok, missing (required) or absent (optional)."""

    what: str
    state: str
    found: str
    advice: str = ""


def doctor(
    *,
    registry: RegistryOption = DEFAULT_REGISTRY,
    security: Annotated[
        bool, typer.Option("--security", help="Check a deployment instead, and list what is open in it.")
    ] = False,
    stack: Annotated[Path, typer.Option(help="With --security: the stack file.")] = Path("stack.yml"),
    gateway: Annotated[
        list[str] | None,
        typer.Option(help="With --security: a running gateway whose functions are called as a stranger; repeatable."),
    ] = None,
    secrets: Annotated[
        Path | None, typer.Option(help="With --security: a folder with copies of the functions' secrets.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List missing software on this machine; exits with 1 if a required part is missing.

    With --security: what is open in a deployment, the worst first, and what to do; exits with 1 if something of the
    severities critical or high is open.

    Example: `isthmus doctor --json`, or
    `isthmus doctor --security --gateway https://edge.example --gateway https://cloud.example --secrets secrets/`
    """
    if security:
        _security(stack, gateway or [], secrets, registry, as_json)
        return
    findings = [finding for look in (_python, _packages, _runtime, _tools, _machine, _port) for finding in look()]
    findings += [*_registry(registry), *_access(stack, registry)]
    broken = any(f.state == "missing" for f in findings)
    if as_json:
        print_json({"ok": not broken, "findings": [asdict(f) for f in findings]})
    else:
        table(
            "this machine",
            ["part", "found", "advice"],
            [(f"{_MARKS[f.state]} {f.what}", f.found, f.advice) for f in findings],
        )
        say("something needed is missing" if broken else "everything needed is here", "red" if broken else None)
    if broken:
        raise typer.Exit(1)


def _security(stack: Path, gateways: Sequence[str], secrets: Path | None, registry: str, as_json: bool) -> None:
    from isthmus_tools.usecases.security_check import SecurityRequest, check_security

    with errors(as_json):
        settings = registry_settings(registry)
        if secrets is not None:
            settings = replace(settings, secrets_dir=str(secrets))
        request = SecurityRequest(
            stack=stack, settings=settings, variables=stack_variables(registry), gateways=gateways
        )
        result = run(check_security, request, quiet=as_json)
    if as_json:
        print_json({"ok": result.is_safe, "findings": [asdict(f) for f in result.findings]})
    else:
        table(
            "this deployment",
            ["state", "severity", "check", "where", "what", "what to do"],
            [
                [f"{_SECURITY_MARKS[f.state]} {f.state}", f.severity, f.check, f.where, f.observed, f.advice]
                for f in result.findings
            ],
            drop=["where", "severity"],
        )
        say("nothing critical or high is open" if result.is_safe else "something is open", _color(result.is_safe))
    if not result.is_safe:
        raise typer.Exit(1)


def _access(stack: Path, registry: str) -> Iterator[Finding]:
    """Functions of the stack file that are open to anyone; nothing without a stack file here."""
    from isthmus_tools.engine.stack import read_stack

    if not stack.is_file():
        return
    try:
        functions = read_stack(stack, stack_variables(registry)).functions.values()
    except IsthmusError:
        return  # its own command tells what is wrong with it
    wrong = [f.name for f in functions if f.environment.get("access") == "anyone"]
    if wrong:
        found = f"access=anyone opens {', '.join(wrong)} to whoever reaches {'it' if len(wrong) == 1 else 'them'}"
        yield Finding(str(stack), "absent", found, "give callers keys: docs/how-to/callers.md")


def _color(is_safe: bool) -> str | None:
    return None if is_safe else "red"


def _python() -> Iterator[Finding]:
    version_text = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok" if sys.version_info >= (3, 11) else "missing", version_text, "3.11 or later is needed")


def _packages() -> Iterator[Finding]:
    for modules, state in ((_NEEDED, "missing"), (_OPTIONAL, "absent")):
        for module, why in modules.items():
            # Not imported: torch takes long to load, and a broken package would raise.
            there = importlib.util.find_spec(module) is not None
            yield Finding(module, "ok" if there else state, _version(module) if there else "not installed", why)


def _runtime() -> Iterator[Finding]:
    # Its absence is reported by _packages.
    if importlib.util.find_spec("onnxruntime") is None:
        return
    from isthmus.runtime.ort import available_providers, cpu_limit

    providers = available_providers()
    yield Finding("execution providers", "ok", ", ".join(providers))
    gpu = any(p in providers for p in ("CUDAExecutionProvider", "TensorrtExecutionProvider"))
    yield Finding("GPU", "ok" if gpu else "absent", "onnxruntime can use it" if gpu else "not usable by onnxruntime")
    yield Finding("CPUs", "ok", str(cpu_limit()), "what runs of a segment share")


def _tools() -> Iterator[Finding]:
    for tool, why in {
        "faas-cli": "deploys to OpenFaaS",
        "docker": "builds the functions' images",
        "git": "tracks templates",
    }.items():
        path = shutil.which(tool)
        yield Finding(tool, "ok" if path else "absent", path or "not on PATH", why)
    from isthmus_tools.engine.nats_process import INSTALL, find_nats_server

    path = find_nats_server()
    advice = f"queues asynchronous calls of `isthmus up`: {INSTALL}"
    yield Finding("nats-server", "ok" if path else "absent", path or "not installed", advice)


def _machine() -> Iterator[Finding]:
    free = shutil.disk_usage(tempfile.gettempdir()).free
    yield Finding("room for the cache", "ok" if free > _ROOM_BYTES else "missing", format_size(free), "2 GB or more")
    pages: Callable[[str], int] = os.sysconf
    memory = pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE")
    # Little memory bounds the models, and fails no check: small models run in it.
    yield Finding("memory", "ok" if memory > _ROOM_BYTES else "absent", format_size(memory))


def _port() -> Iterator[Finding]:
    with socket.socket() as s:
        # By connecting: a bind would also fail while old connections are in TIME_WAIT.
        in_use = s.connect_ex(("127.0.0.1", 8080)) == 0
    yield Finding("port 8080", "absent" if in_use else "ok", "taken" if in_use else "free", "isthmus up --port N")


def _registry(registry: str) -> Iterator[Finding]:
    from isthmus.registry import open_registry, parse_address

    absent = False
    try:
        folder = parse_address(registry).folder
        absent = bool(folder) and not Path(folder).exists()
        # A single short attempt: retries would hide an unreachable server for minutes.
        settings = replace(registry_settings(registry), registry_attempts=1, registry_timeout_s=5.0)
        names = open_registry(settings).models()
    except IsthmusError as e:
        # A folder that does not exist is the state before the first import, and no defect.
        advice = "make one with: isthmus import" if absent else e.hint or "name another with --registry"
        yield Finding("registry", "absent" if absent else "missing", e.message, advice)
        return
    yield Finding("registry", "ok", f"{registry}: {', '.join(names) or 'empty'}", "isthmus import adds models")


def _version(module: str) -> str:
    try:
        # Distributions whose names differ from their modules.
        return version({"PIL": "pillow", "onnx_ir": "onnx-ir"}.get(module, module))
    except PackageNotFoundError:
        return "installed"
