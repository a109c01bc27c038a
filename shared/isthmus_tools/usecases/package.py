"""Packaging: a stack file with a function for each segment of a model, the segment inside the image."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.plan import Candidate, read_plan
from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.errors import LocalError, Missing
from isthmus.pipeline import exit_branch
from isthmus.registry import FolderStore, Registry, Resolved, SegmentCache, open_cache, open_registry
from isthmus.registry.addresses import STORE_SECRETS
from isthmus.registry.content import blob_key
from isthmus.registry.signatures import Signatures, copy_signatures, write_envelopes
from isthmus.registry.source import SIGNATURES
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus.units import format_size
from isthmus_tools.engine.stack import read_stack, substitute
from isthmus_tools.graph.extract import bake, bake_blob, bake_tables
from isthmus_tools.progress import Progress, silent

_GATEWAY = "http://gateway.openfaas.svc.cluster.local:8080"
# As in stack.yml, for a stack file without a gateway for the router.
_GATEWAYS = {"edge": f"${{EDGE_GATEWAY:-{_GATEWAY}}}", "cloud": f"${{TAIL_GATEWAY:-{_GATEWAY}}}"}
# The functions of stack.yml that give template and limits to packaged functions.
_LIKE = {"edge": "edge-head", "cloud": "cloud-tail"}
_HEADING = "# Written by `isthmus package"
# A function's name, the stem and a role, must be a DNS label.
_MAX_STEM = 48
# A packaged handler has no code of its own: the factory of the runtime, and the settings of the environment.
_HANDLER = """from __future__ import annotations

import os

from flask import Flask
from isthmus.serving import create_{kind}_app
from isthmus.settings import {settings}

apps: list[Flask] = []


def create_app() -> Flask:
    apps.append(create_{kind}_app({settings}.from_env(os.environ)))
    return apps[-1]


def drain() -> None:
    for app in apps:
        app.extensions["isthmus"].drain()
"""


@dataclass(frozen=True)
class _Part:
    """A segment of a bundle and its function's tier, edge or cloud: the tier decides gateway and limits."""

    role: str
    tier: str
    digest: str
    bundle: Bundle
    segment: Segment


@dataclass(frozen=True)
class _Partition:
    """The parts that requests pass, and the cuts or the plan's candidate that say so."""

    parts: tuple[_Part, ...]
    cuts: tuple[str, ...] = ()
    plan: Candidate | None = None

    def functions(self, stem: str) -> dict[str, _Part]:
        """The parts by the names of their functions."""
        return {f"{stem}-{part.role}": part for part in self.parts}


@dataclass(frozen=True, kw_only=True)
class PackageRequest:
    """A model to package.

    `model` is NAME or NAME:VERSION. `cuts` is a partition as text; empty takes the plan's, else the bundle's default.
    `output` is the folder for the stack file and the functions, inside the current folder; `stack` gives templates and
    limits, and `variables` fill its ${…}, as the environment would for faas-cli.
    """

    model: str
    registry: RegistrySettings
    variables: Mapping[str, str]
    cuts: str = ""
    output: Path = Path("build/package")
    stack: Path = Path("stack.yml")


@dataclass(frozen=True)
class PackageResult:
    """The stack file, its functions, each function's bytes of weights, and the cuts or the plan's choice."""

    stack: Path
    functions: Sequence[str]
    weights_bytes: Mapping[str, int]
    cuts: Sequence[str]
    plan: str | None


