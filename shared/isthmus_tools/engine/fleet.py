"""Deployed functions of the stack, and their changes by the provider API."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import aiohttp

from isthmus.errors import LocalError, Missing, RequestMalformed
from isthmus.events.configuration import has_configuration
from isthmus.settings import RouterSettings, TriggerSettings
from isthmus_tools.engine.credentials import SecretFolder
from isthmus_tools.engine.replica import WATCHDOG_VARIABLES, Deployment, WatchdogLimits
from isthmus_tools.engine.stack import FunctionSpec, StackFile, stage
from isthmus_tools.engine.supervisor import MAX_REPLICAS, Supervisor
from isthmus_tools.engine.telemetry import Event, OnEvent

NAMESPACE = "openfaas-fn"
READY_PATH = "/ready"  # as in the template's Dockerfile
SETTINGS = frozenset(f.name for f in (*fields(RouterSettings), *fields(TriggerSettings)))
"""Variables read by functions of Isthmus; the router's settings include those of segments."""

_CONFIGURATION = "trigger_config"

_PATH = re.compile(r"/[!-~]*")
IN_CLUSTER_GATEWAY = re.compile(r"http://gateway(?:\.openfaas(?:\.svc(?:\.cluster\.local)?)?)?:8080(?=[/,\s]|$)")
"""URLs of the gateway in a cluster and on faasd."""


@dataclass(frozen=True)
class EngineContext:
    """Folders of the engine, and the gateway's URL as seen by the functions."""

    url: str
    build: Path
    cache: Path
    secrets: SecretFolder


