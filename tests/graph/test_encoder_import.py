"""Sentence encoders from folders: vectors compared with transformers', whole, padded and cut."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.arrays import Array
from isthmus.artifacts.bundle import Bundle
from isthmus.errors import CutError, ModelError
from isthmus.processing.sentences import padded
from isthmus.runtime.ort_runner import UnpublishedRunner
from isthmus_tools.graph.encoder.bundler import add_encoder_cuts, build_encoder
from isthmus_tools.graph.encoder.folder import EncoderSource, read_encoder
from isthmus_tools.graph.exporting import ModelInputs
from isthmus_tools.usecases.cut import list_cuts
from isthmus_tools.usecases.language_sources import sentence_encoder
from support.encoders import TEXTS, expected_vectors, save_encoder, token_rows, write_json


def source_of(folder: Path) -> EncoderSource:
    source = read_encoder(str(folder))
    assert source is not None
    return source


def vectors(bundle: Bundle, files: Mapping[str, Path], cuts: Sequence[str], rows: Sequence[Sequence[int]]) -> Array:
    """The vectors of rows as one batch, by the segments of a partition."""
    assert bundle.embedding is not None
    values = padded(rows, bundle.embedding)
    for segment in bundle.partition(cuts):
        graph = files[segment.graph.digest]
        runner = UnpublishedRunner(graph.read_bytes(), segment, graph.parent, threads=1, repack=True)
        values |= runner.run({spec.name: values[spec.name] for spec in segment.inputs})
    return values[bundle.embedding.vector]


@pytest.mark.parametrize(
    ("family", "pooling", "normalize"), [("bert", "mean", True), ("bert", "max", True), ("roberta", "cls", False)]
)
def test_vectors_are_those_of_transformers(family: str, pooling: str, normalize: bool, tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "encoder", family, pooling, normalize=normalize)
    bundle, files = build_encoder(source_of(folder), "tiny", tmp_path / "bundle", cuts=["1/2"])
    rows = token_rows(folder, TEXTS)
    expected = expected_vectors(folder, rows, pooling, normalize=normalize)
    for cuts in ([], ["layer_1", "layer_2"]):
        actual = vectors(bundle, files, cuts, rows)
        np.testing.assert_allclose(actual, expected, atol=2e-6 * np.abs(expected).max())
        # Each row alone gives what it gives beside longer ones.
        alone = np.concatenate([vectors(bundle, files, cuts, [row]) for row in rows])
        np.testing.assert_allclose(alone, actual, atol=1e-6 * np.abs(expected).max())


def test_a_cut_between_layers_carries_the_tokens_and_the_mask(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "encoder")
    bundle, files = build_encoder(source_of(folder), "tiny", tmp_path / "bundle")
    assert bundle.default_cuts == ("layer_1",)
    tensors = {t.name: (t.dtype, t.shape) for t in bundle.cuts["layer_1"].tensors}
    rows = ("batch", "tokens")
    assert tensors == {"layer_1": ("float32", (*rows, 32)), "attention_mask": ("int64", rows)}
    assert bundle.blobs() == files.keys()
    whole = files[bundle.segment("..").graph.digest]
    extended, new = add_encoder_cuts(bundle, whole, ["layer_2"], tmp_path / "more", default=True)
    assert extended.default_cuts == ("layer_2",)
    assert set(extended.segments) == {"..", "..layer_1", "layer_1..", "..layer_2", "layer_2.."}
    assert len(new) == 2
    for text in ("0", "3", "x", "1/4"):
        with pytest.raises(CutError, match="its cuts are 1 to 2"):
            add_encoder_cuts(bundle, whole, [text], tmp_path / "more")


def test_the_bundle_declares_how_texts_become_vectors(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "encoder", "roberta", "cls", normalize=False)
    bundle, _ = build_encoder(source_of(folder), "tiny", tmp_path / "bundle")
    embedding = bundle.embedding
    assert embedding is not None
    assert (embedding.pooling, embedding.normalized, embedding.max_tokens, embedding.pad) == ("cls", False, 24, 0)
    (folder / "sentence_bert_config.json").unlink()
    # RoBERTa's positions begin behind that of padding.
    assert source_of(folder).max_tokens == 39


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        (
            "modules.json",
            lambda d: [*d[:2], {**d[2], "type": "sentence_transformers.models.Dense"}],
            "by Transformer, P",
        ),
        ("modules.json", lambda d: d[:1], "by Transformer;"),
        ("modules.json", lambda d: {}, "cannot be read"),
        ("1_Pooling/config.json", lambda d: {**d, "pooling_mode_max_tokens": True}, "pools tokens by"),
        ("1_Pooling/config.json", lambda d: {"pooling_mode_weightedmean_tokens": True}, "pools tokens by"),
        ("config.json", lambda d: {**d, "architectures": ["MPNetModel"]}, "holds a MPNetModel"),
        ("config.json", lambda d: {**d, "architectures": []}, "holds a none"),
        ("config.json", lambda d: {**d, "hidden_act": "silu"}, "silu and absolute"),
        ("config.json", lambda d: {**d, "position_embedding_type": "relative_key"}, "relative_key positions"),
        ("config.json", lambda d: {**d, "num_attention_heads": 5}, "dimensions that no encoder has"),
        ("config.json", lambda d: {**d, "num_hidden_layers": 2**40}, "cannot be read"),
    ],
)
def test_folders_of_other_encoders_are_refused(file: str, change: Any, reason: str, encoder: Path) -> None:
    document = json.loads((encoder / file).read_text())
    write_json(encoder / file, change(document))
    with pytest.raises(ModelError, match=reason):
        read_encoder(str(encoder))


def test_minilms_vectors_are_those_of_transformers(tmp_path: Path) -> None:
    source = sentence_encoder("all-minilm-l6-v2")
    assert source is not None
    bundle, files = build_encoder(source, "minilm", tmp_path / "bundle", cuts=["2/4"])
    assert bundle.embedding is not None
    assert (bundle.embedding.max_tokens, bundle.source["license"]) == (256, "Apache-2.0")
    rows = token_rows(source.folder, [*TEXTS, "Isthmus: ein schmales Land zwischen zwei Meeren, naïve 東京. " * 9])
    expected = expected_vectors(source.folder, rows)
    for cuts in ([], ["layer_2", "layer_4"]):
        np.testing.assert_allclose(vectors(bundle, files, cuts, rows), expected, atol=1e-6)


def test_cuts_of_a_folder_are_listed(encoder: Path) -> None:
    inputs = ModelInputs(shapes={"input_ids": (1, 8), "attention_mask": (1, 8)})
    cuts = list_cuts(str(encoder), inputs).cuts
    between = {t.name for c in cuts for t in c.tensors if len(c.tensors) == 2}
    assert {"layer_1", "layer_2", "attention_mask"} <= between


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return save_encoder(tmp_path / "encoder")


def test_what_is_missing_in_a_folder_is_told(encoder: Path, tmp_path: Path) -> None:
    source = source_of(encoder)
    (encoder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read"):
        read_encoder(str(encoder))
    (encoder / "model.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
        build_encoder(source, "tiny", tmp_path / "bundle")
    (encoder / "modules.json").unlink()
    assert read_encoder(str(encoder)) is None
