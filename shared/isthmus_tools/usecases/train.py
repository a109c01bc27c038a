"""Train: raw data to a published version, in stages that leave their results in the run's folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

from isthmus.errors import LearningError, ShapeMismatch
from isthmus.files import write_whole
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.learning.training.capture import Capture, capture
from isthmus_tools.learning.training.cleaning import prepare, read_bounded
from isthmus_tools.learning.training.config import ONE_PROCESS, FileSource, MqttSource, TrainConfig, TrainingPlace
from isthmus_tools.learning.training.evaluation import HeldOutScores, PairedComparison, evaluate
from isthmus_tools.learning.training.files import photo_steps, read_samples
from isthmus_tools.learning.training.samples import DOCUMENT, PreparedData, RawSample, read_prepared
from isthmus_tools.progress import Progress, silent
from isthmus_tools.usecases.model_import import ImportRequest, import_model
from isthmus_tools.usecases.publication import Publication
from isthmus_tools.usecases.version_in_service import version_in_service

STAGES = ("collect", "clean", "train", "evaluate", "publish")
RULES = ("always", "better", "never")


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """A training run.

    `stage` runs that stage alone, on the results of the stages before. `resume` keeps the collected and cleaned data of
    an interrupted run and goes on from its last checkpoint; `fresh` removes all of an earlier run. `promote` replaces
    the configuration's, unless empty. `place` says where the network is trained.
    """

    config: TrainConfig
    registry: RegistrySettings
    stage: str = ""
    resume: bool = False
    fresh: bool = False
    promote: str = ""
    place: TrainingPlace = ONE_PROCESS


@dataclass
class TrainResult:
    """The result of each stage; None for stages that did not run.

    `comparison` is with the version in service; `unpromoted` says why the alias did not move, empty after a move.
    """

    folder: Path
    prepared: PreparedData | None = None
    training: Mapping[str, Any] | None = None
    evaluation: HeldOutScores | None = None
    comparison: PairedComparison | None = None
    publication: Publication | None = None
    unpromoted: str = ""
    warnings: list[str] = field(default_factory=list)
    messages: int = 0


def train(request: TrainRequest, progress: Progress = silent) -> TrainResult:
    """Collect, clean, train, evaluate and publish, or a single stage of these.

    Raises:
        LearningError: the data, the configuration, a checkpoint, or the labels of the model in service.
        ModelError: the network cannot be exported, or its segments do not run.
        RegistryError, BrokerRefused, BrokerUnavailable: the stores and brokers of sources, and the registry.
    """
    run = _TrainingRun(request, progress)
    run.begin()
    for stage in STAGES:
        if request.stage in ("", stage):
            getattr(run, stage)()
    return run.result


class _TrainingRun:
    """The stages of a request; each takes the results of the stage before, from memory or from the folder."""

    def __init__(self, request: TrainRequest, progress: Progress) -> None:
        self._config, self._request, self._progress = request.config, request, progress
        self._folder = self._config.run_folder
        self._data_folder, self._model = self._config.data_folder, self._folder / "model.onnx"
        self._promote = request.promote or self._config.publish.promote
        registry = open_registry(request.registry)
        self._served = version_in_service(registry, self._config.name, self._config.publish.alias)
        self.result = TrainResult(self._folder)

    def begin(self) -> None:
        """Remove an earlier run, or refuse to overwrite an interrupted run."""
        request = self._request
        if request.resume and request.fresh:
            raise LearningError("--resume goes on with a run, and --fresh removes it: give one")
        if request.stage not in ("", *STAGES):
            raise LearningError(f"there is no stage {request.stage!r}; stages are {', '.join(STAGES)}")
        # Before hours of collecting.
        if request.stage not in ("collect", "clean") and importlib.util.find_spec("torch") is None:
            raise LearningError("training needs torch", hint='pip install "isthmus_tools[torch]"', package="torch")
        checkpoints, finished = self._folder / "checkpoints", self._folder / "training.json"
        interrupted = checkpoints.is_dir() and any(checkpoints.iterdir()) and not finished.exists()
        if self._promote not in RULES:
            raise LearningError(f"there is no rule {self._promote!r} of promotion; rules are {', '.join(RULES)}")
        # Cleaning changes the data under the checkpoints, and training replaces these.
        touches = request.stage in ("", "clean", "train")
        if interrupted and touches and not (request.resume or request.fresh):
            raise LearningError(
                f"{self._folder} holds the checkpoints of a run that was interrupted",
                folder=str(self._folder),
                hint="--resume goes on with it, --fresh starts anew",
            )
        if request.fresh and request.stage in ("", "collect"):
            shutil.rmtree(self._folder / "collected", ignore_errors=True)
        if touches and not request.resume:
            self._remove_training()
            # A run that fails while reading leaves nothing that --resume would take for its data.
            if request.stage != "train":
                (self._data_folder / DOCUMENT).unlink(missing_ok=True)
        self._folder.mkdir(parents=True, exist_ok=True)

    def collect(self) -> None:
        """Wait for messages; files stay in place."""
        captures = self._captures
        if captures and not self._is_cleaned():
            capture(captures, self._progress)
        self.result.messages = sum(each.count for each in captures)

    def clean(self) -> None:
        """Clean and split the samples, and write the parts."""
        if self._is_cleaned():
            self.result.prepared = read_prepared(self._data_folder)
            return
        raw = read_bounded(self._raw_samples(), self._config.data)
        self._progress("cleaning")
        config = self._config
        if classes := self._classes({sample.label for sample in raw}):
            config = msgspec.structs.replace(config, data=msgspec.structs.replace(config.data, classes=classes))
        earlier = self._document("parts")
        prepared = prepare(config, raw, earlier)
        # Before the data, and beyond --fresh: what trained a version in service may not evaluate the next.
        parts = {group: name for name, part in prepared.parts.items() for group in part.groups}
        self._write("parts", {**earlier, **parts})
        prepared.write(self._data_folder)
        self.result.prepared = prepared
        if config.training.class_weights == "none" and (imbalance := prepared.imbalance()):
            self.result.warnings.append(imbalance)

    def train(self) -> None:
        """Train, export the graph, and write the history."""
        # Imported late: torch takes seconds, and other stages need no torch.
        from isthmus_tools.learning.training.run import export_graph, fingerprint, fit, open_checkpoints

        data, config = self._prepared(), self._config
        # A run that was killed after its training does not train again.
        mark, document = fingerprint(config, data), self._document("training")
        if self._request.resume and document.get("fingerprint") == mark and self._model.exists():
            self.result.training = document
            return
        checkpoints = open_checkpoints(config, data, self.result.warnings.append)
        if not self._request.resume:
            checkpoints.remove()
        trained = fit(
            config,
            data,
            checkpoints,
            resume=self._request.resume,
            progress=self._progress,
            place=self._request.place,
            settings=self._request.registry,
        )
        self._progress("exporting the graph")
        export_graph(trained.network, data, self._model)
        self.result.training = trained.document() | {"fingerprint": mark}
        self._write("training", self.result.training)

    def evaluate(self) -> None:
        """Score the exported graph on the held-out part."""
        from isthmus_tools.learning.training.run import graph_scores

        data = self._prepared()
        if not len(data.test):
            self.result.warnings.append("there is no part test: nothing is evaluated")
            return
        self._progress("evaluating on the held-out part")
        # The graph, not the network: what is published is what was evaluated.
        self._predicted = graph_scores(self._model, data.input_name, data.test).argmax(1)
        self.result.evaluation = evaluate(self._predicted, data.test.labels, data.test.groups, data.classes)
        self._write("evaluation", self.result.evaluation.document())

    def publish(self) -> None:
        """Publish the graph as a version, and move the alias where the rule says so."""
        if self.result.evaluation is None:
            self.evaluate()
        data, options = self._prepared(), self._config.publish
        promotes = self._decide()
        evaluation, comparison = self.result.evaluation, self.result.comparison
        source = {
            "training": {
                "seed": self._config.seed,
                "network": Path(self._config.network_name).name,
                "samples": {name: len(part) for name, part in data.parts.items()},
                "evaluation": evaluation.summary() if evaluation is not None else None,
                "comparison": comparison.document() if comparison is not None else None,
            }
        }
        pre = photo_steps(self._config.data.size) | {"input": data.input_name}
        post = {"kind": "classify", "output": "scores", "softmax": True, "top_k": min(5, len(data.classes))}
        self.result.publication = import_model(
            ImportRequest(
                model=str(self._model),
                registry=self._request.registry,
                name=self._config.name,
                cuts=self._config.cuts,
                preprocess=pre if self._config.data.kind == "image" else None,
                postprocess=post,
                labels=data.classes,
                alias=options.alias if promotes else "",
                source=source,
            ),
            self._progress,
        )
        if promotes and options.alias and not self.result.publication.moved:
            # Requests must not lose a plan by a training.
            self.result.unpromoted = "the version in service has a plan, and the new one has none yet"

    def _decide(self) -> bool:
        """Whether the alias moves to the new version; `unpromoted` says why not."""
        if self._promote == "never":
            self.result.unpromoted = "promotion is off"
        if self._promote != "better" or self._served is None:
            # The first version of a name has none to be better than.
            return self._promote != "never"
        if self.result.evaluation is None:
            self.result.unpromoted = "there is no held-out part to compare on"
            return False
        served, metric = self._served, self._config.publish.metric
        self._progress(f"comparing with version {served.version}, which is in service")
        try:
            comparison = served.compared_with(self._predicted, self._prepared(), metric, self._request.registry)
        except ShapeMismatch as e:
            # Published all the same: training cost more than a second try of the promotion.
            self.result.unpromoted = f"version {served.version} takes other inputs, and is not compared: {e}"
            return False
        self.result.comparison, self.result.unpromoted = comparison, comparison.reason
        return comparison.is_better

    def _classes(self, labels: set[str]) -> tuple[str, ...]:
        """The declared classes, else those of the version in service where the data has the same.

        Raises:
            LearningError: the version in service has other classes, and the two are to be compared.
        """
        declared, served = self._config.data.classes, self._served
        # A single class is refused with a better reason.
        if served is not None and self._promote == "better" and len(labels) > 1:
            served.check_labels(set(declared) or labels)
        if declared or served is None or set(served.labels) != labels:
            return declared
        return served.labels

    @cached_property
    def _captures(self) -> list[Capture]:
        collected = self._folder / "collected"
        sources = [source for source in self._config.data.sources if isinstance(source, MqttSource)]
        return [Capture(source, collected, self._request.registry) for source in sources]

    def _raw_samples(self) -> Iterator[RawSample]:
        for source in self._config.data.sources:
            if isinstance(source, FileSource):
                collected = self._folder / "collected"
                yield from read_samples(source, self._config.data, collected, self._request.registry, self._progress)
        for each in self._captures:
            yield from each.samples()

    def _is_cleaned(self) -> bool:
        """Whether the data of an interrupted run is there, and is to be used."""
        return self._request.resume and (self._data_folder / DOCUMENT).exists()

    def _prepared(self) -> PreparedData:
        if self.result.prepared is None:
            self.result.prepared = read_prepared(self._data_folder)
        return self.result.prepared

    def _remove_training(self) -> None:
        """Remove all that the stages from the training on left."""
        shutil.rmtree(self._folder / "checkpoints", ignore_errors=True)
        for name in ("training.json", "model.onnx", "evaluation.json", "confusion.png"):
            (self._folder / name).unlink(missing_ok=True)

    def _document(self, name: str) -> dict[str, Any]:
        try:
            document = json.loads((self._folder / f"{name}.json").read_text())
        except (OSError, ValueError):
            return {}
        return document if isinstance(document, dict) else {}

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        write_whole(self._folder / f"{name}.json", json.dumps(document, indent=1).encode() + b"\n", mode=0o644)