def package(request: PackageRequest, progress: Progress = silent) -> PackageResult:
    """Write a stack file and functions that serve a model without a registry.

    Where the bundle has a plan, the functions are the plan's, and the router follows it.

    Raises:
        LocalError: the stack file or the output cannot be used, or a function could never load its segment.
        RegistryError: unknown model or cut, or the registry cannot be read.
    """
    store = open_registry(request.registry)
    progress(f"finding {request.model}")
    model = store.resolve(request.model)
    base = _read(request.stack, request.variables)
    router = _Environment(base["functions"]["router"], request.variables)
    folder = _folder(request.output, model.name)
    partition = _partition(store, model, request.cuts, router)
    _check_room(base, partition, request.variables)
    stem = model.name.replace(".", "-").replace("_", "-")[:_MAX_STEM].rstrip("-")
    weights: dict[str, int] = {}
    # Beside the target, so that the rename stays on one file system; an interrupted run leaves the old package whole.
    with tempfile.TemporaryDirectory(prefix=f".{model.name}-", dir=folder.parent) as temporary:
        written = Path(temporary) / folder.name
        cache = open_cache(request.registry, store)
        for name, part in partition.functions(stem).items():
            progress(f"baking segment {part.segment.id} into {name}")
            weights[name] = _bake(store, cache, part, written / name / "segment")
        progress(f"writing {stem}-router")
        _bake_registry(store, model, partition, written / f"{stem}-router" / "registry")
        # An alias baked here is nobody's signed word: with signatures the router names the version.
        is_signed = bool(store.signatures.of(model.digest))
        served = f"{model.name}:{model.version}" if is_signed else model.name
        functions = _functions(base, stem, served, partition, folder, written)
        keys = ("version", "provider", "configuration")
        document = {**{key: base[key] for key in keys if key in base}, "functions": functions}
        heading = f"{_HEADING} {request.model}`: each segment baked into a function of its own.\n"
        (written / "stack.yml").write_text(heading + yaml.safe_dump(document, sort_keys=False))
        # `rename` replaces no folder that has content.
        if folder.exists():
            shutil.rmtree(folder)
        written.rename(folder)
    choice = partition.plan.name if partition.plan else None
    return PackageResult(folder / "stack.yml", list(functions), weights, partition.cuts, choice)


def _folder(output: Path, name: str) -> Path:
    """The folder to write, relative to the current folder as faas-cli reads handlers; an earlier package is replaced.

    Raises:
        LocalError: the folder is elsewhere, or holds files of another origin.
    """
    current = Path.cwd()
    # Resolved, so that a symbolic link to another place counts as that place.
    folder = Path(os.path.relpath(output.resolve() / name, current.resolve()))
    if folder.parts[0] == "..":
        raise LocalError(
            f"--output {output} is not inside {current}, and faas-cli finds handlers from there",
            hint="run it in the folder that holds template/, with --output inside it",
        )
    try:
        # The heading marks the files that a later run may replace.
        if folder.exists() and not (folder / "stack.yml").read_text().startswith(_HEADING):
            raise LocalError(
                f"{folder} has a stack.yml that isthmus package did not write", hint="name another --output"
            )
    except (OSError, UnicodeDecodeError) as e:
        raise LocalError(
            f"{folder} holds what isthmus package did not write", hint="remove it, or name another --output"
        ) from e
    folder.parent.mkdir(parents=True, exist_ok=True)
    return folder


def _partition(store: Registry, model: Resolved, cuts: str, router: _Environment) -> _Partition:
    """The partition that a router of these settings would use for the model; `cuts` go before its own.

    Raises:
        LocalError: a function of the plan would hold several segments.
        Missing: a cut or the plan's variant is not in the registry.
        PlanMismatch, PlanMalformed: see `read_plan`.
    """
    cuts = cuts or router.value("cuts")
    if not cuts and router.value("plan").lower() not in ("false", "0"):
        plan = read_plan(model.bundle, store.blob)
        if plan is not None:
            return _planned_partition(store, model, plan.choice)
    names = model.bundle.cut_names(cuts) if cuts else model.bundle.default_cuts
    segments = model.bundle.partition(names)
    parts = tuple(
        _Part(_role(i, len(segments)), "cloud" if i else "edge", model.digest, model.bundle, segment)
        for i, segment in enumerate(segments)
    )
    return _Partition(parts, names)


