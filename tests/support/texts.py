"""A small transformer of random weights that tells two kinds of real texts apart, with the usual attention bias."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any
from zlib import crc32

import numpy as np
from onnx import TensorProto, helper, numpy_helper
from sklearn import datasets

from isthmus.runtime.ort import ort
from support.bundles import Published, publish, save, value

TOKENS, WORDS, WIDTH = 24, 1024, 24
TRAINED = 300
"""The first texts in the fixed order fit the model; exits and bounds take the rest."""
BETWEEN = "22"
"""The cut between the layers."""
SMALLEST = float(np.finfo(np.float32).min)
"""What padding adds to the attention's scores, in transformers' models."""


@cache
def texts() -> tuple[dict[str, Any], Any]:
    """Ids and masks (rows, 24) of pieces of Python's reference (0) and of scikit-learn's data sets (1), shuffled.

    Words are hashed; pieces have 6 to 24 words, half of them 24, padded behind.
    """
    described = (getattr(datasets, f"load_{name}")().DESCR for name in ("iris", "wine", "breast_cancer", "diabetes"))
    sources = ["\n".join(topics.values()), "\n".join([*described, datasets.load_digits().DESCR])]
    rng = np.random.default_rng(0)
    rows: list[tuple[Any, int]] = []
    for label, source in enumerate(sources):
        words = [1 + crc32(word.encode()) % (WORDS - 1) for word in re.findall(r"[a-z]+", source.lower())]
        # Pieces of the shorter source overlap: both kinds are as many.
        starts, lengths = np.linspace(0, len(words) - TOKENS, 500).astype(int), rng.integers(6, 2 * TOKENS, 500)
        rows += [(words[a : a + min(TOKENS, n)], label) for a, n in zip(starts, lengths, strict=True)]
    order = rng.permutation(len(rows))
    ids, mask = np.zeros((len(rows), TOKENS), np.int64), np.zeros((len(rows), TOKENS), np.int64)
    for row, index in enumerate(order):
        words = rows[index][0]
        ids[row, : len(words)], mask[row, : len(words)] = words, 1
    return {"ids": ids, "mask": mask}, np.array([rows[index][1] for index in order], np.int64)


def text_model(path: Path, *, relative: bool = False) -> Path:
    """Two attention layers of random weights, the mean of the real tokens, and a ridge regression of the classes.

    With `relative` the attention bias depends on the distance of tokens too, as in T5 and MPNet.
    """
    rng = np.random.default_rng(1)
    weights = {"embedding": rng.standard_normal((WORDS, WIDTH)), "one": np.ones(()), "smallest": np.array(SMALLEST)}
    places = np.arange(TOKENS)
    # Of a single column where distances do not count.
    weights["distances"] = -0.1 * np.abs(places[:, None] - places) if relative else np.zeros((1, 1))
    nodes = [
        helper.make_node("Cast", ["mask"], ["real"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["one", "real"], ["padding"]),
        helper.make_node("Mul", ["padding", "smallest"], ["flat_bias"]),
        helper.make_node("Unsqueeze", ["flat_bias", "heads"], ["padding_bias"]),
        helper.make_node("Add", ["padding_bias", "distances"], ["attention_bias"]),
        helper.make_node("Gather", ["embedding", "ids"], ["h0"]),
    ]
    for layer in range(2):
        for name in ("q", "k", "v", "up", "down"):
            weights[f"{name}{layer}"] = rng.standard_normal((WIDTH, WIDTH)) / np.sqrt(WIDTH)
        steps = [
            ("MatMul", ["h", "q"], "queries"),
            ("MatMul", ["h", "k"], "keys"),
            ("MatMul", ["h", "v"], "values"),
            ("Transpose", ["keys"], "turned"),
            ("MatMul", ["queries", "turned"], "products"),
            ("Mul", ["products", "scale"], "scaled"),
            # The bias has an axis for heads, of which there is one.
            ("Unsqueeze", ["scaled", "second"], "by_head"),
            ("Add", ["by_head", "attention_bias"], "biased"),
            ("Softmax", ["biased"], "shares_by_head"),
            ("Squeeze", ["shares_by_head", "second"], "shares"),
            ("MatMul", ["shares", "values"], "attended"),
            ("Add", ["h", "attended"], "mixed"),
            ("MatMul", ["mixed", "up"], "wide"),
            ("Relu", ["wide"], "active"),
            ("MatMul", ["active", "down"], "narrow"),
            ("Add", ["mixed", "narrow"], "sum"),
        ]
        shared = ("scale", "attention_bias", "second")
        for kind, inputs, output in steps:
            options = {"perm": [0, 2, 1]} if kind == "Transpose" else {}
            names = [name if name in shared else f"{name}{layer}" for name in inputs]
            nodes.append(helper.make_node(kind, names, [f"{output}{layer}"], **options))
        nodes.append(helper.make_node("LayerNormalization", [f"sum{layer}", "ones", "zeros"], [f"h{layer + 1}"]))
    weights |= {"scale": np.array(WIDTH**-0.5), "ones": np.ones(WIDTH), "zeros": np.zeros(WIDTH)}
    nodes += [
        helper.make_node("Unsqueeze", ["real", "last"], ["real_rows"]),
        helper.make_node("Mul", ["h2", "real_rows"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "second"], ["total"], keepdims=0),
        helper.make_node("ReduceSum", ["real", "second"], ["count"], keepdims=1),
        helper.make_node("Div", ["total", "count"], ["mean"]),
    ]
    constants = [numpy_helper.from_array(array.astype("f4"), name) for name, array in weights.items()]
    axes = {"second": [1], "last": [2], "heads": [1, 2]}
    constants += [numpy_helper.from_array(np.array(numbers, np.int64), name) for name, numbers in axes.items()]
    inputs = [value(name, "batch", TOKENS, dtype=TensorProto.INT64) for name in ("ids", "mask")]
    features = save(path.with_name("means.onnx"), nodes, inputs, [value("mean", "batch", WIDTH)], constants)
    arrays, classes = texts()
    session = ort.InferenceSession(str(features), providers=["CPUExecutionProvider"])
    x = session.run(None, {name: array[:TRAINED] for name, array in arrays.items()})[0].astype(np.float64)
    middle = x.mean(0)
    matrix = np.linalg.solve(
        (x - middle).T @ (x - middle) + np.eye(WIDTH), (x - middle).T @ np.eye(2)[classes[:TRAINED]]
    )
    parts = {"w": 10 * matrix, "b": -10 * middle @ matrix}
    head = [numpy_helper.from_array(part.astype("f4"), name) for name, part in parts.items()]
    nodes.append(helper.make_node("Gemm", ["mean", "w", "b"], ["logits"]))
    return save(path, nodes, inputs, [value("logits", "batch", 2)], [*constants, *head])


def publish_texts(folder: Path, **options: bool) -> Published:
    """The classifier of texts, parted between its layers."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: array[:1] for name, array in texts()[0].items()}
    post = {"kind": "classify", "output": "logits", "softmax": True, "top_k": 2}
    model, labels = text_model(folder / "texts.onnx", **options), ["python", "data"]
    return publish(folder, model, arrays, partitions=[[BETWEEN]], postprocess=post, labels=labels)


def write_texts(folder: Path, start: int, stop: int, *, unpadded: bool = False) -> Path:
    """Some texts with labels, as a file in `folder`; those of 24 words are first: runs that show no padding.

    With `unpadded` there are no others.
    """
    arrays, classes = texts()
    rows = np.arange(start, stop)
    is_full = arrays["mask"][rows].all(axis=1)
    rows = rows[is_full] if unpadded else rows[np.argsort(~is_full, kind="stable")]
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "texts.npz", labels=classes[rows], **{name: array[rows] for name, array in arrays.items()})
    return folder
