"""The configuration of a training run: a TOML file, read and checked once at start.

Source: docs/reference/training.md. Credentials are names of secrets (files in `secrets_dir`), never values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from isthmus.artifacts.bundle import is_model_name
from isthmus.artifacts.constraints import matching
from isthmus.errors import ConfigurationMalformed, LearningError
from isthmus.events.configuration import Bytes, Seconds, Text, decode_unit, fill_variables
from isthmus.registry.aliases import is_alias

# A configuration is a page; a larger file is a wrong path.
_MAX_BYTES = 256 * 2**10
PAGE = "docs/reference/training.md"
READY_NETWORKS = {"series": "convolutions", "image": "residual", "table": "dense"}
"""The ready network of each kind of data."""
READY_CUTS = {"convolutions": "relu_3", "residual": "relu_3", "dense": "relu_1"}
"""The tensor that a ready network's head gives, by its name in the exported graph."""
# msgspec words its refusals so; a message of another form gets no advice.
_UNKNOWN_KEY = re.compile(r"unknown field `([^`]+)`")
_MISSING_KEY = re.compile(r"missing required field `([^`]+)`")
_PLACEHOLDER = re.compile(r"\{(\w*)\}")
Share: TypeAlias = Annotated[float, Meta(ge=0, le=0.8)]
Positive: TypeAlias = Annotated[float, Meta(gt=0)]
Natural: TypeAlias = Annotated[int, Meta(ge=0, le=10**9)]
PART = matching("(train|validation|test|)")


class _TrainingTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of the file; unknown keys are refused by name."""


class FileSource(_TrainingTable, frozen=True, kw_only=True, tag_field="kind", tag="files"):
    """Files below `path`: a folder, a file, or a folder of objects at s3://, gs://, az:// or hdfs://.

    A folder per class holds photos, CSV files of readings or .npy arrays. `.npz` files have their labels beside the
    inputs, `.ts` files are of the UCR archive, and a CSV file of a table has its label in the column `label`. `group`
    is that table's column of groups, or a regular expression for a file's path, with the group in parentheses.
    """

    path: Text
    label: str = ""
    group: str = ""
    part: Annotated[str, PART] = ""
    """The part that all samples of this source go to; split by group if empty."""


class MqttSource(_TrainingTable, frozen=True, kw_only=True, tag_field="kind", tag="mqtt"):
    """Readings that arrive by MQTT until `count` messages are there, or for `time`.

    `topic` has {label} at the level that names the class, and may have {group}: study/{group}/{label}. A payload is a
    request of the Open Inference Protocol, or the readings as nested JSON lists. Messages are acknowledged once
    on disk.
    """

    url: Text = "mqtt://127.0.0.1:1883"
    topic: Text
    count: Annotated[int, Meta(ge=1, le=10**7)] = 10**7
    time: Seconds = Seconds(3600)
    version: Annotated[str, matching(r"(3\.1\.1|5)")] = "5"
    client_id: str = ""
    user: str = ""
    password_secret: str = ""
    part: Annotated[str, PART] = ""


Source: TypeAlias = FileSource | MqttSource


class DataTable(_TrainingTable, frozen=True, kw_only=True):
    """The data: series (channels, length), photos, or rows of a table.

    `classes` gives the labels' order; by default that of the model in service, else sorted. `length` and `hop` cut
    longer series into windows; `size` is the photos' height and width. `max_bytes` bounds all data in memory.
    """

    kind: Annotated[str, matching("(series|image|table)")]
    # More sources are a mistake of a generated file.
    sources: Annotated[tuple[Source, ...], Meta(min_length=1, max_length=64)]
    classes: tuple[str, ...] = ()
    input: Annotated[str, matching("[A-Za-z_][A-Za-z0-9_]{0,62}|")] = ""
    """Name of the model's input; readings, image or features by default."""
    length: Natural = 0
    hop: Natural = 0
    size: tuple[Annotated[int, Meta(ge=8, le=1024)], Annotated[int, Meta(ge=8, le=1024)]] = (64, 64)
    max_bytes: Bytes = Bytes(2**30)

    @property
    def input_name(self) -> str:
        return self.input or {"series": "readings", "image": "image", "table": "features"}[self.kind]