def _planned_partition(store: Registry, model: Resolved, choice: Candidate) -> _Partition:
    """The functions of a candidate's route, as `pipeline.planned_route` makes it."""
    digest, bundle = model.digest, model.bundle
    if choice.variant is not None:
        digest, bundle = choice.variant, _variant(store, model.name, choice.variant)
    if choice.variant is not None or choice.kind == "edge":
        whole = bundle.segment(SegmentId(variant=choice.head))
        return _Partition((_Part("head", "edge", digest, bundle, whole),), (), choice)
    if choice.kind == "cloud":
        return _Partition((_Part("tail", "cloud", digest, bundle, bundle.segment(WHOLE)),), (), choice)
    segments = bundle.partition(choice.cuts)
    if len(segments) != 2:
        raise LocalError(
            f"{choice.name}, as the plan of {model.name} says, has {len(segments)} segments on two functions, and a"
            " packaged function holds one",
            hint=f"package it without its plan: --cut {'/'.join(choice.cuts)}",
        )
    head, tail = segments
    if choice.head:
        head = bundle.segment(SegmentId("", choice.cuts[0], choice.head))
    parts = (_Part("head", "edge", digest, bundle, head), _Part("tail", "cloud", digest, bundle, tail))
    return _Partition(parts, choice.cuts, choice)


def _variant(store: Registry, model: str, digest: str) -> Bundle:
    try:
        return store.bundle(digest)
    except Missing as e:
        raise Missing(
            f"the plan of {model} serves its variant {digest}, which the registry does not have",
            kind="bundle",
            name=digest,
            exists=[],
            hint=f"plan again: isthmus plan {model} …; or package it without its plan: --cut …",
        ) from e


def _check_room(base: Mapping[str, Any], partition: _Partition, variables: Mapping[str, str]) -> None:
    """Refuse a segment that its function could never load.

    Raises:
        LocalError: the segment's weights exceed max_loaded_bytes of the function's model in the stack file.
        SettingsError: that setting is no size.
    """
    for part in partition.parts:
        like = _LIKE[part.tier]
        # Unset, the limit is the function's default.
        text = _Environment(base["functions"][like], variables).value("max_loaded_bytes")
        # Settings need a registry or a baked segment; neither is read here.
        limit = SegmentSettings.from_env({"segment_dir": "baked", "max_loaded_bytes": text}).max_loaded_bytes
        size = sum(tensor.length for tensor in part.bundle.weight_ranges(part.segment))
        if size > limit:
            raise LocalError(
                f"segment {part.segment.id} has {format_size(size)} of weights, and {like} loads at most"
                f" {format_size(limit)}: max_loaded_bytes",
                hint="raise it and limits.memory in the stack file, or cut the model elsewhere",
            )


class _Environment:
    """A function's environment as faas-cli would deploy it with these variables."""

    def __init__(self, function: Mapping[str, Any], variables: Mapping[str, str]) -> None:
        self._texts, self._variables = function.get("environment") or {}, variables

    def value(self, name: str) -> str:
        text = self._texts.get(name)
        return "" if text is None else substitute(str(text), self._variables).strip()


def _bake(store: Registry, cache: SegmentCache, part: _Part, folder: Path) -> int:
    with cache.locate(part.digest, part.segment.id) as located:
        size = bake(located, store.manifest(part.digest), folder)
    bake_tables(part.bundle, part.segment, store.blob, folder)
    if not part.segment.id.start and (branch := exit_branch(part.bundle, part.segment.id.stop)) is not None:
        bake_blob(branch.segment.graph, store.blob, folder)
    # What functions with trusted keys demand beside the manifest.
    if envelopes := store.signatures.of(part.digest):
        write_envelopes(folder / SIGNATURES, envelopes)
    return size


def _functions(
    base: Mapping[str, Any], stem: str, model: str, partition: _Partition, folder: Path, written: Path
) -> dict[str, Any]:
    """The functions of the stack file, their handlers laid in `written` to be used from `folder`."""
    functions: dict[str, Any] = {}
    parts = partition.functions(stem)
    for name, part in parts.items():
        like = base["functions"][_LIKE[part.tier]]
        functions[name] = _function(name, folder, like, {"segment_dir": "function/segment"}, "segment")
        _write_handler(written / name, "segment", Path(like["handler"]))
    like, router = base["functions"]["router"], f"{stem}-router"
    gateways = _gateways(like.get("environment") or {})
    environment = {
        "registry": "function/registry",
        "model": model,
        "hops": ",".join(f"{gateways[part.tier]}/function/{name}" for name, part in parts.items()),
    }
    # The router follows the plan only where the setting cuts is empty.
    cuts = {} if partition.plan else {"cuts": "/".join(partition.cuts)}
    functions[router] = _function(router, folder, like, environment | cuts, "router")
    _write_handler(written / router, "router", Path(like["handler"]))
    return functions


