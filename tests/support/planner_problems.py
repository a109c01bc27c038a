"""Problems for the planner's tests: random ones, all divisions of a small one, and one shaped like a language model."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from isthmus_tools.planner.search import Labels, LinkTimes, Problem, Tensor, is_allowed


def random_problem(seed: int, tiers: int, nodes: int, *, plain: bool = False) -> Problem:
    """A small graph with skips, values read by many, early outputs, two inputs; decimals that tie.

    Unless `plain`: times that forbid, pins, fixed seconds, values that cannot cross, and any caller.
    """
    rng = random.Random(seed)
    coarse = seed % 2 == 0
    readers: list[list[int]] = [[] for _ in range(nodes + 2)]
    for v in range(nodes):
        for source in rng.sample(range(-2, v), rng.randint(1, min(3, v + 2))):
            readers[source].append(v)
    tensors = [Tensor(f"in{i}", None, tuple(readers[i]), rng.choice([0, 1, 2, 5, 8])) for i in (-2, -1)]
    for v in range(nodes):
        output = not readers[v] or rng.random() < 0.15
        uncarried = not plain and rng.random() < 0.05
        size = math.inf if uncarried else rng.choice([0, 1, 1, 2] if coarse else [0, 1, 1, 2, 3, 7])
        tensors.append(Tensor(f"v{v}", v, tuple(readers[v]), size, output))
        if rng.random() < 0.2:
            some = tuple(w for w in readers[v] if rng.random() < 0.7)
            tensors.append(Tensor(f"u{v}", v, some, rng.choice([1, 2])))
    speed = [0.1] * 4 if coarse else [1.0, 0.5, 0.2, 0.1]
    most = 3 if coarse else 9
    grain = [0.1] if coarse else [0.1, 0.3, 1.0]
    seconds = [[rng.randint(0, most) * speed[t] * rng.choice([1, 3]) for _ in range(nodes)] for t in range(tiers)]
    links = [LinkTimes(rng.choice(grain), rng.choice([0.0, 0.1, 0.4])) for _ in range(tiers - 1)]
    if plain:
        return Problem(tuple(map(tuple, seconds)), tuple(tensors), tuple(links))
    for row in seconds:
        for v in range(nodes):
            row[v] = math.inf if rng.random() < 0.06 else row[v]
    links = [LinkTimes(link.up, link.down, rng.choice([0.0, 0.2, 1.5])) for link in links]
    ends = [sorted(rng.choices(range(tiers), k=2)) for _ in range(nodes)]
    pins = {v: (ends[v][0], ends[v][1]) for v in range(nodes) if rng.random() < 0.1}
    return Problem(tuple(map(tuple, seconds)), tuple(tensors), tuple(links), rng.randrange(tiers), pins)


def divisions(problem: Problem) -> Iterator[Labels]:
    """All allowed ones, by trying all."""
    every = itertools.product(range(problem.tiers), repeat=problem.nodes)
    before = [(t.producer, v) for t in problem.tensors if t.producer is not None for v in t.consumers]
    for labels in every:
        if all(labels[u] <= labels[v] for u, v in before) and is_allowed(problem, labels):
            yield labels


def language_model(nodes: int, tiers: int, *, even: bool = False) -> Problem:
    """Decoder blocks of about 65 nodes, SmolLM2's sizes for 16 tokens: residuals, rotary inputs, KV outputs, a mask.

    Unless `even`, each node likes another tier, so that the best division lies across the graph.
    """
    rng = random.Random(0)
    width = 16 * 576 * 4
    rows: list[tuple[str, int | None, list[int], int, bool]] = []
    work: list[float] = []

    def node(reads: list[int], size: int, seconds: float = 1e-5, output: bool = False) -> int:
        for source in reads:
            rows[source][2].append(len(work))
        rows.append((f"v{len(work)}", len(work), [], size, output))
        work.append(seconds)
        return len(rows) - 1

    def run(value: int, length: int, size: int) -> int:
        for _ in range(length):
            value = node([value], size)
        return value

    rows += [("ids", None, [], 128, False), ("mask", None, [], 128, False)]
    hidden, cosine, sine, mask = node([0], width), node([1], width // 9), node([1], width // 9), node([1], 1024)
    while len(work) < nodes - 65:
        normal = run(node([run(hidden, 2, width), hidden], width), 3, width)
        heads = []
        for share, seconds in ((1, 4e-4), (3, 2e-4)):
            a = run(node([normal], width // share, seconds), 4, width // share)
            turned = node([run(a, 2, width // share), sine], width // share)
            heads.append(node([node([a, cosine], width // share), turned], width // share, output=share == 3))
        value = run(node([normal], width // 3, 2e-4), 3, width // 3)
        scores = run(node([node(heads, 9216, 1e-4), mask], 9216), 3, 9216)
        mixed = node([node([scores, value], width, 1e-4)], width, 4e-4)
        hidden = node([mixed, hidden], width)
        normal = run(node([run(hidden, 2, width), hidden], width), 3, width)
        gate, up = (node([normal], width * 8 // 3, 1e-3) for _ in range(2))
        gate = node([gate, node([gate], width * 8 // 3)], width * 8 // 3)
        hidden = node([node([node([gate, up], width * 8 // 3)], width, 1e-3), hidden], width)
    hidden = run(hidden, nodes - 1 - len(work), width)
    node([hidden], 49152 * 4, 5e-3, output=True)
    scale = (1.0, 1 / 6, 1 / 60) if even else (1.0, 0.6, 0.4)
    noise = 0.0 if even else 1.2
    return Problem(
        tuple(tuple(s * m * rng.lognormvariate(0, noise) for s in work) for m in scale[:tiers]),
        tuple(Tensor(name, producer, tuple(readers), size, out) for name, producer, readers, size, out in rows),
        tuple(LinkTimes(3e-9 * (b + 1), 3e-9, 0.001) for b in range(tiers - 1)),
    )
