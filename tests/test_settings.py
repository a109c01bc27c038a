"""Settings from the environment, and the docs that list them."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

import pytest

from isthmus.errors import SettingsError
from isthmus.settings import (
    AccessSettings,
    FunctionSettings,
    RegistrySettings,
    RouterSettings,
    SegmentSettings,
    TriggerSettings,
    parse_size,
)
from support.paths import ROOT

DOCS = ROOT / "docs" / "reference" / "settings.md"


def test_defaults_stand_where_the_environment_is_silent_or_empty() -> None:
    made = SegmentSettings.from_env({"registry": "/r", "threads": ""})
    assert (made.registry, made.threads, made.providers) == ("/r", 0, ("CPUExecutionProvider",))


def test_values_are_read_by_their_type() -> None:
    made = RouterSettings.from_env(
        {
            "registry": " s3://b/p ",
            "model": "m",
            "hops": "local, http://t ,",
            "cache_bytes": "1.5GiB",
            "deadline_s": "2.5",
        }
    )
    assert made.registry == "s3://b/p"
    assert made.hops == ("local", "http://t")
    assert made.cache_bytes == 3 * 2**29
    assert made.deadline_s == 2.5


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("threads", "two"),
        ("threads", "-1"),
        ("cache_bytes", "lots"),
        ("cache_bytes", "5 parsecs"),
        ("deadline_s", "soon"),
        ("deadline_s", "nan"),
        ("deadline_s", "-1"),
        ("exec_timeout", "soon"),
        ("exec_timeout", "30 s"),
        ("exec_timeout", "-1s"),
        ("max_concurrency", "0"),
        ("log_level", "loud"),
        ("registry", ""),
    ],
)
def test_a_bad_value_stops_the_start_and_names_the_variable(variable: str, value: str) -> None:
    with pytest.raises(SettingsError) as e:
        SegmentSettings.from_env({"registry": "/r"} | {variable: value})
    assert e.value.facts["variable"] == variable
    assert variable in e.value.message


def test_those_who_wait_leave_room_for_calls() -> None:
    with pytest.raises(SettingsError, match="less than max_concurrency") as e:
        TriggerSettings.from_env({"max_concurrency": "24"})
    assert e.value.facts["variable"] == "max_waiters"
    assert TriggerSettings.from_env({"max_concurrency": "25"}).max_waiters == 24


@pytest.mark.parametrize(
    ("exec_timeout", "deadline_s", "longest_s"),
    [("", "", 20.0), ("10s", "", 9.0), ("10", "", 9.0), ("1m", "60", 59.0), ("200ms", "", 0.15), ("0", "40", 40.0)],
)
def test_a_request_ends_a_margin_before_the_watchdogs_exec_timeout(
    exec_timeout: str, deadline_s: str, longest_s: float
) -> None:
    env = {"registry": "/r", "exec_timeout": exec_timeout, "deadline_s": deadline_s}
    assert SegmentSettings.from_env(env).longest_s == pytest.approx(longest_s)


@pytest.mark.parametrize(
    ("text", "size"),
    [("512", 512), ("64KiB", 65536), ("200MB", 200_000_000), ("1.5Gi", 1610612736), ("2g", 2 * 10**9), ("7 b", 7)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


def test_a_size_of_hundreds_of_digits_is_none() -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size("9" * 400 + "GB")


def test_the_docs_list_every_setting_with_its_default_and_meaning() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", DOCS.read_text(), re.MULTILINE))
    known = {f.name: f for cls in (RouterSettings, TriggerSettings) for f in fields(cls)}
    assert rows.keys() == known.keys()
    for name, row in rows.items():
        default, _, meaning = row.partition(" | ")
        assert meaning == known[name].metadata["help"].replace("|", "\\|")
        assert default == shown(known[name].default)


def shown(default: object) -> str:
    if default is MISSING:
        return "required"
    return f"`{','.join(default) if isinstance(default, tuple) else default}`" if default not in ("", ()) else "empty"


if __name__ == "__main__":  # prints docs/reference/settings.md's tables anew
    for cls in (RegistrySettings, AccessSettings, FunctionSettings, SegmentSettings, RouterSettings, TriggerSettings):
        print(f"\n## {cls.__name__}\n\n| variable | default | what |\n|---|---|---|")  # noqa: T201
        for f in fields(cls):
            if f.name in cls.__annotations__:
                print(f"| `{f.name}` | {shown(f.default)} | {f.metadata['help']} |")  # noqa: T201


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("threads", "-1", "not negative"),
        ("threads", "99999999999", "at most 1,024"),
        ("max_concurrency", "0", "at least 1"),
        ("max_concurrency", "999999999", "at most 4,096"),
        ("deadline_s", "0", "at least 0.001"),
        ("deadline_s", "1e300", "at most 604,800"),
        ("exec_timeout", "999999999999h", "at most 604,800"),
        ("registry_attempts", "0", "at least 1"),
        ("registry_timeout_s", "0", "at least 0.001"),
        ("hop_attempts", "0", "at least 1"),
        ("hop_connect_timeout_s", "0", "at least 0.001"),
        ("guard_share", "7", "at most 1"),
        ("cache_bytes", "999999999999999999TB", "at most"),
    ],
)
def test_numbers_that_cannot_be_meant_stop_the_start(name: str, text: str, said: str) -> None:
    with pytest.raises(SettingsError, match=f"the setting {name} is .*{said}"):
        RouterSettings.from_env({"registry": "/r", "model": "m", "hops": "local", name: text})


@pytest.mark.parametrize("header", ["X Caller", "X-Caller:", "caf\u00e9", "x" * 81, "X-Forwarded-For", "forwarded"])
def test_a_header_of_callers_that_is_none_or_never_arrives_stops_the_start(header: str) -> None:
    with pytest.raises(SettingsError, match="caller_header") as e:
        RouterSettings.from_env({"registry": "/r", "model": "m", "hops": "local", "caller_header": header})
    assert e.value.facts["variable"] == "caller_header"
