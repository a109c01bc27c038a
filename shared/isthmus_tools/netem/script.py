"""Script of a network emulator: timed changes as JSON lines or a JSON list. docs/how-to/link.md lists the keys."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from isthmus.errors import LocalError
from isthmus.units import parse_duration, parse_rate
from isthmus_tools.netem.shaping import LinkShape

# Between objects of a list, and between lines of JSON.
_GAP = re.compile(r"[\s,]*")
_LINE_GAP = re.compile(r"\s*")


@dataclass(frozen=True)
class ScriptStep:
    """A change `at_s` seconds after the start: fields of the shape, and faults; `written` is the source text."""

    at_s: float
    shape: Mapping[str, Any] = field(default_factory=dict)
    down: bool | None = None
    refuse: bool | None = None
    stall_s: float = 0.0
    cut: bool = False
    written: str = ""


def parse_script(text: str) -> tuple[ScriptStep, ...]:
    """Parse the steps of a script, in order of time.

    Raises:
        LocalError: not JSON, an unknown key, a value out of range, or decreasing times; facts: `line`.
    """
    steps: list[ScriptStep] = []
    shape = LinkShape()
    for line, entry in _entries(text):
        try:
            step = _step(entry)
            # LinkShape checks values, so a step that no network could have is refused with its line.
            shape = replace(shape, **step.shape)
            if steps and step.at_s < steps[-1].at_s:
                raise ValueError(f"at_s is {step.at_s:g}, before the step above it")
        except (ValueError, LocalError) as e:
            raise LocalError(f"line {line} of the link's script: {e.args[0]}", line=line) from e
        steps.append(step)
    return tuple(steps)


def _entries(text: str) -> Iterator[tuple[int, Any]]:
    """Each step as parsed JSON, with the number of its first line."""
    listed = text.lstrip().startswith("[")
    gap, at = (_GAP, text.index("[") + 1) if listed else (_LINE_GAP, 0)
    decoder = json.JSONDecoder()
    try:
        if listed:
            json.loads(text)
        while (at := gap.match(text, at).end()) < len(text) and text[at] != "]":  # type: ignore[union-attr]
            line = text.count("\n", 0, at) + 1
            entry, at = decoder.raw_decode(text, at)
            yield line, entry
    except json.JSONDecodeError as e:
        raise LocalError(
            f"line {e.lineno} of the link's script is no JSON: {e.msg}",
            line=e.lineno,
            hint='a step looks like {"at_s": 5, "uplink": "1mbit"}, one on a line or all in a list',
        ) from e
    except RecursionError as e:
        raise LocalError("the link's script is nested too deeply") from e


def _step(entry: Any) -> ScriptStep:
    if not isinstance(entry, dict) or "at_s" not in entry:
        raise ValueError('a step is an object with at_s, such as {"at_s": 5, "uplink": "1mbit"}')
    shape: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in entry.items():
        if key in _SHAPE:
            name, read = _SHAPE[key]
            shape[name] = read(key, value)
        elif key in _FAULTS:
            rest[key] = _FAULTS[key](key, value)
        else:
            raise ValueError(f"{key!r} is none of {', '.join([*_FAULTS, *_SHAPE])}")
    return ScriptStep(shape=shape, written=json.dumps(entry, ensure_ascii=False), **rest)


def _text(read: Callable[[str], float]) -> Callable[[str, Any], float]:
    def parse(key: str, value: Any) -> float:
        if not isinstance(value, str):
            raise ValueError(f"{key} is {json.dumps(value)}; it is a text with its unit")
        try:
            return read(value)
        except ValueError as e:
            raise ValueError(f"{key}: {e}") from e

    return parse


def _number(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
        raise ValueError(f"{key} is {json.dumps(value)}; it is a number, 0 or more")
    return float(value)


def _flag(key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {json.dumps(value)}; it is true or false")
    return value


_FAULTS: dict[str, Callable[[str, Any], Any]] = {
    "at_s": _number,
    "down": _flag,
    "refuse": _flag,
    "cut": _flag,
    "stall_s": _number,
}
_SHAPE: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
    "uplink": ("uplink_bps", _text(parse_rate)),
    "downlink": ("downlink_bps", _text(parse_rate)),
    "rtt": ("rtt_s", _text(parse_duration)),
    "jitter": ("jitter_s", _text(parse_duration)),
    "up_delay": ("up_delay_s", _text(parse_duration)),
    "down_delay": ("down_delay_s", _text(parse_duration)),
    "connect_rtts": ("connect_rtts", _number),
    "slow_start": ("slow_start", _flag),
    "cuts_per_s": ("cuts_per_s", _number),
}
KEYS = (*_FAULTS, *_SHAPE)
