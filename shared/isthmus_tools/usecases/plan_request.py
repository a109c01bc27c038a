"""The request for a plan, and its result, which can be published."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.conditions import Conditions, Constraints, Objective
from isthmus.artifacts.plan import Plan
from isthmus.errors import ConstraintMalformed, RequestMalformed
from isthmus.registry import Registry
from isthmus.settings import RegistrySettings
from isthmus_tools.budget import UNLIMITED, Budget
from isthmus_tools.planner.candidates import CandidateSet
from isthmus_tools.planner.costs import Prices
from isthmus_tools.planner.decoder_layers import DecoderLayers
from isthmus_tools.planner.language_candidates import LanguageCandidates
from isthmus_tools.usecases.answer_size import AnswerSize
from isthmus_tools.usecases.function_urls import FunctionUrls
from isthmus_tools.usecases.publication import Publication, publish_candidate

__all__ = ["AnswerSize", "PlanRequest", "PlanResult", "check_language_request"]


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """A model to plan for: the link, the objective and its constraints, the functions and the inputs to measure with.

    `model` is NAME or NAME:VERSION. Without functions the plan is predicted from stored profiles; with functions and a
    token both tiers are profiled first; `predict_only` measures nothing over the link. `sweep` tries cuts for other
    links too. `int8` tries the model quantised at the edge. Candidates run on `photos` or `tensors`, else on the sample
    photos or random numbers; a language model on the text of these files, for the `answer`.
    """

    model: str
    registry: RegistrySettings
    conditions: Conditions
    constraints: Constraints = field(default_factory=Constraints)
    objective: Objective = "latency"
    prices: Prices | None = None
    functions: FunctionUrls | None = None
    predict_only: bool = False
    photos: Sequence[Path] = ()
    tensors: Mapping[str, Array] = field(default_factory=dict)
    sweep: bool = False
    int8: bool = True
    answer: AnswerSize = AnswerSize()  # noqa: RUF009 - it is frozen
    budget: Budget = UNLIMITED


@dataclass(frozen=True)
class PlanResult:
    """A plan and its candidate set, with files that exist until the result is closed; a context manager."""

    plan: Plan
    candidate_set: CandidateSet | LanguageCandidates
    registry: Registry
    settings: RegistrySettings
    _files: contextlib.ExitStack

    def publish(self, alias: str = "prod") -> Publication:
        """Publish the plan as the model's next version, and the int8 variant, if any, as a model of its own.

        Raises:
            RegistryError: the alias is malformed, or the registry cannot be written.
        """
        return publish_candidate(self.registry, self.settings, self.candidate_set, self.plan, alias)

    @property
    def graph_candidates(self) -> CandidateSet:
        """The candidates with the graph that these were searched in.

        Raises:
            RequestMalformed: a language model's, of whose layers no graph was searched.
        """
        if isinstance(self.candidate_set, LanguageCandidates):
            raise RequestMalformed(f"{self.plan.model} is a language model: its plan has no curves along the graph")
        return self.candidate_set

    def close(self) -> None:
        """Remove the candidates' files, without which `publish` fails."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()


def check_language_request(request: PlanRequest, bundle: Bundle) -> None:
    """Refuse options that a language model has no use for, and sizes beyond its context.

    Raises:
        ConstraintMalformed: names the option.
    """
    if request.objective == "throughput":
        raise ConstraintMalformed(
            "the throughput of a language model is that of sessions in batches, and no plan predicts these",
            what="objective",
            hint="plan for latency, first-token or per-token",
        )
    if request.constraints.max_error is not None:
        raise ConstraintMalformed(
            "codecs of a language model are judged by tokens: give --max-disagreement", what="max_error"
        )
    if request.constraints.private_ssim is not None:
        raise ConstraintMalformed(
            "no leak document tells what a language model's hidden states reveal: give --private-depth",
            what="private_ssim",
        )
    if request.tensors:
        raise ConstraintMalformed("a language model runs on text: --input FILE", what="tensor")
    layers = DecoderLayers.of(bundle).count
    if request.constraints.private_depth > layers:
        raise ConstraintMalformed(
            f"the private depth is {request.constraints.private_depth} layers; the model has {layers}",
            what="private_depth",
        )
    request.answer.load(bundle)
