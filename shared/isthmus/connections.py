"""Kept-alive connections to hops, where the time to connect has a bound of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection


def open_pool(connect_timeout_s: float) -> urllib3.PoolManager:
    """A pool for all hops; no connection takes longer than `connect_timeout_s` to make.

    urllib3's own connect timeout bounds the sending of the body too, so that a frame on a slow uplink would count as a
    hop that cannot be reached. Here a request's `total` timeout is what bounds sending.
    """

    class Plain(HTTPConnection):
        def connect(self) -> None:
            with _at_most(self, connect_timeout_s):
                super().connect()

    class Tls(HTTPSConnection):
        def connect(self) -> None:
            with _at_most(self, connect_timeout_s):
                super().connect()

    class PlainPool(urllib3.HTTPConnectionPool):
        ConnectionCls = Plain

    class TlsPool(urllib3.HTTPSConnectionPool):
        ConnectionCls = Tls

    pool = urllib3.PoolManager(num_pools=8, maxsize=64, block=False)
    pool.pool_classes_by_scheme = {"http": PlainPool, "https": TlsPool}
    return pool


@contextmanager
def _at_most(connection: HTTPConnection, seconds: float) -> Iterator[None]:
    whole = connection.timeout
    connection.timeout = seconds if whole is None else min(whole, seconds)
    try:
        yield
    finally:
        connection.timeout = whole
    if connection.sock is not None:
        connection.sock.settimeout(whole)
