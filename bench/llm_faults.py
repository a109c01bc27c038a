"""Generations whose functions are killed and whose connections are cut: SmolLM2 cut behind layer 10, token by token.

The generator of this process is the router's. Functions are processes that a supervisor starts again. Every text is
compared with the same one without faults, half of them greedy and half seeded with penalties.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

from functions import StagedFunction, free_port, stage_functions
from harness import STATE, Report, Row, arguments, at_least, at_most
from llm import CUT, FUNCTION, NAME, REGISTRY, Model, http_hop, open_model
from llm_prompts import MIXED
from supervised import Supervised, answers

from isthmus.artifacts.sampling import Sampling
from isthmus.context import Context
from isthmus.generation import Generated, GenerationRequest, Generator
from isthmus.pipeline import Hop, HopReply, HttpHop, LocalHop, Route
from isthmus.retries import log_retries
from isthmus.routing import Estimates, watch
from isthmus.wire.frame import Frame
from isthmus_tools.netem import LinkShape, NetworkEmulator

TOKENS, EVERY = 40, 10
CONTEXT, RESUME_S = 512, 2.0
SAMPLINGS = {
    "greedy": Sampling(),
    "seeded": Sampling(temperature=0.8, top_p=0.95, repetition_penalty=1.1, presence_penalty=0.2, seed=7),
}
# Of each fault, generations in a full and in a quick run: 50 and 6.
TAIL, REPLICA, HEAD, LINK = (
    "kill -9 of the only tail",
    "kill -9 of the tail that has the session, of two",
    "kill -9 of the head",
    "connections reset at random",
)
NUMBERS = {TAIL: (14, 2), REPLICA: (14, 2), HEAD: (10, 1), LINK: (12, 1)}
# Resets of an established connection a second; a step takes some 30 ms.
CUTS_PER_S = 4.0
DEADLINE_S = 180.0


@dataclass
class Texts:
    """What became of the generations under one fault. Units: seconds."""

    identical: int = 0
    done: list[Generated] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    faults: int = 0

    def row(self, fault: str) -> Row:
        return {
            "fault": fault,
            "generations": len(self.done),
            "token_identical": self.identical,
            "faults": self.faults,
            "rebuilds": sum(d.recoveries for d in self.done),
            "positions_run_again": sum(d.replayed for d in self.done),
            "longest_gap_p50_s": statistics.median(self.gaps_s),
            "longest_gap_max_s": max(self.gaps_s),
        }


class NotedHop:
    """A hop to a function, which notes the function that answered last."""

    encodes = True
    latest: NotedHop | None = None

    def __init__(self, inner: HttpHop, function: Supervised) -> None:
        self.name, self._inner, self.function = inner.name, inner, function

    def call(self, frame: Frame, context: Context) -> HopReply:
        """See `Hop.call`."""
        reply = self._inner.call(frame, context)
        NotedHop.latest = self
        return reply

    def end_session(self, session: str, deadline: object) -> None:
        """No-op: functions drop idle sessions by themselves."""

    def close(self) -> None:
        """Close the connections."""
        self._inner.close()


def main() -> None:
    report = arguments("llm_faults", __doc__, ["flask", "numpy", "onnxruntime", "waitress"])
    log = logging.getLogger("llm_faults")
    log.addHandler(logging.NullHandler())
    log.propagate = False  # retries are what this benchmark is about
    log_retries(log)
    with contextlib.ExitStack() as stack:
        model = stack.enter_context(open_model(report))
        staged = stage_functions("edge-head", "cloud-tail", registry=REGISTRY, model=NAME)
        head = stack.enter_context(supervised("head", staged["edge-head"], f"{NAME}@head"))
        tails = [
            stack.enter_context(supervised(name, staged["cloud-tail"], f"{NAME}@tail")) for name in ("tail", "tail-2")
        ]
        for function, _ in (head, *tails):
            function.wait_ready()
        bench = Faults(report, model, head, tails)
        stack.callback(bench.close)
        rows = [bench.run(fault, NUMBERS[fault][report.quick]).row(fault) for fault in NUMBERS]
        report.add(f"{TOKENS} tokens each, a kill at every {EVERY}th token", rows)
        generations = sum(int(row["generations"] or 0) for row in rows)
        identical = sum(int(row["token_identical"] or 0) for row in rows)
        report.goals.append(at_least(f"token-identical of {generations} generations", identical, generations))
        resume(report, bench)
    report.emit()


@contextlib.contextmanager
def supervised(name: str, function: StagedFunction, preload: str) -> Iterator[tuple[Supervised, str]]:
    """A function that is started again whenever it ends, and its URL."""
    url = f"http://127.0.0.1:{free_port()}"
    environment = function.environment_at(
        url, **{**FUNCTION, "preload": preload}, cache_dir=str(STATE / f"llm-faults-{name}")
    )
    is_ready = partial(answers, f"{url}/ready")
    with Supervised(f"llm-{name}", function.command, environment, is_ready, function.folder) as running:
        yield running, url


class Faults:
    """The model's hops, and the texts without faults."""

    def __init__(
        self, report: Report, model: Model, head: tuple[Supervised, str], tails: list[tuple[Supervised, str]]
    ) -> None:
        self.report, self.model = report, model
        self.local, self.head = LocalHop(model.store), NotedHop(http_hop(head[1]), head[0])
        self.noted = [NotedHop(http_hop(url), function) for function, url in tails]
        self.tail_url = tails[0][1]
        (self.tail,) = watch([[self.noted[0]]], Estimates())
        (self.tails,) = watch([self.noted], Estimates())
        for hop in self.tails.watched:
            hop.memory.tell(model.resolved.digest, f"{CUT}..", is_loaded=True)
        self._expected: dict[tuple[int, str], list[int]] = {}

    def close(self) -> None:
        """Close the hops."""
        for hop in (self.head, self.tail, self.tails):
            hop.close()

    def run(self, fault: str, number: int) -> Texts:
        """Generate under a fault."""
        texts = Texts()
        for i in range(number):
            self.report.say(f"{fault}: {i + 1} of {number}")
            prompt, sampling = i % 5, list(SAMPLINGS)[i % 2]
            expected = self.expected(prompt, sampling)
            with self.route(fault, texts) as (route, act):
                tokens, gap_s, done = self.generate(route, self.request(prompt, sampling), act)
            texts.identical += tokens == expected
            texts.gaps_s.append(gap_s)
            texts.done.append(done)
        return texts

    def request(self, prompt: int, sampling: str) -> GenerationRequest:
        """A conversation's generation."""
        ids = self.model.ids(MIXED[prompt])
        return GenerationRequest(prompt=ids, max_tokens=TOKENS, sampling=SAMPLINGS[sampling])

    def expected(self, prompt: int, sampling: str) -> list[int]:
        """The text without faults, along the same cut."""
        key = (prompt, sampling)
        if key not in self._expected:
            self.noted[0].function.wait_ready()
            route = self.model.split(self.local, self.tail)
            self._expected[key] = self.generate(route, self.request(*key), lambda: None)[0]
        return self._expected[key]

    @contextlib.contextmanager
    def route(self, fault: str, texts: Texts) -> Iterator[tuple[Route, Callable[[], None]]]:
        """The route of a generation under a fault, and what happens at every tenth token."""

        def kill_holder() -> None:
            if (hop := NotedHop.latest) is not None:
                texts.faults += 1
                hop.function.kill()

        if fault == LINK:
            with NetworkEmulator(self.tail_url, LinkShape(rtt_s=0.005, cuts_per_s=CUTS_PER_S)) as link:
                hop = http_hop(link.url)
                yield self.model.split(self.local, hop), lambda: None
                hop.close()
                texts.faults += link.counters.cuts
            return
        hops: dict[str, tuple[Hop, Hop]] = {
            TAIL: (self.local, self.tail),
            REPLICA: (self.local, self.tails),
            HEAD: (self.head, self.tail),
        }

        def kill_head() -> None:
            texts.faults += 1
            self.head.function.kill()

        yield self.model.split(*hops[fault]), kill_head if fault == HEAD else kill_holder

    def generate(
        self, route: Route, request: GenerationRequest, act: Callable[[], None]
    ) -> tuple[list[int], float, Generated]:
        """The tokens, and the longest pause between two of them."""
        done, tokens, gap_s = Generated(), list[int](), 0.0
        latest = time.perf_counter()
        for token in Generator(route).run(request, Context.from_headers({}, longest_s=DEADLINE_S), done):
            if tokens:
                gap_s = max(gap_s, time.perf_counter() - latest)
            tokens.append(token.token)
            latest = time.perf_counter()
            if len(tokens) % EVERY == 0 and len(tokens) < request.max_tokens:
                act()
        return tokens, gap_s, done


