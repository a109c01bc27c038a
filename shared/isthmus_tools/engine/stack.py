"""stack.yml: read as faas-cli does, refusing keys that faas-cli would ignore silently, and staged as an image is.

Source: docs/how-to/local.md, "stack.yml".
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
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
MAX_FUNCTIONS = 15  # of OpenFaaS CE
MAX_STACK_BYTES = 1 << 20  # bounds the time of the YAML parser, which is pure Python

# RFC 1123 label, as Kubernetes requires for names.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_HOLE = re.compile(r"\$\{([^{}]*)\}")
_VARIABLE = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::?=(?P<set>.*)|:-(?P<default>.*))?", re.DOTALL)


@dataclass(frozen=True)
class FunctionSpec:
    """A function of stack.yml."""

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
        """Read the current file. See `read_stack`."""
        return read_stack(self.path, self.variables)

    def read_defaults(self) -> Stack | None:
        """The stack with defaults for all variables; None if a variable has no default."""
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
        LocalError: another form; faas-cli would read it in another way than a shell does.
    """

    def fill(match: re.Match[str]) -> str:
        variable = _VARIABLE.fullmatch(match[1])
        if not variable or "${" in match[1]:
            raise LocalError(f"stack.yml holds {match[0]!r}; write ${{NAME}} or ${{NAME:-default}}")
        return env.get(variable["name"], "") or variable["default"] or variable["set"] or ""

    return _HOLE.sub(fill, text)


_HINT = "run this from the repository's root, or name the file with --stack"


def read_stack(path: Path, env: Mapping[str, str]) -> Stack:
    """Read a stack file, with the variables of `env`.

    Raises:
        LocalError: the file is missing, no stack, or has a key that faas-cli would ignore silently.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise LocalError(f"cannot read {path}: {e}", hint=_HINT) from e
    if len(text) > MAX_STACK_BYTES:
        raise LocalError(f"{path.name} has more than {MAX_STACK_BYTES} characters", limit=MAX_STACK_BYTES)
    try:
        # BaseLoader keeps every scalar a string, as faas-cli does.
        doc = yaml.load(substitute(text, env), yaml.BaseLoader)  # noqa: S506
    except (yaml.YAMLError, RecursionError) as e:
        raise LocalError(f"{path.name} is not YAML: {e}") from e
    if not isinstance(doc, dict):
        raise LocalError(f"{path.name} is no stack file", hint=_HINT)
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
    """Root of a stack's paths: the file's folder if the templates are there, else, as for faas-cli, this folder."""
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


def _mapping(doc: Any, where: str, allowed: Collection[str] | None = None) -> dict[str, Any]:
    if doc in (None, ""):
        return {}
    if not isinstance(doc, dict):
        raise LocalError(f"{where} must be a mapping")
    for key in doc:
        if allowed is not None and key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(sorted(allowed))}"
            raise LocalError(f"{where} has the key {key!r}, which faas-cli would silently ignore; {meant}", key=key)
    return doc


def _texts(doc: Any, where: str, allowed: Collection[str] | None = None) -> dict[str, str]:
    texts = _mapping(doc, where, allowed)
    for key, value in texts.items():
        if not isinstance(value, str):
            raise LocalError(f"{where}.{key} must be one value")
    return texts


def _strings(doc: Any, where: str) -> tuple[str, ...]:
    if doc in (None, ""):
        return ()
    if not isinstance(doc, list) or not all(isinstance(part, str) for part in doc):
        raise LocalError(f"{where} must be a list of strings")
    return tuple(doc)


_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.egg-info")
# faas-cli leaves these out of a handler in the repository's root.
_NOT_HANDLER = frozenset({"build", "template"})


@contextlib.contextmanager
def build_folder(root: Path, port: int) -> Iterator[Path]:
    """A new folder below `root` for staged functions, removed after the block.

    Folders of killed engines are removed first: an engine locks its folder, and the kernel drops the lock with the
    process.
    """
    root.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as exits:
        if (root_lock := _lock(root, wait=True)) is not None:  # no other engine sweeps before the new folder is locked
            exits.callback(os.close, root_lock)
            for folder in root.iterdir():
                if (stale := _lock(folder)) is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    os.close(stale)
        own = Path(tempfile.mkdtemp(prefix=f"{port}-", dir=root))
        lock = _lock(own)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path, *, wait: bool = False) -> int | None:
    """Lock `folder` until the descriptor is closed; None if another process holds the lock, or locking fails."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def stage(stack: Stack, spec: FunctionSpec, folder: Path) -> Path:
    """Lay a function out in `folder`/NAME as `faas-cli build --shrinkwrap` does, less the files in .dockerignore.

    The handler goes over the template's function/, each copied path to function/PATH; an earlier folder is replaced.

    Raises:
        LocalError: the template, the handler or a copied path is missing, or lies outside the repository.
    """
    target = folder / spec.name
    template = _inside(stack.root, f"template/{spec.lang}", f"the template of {spec.name} (lang: {spec.lang})")
    handler = _inside(stack.root, spec.handler, f"the handler of {spec.name}")
    if not (template / "index.py").is_file():
        raise LocalError(
            f"the local engine runs templates with an index.py; template/{spec.lang} of {spec.name} has none"
        )
    try:
        if target.exists():
            shutil.rmtree(target)
        shutil.copytree(template, target, ignore=_IGNORED)
        for part in sorted(handler.iterdir()):
            if part.name not in _NOT_HANDLER:
                _copy(part, target / "function" / part.name)
        for path in stack.copy:
            _copy(_inside(stack.root, path, f"configuration.copy: {path}"), target / "function" / path)
    except (OSError, shutil.Error) as e:
        raise LocalError(f"cannot lay out {spec.name} in {target}: {e}") from e
    return target


def _inside(root: Path, path: str, what: str) -> Path:
    resolved = (root / path).resolve()
    if resolved == root or not resolved.is_relative_to(root):
        raise LocalError(f"{what} is {path!r}, which is not inside {root}")
    if not resolved.exists():
        raise LocalError(f"{what} is {path!r}, which does not exist", path=path)
    return resolved


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        if not _IGNORED(str(source.parent), [source.name]):
            shutil.copytree(source, target, ignore=_IGNORED, dirs_exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)