class Fleet:
    """Deployed functions; a removed function of the stack can be deployed again."""

    def __init__(
        self,
        file: StackFile,
        context: EngineContext,
        session: aiohttp.ClientSession,
        on_event: OnEvent,
        *,
        overrides: Mapping[str, Mapping[str, str]],
        drain_s: float,
    ) -> None:
        stack = file.read()
        for name in overrides:
            if name != "*" and name not in stack.functions:
                raise LocalError(f"stack.yml has no function {name!r}; it has {', '.join(stack.functions)}")
        self._file = file
        self._stack = stack
        self._context = context
        self._deployed = 0
        self._session = session
        self._on_event = on_event
        self._overrides = overrides
        self._drain_s = drain_s
        self._running: dict[str, Supervisor] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Supervisor]:
        return iter(self._running.values())

    def get(self, name: str) -> Supervisor | None:
        """The deployed function `name`, with or without the namespace, else None."""
        plain, _, namespace = name.partition(".")
        return self._running.get(plain) if namespace in ("", NAMESPACE) else None

    def find(self, name: str) -> Supervisor:
        """The deployed function `name`.

        Raises:
            Missing: no function is deployed.
        """
        if (supervisor := self.get(name)) is not None:
            return supervisor
        raise Missing(f"error finding function {name}", kind="function", name=name, exists=sorted(self._running))

    def start(self, replicas: Mapping[str, int]) -> None:
        """Deploy every function of the stack.

        Raises:
            LocalError: a function cannot be staged, or `replicas` names a function that the stack lacks.
        """
        for name in replicas:
            if name not in self._stack.functions:
                raise LocalError(f"stack.yml has no function {name!r}; it has {', '.join(self._stack.functions)}")
        for spec in self._stack.functions.values():
            self._deploy(spec, replicas.get(spec.name, self._first_replicas(spec)))

    def deploy(self, doc: Mapping[str, Any], *, update: bool) -> None:
        """Deploy a function by a request of the provider API, from the current working tree and stack.yml.

        Raises:
            Missing: `update` of a function that is not deployed.
            RequestMalformed: not a deployment; another image than stack.yml's, as the engine pulls no images; or a
                variable unknown to stack.yml, the settings and the watchdog.
            LocalError: stack.yml cannot be read, or the function cannot be staged.
        """
        name = _text(doc, "service")
        if update and self.get(name) is None:
            raise Missing(f"error finding function {name}", kind="function", name=name, exists=sorted(self._running))
        stack = self._file.read()
        declared = stack.functions.get(name)
        if declared is None:
            raise RequestMalformed(
                f"this engine runs the functions of stack.yml and pulls no images; it has no {name!r}",
                hint=f"it has {', '.join(stack.functions)}",
            )
        if (namespace := _text(doc, "namespace")) not in ("", NAMESPACE):
            raise RequestMalformed(f"there is no namespace {namespace!r}; there is {NAMESPACE}")
        if (image := _text(doc, "image")) != declared.image:
            raise RequestMalformed(
                f"this engine runs {name} from the working tree, as image {declared.image!r}; it cannot pull {image!r}"
            )
        environment = _texts(doc, "envVars")
        self._check_variables(declared, environment)
        environment = self._fill_in(declared, environment)
        secrets = _strings(doc, "secrets")
        if missing := sorted(set(secrets) - set(self._context.secrets.names())):
            raise RequestMalformed(
                f"the secret {missing[0]} of {name} does not exist", hint=f"faas-cli secret create {missing[0]}"
            )
        spec = replace(
            declared,
            fprocess=_text(doc, "envProcess"),
            environment=environment,
            secrets=secrets,
            labels=_texts(doc, "labels"),
            annotations=_texts(doc, "annotations"),
            constraints=_strings(doc, "constraints"),
            limits=_texts(doc, "limits"),
            requests=_texts(doc, "requests"),
            readonly_root_filesystem=doc.get("readOnlyRootFilesystem") is True,
        )
        running = self.get(name)
        self._stack = stack
        # A deployment may bring the configuration that was missing.
        self._deploy(spec, (running.desired if running else 0) or self._first_replicas(spec))

    def _fill_in(self, declared: FunctionSpec, environment: Mapping[str, str]) -> dict[str, str]:
        """A deployment's variables, with the engine's own value in place of an unchanged default of stack.yml.

        faas-cli fills `${…}` from its own shell, mostly not the engine's: `registry` would become stack.yml's default,
        a registry without this engine's bundles.
        """
        stack = self._file.read_defaults()
        default = stack.functions.get(declared.name) if stack is not None else None
        unset = default.environment if default is not None else {}
        own = {k: v for k, v in declared.environment.items() if k in unset and environment.get(k) == unset[k] != v}
        if own:
            text = (
                f"the deployment holds stack.yml's default for {', '.join(own)}; it runs with this engine's own value"
            )
            self._on_event(Event("deployed", text, declared.name))
        return {**environment, **own}

    def _check_variables(self, declared: FunctionSpec, environment: Mapping[str, str]) -> None:
        """Refuse variables outside stack.yml, settings and watchdog: PYTHONPATH or LD_PRELOAD would choose the code.

        Raises:
            RequestMalformed: names the variables.
        """
        own = {*declared.environment, *self._overrides.get("*", {}), *self._overrides.get(declared.name, {})}
        if unknown := sorted(set(environment) - own - WATCHDOG_VARIABLES - SETTINGS):
            raise RequestMalformed(
                f"{declared.name} cannot be given the variables {', '.join(map(repr, unknown))}: neither stack.yml nor"
                " the settings nor the watchdog has them",
                hint="name them in the function's environment in stack.yml",
            )

    def remove(self, name: str) -> None:
        """Drain and end a function.

        Raises:
            Missing: the function is not deployed.
        """
        supervisor = self.find(name)
        del self._running[supervisor.name]
        task = asyncio.create_task(self._end(supervisor))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def resolve(self, text: str) -> str:
        """`text` with the gateway's in-cluster names replaced by this engine's address, as cluster DNS would."""
        return IN_CLUSTER_GATEWAY.sub(self._context.url, text)

    async def close(self) -> None:
        """Drain and end every function."""
        await asyncio.gather(*(s.close() for s in self._running.values()), *self._leaving)

    def kill(self) -> None:
        """End every function now."""
        for supervisor in self._running.values():
            supervisor.kill()

    def _deploy(self, spec: FunctionSpec, replicas: int) -> None:
        # A folder for each deployment: draining replicas of the last deployment still read from their folder.
        self._deployed += 1
        folder = stage(self._stack, spec, self._context.build / str(self._deployed))
        environment = self._environment(spec, folder)
        deployment = Deployment(spec, folder, environment, _ready_path(spec), WatchdogLimits.from_env(environment))
        supervisor = self._running.get(spec.name)
        if supervisor is None:
            supervisor = Supervisor(
                spec.name, self._session, self._on_event, drain_s=self._drain_s, discard=self._remove_folder
            )
            self._running[spec.name] = supervisor
        supervisor.deploy(deployment, replicas)

    def _first_replicas(self, spec: FunctionSpec) -> int:
        """A function's replicas at first: none of a trigger without a configuration, which could only say so."""
        values = {**spec.environment, **self._overrides.get("*", {}), **self._overrides.get(spec.name, {})}
        given = values.get(_CONFIGURATION, "")
        if given and not has_configuration(given, self._stack.root / spec.handler):
            self._on_event(Event("idle", f"no configuration: {spec.handler}/{given} is missing", spec.name))
            return 0
        return _min_replicas(spec)

    async def _end(self, supervisor: Supervisor) -> None:
        await supervisor.close()
        await asyncio.to_thread(self._remove_folder, supervisor.deployment)

    def _remove_folder(self, deployment: Deployment) -> None:
        """Remove the staged folder of a replaced or removed deployment."""
        folder = deployment.folder.parent
        if folder.parent == self._context.build:
            shutil.rmtree(folder, ignore_errors=True)

    def _environment(self, spec: FunctionSpec, folder: Path) -> dict[str, str]:
        """A function's environment here, laid out in `folder`: its own, the overrides, in-cluster names resolved."""
        values = {
            # In a container every function has a /tmp, and so a cache, of its own.
            "cache_dir": str(self._context.cache / spec.name),
            "secrets_dir": str(self._context.secrets.path),
            "expose_details": "true",  # on this machine the caller and the operator are mostly the same person
            "page": "true",
            **spec.environment,
            **self._overrides.get("*", {}),
            **self._overrides.get(spec.name, {}),
        }
        registry = values.get("registry", "")
        # A registry baked into the image is relative to the function's staged folder.
        if registry and "://" not in registry and not (folder / registry).is_dir():
            # Relative to the stack's root, as every path of stack.yml: a process starts in its staged folder.
            values["registry"] = str(self._stack.root / registry)
        return {k: self.resolve(v) for k, v in values.items()}


