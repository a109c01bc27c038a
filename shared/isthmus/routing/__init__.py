"""The choice of a request's route: model catalog, candidate routes, dispatch, and the accuracy guard."""

from isthmus.routing.attempts import GenerationRoute
from isthmus.routing.canary_trials import CanaryTrials
from isthmus.routing.candidates import RouteCandidate, ServedModel
from isthmus.routing.catalog import ModelCatalog, VersionDraw
from isthmus.routing.codec_override import override_codec, parse_override
from isthmus.routing.comparison import Comparison
from isthmus.routing.dispatcher import DEGRADED_HEADER, EXIT_HEADER, ROUTE_HEADER, Attempt, Dispatcher
from isthmus.routing.estimates import Estimates
from isthmus.routing.guard import Guard
from isthmus.routing.links import LinkEstimate
from isthmus.routing.probes import LinkProber
from isthmus.routing.replicas import watch
from isthmus.routing.selection import RouteSelector
from isthmus.routing.warming import Warming
from isthmus.routing.watched_hop import WatchedHop

__all__ = [
    "DEGRADED_HEADER",
    "EXIT_HEADER",
    "ROUTE_HEADER",
    "Attempt",
    "CanaryTrials",
    "Comparison",
    "Dispatcher",
    "Estimates",
    "GenerationRoute",
    "Guard",
    "LinkEstimate",
    "LinkProber",
    "ModelCatalog",
    "RouteCandidate",
    "RouteSelector",
    "ServedModel",
    "VersionDraw",
    "Warming",
    "WatchedHop",
    "override_codec",
    "parse_override",
    "watch",
]
