"""Rules of of-watchdog that hold here as well, where no watchdog stands before a function's process.

Source: of-watchdog 0.11.6, config/config.go, executor/http_runner.go, and its concurrency limiter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from isthmus.units import parse_duration

DEFAULT_TIMEOUT_S = 30.0
INTERNAL = "X-OpenFaaS-Internal"
TIMED_OUT = {INTERNAL: "of-watchdog"}
"""The header of the empty 504 that ends a call at its timeout."""
REFUSED = {INTERNAL: "faas-middleware"}
"""The header of the 429 for a call over max_inflight."""
VARIABLES = frozenset(
    {
        *("fprocess", "function_process", "mode", "port", "upstream_url", "http_upstream_url", "content_type"),
        *("read_timeout", "write_timeout", "exec_timeout", "healthcheck_interval", "max_inflight", "ready_path"),
        *("prefix_logs", "log_buffer_size", "log_callid", "suppress_lock", "buffer_http", "http_buffer_req_body"),
        *("static_path", "jwt_auth", "jwt_auth_debug", "jwt_auth_local"),
    }
)
"""The environment variables that it reads."""


@dataclass(frozen=True)
class Watchdog:
    """The limits of one replica's calls.

    Units: exec_timeout_s is seconds; 0 is no limit, as 0 is for max_inflight.
    """

    exec_timeout_s: float = DEFAULT_TIMEOUT_S
    max_inflight: int = 0

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """The limits that the variables `exec_timeout` and `max_inflight` set; a malformed one becomes the default."""
        inflight = env.get("max_inflight", "")
        return cls(
            _seconds(env.get("exec_timeout", ""), DEFAULT_TIMEOUT_S),
            int(inflight) if _is_whole(inflight) else 0,
        )

    def timeout_s(self, x_timeout: str) -> float:
        """Seconds that a call may take, 0 for no limit: X-Timeout shortens exec_timeout and never lengthens it.

        Where there is no exec_timeout an X-Timeout exceeds it, so the function alone keeps to it.
        """
        try:
            return min(parse_duration(x_timeout), self.exec_timeout_s)
        except ValueError:
            return self.exec_timeout_s

    def refuses(self, in_flight: int) -> bool:
        """Whether a call beside `in_flight` others is one too many."""
        return 0 < self.max_inflight <= in_flight

    @property
    def refusal(self) -> str:
        """The body of the 429."""
        return f"Concurrent request limit exceeded. Max concurrent requests: {self.max_inflight}\n"


def _seconds(text: str, default: float) -> float:
    if _is_whole(text):
        return float(text)
    try:
        return parse_duration(text)
    except ValueError:
        return default


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10
