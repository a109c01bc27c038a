"""Comparison of a trial's versions: some requests run on the other version too, in idle time, as the guard's do.

Predictions of photos, tensors and embeddings are compared, by the rule of agreement of the stable version's bundle.
Generated texts are not: two versions of a language model may both be right with different tokens.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeAlias

from isthmus.arrays import Array
from isthmus.artifacts.fidelity import Measure, measure_for
from isthmus.context import Context
from isthmus.errors import DeadlineExceeded, HopError, IsthmusError, Overloaded, RegistryError
from isthmus.pipeline import execute
from isthmus.pipeline.agreement import agrees
from isthmus.processing.image import model_input
from isthmus.processing.image_budget import ImageMemory
from isthmus.routing.canary_trial import CanaryTrial
from isthmus.routing.canary_trials import CanaryTrials
from isthmus.routing.candidates import ServedModel
from isthmus.routing.guard import Fidelities
from isthmus.routing.idle_work import IdleWork, job_context
from isthmus.settings import RouterSettings

Inputs: TypeAlias = Mapping[str, Array] | bytes
"""The tensors of a request, or its photo, which each version makes its own tensors of."""

# Errors of the way to a prediction, which say nothing of the version.
_PASSING = (HopError, DeadlineExceeded, Overloaded, RegistryError)


class Comparison:
    """Compares the setting `canary_compared`'s share of the requests of trials."""

    def __init__(
        self,
        settings: RouterSettings,
        trials: CanaryTrials,
        fidelities: Fidelities,
        images: ImageMemory,
        busy: Callable[[], float],
        log: logging.Logger,
    ) -> None:
        self._settings, self._images = settings, images
        self.trials, self._fidelities = trials, fidelities
        self._idle = IdleWork("comparison", busy, log)
        self._draw = random.Random().random  # noqa: S311 - no secret
        self.close = self._idle.close

    def watch(self, model: ServedModel, outputs: Mapping[str, Array], inputs: Inputs) -> None:
        """Draw whether a served request of `model` runs with the other version of its trial later."""
        if (
            (trial := self.trials.of(model)) is None
            or self._draw() >= self._settings.canary_compared
            or self._idle.is_closed
        ):
            return
        self._idle.offer(partial(self.compare, trial, model, outputs, inputs))

    def compare(self, trial: CanaryTrial, model: ServedModel, outputs: Mapping[str, Array], inputs: Inputs) -> None:
        """Repeat a request with the trial's other version, and roll the canary back where too many predictions differ.

        A version that cannot run what the other one ran differs.
        """
        is_canary = model.digest == trial.tried.digest
        context = job_context(self._settings.deadline_s)
        agreed: bool | None
        try:
            version = trial.stable if is_canary else trial.tried
            # A photo that was redacted for its caller is redacted for the other version too.
            version = replace(version, redactor=version.redactor or model.redactor)
            other = self._outputs(version, inputs, context)
            pair = (other, outputs) if is_canary else (outputs, other)
            agreed = _agree(self._measure(trial.stable), *pair)
        except _PASSING:
            agreed = None
        except IsthmusError:
            agreed = False
        trial.compared(agreed)
        self.trials.judge(trial)

    def _outputs(self, model: ServedModel, inputs: Inputs, context: Context) -> Mapping[str, Array]:
        """The outputs of a version along its plan's choice; in no metric, for no caller asked for them."""
        selected, max_pixels = model.route, self._settings.max_image_pixels
        if not isinstance(inputs, bytes):
            return execute(selected.route, inputs, context, {}).comparable
        if selected.photo is None:
            tensors = model_input(
                model.bundle, inputs, max_pixels=max_pixels, memory=self._images, redactor=model.redactor
            )
            return execute(selected.route, tensors, context, {}).comparable
        encoded = selected.photo.encode(inputs, max_pixels=max_pixels, memory=self._images, redactor=model.redactor)
        return execute(selected.route, {}, context, encoded).comparable

    def _measure(self, stable: ServedModel) -> Measure:
        fidelity = self._fidelities(stable.bundle)
        return measure_for(stable.bundle) if fidelity is None else fidelity.measure


def _agree(measure: Measure, stable: Mapping[str, Array], canary: Mapping[str, Array]) -> bool:
    """Whether the predictions are the same; outputs of other names are not."""
    return stable.keys() == canary.keys() and agrees(measure, stable, canary)
