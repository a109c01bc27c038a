"""`isthmus demo`: the main job, end to end, on a real model and real photos."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.artifacts.segment_id import WHOLE, SegmentId
from isthmus.errors import RequestMalformed
from isthmus.units import format_size
from isthmus_tools.cli.console import DEFAULT_REGISTRY, AsJson, RegistryOption, errors, out, print_json, progress_bars
from isthmus_tools.cli.console import table as print_table
from isthmus_tools.progress import Progress
from isthmus_tools.zoo.photos import sample_photos

if TYPE_CHECKING:  # they load onnxruntime, numpy and an HTTP client
    from isthmus.arrays import Array
    from isthmus.client import Client
    from isthmus_tools.cli.here import Here

MODEL = "efficientnet-lite0"
JPEG_QUALITY = 85


@dataclass(frozen=True)
class Shown:
    """One photo's answer beside the uncut model's.

    `difference` is the largest one between the logits, relative to the largest logit. Bytes: the photo as it came, the
    model's crop of it as a JPEG of quality 85, the float input, what was sent over the link, and what that weighs raw.
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
    list_photos: Annotated[bool, typer.Option("--list", help="Print the photos' paths and leave.")] = False,
    registry: RegistryOption = DEFAULT_REGISTRY,
    as_json: AsJson = False,
) -> None:
    """Classify real photos with EfficientNet-Lite0, cut in two, and compare with the uncut model.

    Imports the model if the registry lacks it, starts router, edge-head and cloud-tail, asks them, and stops them.

    Example: `isthmus demo my-cat.jpg`
    """
    with errors(as_json):
        paths = photos or sample_photos()
        if list_photos:
            if as_json:
                print_json([str(path) for path in paths])
            else:
                typer.echo("\n".join(map(str, paths)))
            return
        # The import and the start take a minute: what was named is read before.
        contents = {path: _read(path) for path in paths}
        from isthmus_tools.cli.here import Here

        with _ready(registry, stack, port, as_json) as (client, step):
            step("loading the uncut model in this process, to compare")
            whole = Here(registry, MODEL, WHOLE, threads=1)
            shown = []
            for path in paths:
                step(f"asking about {path.name}")
                answers = [client.photo(contents[path], model=MODEL) for _ in range(repeat)]
                shown.append(compared(path.name, contents[path], answers, client, whole))
            step("stopping the functions")
        taken = Taken.of(answers[0]["route"])
        cuts = [whole.model.bundle.cuts[name] for name in taken.cuts]
        if as_json:
            print_json(
                {
                    "model": f"{whole.model.name}:{whole.model.version}",
                    "digest": whole.model.digest,
                    "plan": taken.plan,
                    "hops": taken.hops,
                    "cuts": [asdict(c) for c in cuts],
                    "photos": [asdict(s) for s in shown],
                }
            )
        else:
            for one in shown:
                _print_classes(one)
            out.print(f"\n{taken.text()}", highlight=False, markup=False, soft_wrap=True)
            for cut in cuts:
                tensors = ", ".join(f"{t.name} {t.dtype}{list(t.shape)}" for t in cut.tensors)
                out.print(
                    f"cut {cut.name}: {tensors}, after {cut.macs_before:.0%} of the multiply-accumulates",
                    highlight=False,
                    markup=False,
                    soft_wrap=True,
                )
            _print_totals(shown)
        # The codec of a plan may change the order of the less likely ones: that is what its error bounds.
        if not all(s.same_likeliest if taken.plan else s.same_classes for s in shown):
            raise typer.Exit(1)


@contextmanager
def _ready(registry: str, stack: Path, port: int, quiet: bool) -> Iterator[tuple[Client, Progress]]:
    """The functions, running and ready, with the model in the registry."""
    from isthmus.client import Client
    from isthmus_tools.cli.engine import engine, variables
    from isthmus_tools.cli.importing import publish_if_absent
    from isthmus_tools.engine.stack import read_stack

    read_stack(stack, variables(registry))
    publish_if_absent(MODEL, registry, quiet=quiet)
    with progress_bars(quiet) as step, engine(stack, registry, port, step) as url:
        yield Client(f"{url}/function/router"), step


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as e:
        raise RequestMalformed(f"{path} cannot be read: {e.strerror}") from e


@dataclass(frozen=True)
class Taken:
    """The way that requests took: the plan's choice where there is a plan, and each segment's hop."""

    plan: str
    hops: dict[str, str]

    @classmethod
    def of(cls, route: Mapping[str, Any]) -> Taken:
        """From an answer's `route`."""
        return cls(route.get("plan", ""), {s["segment"]: s["hop"] for s in route["segments"]})

    @property
    def cuts(self) -> list[str]:
        """The cuts between the segments, in order."""
        return [stop for segment in self.hops if (stop := SegmentId.parse(segment).stop)]

    def text(self) -> str:
        """The way as one line."""
        by = f"by the plan, {self.plan}" if self.plan else "without a plan"
        parts = (f"{'the whole model' if s == WHOLE else s} on {h.rpartition('/')[2]}" for s, h in self.hops.items())
        return f"served {by}: {', '.join(parts)}"


