"""`isthmus link`: an emulated network between a client and a target on this machine."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from isthmus.errors import LocalError
from isthmus.units import format_duration, format_rate, format_size, parse_duration, parse_rate
from isthmus_tools.cli.console import errors, say
from isthmus_tools.cli.options import read_option
from isthmus_tools.cli.termination import until_signal

if TYPE_CHECKING:
    from isthmus_tools.netem.emulator import LinkCounters, NetworkEmulator
    from isthmus_tools.netem.script import ScriptStep

# Between looks at the counters: short for a script's steps, long for an idle terminal.
_TICK_S = 0.2
_RATE = "such as 10mbit, 1.5Mbit/s or unlimited."


def link(
    *,
    to: Annotated[str, typer.Option(help="Where the link leads: HOST:PORT or an http URL.")],
    port: Annotated[
        int, typer.Option(help="Port to listen on, on 127.0.0.1; 0 takes a free one.", min=0, max=65535)
    ] = 0,
    uplink: Annotated[str, typer.Option(help=f"Rate from client to target, {_RATE}")] = "unlimited",
    downlink: Annotated[str, typer.Option(help=f"Rate from target to client, {_RATE} As --uplink if not given.")] = "",
    rtt: Annotated[str, typer.Option(help="Round-trip time, half of it each way.")] = "0ms",
    jitter: Annotated[str, typer.Option(help="The round trip varies by up to ± this.")] = "0ms",
    up_delay: Annotated[str | None, typer.Option(help="Delay from client to target, instead of half of --rtt.")] = None,
    down_delay: Annotated[str | None, typer.Option(help="Delay from target to client, likewise.")] = None,
    connect_rtts: Annotated[float, typer.Option(help="Round trips before a new connection carries a byte.", min=0)] = 1,
    slow_start: Annotated[bool, typer.Option(help="Model TCP's slow start.")] = False,
    cuts_per_s: Annotated[float, typer.Option(help="Rate at which each connection is reset.", min=0)] = 0,
    script: Annotated[Path | None, typer.Option(help="What changes when: JSON lines, see docs/how-to/link.md.")] = None,
    every: Annotated[str, typer.Option(help="How often to print the counters, where they changed.")] = "5s",
    # Not `AsJson`: documents follow each other, one a line, for as long as the link runs.
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object a line instead of text.")] = False,
) -> None:
    """Relay to a target over an emulated network with set bandwidth, delay and faults, until Ctrl-C.

    Example: `isthmus link --to 127.0.0.1:8080 --port 9000 --uplink 10mbit --downlink 50mbit --rtt 20ms`
    """
    from isthmus_tools.netem import LinkShape, NetworkEmulator

    with errors(as_json):
        shape = LinkShape(
            uplink_bps=read_option(parse_rate, "--uplink", uplink),
            downlink_bps=read_option(parse_rate, "--downlink", downlink or uplink),
            rtt_s=read_option(parse_duration, "--rtt", rtt),
            jitter_s=read_option(parse_duration, "--jitter", jitter),
            up_delay_s=None if up_delay is None else read_option(parse_duration, "--up-delay", up_delay),
            down_delay_s=None if down_delay is None else read_option(parse_duration, "--down-delay", down_delay),
            connect_rtts=connect_rtts,
            slow_start=slow_start,
            cuts_per_s=cuts_per_s,
        )
        steps = _script(script) if script else ()
        every_s = read_option(parse_duration, "--every", every)
        with NetworkEmulator(to, shape, port=port, script=steps) as running, until_signal() as leave:
            printer = _Lines() if as_json else _Text()
            printer.begins(running, to)
            # Counters are read once a tick, so they cannot be printed more often.
            _watch(running, steps, max(every_s, _TICK_S), leave, printer)


class _Text:
    def begins(self, running: NetworkEmulator, to: str) -> None:
        shape = running.shape
        up, down = shape.up, shape.down
        self._say(f"{running.url} → {to}, until Ctrl-C")
        self._say(f"  up    {format_rate(up.bps)}, {format_duration(up.delay_s)} ± {format_duration(up.jitter_s)}")
        self._say(
            f"  down  {format_rate(down.bps)}, {format_duration(down.delay_s)} ± {format_duration(down.jitter_s)}"
        )
        self._say(
            f"  a new connection waits {format_duration(shape.connect_rtts * shape.round_trip_s)}; "
            f"slow start {'is' if shape.slow_start else 'is not'} modelled; losses and headers are not"
        )

    def step(self, step: ScriptStep) -> None:
        self._say(f"{step.at_s:8.1f} s  {step.written}")

    def counts(self, at_s: float, now: LinkCounters, up_bps: float, down_bps: float) -> None:
        self._say(
            f"{at_s:8.1f} s  up {format_size(now.bytes_up)} ({format_rate(up_bps)})"
            f"  down {format_size(now.bytes_down)} ({format_rate(down_bps)})"
            f"  connections {now.connections}, {now.open} open, {now.cuts} cut"
        )

    def _say(self, text: str) -> None:
        say(text)


class _Lines:
    def begins(self, running: NetworkEmulator, to: str) -> None:
        shape = asdict(running.shape)
        # JSON has no infinity: an unlimited rate is null.
        shape |= {name: None for name in ("uplink_bps", "downlink_bps") if shape[name] == float("inf")}
        self._say({"url": running.url, "port": running.port, "to": to, "shape": shape})

    def step(self, step: ScriptStep) -> None:
        self._say({"step": json.loads(step.written)})

    def counts(self, at_s: float, now: LinkCounters, up_bps: float, down_bps: float) -> None:
        self._say({"at_s": round(at_s, 3), **asdict(now), "up_bps": round(up_bps), "down_bps": round(down_bps)})

    def _say(self, document: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(document) + "\n")
        # A program that started the link waits for the first line, which has the port.
        sys.stdout.flush()


def _watch(
    running: NetworkEmulator,
    steps: Sequence[ScriptStep],
    every_s: float,
    leave: threading.Event,
    printer: _Text | _Lines,
) -> None:
    began = shown_at = time.monotonic()
    waiting = list(steps)
    shown = type(running.counters)()
    while True:
        leaving = leave.wait(_TICK_S)
        now, counters = time.monotonic(), running.counters
        while waiting and began + waiting[0].at_s <= now:
            printer.step(waiting.pop(0))
        if leaving or now - shown_at >= every_s:
            if leaving or counters != shown:
                up, down = counters.bytes_up - shown.bytes_up, counters.bytes_down - shown.bytes_down
                printer.counts(now - began, counters, up * 8 / (now - shown_at), down * 8 / (now - shown_at))
            shown_at, shown = now, counters
        if leaving:
            return


def _script(path: Path) -> tuple[ScriptStep, ...]:
    from isthmus_tools.netem.script import parse_script

    try:
        return parse_script(path.read_text())
    except (OSError, UnicodeDecodeError) as e:
        raise LocalError(f"the link's script {path} cannot be read: {getattr(e, 'strerror', None) or e}") from e
