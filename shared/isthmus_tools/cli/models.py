"""`isthmus models`: the models of a registry, a row each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, say, say_command, table
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, in_registry, registry_settings

if TYPE_CHECKING:
    from isthmus_tools.usecases.language import LanguageFacts


def models(*, registry: RegistryOption = DEFAULT_REGISTRY, as_json: AsJson = False) -> None:
    """List the models of a registry: what serves, when it was published, whether it is calibrated, its plan.

    Example: `isthmus models --registry s3://isthmus`
    """
    from isthmus.registry import open_registry
    from isthmus_tools.usecases.versions import list_models

    with errors(as_json):
        summaries = list_models(open_registry(registry_settings(registry)))
        if as_json:
            documents: list[dict[str, Any]] = [
                {
                    "name": model.name,
                    "serving": model.serving.version,
                    "newest": model.newest,
                    "versions": model.versions,
                    "aliases": dict(model.aliases),
                    "published": model.serving.published.isoformat(),
                    "calibrated": list(model.serving.calibrated),
                    "plan": model.serving.plan,
                    "language": language.document() if (language := model.serving.language) is not None else None,
                }
                for model in summaries
            ]
            print_json(documents)
            return
        layered = any(model.serving.language is not None for model in summaries)
        table(
            registry,
            [
                "model",
                "serves",
                *(["layers"] if layered else []),
                "published",
                "calibrated",
                "plan",
                "versions",
                "other aliases",
            ],
            [
                (
                    model.name,
                    model.serving.version,
                    *([_layers(model.serving.language)] if layered else []),
                    # The reader's time zone; --json keeps the offset.
                    f"{model.serving.published.astimezone():%Y-%m-%d %H:%M}",
                    cuts_text(model.serving.calibrated),
                    model.serving.plan or "none",
                    model.versions,
                    ", ".join(f"{alias} → {version}" for alias, version in model.aliases.items() if alias != "prod"),
                )
                for model in summaries
            ],
            numbers=["versions"],
            drop=["layers", "other aliases", "versions", "published"],
        )
        if newer := [m for m in summaries if m.newest != m.serving.version]:
            say(f"newer than what serves: {', '.join(f'{m.name}:{m.newest}' for m in newer)}")
        following = "isthmus show NAME" if summaries else "isthmus import MODEL.onnx"
        say_command("next", in_registry(following, registry))


def _layers(language: LanguageFacts | None) -> str:
    """A language model's layers and the memory of a token, as a table's cell."""
    return "" if language is None else f"{language.layers}, {format_size(language.kv_bytes)} a token"


def cuts_text(cuts: tuple[str, ...]) -> str:
    """Calibrated cuts as a table's cell."""
    if not cuts:
        return "no"
    return f"at {', '.join(cuts)}" if len(cuts) <= 3 else f"at {len(cuts)} cuts"
