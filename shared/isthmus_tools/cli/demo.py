"""`isthmus demo`: the main job, end to end, on a real model and real photos."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.units import format_size
from isthmus_tools.cli.console import errors, print_json, progress_bars, say
from isthmus_tools.cli.console import table as print_table
from isthmus_tools.cli.options import (
    DEFAULT_REGISTRY,
    AsJson,
    EdgeCpus,
    EdgeSlowdown,
    RegistryOption,
    edge_slowdown_of,
    registry_settings,
    stack_variables,
)
from isthmus_tools.progress import Progress
from isthmus_tools.zoo.photos import read_photo, sample_photos

# The imports load onnxruntime, numpy and an HTTP client.
if TYPE_CHECKING:
    from isthmus.arrays import Array
    from isthmus.client import Client
    from isthmus_tools.usecases.local_model import LocalModel

MODEL = "efficientnet-lite0"
# As cameras and browsers save photos.
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Comparison:
    """A photo's prediction beside the uncut model's.

    `difference` is the largest difference of a logit, relative to the largest logit. Bytes: the photo's file, the
    model's crop as a JPEG of quality 85, the float input, the bytes sent over the link, and the same tensors raw.
    """

    photo: str
    classes: list[dict[str, Any]]
    same_classes: bool
    same_likeliest: bool
    difference: float
    photo_bytes: int
    jpeg_bytes: int
    input_bytes: int
    link_bytes: int
    link_raw_bytes: int
    timings_ms: dict[str, float]


def demo(
    photos: Annotated[list[Path] | None, typer.Argument(help="Photos; five that come with packages if none.")] = None,
    *,
    port: Annotated[int, typer.Option(help="Port of the local gateway; 0 takes a free one.", min=0, max=65535)] = 0,
    stack: Annotated[Path, typer.Option(help="The stack file.")] = Path("stack.yml"),
    repeat: Annotated[int, typer.Option(help="Times each photo is sent; times shown are medians.", min=1)] = 5,
    edge_slowdown: EdgeSlowdown = None,
    edge_cpus: EdgeCpus = None,
    list_photos: Annotated[bool, typer.Option("--list", help="Print the photos' paths and leave.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Classify real photos with EfficientNet-Lite0, cut in two, and compare with the uncut model.

    Imports the model if the registry lacks it, starts router, edge-head and cloud-tail, and stops them at the end.

    Example: `isthmus demo my-cat.jpg`
    """
    with errors(as_json):
        slowdown = edge_slowdown_of(edge_slowdown, edge_cpus)
        paths = photos or sample_photos()
        if list_photos:
            if as_json:
                print_json([str(path) for path in paths])
            else:
                typer.echo("\n".join(map(str, paths)))
            return
        # The import and the start take a minute: unreadable photos are refused before.
        contents = {path: read_photo(path) for path in paths}
        from isthmus_tools.usecases.local_model import LocalModel

        with _running(registry, stack, port, as_json, slowdown) as (client, progress):
            progress("loading the uncut model in this process, to compare")
            whole = LocalModel(MODEL, registry_settings(registry), WHOLE, threads=1)
            comparisons = []
            for path in paths:
                progress(f"asking about {path.name}")
                responses = [client.photo(contents[path], model=MODEL) for _ in range(repeat)]
                comparisons.append(compare(path.name, contents[path], responses, client, whole))
            progress("stopping the functions")
        route = ServedRoute.of(responses[0]["route"])
        cuts = [whole.model.bundle.cuts[name] for name in route.cuts]
        if as_json:
            print_json(
                {
                    "model": f"{whole.model.name}:{whole.model.version}",
                    "digest": whole.model.digest,
                    "plan": route.plan,
                    "hops": route.hops,
                    "cuts": [asdict(c) for c in cuts],
                    "photos": [asdict(c) for c in comparisons],
                }
            )
        else:
            for comparison in comparisons:
                _print_classes(comparison)
            say(f"\n{route.text()}")
            for cut in cuts:
                tensors = ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in cut.tensors)
                say(f"cut {cut.name}: {tensors}, after {cut.macs_before:.0%} of the multiply-accumulates")
            _print_totals(comparisons)
        # A plan's codec may change the order of the less likely classes: its stated error allows that.
        if not all(c.same_likeliest if route.plan else c.same_classes for c in comparisons):
            raise typer.Exit(1)


@contextmanager
def _running(
    registry: str, stack: Path, port: int, quiet: bool, slowdown: float | None
) -> Iterator[tuple[Client, Progress]]:
    """The stack's functions, ready, with the model in the registry; those of the edge at a part of a CPU."""
    from isthmus.client import Client
    from isthmus_tools.engine.cpu_share import share_of_a_cpu
    from isthmus_tools.engine.stack import read_stack
    from isthmus_tools.usecases.functions import stack_running
    from isthmus_tools.usecases.model_import import ImportRequest, import_model

    variables = stack_variables(registry)
    # An unusable stack file fails before the import and the start.
    read_stack(stack, variables)
    with progress_bars(quiet) as progress, ExitStack() as resources:
        edge = None if slowdown is None else resources.enter_context(share_of_a_cpu(1 / slowdown))
        if edge is not None:
            progress(f"router and edge-head get 1/{slowdown:g} of a CPU, by {edge.method}")
        import_model(ImportRequest(model=MODEL, registry=registry_settings(registry), if_absent=True), progress)
        with stack_running(stack, variables, progress, port=port, edge=edge) as url:
            yield Client(f"{url}/function/router"), progress