def compared(name: str, photo: bytes, answers: list[dict[str, Any]], client: Client, whole: Here) -> Shown:
    """A photo's answers beside what the uncut model makes of it in this process."""
    tensor, array = whole.preprocess(photo)
    expected = whole.run({tensor: array}).outputs
    split = client.infer({tensor: array}, model=MODEL).outputs
    logits = whole.model.bundle.outputs[0].name
    scale = float(abs(expected[logits]).max())
    uncut = whole.classes(expected)
    return Shown(
        photo=name,
        classes=answers[0]["classes"],
        same_classes=all([c["index"] for c in a["classes"]] == [c["index"] for c in uncut] for a in answers),
        same_likeliest=all(a["classes"][0]["index"] == uncut[0]["index"] for a in answers),
        difference=float(abs(expected[logits] - split[logits]).max()) / scale,
        photo_bytes=len(photo),
        jpeg_bytes=_as_jpeg(array),
        input_bytes=array.nbytes,
        link_bytes=answers[0]["route"]["link_bytes"],
        link_raw_bytes=answers[0]["route"]["link_raw_bytes"],
        timings_ms=medians(answers),
    )


def medians(answers: list[dict[str, Any]]) -> dict[str, float]:
    """Each stage's median; a hop's own computing apart from the rest of the hop. Stages that did not happen are 0.

    Where the cloud makes the input of a photo, the router does not preprocess; with closer looks a segment runs more
    than once.
    """
    rows = []
    for answer in answers:
        timings = answer["timings_ms"]
        row = {"preprocess": timings.get("preprocess", 0.0)}
        for stage in answer["route"]["segments"]:
            run, hop = f"{stage['segment']} run", f"{stage['segment']} hop"
            row[run] = row.get(run, 0.0) + stage["run_ms"]
            row[hop] = row.get(hop, 0.0) + stage["ms"] - stage["run_ms"]
        row["postprocess"] = timings.get("postprocess", 0.0)
        rows.append(row | {"total": sum(row.values())})
    stages = _in_order(rows)
    return {stage: round(statistics.median(row.get(stage, 0.0) for row in rows), 2) for stage in stages}


def _in_order(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Every row's stages, the total last."""
    return sorted(dict.fromkeys(stage for row in rows for stage in row), key=lambda stage: stage == "total")


def _as_jpeg(array: Array) -> int:
    """Bytes of the model's input as a JPEG: what sending the photo to the cloud would have cost at the least."""
    from PIL import Image

    pixels = (array[0].transpose(1, 2, 0) * 128 + 127).clip(0, 255).round().astype("uint8")
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=JPEG_QUALITY)
    return len(data.getvalue())


def verdict(one: Shown) -> str:
    """How the photo's classes compare with the uncut model's, as a sentence."""
    if one.same_classes:
        return "the uncut model says the same"
    if one.same_likeliest:
        return "the uncut model says the same class first, others in another order"
    return "the uncut model says something else"


def _print_classes(one: Shown) -> None:
    print_table(
        f"{one.photo}: {verdict(one)}, largest difference {one.difference:.1e}",
        ["class", "index", "probability"],
        [(c["label"], c["index"], f"{c['probability']:.4f}") for c in one.classes],
        numbers=["index", "probability"],
    )


def _print_totals(shown: list[Shown]) -> None:
    print_table(
        f"bytes: the photo as it came, the model's crop as a JPEG (quality {JPEG_QUALITY}), as floats, sent over the"
        " link, and the same raw",
        ["photo", "file", "JPEG", "float input", "sent", "raw"],
        [
            (
                s.photo,
                format_size(s.photo_bytes),
                format_size(s.jpeg_bytes),
                format_size(s.input_bytes),
                format_size(s.link_bytes),
                format_size(s.link_raw_bytes),
            )
            for s in shown
        ],
        numbers=["file", "JPEG", "float input", "sent", "raw"],
    )
    stages = _in_order([s.timings_ms for s in shown])
    print_table(
        "milliseconds in each stage, medians; a segment's hop is all that is not its own computing",
        ["photo", *(stage.replace(" ", "\n").replace("process", "") for stage in stages)],
        [(s.photo, *(f"{s.timings_ms.get(stage, 0.0):.1f}" for stage in stages)) for s in shown],
        numbers=[stage.replace(" ", "\n").replace("process", "") for stage in stages],
    )