class CleanTable(_TrainingTable, frozen=True, kw_only=True):
    """Rules of cleaning.

    `missing`: values that are NaN or infinite are filled (interpolated in series; the training part's median in
    tables), or their sample is dropped. Samples with more than `max_missing` of missing values are always dropped. An
    outlier lies farther outside the 1st to 99th percentile of its channel than `outlier_limit` times their distance;
    `outliers` is the fate of a training or validation sample with an outlier. Held-out samples stay.
    """

    missing: Annotated[str, matching("(fill|drop)")] = "fill"
    max_missing: Annotated[float, Meta(ge=0, le=1)] = 0.2
    outliers: Annotated[str, matching("(drop|keep)")] = "drop"
    outlier_limit: Positive = 10.0
    duplicates: Annotated[str, matching("(drop|keep)")] = "drop"


class SplitTable(_TrainingTable, frozen=True, kw_only=True):
    """Shares of the groups that validate and test; all samples of a group stay together."""

    # Of each class: a share of all would leave rare classes to chance.
    validation: Share = 0.15
    test: Share = 0.2


class NetworkTable(_TrainingTable, frozen=True, kw_only=True):
    """The network: a ready network, or `file.py:function`, a function of the input's shape and the number of classes.

    `width` channels (or units) inside a ready network, `bottleneck` at its cut, where activations leave the edge; by
    default a sixth of the width, or half of it for tables.
    """

    name: str = ""
    width: Annotated[int, Meta(ge=1, le=4096)] = 24
    bottleneck: Annotated[int, Meta(ge=0, le=4096)] = 0


class FitTable(_TrainingTable, frozen=True, kw_only=True):
    """The loop: `batch` samples a step over all processes, at most `epochs` passes over the data.

    `patience` epochs without a lower validation loss end the training (0: never), and the best weights stay. `shift` is
    the largest random shift of a training sample (samples of a series, pixels of a photo). A checkpoint is written
    every `checkpoint_every` steps (0: once an epoch), and the last `keep` stay.
    """

    # For some hundred samples; early stopping ends longer runs.
    epochs: Annotated[int, Meta(ge=1, le=10**6)] = 60
    batch: Annotated[int, Meta(ge=1, le=10**6)] = 32
    optimiser: Annotated[str, matching("(adamw|adam|sgd)")] = "adamw"
    rate: Positive = 3e-3
    weight_decay: Annotated[float, Meta(ge=0)] = 1e-3
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.9
    schedule: Annotated[str, matching("(cosine|constant)")] = "cosine"
    warmup: Annotated[float, Meta(ge=0, le=0.5)] = 0.05
    label_smoothing: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    class_weights: Annotated[str, matching("(none|balanced)")] = "none"
    clip: Annotated[float, Meta(ge=0)] = 5.0
    """The largest norm of a step's gradients; 0 for no bound."""
    shift: Natural = 0
    mirror: bool = False
    patience: Natural = 15
    checkpoint_every: Natural = 0
    keep: Annotated[int, Meta(ge=1, le=1000)] = 3
    # Names of torch.
    device: Annotated[str, matching("(cpu|cuda)(:[0-9]{1,2})?")] = "cpu"
    threads: Annotated[int, Meta(ge=1, le=1024)] = 1


class PublishTable(_TrainingTable, frozen=True, kw_only=True):
    """The version: its default `cuts`, and when `alias` moves: always, never, or for a better version.

    Better: the lower end of the paired 95% interval of the difference in `metric` to the version in service, on the
    same held-out data, is above 0.
    """

    cuts: tuple[str, ...] = ()
    promote: Annotated[str, matching("(always|better|never)")] = "better"
    alias: str = "prod"
    metric: Annotated[str, matching("(accuracy|macro_f1)")] = "accuracy"


class SplitLearningTable(_TrainingTable, frozen=True, kw_only=True):
    """Training over the link: codecs of what crosses; labels `cross`, or `stay` with the last layer at the edge."""

    labels: Annotated[str, matching("(cross|stay)")] = "cross"
    activations: str = "raw"
    gradients: str = "raw"


