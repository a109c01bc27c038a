"""Is a split language model the same model? SmolLM2's tokens beside transformers' and the uncut ONNX graph's, raw and
with coded hidden states; perplexity of a text by codec and cut.

The uncut model generates each answer greedily, the end token ignored. A system generates the same tokens exactly if at
every position, behind the same tokens, its likeliest next token is the same (by induction over positions), so every
system, the uncut model and transformers among them, is run over the finished answers (teacher forcing): the prompt in
chunks, the answer in one step. Some answers are generated token by token as well. A position counts as a tie where the
uncut model's two best scores differ by less than `TIE`: there, float32 sums in another order may decide.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from harness import STATE, Report, Row, arguments, at_most
from llm import NAME, open_smollm2
from llm_prompts import VARIED

from isthmus.arrays import Array
from isthmus.artifacts.choice import RAW, Choice
from isthmus.artifacts.fidelity import measure_for
from isthmus.context import Context
from isthmus.generation import Generated, GenerationRequest, Generator, TextCodec
from isthmus.pipeline import LocalHop, LoopbackHop, Route, execute, plan_route
from isthmus.registry import Resolved
from isthmus.routing import override_codec
from isthmus.runtime.ort import cpu_limit
from isthmus.runtime.session_store import SessionStore
from isthmus.settings import SegmentSettings
from isthmus.wire.frame import Step
from isthmus_tools.calibration import texts
from isthmus_tools.graph.decoder.gguf_file import read_gguf
from isthmus_tools.zoo.calibration import PROSE
from isthmus_tools.zoo.models import ready_decoder

PARTITIONS = ("5", "10", "20", "10/20")
REGISTRY = STATE / "llm-fidelity-registry"
CHUNKS = (7, 64, 256)
ANSWER, PROMPTS = 200, len(VARIED)
# Sessions at once: a function's default bound.
CONCURRENT = 16
TIE = 1e-4
# Windows of 512 tokens predict one token less each: 3,000 predictions.
TEXT_TOKENS = 3006
CODED = (Choice("half/1"), Choice("int8-token/1"))
MAX_WORSE = 0.5
LINK_BPS = 4e6


@dataclass(frozen=True)
class Answer:
    """A prompt and its greedy answer, int64 (1, tokens)."""

    ids: Array
    prompt: int

    @property
    def expected(self) -> Array:
        """The answer's tokens."""
        return np.asarray(self.ids[0, self.prompt :])


@dataclass(frozen=True)
class Model:
    """The published model, its text codec, and its segments in this process."""

    resolved: Resolved
    text: TextCodec
    store: SessionStore
    sessions: Iterator[int]

    def route(self, cuts: str) -> Route:
        """A head in this process, and later segments behind frames; no cuts for the uncut model."""
        local = LocalHop(self.store)
        names = [f"layer_{part}" for part in cuts.split("/") if part]
        hops = (local, LoopbackHop(local)) if names else (local,)
        return plan_route(self.resolved.digest, self.resolved.bundle, hops, names)

    def coded(self, cuts: str, choice: Choice) -> Route:
        """The route with every cut encoded."""
        return override_codec(self.route(cuts), choice, _no_tables, measure_for)

    def scores(self, route: Route, ids: Array, sizes: Sequence[int]) -> Iterator[Array]:
        """The logits of steps of these sizes, (tokens, vocabulary) each."""
        state, start, session = self.resolved.bundle.state, 0, f"session {next(self.sessions)}"
        assert state is not None
        context = Context.from_headers({}, longest_s=600)
        for size in sizes:
            step = Step(session, start, reserve=ids.shape[1])
            result = execute(route, {state.tokens: ids[:, start : start + size]}, context, step=step)
            yield result.outputs["logits"][0]
            start += size
        self.store.end_session(session)


def main() -> None:
    report = arguments("llm_fidelity", __doc__, ["numpy", "onnxruntime", "tokenizers", "torch", "transformers"])
    with open_model(report) as model:
        answers = greedy_answers(report, model)
        identity(report, model, answers)
        token_by_token(report, model, answers)
        coded_answers(report, model, answers)
        perplexity(report, model)
        transfers(report, model)
    report.emit()


@contextlib.contextmanager
def open_model(report: Report) -> Iterator[Model]:
    """The model with every partition, and room for all sessions."""
    settings = SegmentSettings(
        registry=str(REGISTRY),
        cache_dir=str(STATE / "llm-fidelity-cache"),
        threads=cpu_limit(),
        cache_bytes=2 * 2**30,
        max_sessions=CONCURRENT,
        max_session_tokens=1024,
    )
    with open_smollm2(report, settings, PARTITIONS) as parts:
        yield Model(*parts, itertools.count())


