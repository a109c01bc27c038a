"""`isthmus revoke`: remove a recipient's grant of an encrypted version."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus_tools.cli.console import errors, print_json, say
from isthmus_tools.cli.encrypt import grant_document, show_grants
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    ModelArgument,
    RegistryOption,
    in_registry,
    registry_settings,
)


def revoke(
    model: ModelArgument,
    *,
    recipients: Annotated[
        list[str], typer.Option("--from", help="A recipient: its label, its id, or FILE.pub.pem. Once for each.")
    ],
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Remove a recipient's grant of an encrypted version: from now on the registry gives it no key.

    What the recipient has read, content and keys, it may have kept; a revocation cannot take that back. New keys
    exclude it from what is published next.

    Example: `isthmus revoke efficientnet-lite0:3 --from edge-2.pub.pem`
    """
    from isthmus_tools.usecases import encryption as use_case

    with errors(as_json):
        request = use_case.RevokeRequest(model=model, recipients=recipients, registry=registry_settings(registry))
        result = use_case.revoke(request)
        following = in_registry(f"isthmus encrypt {result.name}:{result.version} --new-keys --for …", registry)
        if as_json:
            grants = [grant_document(each) for each in result.grants]
            print_json({"name": result.name, "version": result.version, "grants": grants, "next": following})
            return
        say(f"grants of {result.name}:{result.version} that are left:")
        show_grants(result.grants)
        say(f"a revoked recipient may have kept keys and content that it read\nnew keys: {following}")