class FederatedTable(_TrainingTable, frozen=True, kw_only=True):
    """Federated averaging: `rounds`, in each of which a node passes `epochs` times over its data.

    A round ends when all nodes have answered, or after `round_time` with the answers of at least `min_nodes`. The first
    waits for `nodes` nodes. `momentum` is the server's. `average` is of all weights, or of the head's alone: each node
    has a tail of its own then. `codec` encodes the nodes' changes of the weights.
    """

    rounds: Annotated[int, Meta(ge=1, le=10**6)] = 20
    epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    nodes: Annotated[int, Meta(ge=0, le=10**4)] = 0
    min_nodes: Annotated[int, Meta(ge=1, le=10**4)] = 2
    round_time: Seconds = Seconds(300)
    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    average: Annotated[str, matching("(all|head)")] = "all"
    codec: str = "raw"


class TrainConfig(_TrainingTable, frozen=True, kw_only=True):
    """The whole file. A run keeps its files in `folder`, relative to where the command runs, as the registry is."""

    name: Text
    folder: str = ""
    seed: Natural = 0
    data: DataTable
    clean: CleanTable = CleanTable()
    split: SplitTable = SplitTable()
    network: NetworkTable = NetworkTable()
    training: FitTable = FitTable()
    publish: PublishTable = PublishTable()
    split_learning: SplitLearningTable = SplitLearningTable()
    federated: FederatedTable = FederatedTable()

    @property
    def network_name(self) -> str:
        return self.network.name or READY_NETWORKS[self.data.kind]

    @property
    def run_folder(self) -> Path:
        """Where the run keeps its files."""
        return Path(self.folder or f".isthmus/training/{self.name}")

    @property
    def data_folder(self) -> Path:
        """Where the run keeps its prepared data."""
        return self.run_folder / "data"

    def network_code(self) -> bytes:
        """The file of a network of the user's own, for digests of a run; empty for a ready network.

        Raises:
            LearningError: the file cannot be read.
        """
        name = self.network_name
        if ".py:" not in name:
            return b""
        try:
            return Path(name.rpartition(":")[0]).read_bytes()
        except OSError as e:
            raise LearningError(f"network.name is {name}, and its file cannot be read: {e}", key="network.name") from e

    @property
    def cuts(self) -> tuple[str, ...]:
        """The bundle's cuts: the configuration's, else where a ready network's head ends; none is the narrowest."""
        ready = READY_CUTS.get(self.network_name)
        return self.publish.cuts or ((ready,) if ready else ())


@dataclass(frozen=True)
class TrainingPlace:
    """Where a network is trained: in `processes` of this machine, or its tail behind the URL `split_with`.

    Two processes of a `pipeline` have head and tail.
    """

    processes: int = 1
    pipeline: bool = False
    split_with: str = ""


ONE_PROCESS = TrainingPlace()
"""In this process."""


def read_config(path: Path, environment: dict[str, str]) -> TrainConfig:
    """Read the file; `${NAME}` and `${NAME:-default}` in it are filled from `environment`.

    Raises:
        LearningError: absent, not TOML, an unknown or missing key, or a value out of range; the message names the key.
    """
    try:
        with path.open("rb") as f:
            content = f.read(_MAX_BYTES + 1)
        text = content.decode()
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "it is no text"
        raise LearningError(f"{path} cannot be read: {why}", file=str(path)) from e
    if len(content) > _MAX_BYTES:
        raise LearningError(f"{path} has more than {_MAX_BYTES} bytes: it is no configuration", file=str(path))
    config = parse_config(text, environment, str(path))
    # Sources and networks lie beside the file, wherever the command runs.
    folder = path.absolute().parent
    sources = tuple(_anchored(source, folder) for source in config.data.sources)
    network = config.network
    if ".py:" in network.name:
        network = msgspec.structs.replace(network, name=str(folder / network.name))
    data = msgspec.structs.replace(config.data, sources=sources)
    return msgspec.structs.replace(config, folder=str(config.run_folder), network=network, data=data)


def parse_config(text: str, environment: dict[str, str], name: str = "train.toml") -> TrainConfig:
    """As `read_config`, from the file's text; paths are not changed."""
    try:
        config = msgspec.toml.decode(fill_variables(text, environment, name), type=TrainConfig, dec_hook=decode_unit)
    except ConfigurationMalformed as e:
        raise LearningError(e.message, hint=e.hint, **e.facts) from e
    except RecursionError as e:
        raise LearningError(f"{name} nests more deeply than a configuration does", file=name) from e
    except msgspec.DecodeError as e:  # of the syntax, or of a field, with its path
        raise LearningError(f"{name}: {e}", file=name, hint=_advice(str(e))) from e
    for holds, key, fault in _rules(config):
        if not holds:
            raise LearningError(f"{name}: {key} {fault}", file=name, key=key, hint=f"see {key} in {PAGE}")
    return config