def greedy_answers(report: Report, model: Model) -> list[Answer]:
    """The uncut model's answers, many at a time so that its function shares runs."""
    report.say("the uncut model generates")
    count = 40 if report.quick else ANSWER

    def answer(text: str) -> Answer:
        prompt = model.text.encode_chat([{"role": "user", "content": text}])
        tokens = generated(model.route(""), prompt, count)
        return Answer(np.array([[*prompt, *tokens]], np.int64), len(prompt))

    with ThreadPoolExecutor(CONCURRENT) as pool:
        return list(pool.map(answer, [prompt.text for prompt in VARIED[: 3 if report.quick else PROMPTS]]))


def generated(route: Route, prompt: Sequence[int], count: int) -> list[int]:
    """Greedy tokens behind a prompt, one a step."""
    request = GenerationRequest(prompt=prompt, max_tokens=count)
    context = Context.from_headers({}, longest_s=1200)
    return [token.token for token in Generator(route).run(request, context, Generated())]


def transformers_model() -> Any:
    """The file's weights in transformers' own Llama."""
    import torch
    import transformers

    decoder = read_gguf(ready_decoder(NAME).path)
    c = decoder.config
    config = transformers.LlamaConfig(
        vocab_size=c.vocabulary,
        hidden_size=c.width,
        intermediate_size=c.ffn,
        num_hidden_layers=c.layers,
        num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads,
        head_dim=c.head_size,
        rms_norm_eps=c.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.context,
        tie_word_embeddings=True,
    )
    torch.set_num_threads(cpu_limit())
    model: Any = transformers.LlamaForCausalLM(config)
    weights = {
        "model.embed_tokens.weight": "token_embd.weight",
        "lm_head.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
    }
    parts = {f"self_attn.{kind}_proj": f"attn_{kind}" for kind in "qkv"} | {
        "self_attn.o_proj": "attn_output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        **{f"mlp.{kind}_proj": f"ffn_{kind}" for kind in ("gate", "up", "down")},
    }
    for layer in range(c.layers):
        weights |= {f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in parts.items()}
    model.load_state_dict({name: torch.tensor(decoder.weights.get(own)) for name, own in weights.items()})
    return model.eval()


def identity(report: Report, model: Model, answers: Sequence[Answer]) -> None:
    """Next tokens of transformers, the uncut graph and every split, beside the answers."""
    report.say("the uncut model again")
    margins: list[Array] = []
    differ = [each_differ(model, model.route(""), answer, 256, margins) for answer in answers]
    uncut = np.concatenate(margins)
    ties = uncut < TIE
    rows = [_identity_row("uncut ONNX", 256, differ, ties)]
    report.say("transformers")
    rows.append(_identity_row("transformers", 0, _transformers_differ(answers), ties))
    partitions = ("10", "10/20") if report.quick else PARTITIONS
    for cuts, chunk in itertools.product(partitions, (64,) if report.quick else CHUNKS):
        report.say(f"cut {cuts}, prompts in chunks of {chunk}")
        differ = [each_differ(model, model.route(cuts), answer, chunk) for answer in answers]
        rows.append(_identity_row(f"cut behind layer {cuts.replace('/', ' and ')}", chunk, differ, ties))
    count = uncut.size
    report.add(f"next tokens beside the uncut model's answers: {len(answers)} answers, {count} tokens", rows)
    report.add(
        "margins of the uncut model: the lead of the best score over the next",
        [
            {
                "positions": count,
                "smallest": float(uncut.min()),
                "median": float(np.median(uncut)),
                f"below_{TIE:g}": int(ties.sum()),
                "below_0.001": int((uncut < 1e-3).sum()),
                "below_0.01": int((uncut < 1e-2).sum()),
            }
        ],
    )
    for name, part in (("the uncut graph", rows[:1]), ("transformers", rows[1:2]), ("all splits", rows[2:])):
        beyond = sum(int(row["other_tokens"] or 0) - int(row["of_these_ties"] or 0) for row in part)
        report.goals.append(at_most(f"{name}: tokens other than the answers', beyond ties", beyond, 0))


def _transformers_differ(answers: Sequence[Answer]) -> list[Array]:
    """As `each_differ`, by transformers in float32, a whole sequence at a time."""
    import torch

    model = transformers_model()
    with torch.no_grad():
        return [
            model(torch.from_numpy(answer.ids[:, :-1])).logits[0, answer.prompt - 1 :].argmax(dim=-1).numpy()
            != answer.expected
            for answer in answers
        ]


def each_differ(model: Model, route: Route, answer: Answer, chunk: int, margins: list[Array] | None = None) -> Array:
    """Where the likeliest next token is another than the answer's: bool, for each of its tokens."""
    size = answer.ids.shape[1] - 1  # behind the last token nothing is compared
    prefill = [min(chunk, answer.prompt - start) for start in range(0, answer.prompt, chunk)]
    *_, last, scores = model.scores(route, answer.ids[:, :-1], [*prefill, size - answer.prompt])
    scores = np.concatenate([last[-1:], scores])
    if margins is not None:
        best = np.partition(scores, -2, axis=-1)[:, -2:]
        margins.append(best[:, 1] - best[:, 0])
    return np.asarray(scores.argmax(axis=-1) != answer.expected)


