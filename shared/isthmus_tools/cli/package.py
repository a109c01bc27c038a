"""`isthmus package`: each segment of one model as a function of its own, baked in, as the plan or `--cut` says."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from isthmus.artifacts.bundle import Bundle, Segment
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import LocalError, Missing
from isthmus.registry import FolderStore, Registry, Resolved, SegmentCache, open_cache, open_registry
from isthmus.registry.content import blob_key
from isthmus.settings import SegmentSettings
from isthmus.units import format_size
from isthmus_tools.cli.console import (
    DEFAULT_REGISTRY,
    AsJson,
    RegistryOption,
    errors,
    out,
    print_json,
    progress_bars,
    registry_settings,
)
from isthmus_tools.cli.cut_options import SYNTAX, OldCuts
from isthmus_tools.engine.stack import read_stack, substitute

if TYPE_CHECKING:
    from isthmus.artifacts.plan import Candidate

_GATEWAY = "http://gateway.openfaas.svc.cluster.local:8080"
_GATEWAYS = {"edge": f"${{EDGE_GATEWAY:-{_GATEWAY}}}", "cloud": f"${{TAIL_GATEWAY:-{_GATEWAY}}}"}
"""Where a stack file's router names none: as in stack.yml."""
_LIKE = {"edge": "edge-head", "cloud": "cloud-tail"}
_HEADING = "# Written by `isthmus package"
_MAX_STEM = 48
"""With its role after it, a function's name stays a DNS label."""
_HANDLER = """from __future__ import annotations

import os

from flask import Flask
from isthmus.serving import create_{kind}_app
from isthmus.settings import {settings}


def create_app() -> Flask:
    return create_{kind}_app({settings}.from_env(os.environ))
"""


@dataclass(frozen=True)
class _Part:
    """A segment of a bundle and the tier, edge or cloud, whose gateway and limits its function takes."""

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


