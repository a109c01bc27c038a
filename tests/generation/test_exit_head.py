"""Exit branches: fitted, published, drafted by, with the tokens of a generation without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from isthmus.artifacts import bundle as bundle_module
from isthmus.artifacts.bundle import EXIT_PROBABILITIES, EXIT_TOKENS
from isthmus.artifacts.sampling import Sampling
from isthmus.artifacts.segment_id import SegmentId
from isthmus.context import Context
from isthmus.errors import CalibrationError, RegistryError
from isthmus.generation import AdaptiveProposer, Generated, GenerationRequest, Generator
from isthmus.generation.exit_head import ExitHead
from isthmus.pipeline import Hop, LocalHop, LoopbackHop, execute, local_route, plan_route
from isthmus.pipeline.hop import HopReply
from isthmus.registry import open_registry
from isthmus.runtime.session_store import SessionStore
from isthmus.settings import RegistrySettings
from isthmus.wire.frame import Frame
from isthmus_tools.calibration.exit_fit import fit, normalised, offered_tokens
from isthmus_tools.usecases.draft import DraftRequest, DraftResult, draft
from support.cli import document, isthmus
from support.hop_servers import context
from support.published_decoders import PublishedDecoder

TEXT = "\n\n".join(f"the cat sat on the mat, and the dog on the log {i} times " * 3 for i in range(40))
PROMPT = [17, 230, 41, 5, 199, 88, 12]


@pytest.fixture(scope="module")
def fitted(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> DraftResult:
    settings = RegistrySettings(
        registry=str(tiny_decoder.registry), cache_dir=str(tmp_path_factory.mktemp("draft-cache"))
    )
    request = DraftRequest(
        model="tiny:1", text=TEXT, registry=settings, cuts=["layer_2", "layer_1"], tokens=600, threads=1, alias="drafts"
    )
    return draft(request)


@pytest.fixture(scope="module")
def with_exits(fitted: DraftResult, tiny_decoder: PublishedDecoder) -> PublishedDecoder:
    resolved = open_registry(RegistrySettings(registry=str(tiny_decoder.registry))).resolve("tiny:drafts")
    return PublishedDecoder(tiny_decoder.folder, tiny_decoder.registry, resolved)


@pytest.fixture
def unsure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights are sure of no token."""
    monkeypatch.setattr("isthmus.generation.exit_head._CLASSES", (0.0, 0.006, 0.007, 0.008))


class Counting(LocalHop):
    """Counts the positions that the segment before the cut runs."""

    positions = 0

    def call(self, frame: Frame, context: Context) -> HopReply:
        if frame.segment.startswith(".."):
            self.positions += frame.tensors["input_ids"].shape[1]
        return super().call(frame, context)


def test_branches_are_published_with_their_agreement(fitted: DraftResult, with_exits: PublishedDecoder) -> None:
    bundle = with_exits.model.bundle
    assert {each.cut for each in bundle.exits} == {"layer_1", "layer_2"}
    assert {each.cut: each.agreement for each in fitted.exits} == {each.cut: each.agreement for each in bundle.exits}
    # One of 300 tokens is right by chance.
    assert min(each.agreement for each in fitted.exits) > 0.1
    assert {segment.id for segment in bundle.segment_list} >= {"..", "..layer_1", "layer_1.."}
    assert not any(segment.id == "layer_1..layer_1" for segment in bundle.segment_list)


