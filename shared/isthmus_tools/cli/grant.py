"""`isthmus grant`: let a further recipient read segments of an encrypted version."""

from __future__ import annotations

from isthmus_tools.cli.console import errors, print_json, say
from isthmus_tools.cli.encrypt import Recipients, grant_document, show_grants
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, ModelArgument, RegistryOption, registry_settings


def grant(
    model: ModelArgument,
    *,
    recipients: Recipients,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Let further recipients read segments of an encrypted version; nothing is encrypted again.

    It takes the private key of a recipient of everything, as the secret recipient-key in the folder secrets_dir. A
    recipient that has a grant gets this one instead.

    Example: `isthmus grant efficientnet-lite0:3 --for edge-2.pub.pem@head`
    """
    from isthmus_tools.usecases import encryption as use_case

    with errors(as_json):
        request = use_case.GrantRequest(model=model, recipients=recipients, registry=registry_settings(registry))
        result = use_case.grant(request)
        if as_json:
            grants = [grant_document(each) for each in result.grants]
            print_json({"name": result.name, "version": result.version, "grants": grants})
            return
        say(f"grants of {result.name}:{result.version}:")
        show_grants(result.grants)
