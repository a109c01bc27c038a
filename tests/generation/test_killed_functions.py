"""Functions that are killed and connections that are cut in mid-generation: real processes, and the same tokens."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import psutil
import pytest

from isthmus.artifacts.sampling import Sampling
from isthmus.context import Context
from isthmus.generation import Generated, GenerationRequest, Generator
from isthmus.pipeline import Hop, LocalHop
from isthmus.routing import Estimates, watch
from isthmus.runtime.session_store import SessionStore
from isthmus_tools.cli.options import stack_variables
from isthmus_tools.engine import Engine
from isthmus_tools.netem import LinkShape, NetworkEmulator
from support.decoders import VOCABULARY
from support.paths import ROOT
from support.patience import LONG_S
from support.published_decoders import PublishedDecoder, http_hop

PROMPT = tuple(map(int, np.random.default_rng(8).integers(1, VOCABULARY, 12)))
SEEDED = Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.2, seed=11)
REQUEST = GenerationRequest(prompt=PROMPT, max_tokens=60, sampling=SEEDED)
CUT = ("layer_1",)


@pytest.fixture(scope="module")
def engine(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """Two tails, as functions whose processes are started again where they end."""
    folder = tmp_path_factory.mktemp("functions")
    common = {"threads": "1", "cache_dir": str(folder / "cache"), "log_level": "error"}
    names = {"cloud-tail": "tiny@tail", "edge-head": "tiny@tail"}
    with Engine(
        ROOT / "stack.yml",
        replicas={"router": 0, "trigger": 0},
        environment={"*": common, **{name: {"preload": preload} for name, preload in names.items()}},
        variables=stack_variables(str(tiny_decoder.registry)),
        asynchronous=False,
    ) as engine:
        engine.wait_ready(2 * LONG_S)
        yield engine


def kill(name: str) -> None:
    """kill -9 of a function's process."""
    for child in psutil.Process(os.getpid()).children(recursive=True):
        if f"/{name}/" in child.cwd() + "/":
            child.send_signal(signal.SIGKILL)
            return
    raise LookupError(name)


def generated(
    hops: tuple[Hop, ...],
    decoder: PublishedDecoder,
    done: Generated,
    *,
    at: Mapping[int, Callable[[], None]] | None = None,
) -> list[int]:
    """The tokens; `at` maps numbers of tokens to actions."""
    tokens = []
    context = Context.from_headers({}, longest_s=LONG_S)
    for token in Generator(decoder.route(CUT if len(hops) > 1 else (), *hops)).run(REQUEST, context, done):
        tokens.append(token.token)
        if at and (act := at.get(len(tokens))):
            act()
    return tokens


@pytest.fixture
def expected(tiny_decoder: PublishedDecoder, store: SessionStore) -> list[int]:
    return generated((LocalHop(store),), tiny_decoder, Generated())


def test_a_tail_that_is_killed_is_started_again_and_goes_on(
    engine: Engine, tiny_decoder: PublishedDecoder, store: SessionStore, expected: list[int]
) -> None:
    done = Generated()
    (tail,) = watch([[http_hop(f"{engine.url}/function/cloud-tail")]], Estimates())
    found = generated((LocalHop(store), tail), tiny_decoder, done, at={20: lambda: kill("cloud-tail")})
    tail.close()
    assert found == expected
    assert (done.recoveries, done.replayed) == (1, 12 + 19)


def test_the_other_replica_goes_on_where_one_is_killed(
    engine: Engine, tiny_decoder: PublishedDecoder, store: SessionStore, expected: list[int]
) -> None:
    done = Generated()
    urls = [f"{engine.url}/function/{name}" for name in ("cloud-tail", "edge-head")]
    (tails,) = watch([[http_hop(url) for url in urls]], Estimates())
    for hop in tails.watched:
        hop.memory.tell(tiny_decoder.model.digest, "layer_1..", is_loaded=True)
    # Whichever of the two has the session.
    both = {20: lambda: kill("cloud-tail"), 40: lambda: kill("edge-head")}
    found = generated((LocalHop(store), tails), tiny_decoder, done, at=both)
    tails.close()
    assert found == expected
    assert 1 <= done.recoveries <= 3


def test_connections_that_are_cut_cost_no_token(
    engine: Engine, tiny_decoder: PublishedDecoder, store: SessionStore, expected: list[int]
) -> None:
    done = Generated()
    with NetworkEmulator(engine.url.removeprefix("http://"), LinkShape(rtt_s=0.004)) as link:
        tail = http_hop(f"{link.url}/function/cloud-tail")
        progress, ended, cuts = threading.Event(), threading.Event(), 0

        def cut_often() -> None:
            nonlocal cuts
            while not ended.is_set():
                # Once for some tokens at most: on a slow machine every try of a step would be cut otherwise.
                if progress.wait(0.05):
                    progress.clear()
                    link.cut()
                    cuts += 1

        cutting = threading.Thread(target=cut_often)
        cutting.start()
        try:
            found = generated(
                (LocalHop(store), tail), tiny_decoder, done, at=dict.fromkeys(range(4, 60, 7), progress.set)
            )
        finally:
            ended.set()
            cutting.join()
            tail.close()
    assert found == expected
    assert cuts >= 2
    # The function was there all the time, with the session: a step that was cut off is made again.
    assert done.recoveries == 0
