"""Calibration of language models: perplexity and next tokens of a text, published and shown."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from isthmus.artifacts.choice import TOKEN_CODECS
from isthmus.artifacts.fidelity import from_json, read_fidelity, to_json
from isthmus.errors import CalibrationError
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.calibration import texts
from isthmus_tools.zoo.calibration import PROSE
from support.bundles import Published
from support.bundles import photos as photos
from support.cli import document, isthmus, refusal
from support.decoders import generate_scores
from support.published_decoders import PublishedDecoder
from support.published_decoders import tiny_decoder as tiny_decoder


@pytest.fixture(scope="module")
def registry(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts") / "registry"
    shutil.copytree(tiny_decoder.registry, folder)
    return folder


@pytest.fixture(scope="module")
def calibrated(registry: Path) -> Any:
    cuts = ("--cut", "layer_1", "--cut", "layer_2")
    return document(isthmus("calibrate", "tiny", *cuts, "--inputs", 200, "--registry", registry, "--json"))


def test_every_codec_of_tokens_is_measured_at_every_cut(calibrated: Any, registry: Path) -> None:
    entries = {(e["cut"], e["codec"]): e for e in calibrated["entries"]}
    assert set(entries) == {(cut, codec) for cut in ("layer_1", "layer_2") for codec in TOKEN_CODECS}
    # Windows of half of the text; the first token of each is not predicted.
    assert {name: calibrated["inputs"][name] for name in ("calibrated", "held_out", "source")} == {
        "calibrated": 100,
        "held_out": 99,
        "source": "prose.txt",
    }
    assert (calibrated["measure"]["kind"], calibrated["measure"]["output"]) == ("top1", "logits")
    assert set(calibrated["tables"]) == {"layer_1", "layer_2"}
    for cut in ("layer_1", "layer_2"):
        raw, coded = entries[cut, "raw"], entries[cut, "int8-token/1"]
        assert (raw["bytes"], entries[cut, "half/1"]["bytes"]) == (64 * 4, 64 * 2)
        assert raw["perplexity"] == entries[cut, "lossless/3"]["perplexity"] > 1
        # A step, six outliers, and a byte for each channel.
        assert coded["bytes"] <= 64 + 4 + 6 * 6
        assert 0 < abs(coded["perplexity"] / raw["perplexity"] - 1) < 0.05
        assert 0 < coded["error"] < 0.05
        finest = entries[cut, "transform/4"]  # the last of its qualities
        assert finest["quality"] == 1
        assert finest["bytes"] < raw["bytes"] / 2
        assert 0 < finest["error"] < 0.1
        assert coded["low"] <= coded["measured"] <= coded["high"]
    published = open_registry(RegistrySettings(registry=str(registry)))
    bundle = published.resolve("tiny").bundle
    fidelity = read_fidelity(bundle, published.blob)
    assert fidelity is not None
    assert from_json(to_json(fidelity)) == fidelity
    assert json.loads(to_json(fidelity))["entries"] == calibrated["entries"]


def test_the_perplexity_is_that_of_the_uncut_model(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(1, 300, (1, 90))
    store = tiny_decoder.store(tmp_path)
    bundle = tiny_decoder.model.bundle
    spec = texts.TextSpec(ids[0].tolist(), "noise", 0.9, ["layer_1"])
    fidelity = texts.score_text(tiny_decoder.model.digest, bundle, store, spec)
    store.store.close()
    blobs = tiny_decoder.folder.parent / "bundle"
    files = {s.graph.digest: blobs / f"{s.graph.digest[7:]}.onnx" for s in bundle.segment_list}
    files[bundle.weights.blob.digest] = next(blobs.glob("weights*"))
    scores = generate_scores(bundle, files, (), [ids])[0].astype(float)
    chances = scores[:-1] - np.log(np.exp(scores[:-1]).sum(axis=-1, keepdims=True))
    expected = math.exp(-chances[np.arange(89), ids[0, 1:]].mean())
    assert fidelity.entries[0].perplexity == pytest.approx(expected, rel=1e-4)


def test_the_codec_command_shows_perplexity_and_chooses(calibrated: Any, registry: Path) -> None:
    shown = isthmus("codec", "tiny", "--all", "--registry", registry)
    assert shown.exit_code == 0, shown.output
    assert "99 tokens of a text" in shown.stdout
    assert "perplexity" in shown.stdout
    assert "(+0.00%)" in shown.stdout
    chosen = document(isthmus("codec", "tiny", "--bytes", "130B", "--registry", registry, "--json"))["chosen"]
    assert {cut: entry["codec"] for cut, entry in chosen.items()} in (
        {"layer_1": a, "layer_2": b} for a in ("half/1", "int8-token/1") for b in ("half/1", "int8-token/1")
    )


def test_a_coded_session_keeps_keys_of_decoded_states(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    # Chunks of one token or of all: a codec's session must not read the raw one's state.
    ids = np.random.default_rng(1).integers(1, 300, 70).tolist()
    found = []
    for chunk in (1, 256):
        store = tiny_decoder.store(tmp_path / str(chunk))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(texts, "CHUNK", chunk)
            spec = texts.TextSpec(ids, "noise", 0.9, ["layer_2"])
            fidelity = texts.score_text(tiny_decoder.model.digest, tiny_decoder.model.bundle, store, spec)
        found.append([entry.perplexity for entry in fidelity.entries])
        store.store.close()
    assert found[0] == pytest.approx(found[1], rel=1e-4)
    assert len(set(found[0])) > 2


def test_texts_and_models_that_do_not_fit(registry: Path, photos: Published, tmp_path: Path) -> None:
    (short := tmp_path / "short.txt").write_text("the cat sat")
    (latin := tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 99)
    (long := tmp_path / "long.txt").write_bytes(b"a" * (2**20 + 1))
    (tmp_path / "one.npy").write_bytes(b"")
    for options, reason in (
        (("--text", short), "tokens; 64 are the least"),
        (("--text", latin), "no text in UTF-8"),
        (("--text", long), "more than 1048576 bytes"),
        (("--text", tmp_path / "none.txt"), "no text in UTF-8"),
        (("--data", tmp_path), "is a language model"),
    ):
        assert reason in refusal(isthmus("calibrate", "tiny", *options, "--registry", registry, "--json"))["error"]
    for options in ((), ("--text", PROSE)):
        refused = isthmus("calibrate", "photos", *options, "--registry", photos.folder, "--json")
        assert "no language model" in refusal(refused)["error"]
    with pytest.raises(CalibrationError, match="no language model"):
        texts.score_text("", photos.bundle, None, texts.TextSpec([1] * 99, "x", 1, []))  # type: ignore[arg-type]