def resume(report: Report, bench: Faults) -> None:
    """Seconds from a kill to the next token at 512 tokens of context: on the other tail, and on the same one."""
    ids = (bench.model.ids(MIXED[0]) * 8)[:CONTEXT]
    repeats = 2 if report.quick else 6
    rows: list[Row] = []
    medians = {}
    for name, hop in (("the other tail takes over", bench.tails), ("the only tail is started again", bench.tail)):
        seconds = []
        for i in range(repeats):
            report.say(f"resume at {CONTEXT} tokens: {name}, {i + 1} of {repeats}")
            for noted in bench.noted:
                noted.function.wait_ready()
                # A tail that serves has run prompts before: the first run maps its weights and takes its memory.
                first = GenerationRequest(prompt=ids, max_tokens=1)
                bench.generate(bench.model.split(bench.local, noted), first, lambda: None)
            running = Generator(bench.model.split(bench.local, hop)).run(
                GenerationRequest(prompt=ids, max_tokens=4),
                Context.from_headers({}, longest_s=DEADLINE_S),
                Generated(),
            )
            next(running), next(running)
            assert NotedHop.latest is not None
            NotedHop.latest.function.kill()
            began = time.perf_counter()
            next(running)
            seconds.append(time.perf_counter() - began)
            list(running)
        medians[name] = statistics.median(seconds)
        rows.append({"event": name, "p50_s": medians[name], "max_s": max(seconds), "repeats": repeats})
    report.add(f"time from a kill to the next token, at {CONTEXT} tokens of context", rows)
    report.goals.append(at_most("time to resume on another tail", next(iter(medians.values())), RESUME_S, "s"))


if __name__ == "__main__":
    main()