def _gateways(environment: Mapping[str, Any]) -> dict[str, str]:
    """The gateways of the stack file's own hops, its variables left for faas-cli to fill in."""
    hops = [hop.strip() for hop in str(environment.get("hops", "")).split(",")]
    # As in stack.yml, the first hop is at the edge and the last in the cloud.
    own = [gateway for gateway, separator, _ in (hop.rpartition("/function/") for hop in hops) if separator]
    return {"edge": own[0], "cloud": own[-1]} if own else dict(_GATEWAYS)


# A packaged function reads no registry.
_REGISTRY_SETTINGS = ("registry", "s3_endpoint", "s3_region", "gcs_endpoint", "azure_account", "azure_endpoint")
_REGISTRY_SECRETS = [name for names in STORE_SECRETS.values() for name in names]


def _function(name: str, folder: Path, like: dict[str, Any], environment: dict[str, str], kind: str) -> dict[str, Any]:
    """A function like `like`, with its own name, handler, image and source of its segment."""
    # Secrets that are not the registry's, such as hop-keys, stay: without them it would run segments for anybody.
    replaced = ("preload", "model", "hops", "cuts", *_REGISTRY_SETTINGS)
    environment_like = {k: v for k, v in (like.get("environment") or {}).items() if k not in replaced}
    own = "router" if kind == "router" else str(like["handler"]).rpartition("/")[2]
    # The image keeps the registry, owner and tag of the function in stack.yml.
    image = str(like["image"]).replace(own, name)
    secrets = like.get("secrets")
    if isinstance(secrets, list):  # else a variable for faas-cli to fill in
        like = {**like, "secrets": [name for name in secrets if name not in _REGISTRY_SECRETS]}
    return {
        **like,
        "handler": f"./{folder / name}",
        "image": image,
        "environment": {**environment_like, **environment},
    }


def _write_handler(folder: Path, kind: str, like: Path) -> None:
    settings = "RouterSettings" if kind == "router" else "SegmentSettings"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "handler.py").write_text(_HANDLER.format(kind=kind, settings=settings))
    shutil.copyfile(like / "requirements.txt", folder / "requirements.txt")


def _role(i: int, count: int) -> str:
    """head, tail, or middle-1 …; the only segment of an uncut model is its head."""
    return "head" if i == 0 else "tail" if i == count - 1 else f"middle-{i}"


def _bake_registry(store: Registry, model: Resolved, partition: _Partition, folder: Path) -> None:
    """A registry of one bundle without its weights and graphs: the router's part, of a plan's variant too."""
    small = FolderStore(folder)
    # A plan's variant is a bundle of its own, with a manifest of its own.
    for digest in {model.digest, *(part.digest for part in partition.parts)}:
        small.put(blob_key(digest), store.manifest(digest))
        copy_signatures(store.signatures, digest, Signatures(small, store.retry_policy))
    bundle = model.bundle
    # Labels for classes, fidelity for the fallback chain, the plan for routes, tables for codecs.
    for blob in (bundle.labels, bundle.fidelity, bundle.plan, *bundle.tables.values()):
        if blob is not None:
            small.put(blob_key(blob.digest), store.blob(blob))
    small.put(f"models/{model.name}/versions/{model.version}", model.digest.encode())
    # The router's setting names the model without a version, and so asks for prod.
    small.put(f"models/{model.name}/aliases/prod", model.version.encode())


def _read(stack: Path, variables: Mapping[str, str]) -> dict[str, Any]:
    """The stack file as written, its ${…} left for faas-cli.

    Raises:
        LocalError: the file is no stack file, or lacks a function or its folder.
    """
    functions = read_stack(stack, variables).functions
    for name in ("router", *_LIKE.values()):
        if name not in functions:
            raise LocalError(f"{stack} has no function {name} to take templates and limits from")
        requirements = Path(functions[name].handler) / "requirements.txt"
        if not requirements.is_file():
            raise LocalError(
                f"there is no {requirements}, which the function like {name} gets",
                hint="run it in the folder that holds template/ and functions/",
            )
    document: dict[str, Any] = yaml.safe_load(stack.read_text(encoding="utf-8"))
    return document
