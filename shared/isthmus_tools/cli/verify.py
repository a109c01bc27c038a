"""`isthmus verify`: whether a version is what was published, and runs."""

from __future__ import annotations

from typing import Annotated

import typer

from isthmus.units import format_size
from isthmus_tools.cli.completion import complete_models
from isthmus_tools.cli.console import errors, print_json, run, say
from isthmus_tools.cli.options import DEFAULT_REGISTRY, AsJson, RegistryOption, Tensors, TrustedKeys, registry_settings


def verify(
    model: Annotated[
        str, typer.Argument(help="NAME, NAME:VERSION or NAME:ALIAS of the registry.", autocompletion=complete_models)
    ],
    *,
    tensor: Tensors = None,
    trusted_keys: TrustedKeys = None,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Verify a version: the digest of every blob, then a run of every segment; exits with 1 at a fault.

    Example: `isthmus verify efficientnet-lite0:3 --registry s3://models/edge`
    """
    from isthmus_tools.cli.inputs import read_tensors
    from isthmus_tools.usecases import verify as use_case

    with errors(as_json):
        settings = registry_settings(registry, trusted_keys=trusted_keys)
        request = use_case.VerifyRequest(model=model, registry=settings, arrays=read_tensors(tensor))
        result = run(use_case.verify, request, quiet=as_json)
        version = result.version
        if as_json:
            print_json(
                {
                    "name": version.name,
                    "version": version.version,
                    "digest": version.digest,
                    "good": result.is_good,
                    "blobs": result.blobs,
                    "bytes": result.bytes,
                    "faults": [vars(fault) for fault in result.faults],
                    "ran_s": {each.segment: round(each.seconds, 3) for each in result.runs},
                    "run_fault": result.run_fault,
                    "signers": [each.document() for each in result.signers],
                }
            )
        else:
            for fault in result.faults:
                say(f"damaged: {fault.digest}: {fault.reason}", "bold red")
            if result.faults:
                say("to repair: delete these blobs, and publish the version again from where it is whole")
            if result.run_fault:
                say(f"does not run: {result.run_fault}", "bold red")
            for each in result.signers:
                say(f"signed by {each.name or each.key or 'nobody'}: {each.state.replace('_', ' ')}")
            counts = f"{result.blobs} blobs, {format_size(result.bytes)} read, {len(result.runs)} segments ran"
            say(f"{version.name}:{version.version}: {'good' if result.is_good else 'not good'}; {counts}", "bold")
        # For scripts, with the reasons on standard output as well.
        if not result.is_good:
            raise typer.Exit(1)
