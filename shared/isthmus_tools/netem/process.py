"""`isthmus link` as a process of its own, so that what computes beside it does not delay it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit, urlunsplit

from isthmus.errors import LocalError
from isthmus_tools import parent_death as leash

_RUN = "from isthmus_tools.cli import main; main()"


@contextlib.contextmanager
def link_to(
    url: str, *, uplink_bps: float = math.inf, downlink_bps: float = math.inf, rtt_s: float = 0.0
) -> Iterator[str]:
    """The URL by which `url` is reached over such a link, which is there as long as the block lasts.

    Raises:
        LocalError: `url` is not http, or the link does not start.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise LocalError(
            f"{url} cannot be reached over a link: it takes http://HOST:PORT/…",
            hint="leave the link out to use the network that is there",
        )
    rates = {"--uplink": uplink_bps, "--downlink": downlink_bps}
    options = [
        text
        for name, bps in rates.items()
        for text in (name, "unlimited" if math.isinf(bps) else f"{max(1, round(bps))}bit")
    ]
    process = subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", leash.__file__, str(os.getpid())),
            *(sys.executable, "-c", _RUN, "link", "--to", f"{parts.hostname}:{parts.port or 80}"),
            *(*options, "--rtt", f"{round(rtt_s * 1e9)}ns", "--every", "1h", "--json"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        place = _place(process)
        yield urlunsplit(parts._replace(netloc=place))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _place(process: subprocess.Popen[str]) -> str:
    """Where it listens, as its first line says."""
    line = process.stdout.readline() if process.stdout else ""
    try:
        return f"127.0.0.1:{int(json.loads(line)['port'])}"
    except (ValueError, KeyError, TypeError) as e:
        process.kill()
        _, said = process.communicate()
        raise LocalError(f"the link did not start: {said.strip()[-300:] or line[:100]}") from e
