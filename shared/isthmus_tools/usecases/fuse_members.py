"""Fusion of several models into a single model: their graphs side by side, then a weighted sum of their scores."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec import structs

from isthmus.artifacts.bundle import Bundle, is_model_name
from isthmus.artifacts.segment_id import WHOLE
from isthmus.errors import ModelError
from isthmus.registry import SegmentCache, open_cache, open_registry
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.graph import build, open_model
from isthmus_tools.graph.merge import FUSED, MemberGraph, ScoreSum, check_sum, fusion_cuts, merge
from isthmus_tools.learning.fusion import FittedFusion, MemberScores, fit_fusion, require_gain
from isthmus_tools.learning.labelled import open_labelled
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.fusion_members import Members, open_members
from isthmus_tools.usecases.publication import Publication, publish_version, refuse_encrypted

INPUTS = 20_000
# Inputs to compare the fused graph with its members: conversions of opsets err for every input or for none.
_CHECKED = 4
_TOP_K = 5


@dataclass(frozen=True, kw_only=True)
class FuseMembersRequest:
    """Models to fuse under the name `name`, and the labelled inputs for their weights.

    `members` are NAME or NAME:VERSION. Inputs are named `MEMBER.INPUT`; with `shared` all members take the same inputs.
    `labels` is a file for `open_labelled`. `inputs` bounds the number of inputs.
    """

    name: str
    members: Sequence[str]
    data: Path
    registry: RegistrySettings
    labels: Path | None = None
    shared: bool = False
    inputs: int = INPUTS
    threads: int = 0
    alias: str = "prod"


@dataclass(frozen=True)
class FuseMembersResult:
    """The published model, the members in order, and the weights with their gain over the best member alone."""

    publication: Publication
    bundle: Bundle
    members: tuple[str, ...]
    fitted: FittedFusion


def fuse_members(request: FuseMembersRequest, progress: Progress = silent) -> FuseMembersResult:
    """Learn the weights of several models' scores, and publish the model of all members and their sum.

    Raises:
        LearningError: members that do not go together, unusable data, or no gain beyond chance; nothing was published.
        ModelError: the members' graphs cannot be brought together, or compute something else then.
        RegistryError: unknown model, or the registry cannot be read or written.
    """
    if not is_model_name(request.name):
        raise ModelError(f"{request.name!r} cannot name a model", hint="use 1 to 63 of a-z, 0-9, '.', '_' and '-'")
    settings = SegmentSettings(**vars(request.registry), threads=request.threads)
    registry = open_registry(settings)
    models = [registry.resolve(reference) for reference in request.members]
    for model in models:
        # An encrypted member's graph would be plain in the new model.
        refuse_encrypted(registry, model)
        if model.name == request.name:
            raise ModelError(f"{request.name} is a member; the fusion needs a name of its own", member=model.name)
    members = open_members(registry, models, shared=request.shared)
    data = open_labelled(
        members.data_bundle(request.name), request.data, members.each[0].classes, labels=request.labels, required=True
    ).sample(request.inputs)
    cache = open_cache(settings, registry)
    # Before the graphs are built: a refusal costs no build.
    observed = members.scores(cache, settings, data, progress)
    progress("learning the weights")
    fitted = fit_fusion(observed)
    require_gain(fitted, observed)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as folder, _graphs(members, observed, cache) as graphs:
        progress(f"building {request.name}")
        total = ScoreSum(fitted.recipe.kind, fitted.weights, fitted.scale)
        path = merge(graphs, total, Path(folder) / "fusion.onnx", shared=request.shared)
        fused = open_model(path)
        inputs = list(itertools.islice(data.inputs(), _CHECKED))
        check_sum(fused, inputs, fitted.fused(observed, slice(0, _CHECKED)))
        bundle, files = build(
            fused,
            request.name,
            Path(folder) / "bundle",
            partitions=[[cut] for cut in fusion_cuts(fused, graphs, shared=request.shared)],
            **_processing(members),
            source={"fusion": _document(members, fitted)},
            progress=progress,
        )
        # Members that share a photo redact it alike, which `open_members` has checked.
        bundle = structs.replace(bundle, redaction=members.first.redaction)
        progress("publishing")
        publication = publish_version(registry, bundle, files, request.alias, settings=request.registry, dry_run=True)
    return FuseMembersResult(publication, bundle, tuple(member.name for member in members.each), fitted)


@contextmanager
def _graphs(members: Members, observed: MemberScores, cache: SegmentCache) -> Iterator[list[MemberGraph]]:
    """The members' uncut graphs, pinned in the cache as long as the block lasts."""
    with ExitStack() as stack:
        graphs = []
        for member, shares in zip(members.each, observed.probabilities, strict=True):
            output, model = member.classes.output, member.model
            graphs.append(
                MemberGraph(
                    member.name,
                    stack.enter_context(cache.locate(model.digest, WHOLE)).path,
                    tuple(spec.name for spec in model.bundle.inputs),
                    output.name,
                    output.dtype,
                    len(output.shape),
                    shares,
                )
            )
        yield graphs


def _processing(members: Members) -> dict[str, Any]:
    top_k = (members.first.postprocess or {}).get("top_k", _TOP_K)
    # The sum is log-odds, of members with logits and with probabilities alike.
    postprocess = {"kind": "classify", "output": FUSED, "softmax": True, "top_k": top_k}
    return {
        "preprocess": members.first.preprocess if members.shared else None,
        "postprocess": postprocess,
        "labels": list(members.class_names) or None,
    }


def _document(members: Members, fitted: FittedFusion) -> dict[str, Any]:
    """The fusion in the bundle's source: docs/reference/bundle.md, "A fusion of models"."""
    return {
        "members": [
            {
                "name": member.name,
                "model": member.model.name,
                "version": member.model.version,
                "digest": member.model.digest,
                "weights": [float(weight) for weight in weights],
            }
            for member, weights in zip(members.each, fitted.weights, strict=True)
        ],
        "shared": members.shared,
        "kind": fitted.recipe.kind,
        "penalty": fitted.recipe.penalty,
        "scale": fitted.scale,
        "alone": members.each[fitted.alone].name,
        "gain": structs.asdict(fitted.gain),
    }
