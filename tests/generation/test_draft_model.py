"""A draft model: its proposals are verified as any others, and it must have the model's vocabulary."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from isthmus.artifacts.sampling import Sampling
from isthmus.errors import ModelError
from isthmus.generation import AdaptiveProposer, Generated, GenerationRequest, Generator
from isthmus.generation.draft_model import DraftModel, check_vocabulary
from isthmus.pipeline import HttpHop, LocalHop
from isthmus.runtime.session_store import SessionStore
from support.decoders import with_swapped_tokens
from support.hop_servers import context
from support.ports import free_port
from support.published_decoders import PublishedDecoder, chained

PROMPT = [17, 230, 41, 5, 199, 88, 12]
SAMPLINGS = [Sampling(), Sampling(temperature=0.9, seed=3, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=2)]


def drafting(decoder: PublishedDecoder, store: SessionStore, cuts: tuple[str, ...] = ()) -> DraftModel:
    return DraftModel(decoder.route(cuts, LocalHop(store)), 100, context())


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
def test_a_draft_model_changes_no_token_and_no_probability(
    sampling: Sampling, tiny_decoder: PublishedDecoder, store: SessionStore
) -> None:
    route = tiny_decoder.route(("layer_1",), *chained(store))
    request = GenerationRequest(prompt=PROMPT, max_tokens=50, sampling=sampling)
    expected = list(Generator(route).run(request, context(), Generated()))
    done, draft = Generated(), drafting(tiny_decoder, store)
    found = list(Generator(route, proposer=AdaptiveProposer([draft])).run(request, context(), done))
    assert [each.token for each in found] == [each.token for each in expected]
    assert [each.logprob for each in found] == pytest.approx([each.logprob for each in expected], abs=1e-4)
    assert done.proposed > 0
    if not sampling.temperature:  # a model agrees with itself
        assert done.accepted == done.proposed


def test_refused_drafts_are_taken_back(tiny_decoder: PublishedDecoder, store: SessionStore) -> None:
    fresh, draft = drafting(tiny_decoder, store), drafting(tiny_decoder, store)
    sequence = list(PROMPT)
    for other in (3, 250, 9):
        proposals = draft.draft(sequence, 6)
        # The first two are accepted, then another token follows.
        sequence += [*proposals[:2], other]
    assert draft.draft(sequence, 6) == fresh.draft(sequence, 6)


def test_a_draft_model_that_lost_its_state_drafts_again(tiny_decoder: PublishedDecoder, store: SessionStore) -> None:
    draft = drafting(tiny_decoder, store)
    expected = draft.draft(PROMPT, 4)
    store.end_session(draft.session)
    assert draft.draft([*PROMPT, expected[0]], 3) == []
    assert draft.draft([*PROMPT, expected[0]], 3) == expected[1:]


def test_a_draft_model_without_a_place_proposes_nothing(tiny_decoder: PublishedDecoder, tmp_path: Path) -> None:
    store = tiny_decoder.store(tmp_path, max_sessions=1, session_idle_s=3600)
    assert len(drafting(tiny_decoder, store).draft(PROMPT, 2)) == 2
    refused = drafting(tiny_decoder, store)
    assert refused.draft(PROMPT, 2) == []
    assert not refused.confidence(PROMPT)
    store.store.close()


def test_a_draft_stays_within_the_session(tiny_decoder: PublishedDecoder, store: SessionStore) -> None:
    draft = DraftModel(tiny_decoder.route((), LocalHop(store)), len(PROMPT) + 2, context())
    assert len(draft.draft(PROMPT, 10)) == 2
    assert not draft.confidence([*PROMPT, 1, 2])


def test_a_function_that_fails_ends_the_drafts_and_not_the_generation(tiny_decoder: PublishedDecoder) -> None:
    with closing(HttpHop(f"http://127.0.0.1:{free_port()}", attempts=1, connect_timeout_s=1, max_reply_bytes=1)) as hop:
        draft = DraftModel(tiny_decoder.route((), hop), 100, context())
        assert draft.draft(PROMPT, 3) == []
    assert not draft.confidence(PROMPT)


def test_another_vocabulary_is_refused(tiny_decoder: PublishedDecoder) -> None:
    bundle = tiny_decoder.model.bundle
    text = Path(tiny_decoder.folder, "tokenizer.json").read_bytes()
    check_vocabulary(bundle, text, bundle, json.dumps(json.loads(text), indent=3).encode())
    with pytest.raises(ModelError, match="another vocabulary"):
        check_vocabulary(bundle, text, bundle, with_swapped_tokens(text))
