"""Decoders by import: the scores of the ONNX graph and of its segments are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from isthmus_tools.graph.decoder import bundler
from isthmus_tools.graph.decoder.transformers_folder import read_folder
from support.decoders import generate_scores, save_decoder, tiny_config

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
