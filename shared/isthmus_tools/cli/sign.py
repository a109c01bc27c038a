"""`isthmus sign`: sign a version, and the alias that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from isthmus_tools.cli.console import errors, print_json, say
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    ExpiresDays,
    ModelArgument,
    RegistryOption,
    registry_settings,
)


def sign(
    model: ModelArgument,
    *,
    key: Annotated[Path, typer.Option(help="File of the signing key.", envvar="ISTHMUS_SIGN_WITH")],
    expires_days: ExpiresDays = 90,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Sign a version; named by an alias, the alias too, which renews its expiry.

    Example: `isthmus sign efficientnet-lite0:prod --key release.pem`
    """
    from isthmus_tools.usecases.signing import DAY_S, SignRequest, sign_model

    with errors(as_json):
        result = sign_model(
            SignRequest(
                model=model,
                key=key,
                registry=registry_settings(registry),
                expires_s=expires_days * DAY_S,
            )
        )
        if as_json:
            print_json(result.document())
            return
        say(f"signed {result.name}:{result.version} ({result.digest}) with the key {result.key}")
        if len(result.manifests) > 1:
            say(f"signed {len(result.manifests) - 1} manifests that its plan names")
        if result.alias:
            until = "without end" if result.expires is None else f"until {result.expires:%Y-%m-%d %H:%M} UTC"
            say(f"signed {result.name}:{result.alias}, valid {until}")
