"""Hops to the functions that are measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from isthmus.pipeline import HttpHop

CONNECT_S = 5.0
# A measured function answers with whatever its segment computes, often as float32.
_ATTEMPTS, _MAX_REPLY_BYTES = 3, 2**30


@contextmanager
def hops_by_url(urls: Iterable[str]) -> Iterator[Mapping[str, HttpHop]]:
    """A hop for each of the URLs, each once, for the block."""
    with ExitStack() as stack:
        hops = {
            url: HttpHop(url, attempts=_ATTEMPTS, connect_timeout_s=CONNECT_S, max_reply_bytes=_MAX_REPLY_BYTES)
            for url in dict.fromkeys(urls)
        }
        for hop in hops.values():
            stack.callback(hop.close)
        yield hops