def test_the_command_says_how_often_a_branch_is_right(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--cut", "layer_1", "--text", tmp_path / "text.txt", "--tokens", 400, "--alias", "by-command"]
    result = document(isthmus("draft", "tiny:1", *options, "--registry", tiny_decoder.registry, "--json"))
    assert [each["cut"] for each in result["exits"]] == ["layer_1"]
    assert 0.1 < result["exits"][0]["agreement"] <= 1
    assert result["alias"] == "by-command"


def test_an_exit_that_is_no_branch_of_a_cut_is_refused(with_exits: PublishedDecoder) -> None:
    bundle = with_exits.model.bundle
    assert bundle_module.from_json(bundle_module.to_json(bundle)) == bundle
    wrong = structs.replace(bundle.exits[0], segment=structs.replace(bundle.exits[0].segment, id=SegmentId("layer_1")))
    for exits, reason in (((wrong,), "no branch"), (bundle.exits[:1] * 2, "two exits of one cut")):
        with pytest.raises(RegistryError, match=reason):
            bundle_module.from_json(bundle_module.to_json(structs.replace(bundle, exits=exits)))
    assert bundle.exits[0].segment.graph.digest in bundle.blobs()


def test_a_branch_computes_its_map_and_the_likeliest_of_its_tokens(
    with_exits: PublishedDecoder, store: SessionStore
) -> None:
    model = with_exits.model
    early = model.bundle.exit_at("layer_1")
    assert early is not None
    stream = np.random.default_rng(0).normal(0, 5, (1, 3, 64)).astype(np.float32)
    route = local_route(model.digest, model.bundle, (early.segment,), LoopbackHop(LocalHop(store)))
    tensors = execute(route, {"layer_1": stream}, context()).tensors
    assert tensors[EXIT_TOKENS].shape == tensors[EXIT_PROBABILITIES].shape == (1, 3)
    assert ((tensors[EXIT_PROBABILITIES] > 1 / 300) & (tensors[EXIT_PROBABILITIES] <= 1)).all()
    again = execute(route, {"layer_1": 10 * stream}, context()).tensors
    assert (again[EXIT_TOKENS] == tensors[EXIT_TOKENS]).all()  # the scale of a residual stream says nothing


@pytest.mark.parametrize("cuts", [("layer_1",), ("layer_2",), ("layer_1", "layer_2")], ids=len)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, seed=3, repetition_penalty=1.2)])
def test_exits_change_no_token_and_the_head_runs_once(
    cuts: tuple[str, ...], sampling: Sampling, with_exits: PublishedDecoder, store: SessionStore, unsure: None
) -> None:
    model, request = with_exits.model, GenerationRequest(prompt=PROMPT, max_tokens=60, sampling=sampling)

    def generated(proposer: AdaptiveProposer | None) -> tuple[list[int], Generated, Counting]:
        head, done = Counting(store), Generated()
        hops: tuple[Hop, ...] = (head, LoopbackHop(LocalHop(store)))
        generator = Generator(plan_route(model.digest, model.bundle, hops, cuts), proposer=proposer)
        return [each.token for each in generator.run(request, context(), done)], done, head

    expected, _, plain = generated(None)
    # Steps of a fixed time on which proposals cost nothing.
    tokens, done, head = generated(AdaptiveProposer([ExitHead()], clock=lambda: 0.0))
    assert tokens == expected
    assert done.proposed > 0
    # Every position once, and each refused proposal.
    assert head.positions <= plain.positions + done.proposed - done.accepted


def test_an_exit_drafts_also_where_the_tail_loses_its_state(
    with_exits: PublishedDecoder, tmp_path: Path, unsure: None
) -> None:
    head, tail = (with_exits.store(tmp_path / name) for name in ("head", "tail"))

    class Forgetful(LocalHop):
        calls = 0

        def call(self, frame: Frame, context: Context) -> HopReply:
            self.calls += 1
            if self.calls % 5 == 0 and frame.step is not None:
                tail.sessions.end(frame.step.session)
                head.sessions.end(frame.step.session) if self.calls % 10 == 0 else None
            return super().call(frame, context)

    request = GenerationRequest(prompt=PROMPT, max_tokens=40)
    whole = Generator(with_exits.route((), LocalHop(head))).run(request, context(), Generated())
    expected, done = [each.token for each in whole], Generated()
    split = Generator(
        with_exits.route(("layer_1",), LocalHop(head), Forgetful(tail)),
        proposer=AdaptiveProposer([ExitHead()], clock=lambda: 0.0),
    )
    assert [each.token for each in split.run(request, context(), done)] == expected
    assert done.recoveries > 2
    head.store.close()
    tail.store.close()


def test_a_model_without_exits_proposes_nothing(tiny_decoder: PublishedDecoder, store: SessionStore) -> None:
    done = Generated()
    route = tiny_decoder.route(("layer_1",), LocalHop(store), LocalHop(store))
    request = GenerationRequest(prompt=PROMPT, max_tokens=5)
    assert len(list(Generator(route, proposer=AdaptiveProposer([ExitHead()])).run(request, context(), done))) == 5
    assert done.proposed == 0


def test_the_fit_finds_a_linear_map() -> None:
    draw = np.random.default_rng(0)
    stream, true = draw.normal(0, 100, (5000, 8)).astype(np.float32), draw.normal(size=(8, 8))
    mapped = fit(stream, (normalised(stream) @ true + 3).astype(np.float32))
    assert np.abs(mapped(stream) - normalised(stream) @ true - 3).max() < 0.5
    with pytest.raises(CalibrationError, match="7 tokens"):
        fit(stream[:7], stream[:7])


def test_offered_tokens_are_those_seen_and_the_lowest() -> None:
    assert offered_tokens([90, 5], 100, 4).tolist() == [0, 1, 5, 90]
    assert offered_tokens([], 3, 10).tolist() == [0, 1, 2]


def test_too_little_text_is_refused(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    settings = RegistrySettings(registry=str(tiny_decoder.registry), cache_dir=str(tmp_path))
    with pytest.raises(CalibrationError, match="1 paragraphs"):
        draft(DraftRequest(model="tiny:1", text="word " * 100, registry=settings))
