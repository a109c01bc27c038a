"""Plans of a small language model on real functions: profiled, measured, published, and followed by a router."""

from __future__ import annotations

import base64
import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.context import Context
from isthmus.errors import ConstraintMalformed, IsthmusError, RequestMalformed
from isthmus.generation import Generated, GenerationRequest, Generator
from isthmus.pipeline import Hop, planned_route
from isthmus.registry import open_registry
from isthmus.routing.demand import Demand
from isthmus.routing.selection import RouteSelector
from isthmus.serving import create_router_app
from isthmus.serving.profiling import SECRET
from isthmus.settings import RegistrySettings, RouterSettings
from isthmus_tools import FunctionUrls, PlanRequest, ProfileRequest, plan, profile
from isthmus_tools.planner.generation_runs import GenerationTask, measure_generations
from isthmus_tools.planner.measurement import LinkedFunctions
from isthmus_tools.planner.segment_pool import codec_tables
from isthmus_tools.profiling import profiles
from isthmus_tools.profiling.slow_edge import EdgeWork, SlowEdge
from isthmus_tools.usecases.answer_size import AnswerSize, prompt_ids
from isthmus_tools.usecases.function_urls import functions_at
from support.bundles import ready
from support.cli import isthmus
from support.published_decoders import PublishedDecoder, chained
from support.routers import served_functions
from support.scripted_decoders import scripted_bundle

TOKEN = "a-token"
LINK = Conditions(20e6, 20e6, 0.005)
SIZE = AnswerSize(prompt=40, tokens=6)


@dataclass
class PlannedDecoder:
    """The tiny decoder with two functions that run it, and a plan measured on these."""

    decoder: PublishedDecoder
    functions: FunctionUrls
    settings: RegistrySettings
    plan: Plan
    version: str

    @property
    def registry(self) -> list[str]:
        return ["--registry", str(self.decoder.registry)]


@pytest.fixture(scope="module")
def planned(tiny_decoder: PublishedDecoder, tmp_path_factory: pytest.TempPathFactory) -> Iterator[PlannedDecoder]:
    folder = tmp_path_factory.mktemp("planned")
    # Plans and profiles are published here, beside the registry that other tests share.
    registry = Path(shutil.copytree(tiny_decoder.registry, folder / "registry"))
    decoder = dataclasses.replace(tiny_decoder, registry=registry)
    (folder / "secrets").mkdir()
    (folder / "secrets" / SECRET).write_text(TOKEN)
    # The functions take sealed calls alone, so that every measurement here shows that commands seal theirs.
    (folder / "secrets" / "hop-keys").write_text(f"k1:{base64.b64encode(bytes(range(32))).decode()}")
    secrets = str(folder / "secrets")
    settings = RegistrySettings(registry=str(registry), cache_dir=str(folder / "cache"), secrets_dir=secrets)
    options: dict[str, Any] = {"secrets_dir": secrets, "log_level": "error"}
    with served_functions(*(decoder.settings(folder / name, **options) for name in ("head", "tail"))) as (head, tail):
        functions = functions_at(head, tail, settings, TOKEN)
        request = PlanRequest(
            model="tiny",
            registry=settings,
            conditions=LINK,
            functions=functions,
            answer=SIZE,
            # Any error is admitted: of forty tokens a single one is more than a hundredth.
            constraints=Constraints(private_depth=1, max_disagreement=1.0, edge_memory_bytes=10**9),
        )
        with plan(request) as result:
            version = result.publish("planned").version.version
        yield PlannedDecoder(decoder, functions, settings, result.plan, version)


def test_the_profiles_have_steps_of_the_whole_model_and_of_two_heads_or_tails(planned: PlannedDecoder) -> None:
    result = profile(ProfileRequest(model="tiny", registry=planned.settings, functions=planned.functions))
    # As the plan has measured them.
    assert result.up_to_date == {"edge", "cloud"}
    edge, cloud = result.profiles["edge"], result.profiles["cloud"]
    assert {str(s.segment) for s in edge.steps} == {"..", "..layer_1", "..layer_2"}
    assert {str(s.segment) for s in cloud.steps} == {"..", "layer_1..", "layer_2.."}
    assert {(s.tokens, s.past) for s in edge.steps} == {(32, 0), (1, 32), (64, 0), (64, 64), (1, 64)}
    assert all(s.run.median > 0 for s in (*edge.steps, *cloud.steps))
    assert edge.whole.memory_bytes > edge.whole.weights_bytes > edge.segments["..layer_1"].weights_bytes  # type: ignore[index]


