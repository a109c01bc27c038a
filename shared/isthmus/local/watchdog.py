"""Rules of of-watchdog that hold here as well, where a function's process has no watchdog before it.

Source: of-watchdog 0.11.6, config/config.go.
"""

from __future__ import annotations

VARIABLES = frozenset(
    {
        *("fprocess", "function_process", "mode", "port", "upstream_url", "http_upstream_url", "content_type"),
        *("read_timeout", "write_timeout", "exec_timeout", "healthcheck_interval", "max_inflight", "ready_path"),
        *("prefix_logs", "log_buffer_size", "log_callid", "suppress_lock", "buffer_http", "http_buffer_req_body"),
        *("static_path", "jwt_auth", "jwt_auth_debug", "jwt_auth_local"),
    }
)
"""The environment variables that it reads."""
