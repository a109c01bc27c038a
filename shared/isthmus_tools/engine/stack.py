"""Read stack.yml as faas-cli does, but refuse the keys that faas-cli would silently ignore.

Source: docs/how-to/local.md, "stack.yml".
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from isthmus.errors import LocalError

TOP_KEYS = frozenset({"version", "provider", "functions", "configuration"})
PROVIDER_KEYS = frozenset({"name", "gateway"})
CONFIGURATION_KEYS = frozenset({"templates", "copy"})
RESOURCE_KEYS = frozenset({"memory", "cpu"})
FUNCTION_KEYS = frozenset(
    {
        *("lang", "handler", "image", "fprocess", "skip_build", "namespace", "platforms"),
        *("environment", "environment_file", "secrets", "constraints", "labels", "annotations"),
        *("limits", "requests", "readonly_root_filesystem"),
        *("build_options", "build_args", "build_secrets"),
    }
)
MAX_FUNCTIONS = 15
MAX_STACK_BYTES = 1 << 20

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOLE = re.compile(r"\$\{([^{}]*)\}")
_VARIABLE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::?=(?P<set>.*)|:-(?P<default>.*))?", re.DOTALL)


@dataclass(frozen=True)
class FunctionSpec:
    """One function of stack.yml, as it is deployed."""

    name: str
    lang: str
    handler: str
    image: str
    fprocess: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    constraints: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    requests: Mapping[str, str] = field(default_factory=dict)
    readonly_root_filesystem: bool = False


@dataclass(frozen=True)
class Stack:
    """A stack.yml: its functions by name, the paths copied into each, and the folder that all paths are relative to."""

    root: Path
    functions: Mapping[str, FunctionSpec]
    copy: tuple[str, ...]
    gateway: str = ""


@dataclass(frozen=True)
class StackFile:
    """A stack.yml that may be edited while its functions run, and the variables of its `${…}`."""

    path: Path
    variables: Mapping[str, str]

    def read(self) -> Stack:
        """The stack as the file is now. See `read_stack`."""
        return read_stack(self.path, self.variables)

    def read_defaults(self) -> Stack | None:
        """The stack as a shell without any of the variables reads it; None where it needs some of them."""
        try:
            return read_stack(self.path, {})
        except LocalError:
            return None


def is_name(text: str) -> bool:
    """Whether `text` can name a function or a secret: a DNS label."""
    return _NAME.fullmatch(text) is not None


def substitute(text: str, env: Mapping[str, str]) -> str:
    """Replace `${NAME}`, `${NAME:-default}` and `${NAME:=default}` in `text`, comments included, as faas-cli does.

    An empty variable takes the default too.

    Raises:
        LocalError: another form, which faas-cli would read differently from what it seems to say.
    """

    def fill(match: re.Match[str]) -> str:
        found = _VARIABLE.fullmatch(match[1])
        if not found or "${" in match[1]:
            raise LocalError(f"stack.yml holds {match[0]!r}; write ${{NAME}} or ${{NAME:-default}}")
        return env.get(found["name"], "") or found["default"] or found["set"] or ""

    return _HOLE.sub(fill, text)


def read_stack(path: Path, env: Mapping[str, str]) -> Stack:
    """The stack that the file at `path` describes, its variables taken from `env`.

    Raises:
        LocalError: no such file, not a stack, or a key that faas-cli would silently ignore.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise LocalError(f"cannot read {path}: {e}", hint="run this from the repository's root") from e
    if len(text) > MAX_STACK_BYTES:
        raise LocalError(f"{path.name} has more than {MAX_STACK_BYTES} characters", limit=MAX_STACK_BYTES)
    try:
        # BaseLoader leaves every scalar a string, which is what faas-cli makes of them too.
        doc = yaml.load(substitute(text, env), yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, RecursionError) as e:
        raise LocalError(f"{path.name} is not YAML: {e}") from e
    if not isinstance(doc, dict):
        raise LocalError(f"{path.name} is no stack file", hint="run this from the repository's root")
    top = _mapping(doc, path.name, TOP_KEYS)
    provider = _mapping(top.get("provider"), "provider", PROVIDER_KEYS)
    if provider.get("name") != "openfaas":
        raise LocalError("provider.name must be openfaas")
    configuration = _mapping(top.get("configuration"), "configuration", CONFIGURATION_KEYS)
    functions = {
        str(name): _function(str(name), doc) for name, doc in _mapping(top.get("functions"), "functions").items()
    }
    if not functions:
        raise LocalError(f"{path.name} has no functions")
    if len(functions) > MAX_FUNCTIONS:
        raise LocalError(f"{path.name} has {len(functions)} functions; OpenFaaS CE takes {MAX_FUNCTIONS}")
    return Stack(
        root=_root(path),
        functions=functions,
        copy=_strings(configuration.get("copy"), "configuration.copy"),
        gateway=str(provider.get("gateway", "")),
    )


def _root(path: Path) -> Path:
    """What a stack's paths start from: its own folder if the templates are there, else, as for faas-cli, this one."""
    own = path.resolve().parent
    return own if (own / "template").is_dir() else Path.cwd()


def _function(name: str, doc: Any) -> FunctionSpec:
    where = f"functions.{name}"
    if not is_name(name):
        raise LocalError(f"{where}: a function's name is a DNS label of at most 63 characters")
    keys = _mapping(doc, where, FUNCTION_KEYS)
    for key in ("lang", "handler", "image"):
        if not keys.get(key):
            raise LocalError(f"{where} has no {key}")
    if keys.get("environment_file"):
        raise LocalError(f"{where}.environment_file: set the variables in environment, where `faas-cli diff` sees them")
    return FunctionSpec(
        name=name,
        lang=str(keys["lang"]),
        handler=str(keys["handler"]),
        image=str(keys["image"]),
        fprocess=str(keys.get("fprocess", "")),
        environment=_texts(keys.get("environment"), f"{where}.environment"),
        secrets=_strings(keys.get("secrets"), f"{where}.secrets"),
        labels=_texts(keys.get("labels"), f"{where}.labels"),
        annotations=_texts(keys.get("annotations"), f"{where}.annotations"),
        constraints=_strings(keys.get("constraints"), f"{where}.constraints"),
        limits=_texts(keys.get("limits"), f"{where}.limits", RESOURCE_KEYS),
        requests=_texts(keys.get("requests"), f"{where}.requests", RESOURCE_KEYS),
        readonly_root_filesystem=keys.get("readonly_root_filesystem", "") == "true",
    )


def _mapping(doc: Any, where: str, known: Collection[str] | None = None) -> dict[str, Any]:
    if doc in (None, ""):
        return {}
    if not isinstance(doc, dict):
        raise LocalError(f"{where} must be a mapping")
    for key in doc:
        if known is not None and key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(sorted(known))}"
            raise LocalError(f"{where} has the key {key!r}, which faas-cli would silently ignore; {meant}", key=key)
    return doc


def _texts(doc: Any, where: str, known: Collection[str] | None = None) -> dict[str, str]:
    found = _mapping(doc, where, known)
    for key, value in found.items():
        if not isinstance(value, str):
            raise LocalError(f"{where}.{key} must be one value")
    return found


def _strings(doc: Any, where: str) -> tuple[str, ...]:
    if doc in (None, ""):
        return ()
    if not isinstance(doc, list) or not all(isinstance(part, str) for part in doc):
        raise LocalError(f"{where} must be a list of strings")
    return tuple(doc)
