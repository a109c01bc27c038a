"""Decoders by import: the scores of the ONNX graph and of its segments are those of transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers

from isthmus.errors import CutError, ModelError
from isthmus_tools.graph.decoder import bundler
from isthmus_tools.graph.decoder.gguf_file import read_gguf
from isthmus_tools.graph.decoder.transformers_folder import read_folder
from support.decoders import generate_scores, save_decoder, tiny_config, write_gguf

FAMILIES = ("llama", "qwen2", "gpt2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_decoder(tmp_path_factory.mktemp(family), tiny_config(family)) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_scores_are_those_of_transformers(family: str, folders: dict[str, Path], tmp_path: Path) -> None:
    decoder = read_folder(folders[family])
    bundle, files = bundler.build_decoder(decoder, "tiny", tmp_path / "out", cuts=["1", "1/2"])
    ids = np.random.default_rng(1).integers(0, decoder.config.vocabulary, (1, 12))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folders[family])
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(ids)).logits.numpy()
    for cuts in ((), ("layer_1",), ("layer_1", "layer_2")):
        found = generate_scores(bundle, files, cuts, [ids[:, :7], ids[:, 7:8], ids[:, 8:]])
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize("kind", ["llama3", "linear"])
def test_scaled_rotary_embeddings_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10_000.0, **SCALED}
    folder = save_decoder(tmp_path / "scaled", config)
    decoder = read_folder(folder)
    assert max(decoder.config.rope_factors) == 8.0
    ids = np.random.default_rng(1).integers(0, decoder.config.vocabulary, (1, 60))
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = model.eval()(torch.from_numpy(ids)).logits.numpy()
    bundle, files = bundler.build_decoder(decoder, "tiny", tmp_path / "out", cuts=["1"])
    found = generate_scores(bundle, files, ("layer_1",), [ids])
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    # A GGUF file holds the factors themselves.
    of_file = read_gguf(write_gguf(folder, tmp_path / "scaled.gguf"))
    np.testing.assert_allclose(of_file.config.rope_factors, decoder.config.rope_factors, rtol=1e-6)


# Relative to the largest score, for layers of random weights: rounding of weights, and of activations at int8.
ERRORS = {"float16": 3e-3, "int8": 6e-2, "int4": 0.5}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", ["float16", "int8", "int4", "int4/float16"])
def test_weights_of_less_bits_compute_nearly_the_same_and_split_as_whole(
    weights: str, family: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    decoder = read_folder(folders[family])
    ids = np.random.default_rng(1).integers(0, decoder.config.vocabulary, (1, 12))
    chunks = [ids[:, :7], ids[:, 7:8], ids[:, 8:]]
    exact, files = bundler.build_decoder(decoder, "exact", tmp_path / "exact", cuts=["1"])
    expected = generate_scores(exact, files, (), chunks)
    bundle, files = bundler.build_decoder(decoder, "tiny", tmp_path / "out", cuts=["1", "2"], weights=weights)
    whole = generate_scores(bundle, files, (), chunks)
    error = np.abs(whole - expected).max() / np.abs(expected).max()
    assert 1e-6 < error < ERRORS[weights.partition("/")[0]]
    assert bundle.weights.blob.size < 0.6 * exact.weights.blob.size
    # A layer has the precision of the first partition's segment in every other partition too.
    for cuts in (("layer_1",), ("layer_2",)):
        np.testing.assert_allclose(generate_scores(bundle, files, cuts, chunks), whole, atol=1e-4 * np.abs(whole).max())


def test_a_tied_matrix_is_stored_once_where_head_and_tail_have_one_precision(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    decoder = read_folder(folders["llama"])
    stored = {}
    for weights in ("float32", "int8", "int4/int8", "int4/float16"):
        bundle, _ = bundler.build_decoder(decoder, "tiny", tmp_path / weights.replace("/", "-"), weights=weights)
        stored[weights] = [t.name for t in bundle.weights.tensors if t.name.startswith("token_embd.weight")]
        head, tail = bundle.partition()
        # The head's own are a prefix of the file.
        assert [start for start, _ in head.weights] == [0]
        assert bundle.weights.tensors[tail.weights[-1][1] - 1] == bundle.weights.tensors[-1]
    assert stored["float32"] == ["token_embd.weight"]
    assert len(stored["int8"]) == len(stored["int4/int8"]) == 2  # integers and scales
    assert len(stored["int4/float16"]) == 3


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ("int3", "'int3' is no precision"),
        ("int4/int8/int8", "for 3 segments; the first partition has 2"),
        ("", "no precision"),
    ],
)
def test_precisions_that_fit_no_partition_are_refused(
    weights: str, reason: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        bundler.build_decoder(read_folder(folders["llama"]), "tiny", tmp_path / "out", cuts=["1"], weights=weights)


def test_a_gguf_file_is_the_model_of_its_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    of_folder, of_file = read_folder(folders["llama"]), read_gguf(write_gguf(folders["llama"], tmp_path / "tiny.gguf"))
    assert of_file.eos == (0,)
    assert replace(of_file.config, epsilon=of_folder.config.epsilon) == of_folder.config
    ids = np.random.default_rng(1).integers(0, of_folder.config.vocabulary, (1, 9))
    scores = [
        generate_scores(*bundler.build_decoder(decoder, "tiny", tmp_path / name, cuts=["1"]), ("layer_1",), [ids])
        for name, decoder in (("folder", of_folder), ("file", of_file))
    ]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5 * np.abs(scores[0]).max())
    text = "the dog sat <|end|> on 12 logs"
    both = [tokenizers.Tokenizer.from_str(json.dumps(each.tokenizer)).encode(text) for each in (of_folder, of_file)]
    assert both[0].ids == both[1].ids


@pytest.mark.parametrize("cut", ["0", "3", "x", "2/1", "1/1"])
def test_a_cut_that_is_no_layer_or_out_of_order_is_refused(cut: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CutError):
        bundler.build_decoder(read_folder(folders["llama"]), "tiny", tmp_path / "out", cuts=[cut])


def test_files_that_hold_no_decoder(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path / "other")
    document = json.loads((config := tmp_path / "other" / "config.json").read_text())
    for change, reason in (
        ({"architectures": ["BertModel"]}, "taken are"),
        ({"num_attention_heads": 0}, "heads as 0"),
        ({"num_hidden_layers": None}, "does not state num_hidden_layers"),
        ({"hidden_act": "relu"}, "activation"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rotary embeddings by yarn"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8}}, "without a valid 'low_freq_factor'"),
        ({"use_sliding_window": True}, "sliding window"),
    ):
        config.write_text(json.dumps({**document, **change}))
        with pytest.raises(ModelError, match=reason):
            read_folder(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").unlink()
    config.write_text(json.dumps(document))
    with pytest.raises(ModelError, match="cannot be read"):
        read_folder(tmp_path / "other")
