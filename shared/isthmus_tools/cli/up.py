"""`isthmus up`: the functions of a stack file on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.errors import LocalError, Missing
from isthmus.units import format_size, parse_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import err, errors, tell
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    EdgeCpus,
    EdgeSlowdown,
    RegistryOption,
    edge_slowdown_of,
    registry_settings,
    stack_variables,
)

if TYPE_CHECKING:
    from isthmus_tools.engine import Event

MAX_ASYNC_BODY_BYTES = 48 * 2**20
"""nats-server takes messages up to 64 MiB, headers included, and advises against large ones."""


def up(
    *,
    model: Annotated[
        str,
        typer.Option(
            help="NAME or NAME:VERSION of the registry to serve; by default MODEL of the environment.",
            autocompletion=complete_models,
        ),
    ] = "",
    port: Annotated[int, typer.Option(help="Port of the gateway.", min=0, max=65535)] = 8080,
    stack: Annotated[Path, typer.Option(help="The stack file.")] = Path("stack.yml"),
    replicas: Annotated[list[str] | None, typer.Option(help="NAME=N: so many of a function; once each.")] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(help="[NAME:]VARIABLE=VALUE: goes before stack.yml's, for one function or all; once each."),
    ] = None,
    allow_callbacks: Annotated[
        list[str] | None,
        typer.Option(
            help="A network, such as 127.0.0.0/8, that X-Callback-Url may lead to beside public addresses; repeatable.",
            metavar="NETWORK",
        ),
    ] = None,
    callback_secret: Annotated[
        str, typer.Option(help="Secret that signs callbacks (Standard Webhooks); see `faas-cli secret create`.")
    ] = "",
    nats_port: Annotated[
        int | None, typer.Option(help="Port of the NATS server; by default 4222 or a free one.", min=1, max=65535)
    ] = None,
    async_body: Annotated[
        str, typer.Option(help="Largest body of an asynchronous call; 256kB is OpenFaaS CE's.", metavar="SIZE")
    ] = "8MB",
    edge_slowdown: EdgeSlowdown = None,
    edge_cpus: EdgeCpus = None,
    logs: Annotated[bool, typer.Option(help="Show what the functions log.")] = True,
    registry: RegistryOption = DEFAULT_REGISTRY,
) -> None:
    """Run the functions of a stack file on this machine, behind OpenFaaS's provider API, until Ctrl-C.

    Prints the `faas-cli login` command for the credentials; function calls need none.

    A NATS server starts with it where nats-server is installed, and queues the calls of /async-function.

    Example: `isthmus up --model detector`, or `isthmus up --replicas cloud-tail=2 --env edge-head:threads=1`
    """
    from isthmus_tools.engine import EngineOptions, run_engine
    from isthmus_tools.engine.cpu_share import joining, share_of_a_cpu
    from isthmus_tools.engine.telemetry import OnEvent, ignore_event
    from isthmus_tools.usecases.local_functions import EDGE_FUNCTIONS, on_one_thread

    with errors(as_json=False), ExitStack() as resources:
        generates = bool(model) and _show_model(model, registry)
        slowdown, variables = edge_slowdown_of(edge_slowdown, edge_cpus), _environment(env or [])
        join: OnEvent = ignore_event
        if slowdown is not None:
            edge = resources.enter_context(share_of_a_cpu(1 / slowdown))
            variables, join = on_one_thread(variables), joining(edge, EDGE_FUNCTIONS)
            share = f"router and edge-head have 1/{slowdown:g} of a CPU, by {edge.method}"
            tell(f"{share}; single calls of some ms may be faster")

        greeting = Greeting(model, generates=generates)

        def on_event(event: Event) -> None:
            join(event)
            _show(event, logs)
            greeting.after(event)

        options = EngineOptions(
            stack_file=stack,
            port=port,
            replicas=_replicas(replicas or []),
            environment=variables,
            variables=stack_variables(registry) | ({"MODEL": model} if model else {}),
            callback_networks=allow_callbacks or (),
            callback_secret=callback_secret,
            nats_port=nats_port,
            async_body_bytes=_body_bytes(async_body),
            on_event=on_event,
        )
        run_engine(options)


def _show_model(model: str, registry: str) -> bool:
    """Print the version that functions will serve, before they start; True for a model that generates text.

    Raises:
        Missing: unknown model, version or alias; the hint says how to import or list models.
    """
    from isthmus.registry import open_registry
    from isthmus_tools.usecases.versions import summarise

    try:
        version = summarise(open_registry(registry_settings(registry)), model)
    except Missing as e:
        hint = "list the models: isthmus models; import one: isthmus import MODEL.onnx --name NAME"
        raise type(e)(e.message, **{**e.facts, "hint": hint}) from e
    plan = f"by the plan {version.plan}" if version.plan else "without a plan"
    alias = f" ({' and '.join(version.aliases)})" if version.aliases else ""
    tell(f"serving {version.name}:{version.version}{alias} {plan}")
    return version.bundle.state is not None


@dataclass
class Greeting:
    """Prints once, when the first replicas are ready, how to send a request."""

    model: str
    gateway: str = ""
    waiting: set[str] = field(default_factory=set)
    generates: bool = False

    def after(self, event: Event) -> None:
        if event.kind == "listening":
            self.gateway = event.text
        elif event.kind == "starting":
            self.waiting.add(event.replica)
        elif event.kind == "ready" and self.gateway and event.replica in self.waiting:
            self.waiting.remove(event.replica)
            if not self.waiting:
                for line in self._lines(f"{self.gateway}/function/router"):
                    tell(line)
                self.gateway = ""

    def _lines(self, url: str) -> tuple[str, str]:
        # A photo means nothing to a language model.
        if self.generates:
            # -N: curl would hold back the events of the stream.
            return (
                f"""ready; try: curl -N {url}/v1/completions -d '{{"prompt": "The sea", "stream": true}}'""",
                f"or OpenAI's clients with base_url={url}/v1; Ctrl-C stops",
            )
        model = f" --model {self.model}" if self.model else ""
        return (
            f"ready; try: isthmus infer PHOTO{model} --url {url}",
            f"or curl --data-binary @PHOTO {url}, or the page {self.gateway}; Ctrl-C stops",
        )


def _show(event: Event, logs: bool) -> None:
    if event.kind == "log" and not logs:
        return
    who = event.replica or event.function or "isthmus"
    text = event.text if event.kind == "log" else f"{event.kind} {event.text}".strip()
    style = {"failed": "red", "exited": "yellow", "ready": "green", "log": "dim"}.get(event.kind, "")
    err.print(f"{who} ", style="bold", end="", highlight=False)
    err.print(text, style=style, highlight=False, markup=False, soft_wrap=True)


def _body_bytes(text: str) -> int:
    try:
        size = parse_size(text)
    except ValueError as e:
        raise LocalError(f"--async-body: {e}") from e
    if not 1 <= size <= MAX_ASYNC_BODY_BYTES:
        raise LocalError(f"--async-body is {text}; a queue of NATS takes up to {format_size(MAX_ASYNC_BODY_BYTES)}")
    return size


def _replicas(entries: Sequence[str]) -> dict[str, int]:
    counts = {}
    for entry in entries:
        name, _, count = entry.partition("=")
        # `isdigit` and `int` accept digits of other scripts.
        if not name or not re.fullmatch("[0-9]{1,4}", count):
            raise LocalError(f"--replicas is {entry!r}; it is NAME=N")
        counts[name] = int(count)
    return counts


def _environment(entries: Sequence[str]) -> Mapping[str, Mapping[str, str]]:
    variables: dict[str, dict[str, str]] = {}
    for entry in entries:
        variable, equals, value = entry.partition("=")
        function, colon, name = variable.rpartition(":")
        if not equals or not name or (colon and not function):
            raise LocalError(f"--env is {entry!r}; it is VARIABLE=VALUE or NAME:VARIABLE=VALUE")
        variables.setdefault(function or "*", {})[name] = value
    return variables