def package(
    model: Annotated[str, typer.Argument(help="NAME or NAME:VERSION of a bundle in the registry.")],
    *,
    cuts: Annotated[
        str,
        typer.Option("--cut", help=f"A partition of the bundle; empty takes its plan's, else its default. {SYNTAX}"),
    ] = "",
    old_cuts: OldCuts = "",
    output: Annotated[Path, typer.Option(help="Folder for the stack file and the functions.")] = Path("build/package"),
    stack: Annotated[Path, typer.Option(help="The stack file to take templates and limits from.")] = Path("stack.yml"),
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Write a stack file in which each segment of one model is a function with its segment inside the image.

    The functions need no registry. Where the bundle has a plan, they are the plan's, and the router follows it. Run it,
    and faas-cli after it, in the folder that holds `template/`.

    Example: `isthmus package efficientnet-lite0 && faas-cli up -f build/package/efficientnet-lite0/stack.yml`
    """
    with errors(as_json), progress_bars(as_json) as step:
        settings = registry_settings(registry)
        store = open_registry(settings)
        step(f"finding {model}")
        found = store.resolve(model)
        base = _read(stack)
        router = base["functions"]["router"].get("environment") or {}
        folder = _folder(output, found.name)
        partition = _partition(store, found, cuts or old_cuts, router)
        _check_room(base, partition)
        stem = found.name.replace(".", "-").replace("_", "-")[:_MAX_STEM].rstrip("-")
        weights: dict[str, int] = {}
        with tempfile.TemporaryDirectory(prefix=f".{found.name}-", dir=folder.parent) as temporary:
            written = Path(temporary) / folder.name
            cache = open_cache(settings, store)
            for name, part in partition.functions(stem).items():
                step(f"baking segment {part.segment.id} into {name}")
                weights[name] = _bake(store, cache, part, written / name / "segment")
            step(f"writing {stem}-router")
            _bake_registry(store, found, partition, written / f"{stem}-router" / "registry")
            functions = _functions(base, stem, found.name, partition, folder, written)
            keys = ("version", "provider", "configuration")
            document = {**{key: base[key] for key in keys if key in base}, "functions": functions}
            heading = f"{_HEADING} {model}`: each segment baked into a function of its own.\n"
            (written / "stack.yml").write_text(heading + yaml.safe_dump(document, sort_keys=False))
            if folder.exists():
                shutil.rmtree(folder)
            written.rename(folder)
    path, chosen = folder / "stack.yml", partition.plan.name if partition.plan else None
    if as_json:
        facts = {"stack": str(path), "functions": list(functions), "weights_bytes": weights}
        print_json({**facts, "cuts": list(partition.cuts), "plan": chosen})
        return
    out.print(f"as planned: {chosen}" if chosen else f"cut at {'/'.join(partition.cuts) or 'nothing'}", highlight=False)
    for name, count in weights.items():
        out.print(f"{name}: {format_size(count)} of weights", highlight=False)
    out.print(f"written: {path}\nnext: faas-cli up -f {path}", highlight=False, soft_wrap=True)


def _folder(output: Path, name: str) -> Path:
    """The folder to write, relative to this one, as faas-cli reads handlers; one that this command wrote is replaced.

    Raises:
        LocalError: it is elsewhere, or holds what this command did not write.
    """
    here = Path.cwd()
    folder = Path(os.path.relpath(output.resolve() / name, here.resolve()))
    if folder.parts[0] == "..":
        raise LocalError(
            f"--output {output} is not inside {here}, and faas-cli finds handlers from there",
            hint="run it in the folder that holds template/, with --output inside it",
        )
    try:
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


def _partition(store: Registry, found: Resolved, wanted: str, router: Mapping[str, Any]) -> _Partition:
    """What the router of these settings would do for the model, `wanted` being its cuts if any are.

    Raises:
        LocalError: a plan whose functions could not each hold one segment.
        Missing: a cut or the plan's variant is not in the registry.
        PlanMismatch, PlanMalformed: see `read_plan`.
    """
    wanted = wanted or _setting(router, "cuts")
    if not wanted and _setting(router, "plan").lower() not in ("false", "0"):
        from isthmus.artifacts.plan_document import read_plan

        plan = read_plan(found.bundle, store.blob)
        if plan is not None:
            return _planned(store, found, plan.choice)
    cuts = found.bundle.cut_names(wanted) if wanted else found.bundle.default_cuts
    segments = found.bundle.partition(cuts)
    parts = tuple(
        _Part(_role(i, len(segments)), "cloud" if i else "edge", found.digest, found.bundle, segment)
        for i, segment in enumerate(segments)
    )
    return _Partition(parts, cuts)


def _planned(store: Registry, found: Resolved, choice: Candidate) -> _Partition:
    """Functions for the route that `planner.planning.route.route_of` makes of a candidate."""
    digest, bundle = found.digest, found.bundle
    if choice.variant is not None:
        digest, bundle = choice.variant, _variant(store, found.name, choice.variant)
    if choice.variant is not None or choice.kind == "edge":
        return _Partition((_Part("head", "edge", digest, bundle, bundle.segment(WHOLE)),), (), choice)
    if choice.kind == "cloud":
        return _Partition((_Part("tail", "cloud", digest, bundle, bundle.segment(WHOLE)),), (), choice)
    segments = bundle.partition(choice.cuts)
    if len(segments) != 2:
        raise LocalError(
            f"{choice.name}, as the plan of {found.name} says, has {len(segments)} segments on two functions, and a"
            " packaged function holds one",
            hint=f"package it without its plan: --cut {'/'.join(choice.cuts)}",
        )
    head, tail = segments
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


def _check_room(base: Mapping[str, Any], partition: _Partition) -> None:
    """Refuse a segment that its function could never load.

    Raises:
        LocalError: its weights exceed the setting max_loaded_bytes of the function that it would be like.
        SettingsError: that setting is no size.
    """
    for part in partition.parts:
        like = _LIKE[part.tier]
        text = _setting(base["functions"][like].get("environment") or {}, "max_loaded_bytes")
        limit = SegmentSettings.from_env({"segment_dir": "baked", "max_loaded_bytes": text}).max_loaded_bytes
        size = sum(tensor.length for tensor in part.bundle.weight_ranges(part.segment))
        if size > limit:
            raise LocalError(
                f"segment {part.segment.id} has {format_size(size)} of weights, and {like} loads at most"
                f" {format_size(limit)}: max_loaded_bytes",
                hint="raise it and limits.memory in the stack file, or cut the model elsewhere",
            )


def _setting(environment: Mapping[str, Any], name: str) -> str:
    """A variable's value as faas-cli would deploy it from here."""
    value = environment.get(name)
    return "" if value is None else substitute(str(value), os.environ).strip()


def _bake(store: Registry, cache: SegmentCache, part: _Part, folder: Path) -> int:
    from isthmus_tools.graph.extract import bake, bake_tables

    with cache.locate(part.digest, part.segment.id) as located:
        size = bake(located, store.manifest(part.digest), folder)
    bake_tables(part.bundle, part.segment, store.blob, folder)
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
    # Where the setting cuts is empty, the router follows the plan.
    cuts = {} if partition.plan else {"cuts": "/".join(partition.cuts)}
    functions[router] = _function(router, folder, like, environment | cuts, "router")
    _write_handler(written / router, "router", Path(like["handler"]))
    return functions


def _gateways(environment: Mapping[str, Any]) -> dict[str, str]:
    """The gateways of the stack file's own hops, its variables left for faas-cli to fill in."""
    hops = [hop.strip() for hop in str(environment.get("hops", "")).split(",")]
    own = [gateway for gateway, found, _ in (hop.rpartition("/function/") for hop in hops) if found]
    return {"edge": own[0], "cloud": own[-1]} if own else dict(_GATEWAYS)


def _function(name: str, folder: Path, like: dict[str, Any], environment: dict[str, str], kind: str) -> dict[str, Any]:
    """A function like `like`, with its own name, handler, image and what it reads its segment from."""
    from_registry = ("registry", "preload", "model", "hops", "cuts", "s3_endpoint", "s3_region")
    kept = {k: v for k, v in (like.get("environment") or {}).items() if k not in from_registry}
    own = "router" if kind == "router" else str(like["handler"]).rpartition("/")[2]
    image = str(like["image"]).replace(own, name)
    return {
        **{k: v for k, v in like.items() if k != "secrets"},
        "handler": f"./{folder / name}",
        "image": image,
        "environment": {**kept, **environment},
    }


def _write_handler(folder: Path, kind: str, like: Path) -> None:
    settings = "RouterSettings" if kind == "router" else "SegmentSettings"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "handler.py").write_text(_HANDLER.format(kind=kind, settings=settings))
    shutil.copyfile(like / "requirements.txt", folder / "requirements.txt")


def _role(i: int, count: int) -> str:
    """head, tail, and middle-1 … between them; the only segment of an uncut model is its head."""
    return "head" if i == 0 else "tail" if i == count - 1 else f"middle-{i}"


def _bake_registry(store: Registry, found: Resolved, partition: _Partition, folder: Path) -> None:
    """A registry of one bundle without its weights and graphs: all that a router reads, of a plan's variant too."""
    small = FolderStore(folder)
    for digest in {found.digest, *(part.digest for part in partition.parts)}:
        small.put(blob_key(digest), store.manifest(digest))
    bundle = found.bundle
    for blob in (bundle.labels, bundle.fidelity, bundle.plan, *bundle.tables.values()):
        if blob is not None:
            small.put(blob_key(blob.digest), store.blob(blob))
    small.put(f"models/{found.name}/versions/{found.version}", found.digest.encode())
    small.put(f"models/{found.name}/aliases/prod", found.version.encode())


def _read(stack: Path) -> dict[str, Any]:
    """The stack file as it is written, its variables left for faas-cli to fill in.

    Raises:
        LocalError: it is none, or lacks a function or its folder.
    """
    functions = read_stack(stack, os.environ).functions
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