def _identity_row(name: str, chunk: int, differ: Sequence[Array], ties: Array) -> Row:
    other = np.concatenate(differ)
    return {
        "model": name,
        "prompt_chunks": chunk,
        "other_tokens": int(other.sum()),
        "of_these_ties": int((other & ties).sum()),
        "answers_alike": f"{sum(not each.any() for each in differ)} of {len(differ)}",
    }


def token_by_token(report: Report, model: Model, answers: Sequence[Answer]) -> None:
    """Answers that splits generate step by step."""
    rows: list[Row] = []
    partitions = ("10",) if report.quick else PARTITIONS
    for cuts, answer in zip(partitions, answers[2:], strict=False):
        report.say(f"token by token, cut {cuts}")
        tokens = generated(model.route(cuts), answer.ids[0, : answer.prompt].tolist(), len(answer.expected))
        differ = int(np.sum(np.array(tokens) != answer.expected))
        rows.append({"cut": cuts, "tokens": len(tokens), "other_tokens": differ})
    report.add("generated token by token, beside the uncut model's answers", rows)
    other = sum(int(row["other_tokens"] or 0) for row in rows)
    report.goals.append(at_most("splits, generated step by step: tokens other than the answers'", other, 0))


def coded_answers(report: Report, model: Model, answers: Sequence[Answer]) -> None:
    """Next tokens with coded hidden states."""
    rows: list[Row] = []
    for cuts, choice in itertools.product(("10",) if report.quick else ("10", "10/20"), CODED):
        report.say(f"cut {cuts}, {choice}")
        differ = [each_differ(model, model.coded(cuts, choice), answer, 256) for answer in answers]
        other = np.concatenate(differ)
        rows.append(
            {
                "cut": cuts,
                "codec": str(choice),
                "same_next_tokens_%": 100 * (1 - float(other.mean())),
                "answers_alike": f"{sum(not each.any() for each in differ)} of {len(differ)}",
                "tokens_before_the_first_other": float(
                    np.mean([each.argmax() if each.any() else len(each) for each in differ])
                ),
            }
        )
    report.add("answers with coded hidden states: next tokens as without", rows)


def perplexity(report: Report, model: Model) -> None:
    """Perplexity and agreement of next tokens on a text, by cut and codec."""
    tokens = model.text.encode(PROSE.read_text(encoding="utf-8"))[: 600 if report.quick else TEXT_TOKENS]
    cuts = ["layer_10"] if report.quick else ["layer_5", "layer_10", "layer_20"]
    spec = texts.TextSpec(tokens, PROSE.name, 0.99, cuts, (RAW, *CODED))
    bundle = model.resolved.bundle
    fidelity = texts.score_text(model.resolved.digest, bundle, model.store, spec, report.say)
    raw = {entry.cut: entry.perplexity for entry in fidelity.entries if entry.codec == RAW.codec}
    worse = {(e.cut, e.codec): 100 * (e.perplexity / raw[e.cut] - 1) for e in fidelity.entries}
    rows: list[Row] = [
        {
            "cut": e.cut,
            "codec": e.codec,
            "perplexity": e.perplexity,
            "worse_%": worse[e.cut, e.codec],
            "same_next_tokens_%": 100 * e.agreement,
            "bytes_a_token": e.bytes,
            "encode_ms": e.pack_ms,
            "decode_ms": e.unpack_ms,
        }
        for e in fidelity.entries
    ]
    report.add(f"perplexity of a text: {fidelity.inputs.held_out} predictions in windows of 512 tokens", rows)
    for choice in CODED:
        worst = max(value for (_, codec), value in worse.items() if codec == choice.codec)
        report.goals.append(at_most(f"perplexity with {choice}, the worst cut", worst, MAX_WORSE, "% worse"))


def transfers(report: Report, model: Model) -> None:
    """Bytes of whole frames over the cut, and the time that a slow uplink takes for these."""
    rows: list[Row] = []
    ids = np.array([model.text.encode(PROSE.read_text(encoding="utf-8"))[:257]], np.int64)
    for choice in (RAW, *CODED):
        sizes: list[int] = []
        state = model.resolved.bundle.state
        assert state is not None
        for start, stop in ((0, 256), (256, 257)):
            result = execute(
                model.coded("10", choice),
                {state.tokens: ids[:, start:stop]},
                Context.from_headers({}, longest_s=600),
                step=Step(f"bytes {choice}", start, reserve=257),
            )
            sizes.append(result.runs[1].sent_bytes)
        model.store.end_session(f"bytes {choice}")
        rows.append(
            {
                "codec": str(choice),
                "prompt_of_256_bytes": sizes[0],
                "ms_at_4_Mbit/s": 8e3 * sizes[0] / LINK_BPS,
                "token_bytes": sizes[1],
                "ms_of_a_token": 8e3 * sizes[1] / LINK_BPS,
            }
        )
    report.add("frames over the cut behind layer 10", rows)


def _no_tables(digest: str, tensor: str, codec: str) -> object:
    raise LookupError(f"{codec} of {tensor} has no table")


if __name__ == "__main__":
    main()