def describe(supervisor: Supervisor) -> dict[str, Any]:
    """Status of a function, as in GET /system/function/NAME.

    `replicas`, shown by `faas-cli list`, counts ready replicas, as on faasd.
    """
    spec = supervisor.deployment.spec
    return {
        "name": spec.name,
        "image": spec.image,
        "namespace": NAMESPACE,
        "envProcess": spec.fprocess,
        "envVars": dict(spec.environment),
        "constraints": list(spec.constraints),
        "secrets": list(spec.secrets),
        "labels": dict(spec.labels),
        "annotations": dict(spec.annotations),
        "limits": dict(spec.limits) or None,
        "requests": dict(spec.requests) or None,
        "readOnlyRootFilesystem": spec.readonly_root_filesystem,
        "invocationCount": supervisor.invocations,
        "replicas": supervisor.available,
        "availableReplicas": supervisor.available,
        "createdAt": supervisor.created.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _min_replicas(spec: FunctionSpec) -> int:
    text = spec.labels.get("com.openfaas.scale.min", "1")
    return min(int(text), MAX_REPLICAS) if re.fullmatch("[0-9]{1,9}", text) else 1


def _ready_path(spec: FunctionSpec) -> str:
    path = spec.environment.get("ready_path") or READY_PATH
    if not _PATH.fullmatch(path):  # appended to an address: without the slash, the path could change the host
        raise LocalError(f"the variable ready_path of {spec.name} is {path[:80]!r}; it must be a path such as /ready")
    return path


def _text(doc: Mapping[str, Any], key: str) -> str:
    value = doc.get(key) or ""
    if not isinstance(value, str):
        raise RequestMalformed(f"{key} must be a string")
    return value


def _texts(doc: Mapping[str, Any], key: str) -> dict[str, str]:
    value = doc.get(key) or {}
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        raise RequestMalformed(f"{key} must map names to strings")
    if broken := sorted(k for k, v in value.items() if not (_can_be_passed(k) and _can_be_passed(v))):
        raise RequestMalformed(f"{key} holds {broken[0][:80]!r}, which no process can be given: a NUL, or no Unicode")
    return value


def _strings(doc: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = doc.get(key) or []
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise RequestMalformed(f"{key} must be a list of strings")
    return tuple(value)


def _can_be_passed(text: str) -> bool:
    return "\0" not in text and text == text.encode(errors="replace").decode()
