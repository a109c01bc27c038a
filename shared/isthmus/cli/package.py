"""`isthmus package`: each partition of one model as a function of its own, its segment baked in."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from isthmus.cli.console import (
    CACHE_DIR,
    DEFAULT_REGISTRY,
    AsJson,
    RegistryOption,
    errors,
    out,
    print_json,
    steps,
)
from isthmus.cli.cut_options import SYNTAX, OldCuts
from isthmus.errors import LocalError
from isthmus.registry import FolderStore, Registry, Resolved, open_cache, open_registry
from isthmus.registry.content import blob_key
from isthmus.settings import RegistrySettings
from isthmus.units import format_size

GATEWAY = "http://gateway.openfaas.svc.cluster.local:8080"
_LONGEST_STEM = 48
"""With its role after it, a function's name stays a DNS label."""
_HANDLER = """from __future__ import annotations

import os

from flask import Flask
from isthmus.serving import create_{kind}_app
from isthmus.settings import {settings}


def create_app() -> Flask:
    return create_{kind}_app({settings}.from_env(os.environ))
"""


def package(
    model: Annotated[str, typer.Argument(help="NAME or NAME:VERSION of a bundle in the registry.")],
    *,
    cuts: Annotated[
        str, typer.Option("--cut", help=f"The partition of the bundle; empty takes its default. {SYNTAX}")
    ] = "",
    old_cuts: OldCuts = "",
    output: Annotated[Path, typer.Option(help="Folder for the stack file and the functions.")] = Path("build/package"),
    stack: Annotated[Path, typer.Option(help="The stack file to take templates and limits from.")] = Path("stack.yml"),
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Write a stack file in which each segment of one model is a function with its segment inside the image.

    The functions need no registry. Run it, and faas-cli after it, in the folder that holds `template/`.

    Example: `isthmus package efficientnet-lite0 && faas-cli up -f build/package/efficientnet-lite0/stack.yml`
    """
    with errors(as_json), steps(as_json) as step:
        settings = RegistrySettings(registry=registry, cache_dir=CACHE_DIR)
        store = open_registry(settings)
        step(f"finding {model}")
        found = store.resolve(model)
        wanted = cuts or old_cuts
        names = found.bundle.cut_names(wanted) if wanted else found.bundle.default_cuts
        segments = found.bundle.partition(names)
        folder = output / found.name
        if folder.exists():
            shutil.rmtree(folder)
        base = _read(stack)
        cache = open_cache(settings, store)
        manifest = store.manifest(found.digest)
        functions: dict[str, Any] = {}
        weights: dict[str, int] = {}
        stem = found.name.replace(".", "-").replace("_", "-")[:_LONGEST_STEM].rstrip("-")
        for i, segment in enumerate(segments):
            name = f"{stem}-{_role(i, len(segments))}"
            step(f"baking segment {segment.id} into {name}")
            from isthmus.graph.bake import bake, bake_tables

            with cache.locate(found.digest, segment.id) as located:
                weights[name] = bake(located, manifest, folder / name / "segment")
            bake_tables(found.bundle, segment, store.blob, folder / name / "segment")
            like = base["functions"]["edge-head" if i == 0 else "cloud-tail"]
            functions[name] = _function(name, folder, like, {"segment_dir": "function/segment"}, "segment")
            _write_handler(folder / name, "segment", Path(like["handler"]))
        router = f"{stem}-router"
        step(f"writing {router}")
        _bake_registry(store, found, folder / router / "registry")
        like = base["functions"]["router"]
        environment = {
            "registry": "function/registry",
            "model": found.name,
            "cuts": "/".join(names),
            "hops": ",".join(f"{GATEWAY}/function/{name}" for name in functions),
        }
        functions[router] = _function(router, folder, like, environment, "router")
        _write_handler(folder / router, "router", Path(like["handler"]))
        document: dict[str, Any] = {key: base[key] for key in ("version", "provider", "configuration") if key in base}
        path = folder / "stack.yml"
        path.write_text(
            f"# Written by `isthmus package {model}`: each segment baked into a function of its own.\n"
            + yaml.safe_dump({**document, "functions": functions}, sort_keys=False)
        )
    if as_json:
        print_json({"stack": str(path), "functions": list(functions), "weights_bytes": weights, "cuts": list(names)})
        return
    for name, count in weights.items():
        out.print(f"{name}: {format_size(count)} of weights", highlight=False)
    out.print(f"written: {path}\nnext: faas-cli up -f {path}", highlight=False, soft_wrap=True)


def _function(name: str, folder: Path, like: dict[str, Any], environment: dict[str, str], kind: str) -> dict[str, Any]:
    """A function like `like`, with its own name, handler, image and what it reads its segment from."""
    from_registry = ("registry", "preload", "model", "hops", "cuts", "s3_endpoint", "s3_region")
    kept = {k: v for k, v in like.get("environment", {}).items() if k not in from_registry}
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


def _bake_registry(store: Registry, found: Resolved, folder: Path) -> None:
    """A registry of one bundle without its weights and graphs: all that a router reads."""
    small = FolderStore(folder)
    small.put(blob_key(found.digest), store.manifest(found.digest))
    bundle = found.bundle
    for blob in (bundle.labels, bundle.fidelity, bundle.plan, *bundle.tables.values()):
        if blob is not None:
            small.put(blob_key(blob.digest), store.blob(blob))
    small.put(f"models/{found.name}/versions/{found.version}", found.digest.encode())
    small.put(f"models/{found.name}/aliases/prod", found.version.encode())


def _read(stack: Path) -> dict[str, Any]:
    try:
        document: dict[str, Any] = yaml.safe_load(stack.read_text())
        missing = [f for f in ("router", "edge-head", "cloud-tail") if f not in document["functions"]]
    except (OSError, yaml.YAMLError, TypeError, KeyError) as e:
        raise LocalError(f"{stack} cannot be read as a stack file: {e}", hint="run it beside stack.yml") from e
    if missing:
        raise LocalError(f"{stack} has no function {', '.join(missing)} to take templates and limits from")
    return document
