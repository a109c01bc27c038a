"""`isthmus link` as a process of its own, undelayed by threads that compute in the caller's process."""

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
from isthmus_tools import parent_death

_RUN = "from isthmus_tools.cli import main; main()"


@contextlib.contextmanager
def link_to(
    url: str, *, uplink_bps: float = math.inf, downlink_bps: float = math.inf, rtt_s: float = 0.0
) -> Iterator[str]:
    """URL that reaches `url` over an emulated network, which runs within the block.

    Raises:
        LocalError: `url` is not http, or the process does not start.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise LocalError(
            f"{url} cannot be reached over a link: it takes http://HOST:PORT/…",
            hint="leave the link out to use the network that is there",
        )
    # The command has no notation for infinity, and rounds rates to whole bits.
    rates = {"--uplink": uplink_bps, "--downlink": downlink_bps}
    options = [
        text
        for name, bps in rates.items()
        for text in (name, "unlimited" if math.isinf(bps) else f"{max(1, round(bps))}bit")
    ]
    process = subprocess.Popen(
        [
            *(sys.executable, "-I", "-S", parent_death.__file__, str(os.getpid())),
            *(sys.executable, "-c", _RUN, "link", "--to", f"{parts.hostname}:{parts.port or 80}"),
            *(*options, "--rtt", f"{round(rtt_s * 1e9)}ns", "--every", "1h", "--json"),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield urlunsplit(parts._replace(netloc=_read_address(process)))
    finally:
        process.terminate()
        try:
            process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()


def _read_address(process: subprocess.Popen[str]) -> str:
    """HOST:PORT of the listener, read from the first line of output."""
    line = process.stdout.readline() if process.stdout else ""
    try:
        return f"127.0.0.1:{int(json.loads(line)['port'])}"
    except (ValueError, KeyError, TypeError) as e:
        process.kill()
        _, errors = process.communicate()
        raise LocalError(f"the link did not start: {errors.strip()[-300:] or line[:100]}") from e