def _rules(config: TrainConfig) -> Iterator[tuple[bool, str, str]]:
    """Rules between fields and in texts: whether each holds, its key, and the fault otherwise."""
    data, network = config.data, config.network_name
    yield is_model_name(config.name), "name", f"is {config.name!r}; use 1 to 63 of a-z, 0-9, '.', '_' and '-'"
    alias = config.publish.alias
    # Before hours of training.
    yield not alias or is_alias(alias), "publish.alias", f"is {alias[:80]!r}; an alias is a name, not only digits"
    yield len(set(data.classes)) == len(data.classes), "data.classes", "names a class twice"
    yield len(data.classes) != 1, "data.classes", "names one class; a classifier tells two or more apart"
    yield not data.hop or bool(data.length), "data.hop", "is of windows, and data.length does not give theirs"
    yield not data.length or data.kind == "series", "data.length", "is for series alone"
    # Of the network alone: `file.py` may lie in a folder with any name.
    is_ready = network in READY_NETWORKS.values()
    yield (
        is_ready or re.fullmatch(r".+\.py:[A-Za-z_]\w*", network) is not None,
        "network.name",
        f"is {network!r}; it is {', '.join(READY_NETWORKS.values())}, or file.py:function",
    )
    fitting = READY_NETWORKS[data.kind]
    yield (
        not is_ready or network == fitting,
        "network.name",
        f"is {network}; the ready network of {data.kind} is {fitting}",
    )
    yield not config.training.mirror or data.kind == "image", "training.mirror", "is for photos alone"
    yield not config.training.shift or data.kind != "table", "training.shift", "is not for tables"
    # With less than a tenth, rounding leaves small classes nothing to train on.
    yield config.split.validation + config.split.test < 0.9, "split", "leaves less than a tenth to train on"
    for i, source in enumerate(data.sources):
        if isinstance(source, MqttSource):
            yield from _topic_rules(f"data.sources[{i}]", source, data.kind)


def _topic_rules(table: str, source: MqttSource, kind: str) -> Iterator[tuple[bool, str, str]]:
    # Photos are files with names, and brokers bound the size of messages.
    names = _PLACEHOLDER.findall(source.topic)
    yield kind != "image", f"{table}.kind", "is mqtt; photos come from files"
    yield "label" in names, f"{table}.topic", "has no {label}, which says where the topic names the class"
    yield (
        set(names) <= {"label", "group"} and len(set(names)) == len(names),
        f"{table}.topic",
        "has other placeholders than one {label} and one {group}",
    )
    # A wildcard of several levels leaves the level of a placeholder open.
    yield "#" not in source.topic, f"{table}.topic", "has #; use + for levels of any text"
    yield source.time >= 0.1, f"{table}.time", "is less than 100ms"


def _anchored(source: Source, folder: Path) -> Source:
    """A source of files with its path relative to the configuration's folder."""
    # An address of a store is absolute.
    if isinstance(source, MqttSource) or "://" in source.path:
        return source
    return msgspec.structs.replace(source, path=str(folder / source.path))


def _advice(message: str) -> str:
    """Advice for msgspec's message."""
    page = f"see {PAGE}"
    if (unknown := _UNKNOWN_KEY.search(message)) is not None:
        near = difflib.get_close_matches(unknown[1], _all_keys(), 1)
        return f"remove the key {unknown[1]}" + (f", or is it {near[0]}?" if near else "") + f"; {page}"
    if (missing := _MISSING_KEY.search(message)) is not None:
        return f"add the key {missing[1]}; {page}"
    return page


def _all_keys() -> list[str]:
    tables = (
        TrainConfig,
        DataTable,
        FileSource,
        MqttSource,
        CleanTable,
        SplitTable,
        NetworkTable,
        FitTable,
        PublishTable,
        SplitLearningTable,
        FederatedTable,
    )
    return sorted({name for table in tables for name in table.__struct_fields__})
