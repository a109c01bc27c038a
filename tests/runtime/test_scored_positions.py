"""Scores of a step's last positions alone: the graph computes those that are sampled, and all where none is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import pytest
from msgspec import UNSET, structs

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.sampling import Sampling
from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Deadline
from isthmus.processing.sampling import sampled_tensors
from isthmus.registry import open_registry
from isthmus.runtime.ort_runner import OrtRunner
from isthmus.runtime.session_store import SessionStore
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Step
from isthmus_tools.graph.decoder.bundler import add_layer_cuts, build_decoder
from isthmus_tools.graph.decoder.transformers_folder import read_folder
from support.decoders import VOCABULARY, generate_scores
from support.patience import LONG_S
from support.published_decoders import PublishedDecoder
from support.published_decoders import store as store
from support.published_decoders import tiny_decoder as tiny_decoder

IDS = np.random.default_rng(0).integers(1, VOCABULARY, (1, 9))


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions with scores of each run."""
    run, counts = OrtRunner.run_step, list[int]()

    def counted(*given: Any) -> Any:
        outputs = run(*given)
        counts.append(outputs["logits"].shape[1])
        return outputs

    monkeypatch.setattr(OrtRunner, "run_step", counted)
    return counts


def stepped(store: SessionStore, decoder: PublishedDecoder, name: str, sampling: Sampling | None) -> dict[str, Any]:
    step, arrays = Step(name, 0, sampling), {"input_ids": IDS}
    return store.step(decoder.model.digest, "..", arrays, step, Deadline.after(LONG_S)).outputs


@pytest.mark.parametrize(("last", "runs"), [(1, [1]), (3, [3]), (9, [9]), (20, [9]), (0, [1])])
def test_only_the_sampled_positions_of_a_chunk_are_scored_and_give_the_same(
    last: int, runs: list[int], scored: list[int], store: SessionStore, tiny_decoder: PublishedDecoder
) -> None:
    sampling, count = Sampling(temperature=1, seed=4, last=last, logprobs=2), min(last, 9)
    everything = stepped(store, tiny_decoder, "all", None)["logits"]
    assert everything.shape == (1, 9, VOCABULARY)
    got = stepped(store, tiny_decoder, "last", sampling)
    assert scored == [9, *runs]
    assert_same(got, sampled_tensors(everything[0, 9 - count :], sampling, 10 - count, ()))


def test_each_run_of_a_long_step_scores_its_share_of_the_sampled_positions(
    scored: list[int], store: SessionStore, tiny_decoder: PublishedDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(temperature=1, seed=4, last=3, logprobs=2)
    whole = stepped(store, tiny_decoder, "whole", sampling)
    monkeypatch.setattr("isthmus.runtime.session_store.MAX_RUN_TOKENS", 4)
    assert_same(stepped(store, tiny_decoder, "pieces", sampling), whole)
    assert scored == [3, 1, 2, 1]


def test_a_bundle_without_the_input_keeps_its_document_and_runs_and_is_cut(
    scored: list[int], store: SessionStore, tiny_decoder: PublishedDecoder, tmp_path: Path
) -> None:
    older = published_without_input(tiny_decoder, tmp_path / "older")
    assert b"scored" not in msgspec.json.encode(older.model.bundle.state)
    of_older, sampling = older.store(tmp_path / "cache"), Sampling(temperature=1, seed=4, last=3)
    assert_same(stepped(of_older, older, "s", sampling), stepped(store, tiny_decoder, "s", sampling))
    assert scored == [9, 3]
    of_older.store.close()


def published_without_input(decoder: PublishedDecoder, root: Path) -> PublishedDecoder:
    """The decoder as earlier releases imported it: cut again, from a graph that scores every position."""
    bundle, files = build_decoder(read_folder(decoder.folder), "tiny", root, cuts=["1"])
    assert bundle.state is not None
    model = ir.load(files[bundle.segment(WHOLE).graph.digest])
    given = next(value for value in model.graph.inputs if value.name == "scored")
    model.graph.inputs.remove(given)
    given.const_value = ir.tensor(np.array(2**31), name="scored")
    model.graph.initializers.add(given)
    data = ir.serde.serialize_model(model).SerializeToString()
    (path := root / "older.onnx").write_bytes(data)
    inputs = tuple(spec for spec in bundle.inputs if spec.name != "scored")
    outputs = tuple(
        structs.replace(spec, shape=("batch", "tokens", VOCABULARY)) if spec.name == "logits" else spec
        for spec in bundle.outputs
    )
    whole = structs.replace(
        bundle.segment(WHOLE), graph=Blob(digest_of(data), len(data)), inputs=inputs, outputs=outputs
    )
    older = structs.replace(
        bundle,
        inputs=inputs,
        outputs=outputs,
        segment_list=(whole,),
        state=structs.replace(bundle.state, scored=UNSET),
    )
    cut, new = add_layer_cuts(older, path, ["2"], root)
    everything = {**files, whole.graph.digest: path, **new}
    found = generate_scores(cut, everything, ("layer_2",), [IDS])
    np.testing.assert_allclose(found, generate_scores(cut, everything, (), [IDS]), rtol=1e-4, atol=1e-4)
    (root / "registry").mkdir()
    registry = open_registry(SegmentSettings(registry=str(root / "registry")))
    registry.publish(cut, everything, alias="prod")
    return PublishedDecoder(decoder.folder, root / "registry", registry.resolve("tiny"))


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name].shape == array.shape
        # The kernel of one row adds up in another order than that of many.
        np.testing.assert_allclose(got[name], array, atol=1e-4)
