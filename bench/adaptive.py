"""A router at a small edge, its cloud behind an emulated link, and a model with a plan: what adaptive routes run on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from functions import PROFILE_TOKEN, Process, stage_functions, tiers_to_profile
from harness import STATE, Report
from models import PLANNED
from traffic import Query

from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Plan, read_plan
from isthmus.errors import Missing
from isthmus.registry import open_cache, open_registry
from isthmus.settings import RegistrySettings
from isthmus_tools.engine.cpu_share import share_of_a_cpu
from isthmus_tools.netem import LinkShape, NetworkEmulator
from isthmus_tools.planner.choice import build_plan
from isthmus_tools.planner.enumeration import enumerate_candidates
from isthmus_tools.planner.inputs import from_photos
from isthmus_tools.profiling.slow_edge import SlowEdge
from isthmus_tools.usecases.demo_model import prepare
from isthmus_tools.usecases.function_urls import FunctionUrls
from isthmus_tools.usecases.profile import ProfileRequest, profile
from isthmus_tools.usecases.publication import publish_candidate
from isthmus_tools.zoo.photos import varied_photos

MODEL = "efficientnet-lite0"
# The int8 variant is at 0.18, and its top classes agree.
LIMITS = Constraints(max_error=0.25)
# The edge has a quarter of a CPU.
EDGE_SHARE = 0.25
REGISTRY = STATE / "adaptive-registry"
# Environment of both functions.
SHARED = {"threads": "1", "preload": "", "cache_bytes": "2GiB", "max_loaded_bytes": "1GiB", "guard_share": "0"}
_SETTINGS = RegistrySettings(registry=str(REGISTRY), cache_dir=str(STATE / "adaptive-cache"))


def photo() -> bytes:
    """A photo as a camera near the model would send, little larger than the model's input."""
    planned = PLANNED[MODEL].photo
    if planned is None:
        raise LookupError(f"{MODEL} takes no photo")
    return planned()


def planned(links: Sequence[Conditions], report: Report) -> dict[Conditions, str]:
    """A version of the model for each link, by reference, with a plan for an edge of EDGE_SHARE; made on first use."""
    registry = open_registry(_SETTINGS)
    references = {link: f"{MODEL}:{_alias(link)}" for link in links}
    if missing := [link for link in links if not _is_planned(references[link])]:
        report.say(f"planning {MODEL} for {len(missing)} links, once: a minute or two")
        prepare(_SETTINGS)
        _plan(missing)
    for reference in references.values():
        registry.resolve(reference)
    return references


def plan_of(reference: str) -> Plan:
    """The plan of a version."""
    registry = open_registry(_SETTINGS)
    plan = read_plan(registry.resolve(reference).bundle, registry.blob)
    if plan is None:
        raise LookupError(f"{reference} has no plan")
    return plan


def _alias(link: Conditions) -> str:
    return f"up{link.up_bps / 1e6:g}m{link.rtt_s * 1e3:g}ms".replace(".", "-")


def _is_planned(reference: str) -> bool:
    with contextlib.suppress(Missing):
        return open_registry(_SETTINGS).resolve(reference).bundle.plan is not None
    return False


def _plan(links: Sequence[Conditions]) -> None:
    registry = open_registry(_SETTINGS)
    with contextlib.ExitStack() as stack:
        edge, cloud = stack.enter_context(tiers_to_profile(REGISTRY, MODEL))
        slow = SlowEdge(1 / EDGE_SHARE, [edge.process.pid])
        (file := STATE / "adaptive.jpg").write_bytes(photo())
        urls = FunctionUrls(edge.url, cloud.url, PROFILE_TOKEN, slow)
        profiles = profile(
            ProfileRequest(model=MODEL, registry=_SETTINGS, functions=urls, photos=[file], new_version=False)
        ).profiles
        examples = from_photos(registry.resolve(MODEL).bundle, [photo()])
        photos = [path.read_bytes() for path in varied_photos()]
        cache = open_cache(_SETTINGS, registry)
        candidates = stack.enter_context(
            enumerate_candidates(
                registry,
                cache,
                MODEL,
                profiles,
                examples,
                "photo",
                links=links,
                objective="throughput",
                jpeg_photos=photos,
            )
        )
        for link in links:
            plan = build_plan(candidates, candidates.predict(link), link, "throughput", LIMITS)
            publish_candidate(registry, candidates, plan, _alias(link))


@dataclass(frozen=True)
class Site:
    """A running router at the edge, the function in the cloud, and the link between."""

    router: Process
    cloud: Process
    link: NetworkEmulator

    def query(self, body: bytes, **headers: str) -> Query:
        """A request of a photo; `headers` as of `Query.with_headers`."""
        return Query(f"{self.router.url}/", body, {"Content-Type": "image/jpeg"}).with_headers(**headers)


@contextlib.contextmanager
def site(reference: str, shape: LinkShape, *, share: float = EDGE_SHARE, **settings: str) -> Iterator[Site]:
    """A router with the head in its process and `share` of a CPU, and a cloud function behind a link.

    `settings` are the router's.
    """
    staged = stage_functions("router", "cloud-tail", registry=REGISTRY, model=reference)
    with contextlib.ExitStack() as stack:
        cloud = stack.enter_context(staged["cloud-tail"].start(**SHARED, cache_dir=str(STATE / "adaptive-cloud")))
        link = stack.enter_context(NetworkEmulator(cloud.url, shape))
        edge = {**SHARED, "hops": f"local,{link.url}", "cache_dir": str(STATE / "adaptive-edge"), **settings}
        with _one_cpu():
            router = stack.enter_context(staged["router"].start(**edge))
        cloud.wait_ready()
        router.wait_ready()
        # A start at a share of a CPU would take long.
        stack.enter_context(share_of_a_cpu(share, [router.process.pid]))
        yield Site(router, cloud, link)


@contextlib.contextmanager
def _one_cpu() -> Iterator[None]:
    """Processes that start in the block see one CPU, as a small device has, and run one segment at a time."""
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cpus)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cpus)
