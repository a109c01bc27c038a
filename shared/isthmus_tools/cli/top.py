"""`isthmus top`: routes, links, circuit breakers and queue of a router, live."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.live import Live
from rich.text import Text

from isthmus.errors import IsthmusError, RequestMalformed
from isthmus.units import format_duration, format_rate, parse_duration
from isthmus_tools.cli.console import errors, out, print_json, say, table
from isthmus_tools.cli.infer import ROUTER
from isthmus_tools.cli.options import ApiKey, AsJson, read_api_key, read_option, registry_settings
from isthmus_tools.cli.termination import until_signal

if TYPE_CHECKING:
    from isthmus.routing.state import CandidateState, HopState, ModelState, RouterState
    from isthmus_tools.usecases.routes import RouterView

# A look costs the router less than a request does, but is no reason to keep one busy.
MIN_INTERVAL_S = 0.1
_HOPS = ["hop", "breaker", "in flight", "calls", "failures", "round trip", "up", "down", "wait", "age"]
_ROUTES = ["route", "share", "req/s", "expected ms", "measured ms", "planned ms", "drift", "requests", "failures"]
_NOTES = ["exit", "memory", "degraded"]


def top(
    *,
    url: Annotated[str, typer.Option(envvar="ISTHMUS_URL", help="The router.")] = ROUTER,
    interval: Annotated[str, typer.Option(help="Time between looks, at least 100ms.")] = "1s",
    once: Annotated[bool, typer.Option("--once", help="Print one look, and leave.")] = False,
    timeout: Annotated[float, typer.Option(help="Longest wait for a look, in seconds.", min=0.001, max=86_400)] = 5.0,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a router's routes, links, circuit breakers and queue, live, until Ctrl-C.

    One look, as with --once, where the output is no terminal, and with --json.

    Example: `isthmus top --url https://edge.example/function/router --interval 500ms`
    """
    from isthmus.http.tls import open_trust
    from isthmus_tools.usecases.routes import RouterView

    with errors(as_json):
        interval_s = read_option(parse_duration, "--interval", interval)
        if interval_s < MIN_INTERVAL_S:
            raise RequestMalformed(f"--interval is {interval}; it is at least {format_duration(MIN_INTERVAL_S)}")
        trust = open_trust(registry_settings(""))
        view = RouterView(url, timeout_s=timeout, trust=trust, api_key=read_api_key(api_key))
        # The first look may fail: a wrong URL is an error of the command, not a router that is away.
        state = view.state()
        if as_json:
            print_json(msgspec.to_builtins(state))
        elif once or not out.is_terminal:
            show(url, state)
        else:
            _follow(view, state, interval_s)


def _follow(view: RouterView, state: RouterState, interval_s: float) -> None:
    """Draw looks until a signal; a router that is away may come back."""
    # The alternate screen, as of top(1): what was on the terminal before is there again afterwards.
    with until_signal() as leave, Live(_drawn(view.url, state), console=out, screen=True, auto_refresh=False) as live:
        while not leave.wait(interval_s):
            error = ""
            try:
                state = view.state()
            except IsthmusError as e:
                error = e.message
            live.update(_drawn(view.url, state, error), refresh=True)


def _drawn(url: str, state: RouterState, error: str = "") -> Text:
    """What `show` prints, as one picture."""
    # The tables of --once, so that both look the same; rich measures the terminal anew for each.
    with out.capture() as captured:
        show(url, state, error)
    return Text.from_ansi(captured.get())


def show(url: str, state: RouterState, error: str = "") -> None:
    """Print the state as tables; `error` says why it is an older one."""
    if error:
        say(f"{error}; below is the last look", "red")
    refusals = ", ".join(f"{count} {reason}" for reason, count in sorted(state.refusals.items()) if count)
    refused = f"{state.refused} refused" + (f" ({refusals})" if refusals else "")
    say(f"{url}: {state.working} of at most {state.limit} requests at work, {state.queued} queued, {refused}")
    table(
        "hops",
        _HOPS,
        [_hop_row(hop) for hop in state.hops],
        numbers=_HOPS[2:],
        # Last to go are the breaker and the link, by which routes are chosen.
        drop=["age", "wait", "calls", "in flight", "down", "failures"],
    )
    if not state.models:
        say("\nno request has named a model yet")
    for model in state.models:
        table(
            f"{model.name}:{model.version}, {model.rate:.1f} requests/s, {model.switches} switches",
            [*_ROUTES, *_NOTES],
            [_route_row(model, candidate) for candidate in _by_share(model.candidates)],
            numbers=_ROUTES[1:],
            drop=["memory", "requests", "failures", "planned ms", "drift", "degraded", "req/s"],
        )


def _hop_row(hop: HopState) -> list[str]:
    return [
        hop.name,
        hop.breaker,
        str(hop.in_flight),
        str(hop.calls),
        str(hop.failures),
        _time(hop.rtt_s),
        ("≥ " if hop.up_is_bound and hop.up_bytes_s else "") + _rate(hop.up_bytes_s),
        _rate(hop.down_bytes_s),
        _time(hop.wait_s) if hop.wait_s else "",
        _time(hop.age_s),
    ]


def _route_row(model: ModelState, route: CandidateState) -> list[str]:
    return [
        f"→ {route.name}" if route.name == model.preferred else f"  {route.name}",
        f"{route.share:.0%}",
        f"{model.rate * route.share:.1f}",
        *(_milliseconds(seconds) for seconds in (route.expected_s, route.measured_s, route.planned_s)),
        "" if route.drift is None else f"×{route.drift:.2f}",
        str(route.requests),
        str(route.failures),
        _exit(route),
        "loaded" if route.loaded else "not loaded",
        route.degraded,
    ]


def _exit(route: CandidateState) -> str:
    """The share of requests that end at the route's exit, or that the guard has closed it."""
    if (met := route.exit) is None:
        return ""
    differing = f", {met.disagreement:.2%} of {met.checks} differ" if met.checks else ""
    return f"closed at {met.cut}{differing}" if met.closed else f"{met.share:.0%} at {met.cut}{differing}"


def _by_share(candidates: Iterable[CandidateState]) -> list[CandidateState]:
    """The routes that are taken first, then in the plan's order."""
    return sorted(candidates, key=lambda route: -route.share)


def _milliseconds(seconds: float | None) -> str:
    return f"{seconds * 1000:.1f}" if seconds else ""


# Two digits: more of an estimate would flicker.
def _time(seconds: float | None) -> str:
    return "" if seconds is None else format_duration(float(f"{seconds:.2g}"))


def _rate(bytes_s: float | None) -> str:
    return "" if bytes_s is None else format_rate(float(f"{bytes_s * 8:.3g}"))