def test_the_profile_is_told_by_step(planned: PlannedDecoder, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    urls = ["--head", planned.functions.head, "--tail", planned.functions.tail, "--token-file", tmp_path / "token"]
    result = isthmus("profile", "tiny", *urls, *planned.registry)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("a step of 1 tokens behind 64: ") == 2
    assert "layer_2" in result.stdout


def test_real_generations_decide_and_the_ids_stay_at_the_edge(planned: PlannedDecoder) -> None:
    by_name = {c.name: c for c in planned.plan.candidates}
    assert "cloud-whole" not in by_name
    seen = {name for name, c in by_name.items() if c.measured is not None}
    assert "edge-whole" in seen
    assert any(by_name[name].cuts for name in seen)
    for name in seen:
        measured = by_name[name].measured
        assert measured is not None
        parts = measured.parts
        assert measured.median == pytest.approx(parts["first_token"] + 5 * parts["per_token"], rel=0.5)
        if by_name[name].cuts:
            # The link lets nothing through faster than it is.
            assert parts["first_token"] > LINK.rtt_s
            assert parts["per_token"] > LINK.rtt_s
            assert by_name[name].error.inputs == 45
    assert by_name["split-layer_1-raw"].error.disagreement == 0
    assert planned.plan.measured


def test_a_router_generates_along_the_plan_with_the_same_tokens(planned: PlannedDecoder, tmp_path: Path) -> None:
    registry = open_registry(planned.settings)
    model = registry.resolve("tiny:planned")
    store = planned.decoder.store(tmp_path / "cache")
    hops: tuple[Hop, Hop] = chained(store)
    settings = RouterSettings(registry=str(planned.decoder.registry), model="tiny:planned", hops=("local", "http://x"))
    candidates = RouteSelector(settings, registry, hops, codec_tables(registry), None).select(
        "tiny", model.digest, model.bundle
    )
    assert candidates[0].name == planned.plan.chosen
    assert {c.name for c in candidates} >= {"edge-whole"}
    # By the token, as the router's live estimates are.
    assert candidates[0].planned_s == planned.plan.choice.per_token_s
    # Of a model of microseconds noise may leave no split among the efficient candidates.
    split = next(c for c in planned.plan.candidates if c.name == "split-layer_1-raw")
    assert Demand.planned(split).calls == 1
    assert Demand.planned(split).up_bytes < 1000
    routes = {c.name: c.route for c in candidates if c.name == "edge-whole"}
    routes["split"] = planned_route(split, model.digest, model.bundle, hops, codec_tables(registry), registry.bundle)
    prompt = prompt_ids(registry, model.bundle, (), 20)
    request = GenerationRequest(prompt=prompt, max_tokens=8)
    tokens = [
        [t.token for t in Generator(route).run(request, Context.from_headers({}, longest_s=60), Generated())]
        for route in routes.values()
    ]
    store.store.close()
    assert len(tokens) == 2
    assert tokens[0] == tokens[1]


def test_the_api_of_a_router_answers_along_the_plan(planned: PlannedDecoder, tmp_path: Path) -> None:
    settings = RouterSettings(
        registry=str(planned.decoder.registry),
        cache_dir=str(tmp_path),
        model="tiny:planned",
        hops=(planned.functions.head, planned.functions.tail),
        adapt=False,
        secrets_dir=planned.settings.secrets_dir,
        log_level="error",
    )
    client = ready(create_router_app(settings).test_client())
    body = {"model": "tiny:planned", "prompt": "the cat", "max_tokens": 4, "temperature": 0}
    answer = client.post("/v1/completions", json=body).get_json()
    assert answer["isthmus"]["route"] == planned.plan.chosen
    assert answer["usage"]["completion_tokens"] == 4


def test_explain_tells_the_terms_of_a_token_and_the_choice(planned: PlannedDecoder) -> None:
    result = isthmus("explain", "tiny:planned", *planned.registry)
    assert result.exit_code == 0, result.output
    assert "a token, predicted" in result.stdout
    assert "the first token, measured" in result.stdout
    assert planned.plan.chosen in result.stdout
    document = json.loads(isthmus("explain", "tiny:planned", "--json", *planned.registry).stdout)
    assert document["plan"]["generation"] == {"prompt": 40, "tokens": 6, "context": 46, "sessions": 1, "chunk": 256}
    assert document["explanation"]["chosen"] == planned.plan.chosen


def predicted(planned: PlannedDecoder, *arguments: object) -> Any:
    result = isthmus("plan", "tiny", *planned.registry, "--no-publish", "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["plan"]


PRICES = """
currency = "EUR"
[edge]
cpu_second = 0.00001
[cloud]
cpu_second = 0.00002
[link]
gb_up = 0.09
gb_down = 0.0
"""


def test_the_command_predicts_from_stored_profiles(planned: PlannedDecoder, tmp_path: Path) -> None:
    sizes = {"--prompt": 50, "--tokens": 10, "--context": 100, "--sessions": 4}
    options: list[object] = ["--objective", "per-token", *itertools.chain(*sizes.items())]
    found = predicted(planned, *options, "--uplink", "4mbit", "--rtt", "20ms")
    assert found["generation"] == {"prompt": 50, "tokens": 10, "context": 100, "sessions": 4, "chunk": 256}
    by_name = {c["name"]: c for c in found["candidates"]}
    assert {"edge-whole", "cloud-whole", "split-layer_1-raw", "split-layer_2-int8-token"} <= by_name.keys()
    assert by_name["split-layer_1-raw"]["generation"]["per_token"]["rtt"] == 0.02
    # Two heads of keys and values, 16 wide, as float32, in one layer.
    assert by_name["split-layer_1-raw"]["generation"]["edge_state_bytes"] == 2 * 2 * 16 * 4 * 100
    (tmp_path / "prices.toml").write_text(PRICES)
    options += ["--prices", tmp_path / "prices.toml"]
    text = isthmus("plan", "tiny", *planned.registry, "--no-publish", "--sweep", *options).stdout
    assert "price, EUR" in text
    assert "edge-whole" in text
    assert "cloud-whole" in text
    assert "50 tokens of prompt, 10 of answer, 4 sessions of 100" in text
    assert "first token, ms" in text
    assert "where splitting pays" in text


def test_ids_that_must_stay_leave_no_way_to_the_cloud_alone(planned: PlannedDecoder) -> None:
    found = predicted(planned, "--private-depth", 2)
    assert {c["name"].rpartition("-")[0] for c in found["candidates"]} >= {"edge", "split-layer_2"}
    assert all(c["kind"] != "cloud" and c["cuts"] != ["layer_1"] for c in found["candidates"])
    assert any("token ids stay at the edge" in sentence for sentence in found["why"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt", 0], "--prompt is 0"),
        (["--tokens", -1], "--tokens is -1"),
        (["--sessions", 0], "--sessions is 0"),
        (["--context", 129], "the model's own is 128"),
        (["--prompt", 100, "--tokens", 29], "more than the model's context, 128"),
        (["--prompt", 10, "--tokens", 10, "--context", 19], "more than --context, 19"),
        (["--first-token", "NaN"], "--first-token"),
        (["--per-token", "0s"], "nothing runs in that"),
        (["--per-token", "1us"], "no candidate meets per-token"),
        (["--edge-memory", "1kB", "--private-depth", 1], "no candidate meets edge-memory"),
        (["--private-depth", 4], "the model has 3"),
        (["--objective", "throughput"], "throughput of a language model"),
        (["--max-error", 0.1], "--max-disagreement"),
        (["--picture", "plan.svg"], "no curves along the graph"),
    ],
)
def test_a_size_or_a_bound_that_makes_no_sense_is_refused(
    planned: PlannedDecoder, arguments: list[object], reason: str
) -> None:
    result = isthmus("plan", "tiny", *planned.registry, "--no-publish", *arguments)
    assert result.exit_code == 1
    assert reason in result.stderr


def test_texts_are_read_only_where_a_generation_runs(planned: PlannedDecoder) -> None:
    predicted(planned, "--input", "/no/such/file")


def test_options_of_language_models_are_refused_for_others(planned: PlannedDecoder) -> None:
    for change in (
        {"objective": "first-token"},
        {"constraints": Constraints(per_token_s=1.0)},
        {"answer": AnswerSize(sessions=2)},
    ):
        request = PlanRequest(model="photos", registry=planned.settings, conditions=LINK, **change)  # type: ignore[arg-type]
        with pytest.raises(IsthmusError):
            plan(request)


def test_a_prompt_comes_from_text_files_as_often_as_it_takes(planned: PlannedDecoder, tmp_path: Path) -> None:
    registry = open_registry(planned.settings)
    bundle = planned.decoder.model.bundle
    (tmp_path / "a.txt").write_text("the cat")
    ids = prompt_ids(registry, bundle, [tmp_path / "a.txt"], 30)
    assert len(ids) == 30
    assert len(set(ids)) < 10
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name, reason in (("empty.txt", "no token"), ("bytes.txt", "not UTF-8"), ("none.txt", "No such file")):
        with pytest.raises(RequestMalformed, match=reason):
            prompt_ids(registry, bundle, [tmp_path / name], 5)


def test_sizes_shrink_to_a_small_context_unless_asked_for() -> None:
    bundle = scripted_bundle()
    assert AnswerSize().load(bundle).prompt == 512
    small = replace(bundle, state=replace(bundle.state, context=100))  # type: ignore[type-var]
    load = AnswerSize().load(small)
    assert (load.prompt, load.tokens, load.context) == (75, 25, 100)
    assert AnswerSize(tokens=90).load(small).prompt == 10
    with pytest.raises(ConstraintMalformed, match="more than"):
        AnswerSize(prompt=90, tokens=20).load(small)


def test_a_slow_edge_is_a_profile_of_its_own(planned: PlannedDecoder) -> None:
    registry = open_registry(planned.settings)
    stored = profiles.newest(registry, planned.decoder.model.bundle, ("edge", "cloud"))
    slow = profiles.slowed(stored["edge"], 4.0, stored["edge"].hop, stored["edge"].whole.run.median)  # type: ignore[arg-type]
    assert slow.device.id != stored["edge"].device.id
    assert slow.whole.run.median == pytest.approx(4 * stored["edge"].whole.run.median)


class _ScriptedEdge(SlowEdge):
    """An edge whose function computes 10 ms between any two looks at its CPU time."""

    def work(self) -> EdgeWork:
        looks = self.__dict__.setdefault("looks", itertools.count())
        return EdgeWork(0.01 * next(looks), 0.0)


def measured_again(planned: PlannedDecoder, names: Sequence[str], tail: str, edge: SlowEdge) -> dict[str, Candidate]:
    registry = open_registry(planned.settings)
    model = registry.resolve("tiny:planned")
    load = planned.plan.generation
    assert load is not None
    task = GenerationTask(prompt_ids(registry, model.bundle, (), load.prompt), load, lambda candidate, steps: 1.0)
    functions = LinkedFunctions(planned.functions.head, tail, tail, planned.functions.protection)
    candidates = [replace(c, measured=None) for c in planned.plan.candidates if c.name in names]
    measured = measure_generations(
        candidates, model.digest, model.bundle, functions, task, codec_tables(registry), edge=edge, rounds=1
    )
    return {c.name: c for c in measured}


def test_the_work_of_a_slow_edge_counts_by_its_cpu_time(planned: PlannedDecoder) -> None:
    found = measured_again(planned, ["edge-whole"], planned.functions.tail, _ScriptedEdge(4.0, (0,)))["edge-whole"]
    assert found.measured is not None
    # Four times 10 ms for each step, beside the time of this process.
    assert found.measured.parts["per_token"] >= 0.04
    assert found.measured.parts["edge"] == pytest.approx(6 * 0.04)


def test_a_candidate_that_fails_is_refused_and_the_others_go_on(planned: PlannedDecoder) -> None:
    found = measured_again(planned, ["edge-whole", "split-layer_1-raw"], "http://127.0.0.1:9", SlowEdge())
    assert found["edge-whole"].measured is not None
    assert "it failed" in found["split-layer_1-raw"].refused
    assert found["split-layer_1-raw"].measured is None
