"""The choice of a request's route: model catalog, route selection, codec override, and the accuracy guard."""

from isthmus.routing.catalog import ModelCatalog, ServedModel
from isthmus.routing.codec_override import override_codec, parse_override
from isthmus.routing.guard import Guard
from isthmus.routing.selection import RouteSelector, SelectedRoute

__all__ = [
    "Guard",
    "ModelCatalog",
    "RouteSelector",
    "SelectedRoute",
    "ServedModel",
    "override_codec",
    "parse_override",
]
