"""`isthmus redact`: publish what the router redacts in a model's inputs before anything of them leaves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from isthmus.errors import RequestMalformed
from isthmus_tools.cli.console import errors, print_json, published_document, run, say, show_publication
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    Alias,
    AsJson,
    DropPlan,
    ModelArgument,
    RegistryOption,
    registry_settings,
)

if TYPE_CHECKING:
    from isthmus.artifacts.redaction import Region


def redact(
    model: ModelArgument,
    *,
    faces: Annotated[bool, typer.Option("--faces", help="Blur faces in photos.")] = False,
    detector: Annotated[
        Path | None, typer.Option(help="An ONNX file that finds faces, in place of CenterFace.", metavar="FILE")
    ] = None,
    side: Annotated[
        int, typer.Option(help="CenterFace looks at photos reduced to so many pixels; more finds smaller faces.")
    ] = 480,
    threshold: Annotated[float, typer.Option(help="Scores from which a box is blurred.", min=0, max=1)] = 0.3,
    margin: Annotated[float, typer.Option(help="Widen each box by this share of it.", min=0, max=1)] = 0.2,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="Fill a rectangle of every photo, once each: left, top, width and height as shares of the photo.",
            metavar="X,Y,W,H",
        ),
    ] = None,
    patterns: Annotated[
        str, typer.Option(help="Mask patterns in texts: card, email, iban, phone, with commas between.")
    ] = "",
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="Mask an expression of your own, in RE2's syntax; once each.", metavar="NAME=EXPRESSION"),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="Redact nothing any more.")] = False,
    alias: Alias = "prod",
    drop_plan: DropPlan = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Publish what the router redacts in a model's photos or texts before anything of them leaves the edge.

    Example: `isthmus redact efficientnet-lite0 --faces --region 0,0.9,1,0.1`
    """
    from isthmus_tools.usecases import redact as use_case

    with errors(as_json):
        chosen = bool(faces or detector or region or patterns or pattern)
        if remove == chosen:
            raise RequestMalformed(
                "name what to redact by --faces, --region, --patterns or --pattern, or --remove alone",
                hint=f"isthmus show {model} says what a version redacts",
            )
        request = use_case.RedactRequest(
            model=model,
            registry=registry_settings(registry),
            faces=faces or detector is not None,
            detector=detector,
            side=side,
            threshold=threshold,
            margin=margin,
            regions=[_region(text) for text in region or ()],
            patterns=[name.strip() for name in patterns.split(",") if name.strip()],
            expressions=[_expression(text) for text in pattern or ()],
            remove=remove,
            alias=alias,
            drop_plan=drop_plan,
        )
        result = run(use_case.redact, request, quiet=as_json)
        version, redaction = result.publication.version, result.bundle.redaction
        sentence = "redacts nothing" if redaction is None else redaction.sentence()
        if as_json:
            print_json(published_document(result.publication, registry, redaction=sentence))
            return
        say(f"{version.name}:{version.version} {version.digest[:19]}… {sentence}")
        show_publication(result.publication, registry)


def _region(text: str) -> Region:
    """The region of --region.

    Raises:
        RequestMalformed: not four shares.
    """
    from isthmus.artifacts.redaction import Region

    try:
        # NaN is refused too: it is not within 0 to 1.
        x, y, width, height = (float(part) for part in text.split(","))
        if not all(0 <= share <= 1 for share in (x, y, width, height)):
            raise ValueError("a share is 0 to 1")
    except ValueError as e:
        raise RequestMalformed(
            f"--region is {text[:80]!r}; it is X,Y,W,H as shares of the photo's width and height",
            option="--region",
            hint="divide pixels by the photo's size: the lower tenth is 0,0.9,1,0.1",
        ) from e
    return Region(x, y, width, height)


def _expression(text: str) -> tuple[str, str]:
    """The name and expression of --pattern.

    Raises:
        RequestMalformed: no name, or no expression.
    """
    import re

    name, equals, expression = text.partition("=")
    if not equals or not expression or not re.fullmatch("[a-z][a-z0-9_]{0,31}", name):
        raise RequestMalformed(
            f"--pattern is {text[:80]!r}; it is NAME=EXPRESSION, the name of a-z, 0-9 and _", option="--pattern"
        )
    return name, expression
