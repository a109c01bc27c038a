"""`isthmus encrypt`: seal a version's content for recipients; and `grant`, `revoke`, which print the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, run, say
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    ModelArgument,
    RegistryOption,
    in_registry,
    registry_settings,
)

if TYPE_CHECKING:
    from isthmus_tools.usecases.encryption import GrantSummary

Recipients = Annotated[
    list[str],
    typer.Option(
        "--for",
        metavar="FILE.pub.pem[@SEGMENT,…]",
        help="A recipient: its public key, and the segments that it may read: head, tail, documents, or ids such as"
        " ..31. Without @ it may read everything. Once for each recipient.",
    ),
]


def encrypt(
    model: ModelArgument,
    *,
    recipients: Recipients,
    shared: Annotated[
        bool, typer.Option("--shared", help="Encrypt the versions too that share content with this one.")
    ] = False,
    new_keys: Annotated[
        bool, typer.Option("--new-keys", help="Encrypt again, where the recipients have their grants already.")
    ] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Encrypt a version in the registry: each recipient can read its segments, and nobody anything else.

    The plain content is removed once its sealed form was read back. The manifest stays readable. A recipient's
    functions need its private key as the secret recipient-key before.

    Example: `isthmus encrypt efficientnet-lite0:3 --for edge.pub.pem@head --for cloud.pub.pem`
    """
    from isthmus_tools.usecases import encryption as use_case

    with errors(as_json):
        settings = registry_settings(registry)
        request = use_case.EncryptRequest(
            model=model, recipients=recipients, registry=settings, shared=shared, new_keys=new_keys
        )
        result = run(use_case.encrypt, request, quiet=as_json)
        # The only content that may still be plain and belongs to the model.
        following = in_registry(f"isthmus encrypt {result.variant} --for …", registry) if result.variant else ""
        if as_json:
            document: dict[str, Any] = {"name": result.name, "versions": list(result.versions)}
            document |= {"removed": result.removed, "variant": result.variant, "next": following}
            print_json({**document, "grants": [grant_document(grant) for grant in result.grants]})
            return
        say(f"encrypted: {', '.join(result.versions)}; {result.removed} plain blobs removed")
        show_grants(result.grants)
        if result.variant:
            say(f"its plan serves {result.variant}, which is not encrypted\nnext: {following}")


def show_grants(grants: Sequence[GrantSummary]) -> None:
    """A line for each recipient."""
    for each in grants:
        # The documents come with every grant, and are named where there is nothing else.
        what = "everything" if each.whole else ", ".join(each.segments) or "no segment, the documents alone"
        of = f"{format_size(each.weights_bytes)} of {format_size(each.of_bytes)} of weights"
        say(f"{each.label} ({each.recipient}) may read {what}: {of}")


def grant_document(grant: GrantSummary) -> dict[str, Any]:
    """A grant, JSON-ready."""
    return {
        "label": grant.label,
        "recipient": grant.recipient,
        "segments": list(grant.segments),
        "whole": grant.whole,
        "weights_bytes": grant.weights_bytes,
        "of_bytes": grant.of_bytes,
    }
