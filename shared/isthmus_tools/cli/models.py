"""`isthmus models`: the contents of a registry."""

from __future__ import annotations

from typing import Any

from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, table
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, registry_settings


def models(*, registry: RegistryOption = DEFAULT_REGISTRY, as_json: AsJson = False) -> None:
    """List the models of a registry: versions, aliases, weights and cuts.

    Example: `isthmus models --registry s3://isthmus`
    """
    from isthmus.registry import open_registry

    with errors(as_json):
        store = open_registry(registry_settings(registry))
        documents: list[dict[str, Any]] = []
        for name in store.models():
            by_version: dict[str, list[str]] = {}
            for alias, number in store.aliases(name).items():
                by_version.setdefault(number, []).append(alias)
            for version in store.versions(name):
                bundle = store.bundle(version.digest)
                documents.append(
                    {
                        "name": name,
                        "version": version.version,
                        "aliases": sorted(by_version.get(version.version, [])),
                        "digest": version.digest,
                        "weights_bytes": bundle.weights.blob.size,
                        "cuts": sorted(bundle.cuts),
                        "default_cuts": list(bundle.default_cuts),
                    }
                )
        if as_json:
            print_json(documents)
            return
        table(
            f"{registry}",
            ["model", "version", "aliases", "weights", "cuts", "default", "digest"],
            [
                (
                    d["name"],
                    d["version"],
                    ", ".join(d["aliases"]),
                    format_size(d["weights_bytes"]),
                    ", ".join(d["cuts"]),
                    "/".join(d["default_cuts"]),
                    d["digest"][:19] + "…",
                )
                for d in documents
            ],
            numbers=["weights"],
        )