@dataclass(frozen=True)
class ServedRoute:
    """The route of a response: the plan's choice where there is a plan, and the hop of each segment."""

    plan: str
    hops: dict[str, str]

    @classmethod
    def of(cls, route: Mapping[str, Any]) -> ServedRoute:
        """Read a response's `route`."""
        return cls(route.get("plan", ""), {s["segment"]: s["hop"] for s in route["segments"]})

    @property
    def cuts(self) -> list[str]:
        """The cuts between the segments, in order."""
        return [stop for segment in self.hops if (stop := SegmentId.parse(segment).stop)]

    def text(self) -> str:
        """The route as a line."""
        by = f"by the plan, {self.plan}" if self.plan else "without a plan"
        parts = (f"{'the whole model' if s == WHOLE else s} on {h.rpartition('/')[2]}" for s, h in self.hops.items())
        return f"served {by}: {', '.join(parts)}"


def compare(name: str, photo: bytes, responses: list[dict[str, Any]], client: Client, whole: LocalModel) -> Comparison:
    """A photo's responses beside the uncut model's prediction in this process."""
    inputs = whole.preprocess(photo)
    expected = whole.run(inputs).outputs
    split = client.infer(inputs, model=MODEL).outputs
    array = next(iter(inputs.values()))
    logits = whole.model.bundle.outputs[0].name
    # Relative to the largest logit: near zero a relative difference of one logit says nothing.
    scale = float(abs(expected[logits]).max())
    uncut = whole.classes(expected)
    return Comparison(
        photo=name,
        classes=responses[0]["classes"],
        # Indices, not labels: two classes of ImageNet are called crane.
        same_classes=all([c["index"] for c in r["classes"]] == [c["index"] for c in uncut] for r in responses),
        same_likeliest=all(r["classes"][0]["index"] == uncut[0]["index"] for r in responses),
        difference=float(abs(expected[logits] - split[logits]).max()) / scale,
        photo_bytes=len(photo),
        jpeg_bytes=_jpeg_size(array),
        input_bytes=array.nbytes,
        link_bytes=responses[0]["route"]["link_bytes"],
        link_raw_bytes=responses[0]["route"]["link_raw_bytes"],
        timings_ms=medians(responses),
    )


def medians(responses: list[dict[str, Any]]) -> dict[str, float]:
    """Median milliseconds of each stage; a hop's own computing apart from the rest of the hop.

    A stage is 0 in a response without it: the router does not preprocess where the cloud makes the input of a photo.
    With closer looks a segment runs more than once.
    """
    rows = []
    for response in responses:
        timings = response["timings_ms"]
        row = {"preprocess": timings.get("preprocess", 0.0)}
        for stage in response["route"]["segments"]:
            run, hop = f"{stage['segment']} run", f"{stage['segment']} hop"
            row[run] = row.get(run, 0.0) + stage["run_ms"]
            row[hop] = row.get(hop, 0.0) + stage["ms"] - stage["run_ms"]
        row["postprocess"] = timings.get("postprocess", 0.0)
        rows.append(row | {"total": sum(row.values())})
    return {name: round(statistics.median(row.get(name, 0.0) for row in rows), 2) for name in _in_order(rows)}


def _in_order(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Every row's stages, the total last."""
    return sorted(dict.fromkeys(stage for row in rows for stage in row), key=lambda stage: stage == "total")


def _jpeg_size(array: Array) -> int:
    """Bytes of the model's input as a JPEG: the least that sending the photo to the cloud would cost."""
    from PIL import Image

    # Undoes the normalisation of EfficientNet-Lite: (pixel - 127) / 128.
    pixels = (array[0].transpose(1, 2, 0) * 128 + 127).clip(0, 255).round().astype("uint8")
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
    return len(data.getvalue())


def verdict(comparison: Comparison) -> str:
    """How the photo's classes compare with the uncut model's, as a sentence."""
    if comparison.same_classes:
        return "the uncut model says the same"
    if comparison.same_likeliest:
        return "the uncut model says the same class first, others in another order"
    return "the uncut model says something else"


def _print_classes(comparison: Comparison) -> None:
    print_table(
        f"{comparison.photo}: {verdict(comparison)}, largest difference {comparison.difference:.1e}",
        ["class", "index", "probability"],
        [(c["label"], c["index"], f"{c['probability']:.4f}") for c in comparison.classes],
        numbers=["index", "probability"],
    )


def _print_totals(comparisons: list[Comparison]) -> None:
    print_table(
        f"bytes: the photo as it came, the model's crop as a JPEG (quality {JPEG_QUALITY}), as floats, sent over the"
        " link, and the same raw",
        ["photo", "file", "JPEG", "float input", "sent", "raw"],
        [
            (
                c.photo,
                format_size(c.photo_bytes),
                format_size(c.jpeg_bytes),
                format_size(c.input_bytes),
                format_size(c.link_bytes),
                format_size(c.link_raw_bytes),
            )
            for c in comparisons
        ],
        numbers=["file", "JPEG", "float input", "sent", "raw"],
    )
    stages = _in_order([c.timings_ms for c in comparisons])
    print_table(
        "milliseconds in each stage, medians; a segment's hop is all that is not its own computing",
        ["photo", *(stage.replace(" ", "\n").replace("process", "") for stage in stages)],
        [(c.photo, *(f"{c.timings_ms.get(stage, 0.0):.1f}" for stage in stages)) for c in comparisons],
        numbers=[stage.replace(" ", "\n").replace("process", "") for stage in stages],
    )
