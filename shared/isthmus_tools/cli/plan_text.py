"""Plans as text and JSON: the candidates with the terms of their cost, the reasons of the choice, and the sweep."""

from __future__ import annotations

import json
import statistics
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from isthmus.artifacts.plan import TERMS, Candidate, Plan, PlannedMix, to_json
from isthmus.units import format_duration, format_rate, format_size
from isthmus_tools.cli.answers_text import show_answer_refusals, show_answer_terms, show_answers
from isthmus_tools.cli.console import say, table
from isthmus_tools.planner.choice import GridCell, behind_text, grid
from isthmus_tools.planner.regions import RegionCell, RegionMap, region_map
from isthmus_tools.planner.throughput import stage_seconds
from isthmus_tools.usecases.explain import PlanExplanation, Refusal, in_words

if TYPE_CHECKING:
    # Imports the planner, and with it onnx-ir: a second that `explain` need not wait.
    from isthmus_tools.usecases.map_check import CheckedCell

# Rows for a terminal; --json has all.
SHOWN = 12
# A terminal has room for few columns.
_RIVALS = 4
# A cell has room for a letter only.
_LETTERS = string.ascii_uppercase + string.ascii_lowercase


@dataclass(frozen=True)
class Sweeps:
    """The best candidates over bandwidth: by round trip, and by edge slowdown."""

    round_trips: Sequence[Sequence[GridCell]]
    regions: RegionMap
    checked: Sequence[CheckedCell] = ()

    @classmethod
    def of(cls, plan: Plan, planned: float | None = None) -> Sweeps:
        """The sweeps of a plan; `planned` as in `region_map`."""
        round_trips = grid(plan.candidates, plan.objective, plan.constraints)
        return cls(round_trips, region_map(plan, planned=planned))


def document(plan: Plan, version: str, sweeps: Sweeps | None = None) -> dict[str, Any]:
    """The plan's own document, its published version, and the sweep, JSON-ready."""
    doc: dict[str, Any] = {"version": version, "typical_gap": plan.typical_gap, "plan": json.loads(to_json(plan))}
    if sweeps is not None:
        doc["map"] = {**sweeps.regions.document(), "checked": [cell.document() for cell in sweeps.checked]}
        doc["sweep"] = [
            {
                "bandwidth_bps": cell.conditions.up_bps,
                "rtt_s": cell.conditions.rtt_s,
                "best": cell.best,
                "seconds": cell.seconds,
            }
            for row in sweeps.round_trips
            for cell in row
        ]
    return doc


def show(plan: Plan, *, refusals: int = SHOWN) -> None:
    """Print the candidates, the fastest first and refused candidates last, then the reasons.

    At most `refusals` refused candidates are printed with their reasons.
    """
    over = link_text(plan)
    if plan.generation is not None:
        show_answers(plan, over)
        _show_reasons(plan, refusals)
        return
    # A measurement goes before any prediction, however fast the prediction is.
    ranked = sorted(plan.candidates, key=lambda c: (bool(c.refused), c.measured is None, c.seconds))
    shown = ranked[:SHOWN]
    has_prices = any(c.price is not None for c in plan.candidates)
    joules = any(c.energy_j is not None for c in plan.candidates)
    memory = plan.constraints.edge_memory_bytes is not None
    exits = any(c.exit is not None for c in shown)
    columns = ["candidate", "measured, ms", "runs", "predicted", "apart", "up", "error"] + ["edge memory"] * memory
    columns += ["exit"] * exits
    # A price file need not name a currency.
    columns += [f"price, {plan.currency}".rstrip(", ")] * has_prices + ["energy, J"] * joules
    # Without measurements the predictions are compared.
    drop = ["runs", "apart", "edge memory", "error", *["predicted"] * plan.measured]
    rows = []
    for candidate in shown:
        row = [_name(plan, candidate), *_seen(candidate), f"{candidate.predicted.total * 1e3:.1f}", _apart(candidate)]
        row += [format_size(candidate.up_bytes), _error(candidate)]
        row += [format_size(candidate.edge_memory_bytes)] * memory
        row += [f"{candidate.exit.share:.0%}" if candidate.exit is not None else ""] * exits
        row += [f"{candidate.price:.3g}" if candidate.price is not None else ""] * has_prices
        row += [f"{candidate.energy_j:.3g}" if candidate.energy_j is not None else ""] * joules
        rows.append(row)
    table(f"{plan.model} for {plan.objective}, {over}", columns, rows, numbers=columns[1:], drop=drop)
    if len(ranked) > len(shown):
        say(f"and {len(ranked) - len(shown)} more: --json has all")
    if plan.mix is not None:
        _show_mix(plan, plan.mix)
    _show_reasons(plan, refusals)


def link_text(plan: Plan) -> str:
    """The plan's link as the end of a title."""
    c = plan.conditions
    if c.adds_nothing:
        return "over the network that is there"
    return f"over {format_rate(c.up_bps)} up, {format_rate(c.down_bps)} down, {format_duration(c.rtt_s)}"


def _show_reasons(plan: Plan, refusals: int) -> None:
    """Print the reasons, and at most so many refused candidates with theirs."""
    for sentence in plan.why:
        say(f"- {sentence}")
    if (gap := plan.typical_gap) is not None:
        say(f"- measurements are {gap:.0%} from predictions in the median")
    if plan.generation is not None:
        if refusals:
            show_answer_refusals(plan)
        return
    refused = sorted((c for c in plan.candidates if c.refused), key=lambda c: (c.measured is None, c.seconds))
    if refused and refusals:
        say("refused:")
        for candidate in refused[:refusals]:
            say(f"  {candidate.name}: {candidate.refused}")
        if len(refused) > refusals:
            say(f"  and {len(refused) - refusals} more: isthmus explain tells why")


def _show_mix(plan: Plan, mix: PlannedMix) -> None:
    """Print the candidates that share the requests, and what the rate uses of each resource."""
    stages = {c.name: stage_seconds(c) for c in plan.candidates}
    columns = ["route", "share", "requests a second", *(f"{name}, ms" for name in mix.used)]
    rows = [
        [name, f"{share:.0%}", f"{share * mix.rate:.1f}", *(f"{s * 1e3:.1f}" for s in stages[name])]
        for name, share in sorted(mix.shares.items(), key=lambda item: -item[1])
    ]
    rows.append(["used", "100%", f"{mix.rate:.1f}", *(f"{used:.0%}" for used in mix.used.values())])
    gains = [f"{price:.2g}" if price > 1e-9 else "" for price in mix.prices.values()]
    rows.append(["gain of 1% more", "", "", *gains])
    table(f"{plan.model}: the most requests a second, by several routes", columns, rows, numbers=columns[1:])


def explain(explanation: PlanExplanation) -> None:
    """Print the choice in words, the terms of its cost beside its runners-up, and every refusal with its figure."""
    plan = explanation.plan
    _show_terms(plan, [runner_up.candidate for runner_up in explanation.runners_up[:_RIVALS]])
    show(plan, refusals=0)
    say(f"chosen: {in_words(plan.choice)} ({plan.chosen})", "bold")
    if explanation.runners_up:
        say(f"runners-up for {plan.objective}:")
    for runner_up in explanation.runners_up[:_RIVALS]:
        say(f"  {runner_up.what} ({runner_up.candidate}): {behind_text(runner_up.behind)}")
    if explanation.refusals:
        say("refused:")
    for refusal in explanation.refusals:
        name = f" ({refusal.name})" if refusal.is_candidate else ""
        say(f"  {refusal.what}{name}: {refusal.reason}{_agreement(refusal)}")


def _agreement(refusal: Refusal) -> str:
    """The share of predictions kept, unless the reason states the share."""
    if refusal.agreement is None or f"{refusal.agreement:.1%}" in refusal.reason:
        return ""
    asked = "" if refusal.asked is None else f", {refusal.asked:.1%} asked"
    return f"; it keeps {refusal.agreement:.1%} of {refusal.inputs} predictions{asked}"


def _show_terms(plan: Plan, rivals: Sequence[str]) -> None:
    columns = [plan.choice, *(c for name in rivals for c in plan.candidates if c.name == name)]
    if plan.generation is not None:
        show_answer_terms(plan, columns)
        return
    rows: list[list[str]] = []
    for term in TERMS:
        seconds = [c.predicted.seconds[term] for c in columns]
        # A term without seconds explains no difference.
        if any(seconds):
            rows.append([term.replace("_", " "), *(f"{s * 1e3:.2f}" if s else "" for s in seconds)])
    rows.append(["predicted", *(f"{c.predicted.total * 1e3:.2f}" for c in columns)])
    rows.append(["measured", *("" if c.measured is None else f"{c.measured.median * 1e3:.2f}" for c in columns)])
    if any(c.exit is not None for c in columns):
        rows.append(["exit, %", *("" if c.exit is None else f"{100 * c.exit.share:.1f}" for c in columns)])
    rows.append(["edge run is", *(c.predicted.sources.edge for c in columns)])
    rows.append(["cloud run is", *(c.predicted.sources.cloud for c in columns)])
    names = [c.name for c in columns]
    title = f"{plan.model}: the terms of {plan.chosen} and of those behind it, ms"
    # From the last on: the candidate next to the choice stays.
    table(title, ["term", *names], rows, numbers=names, drop=names[:1:-1])


def show_sweeps(sweeps: Sweeps) -> None:
    """Print both sweeps, the map that names the regions first."""
    _show_regions(sweeps.regions)
    if sweeps.checked:
        _show_checked(sweeps.checked)
    _show_round_trips(sweeps.round_trips)


def _show_regions(regions: RegionMap) -> None:
    requested = regions.requested()
    rates = [format_rate(cell.conditions.up_bps).replace("bit/s", "") for cell in regions.cells[0]]
    rows = [[f"{row[0].slowdown:g}×", *(_region(cell, cell is requested) for cell in row)] for row in regions.cells]
    over = "the cloud" if regions.over_cloud else "the planned edge"
    table(
        f"where splitting pays: the best for {regions.objective} by edge slowdown over {over} and bit/s, its ms,"
        f" predicted at {format_duration(regions.rtt_s)} of round trip",
        ["", *rates],
        rows,
        numbers=rates,
        drop=_every_other(rates),
    )
    counts = regions.counts
    say(", ".join(f"{region} is best in {count}" for region, count in counts.items()) + f" of {sum(counts.values())}")
    if requested is not None:
        lead = "" if requested.lead is None else f", by {requested.lead:.1%} over the best of another kind"
        say(f"in brackets, nearest to {regions.planned:.3g}× and the link: {requested.best or 'none'}{lead}")
    splits = dict.fromkeys(cell.best for row in regions.cells for cell in row if cell.region == "split")
    if splits:
        say(f"splits: {', '.join(splits)}")


def _show_checked(checked: Sequence[CheckedCell]) -> None:
    rows = []
    for one in checked:
        where = [f"{one.cell.slowdown:g}×", format_rate(one.cell.conditions.up_bps)]
        for i, c in enumerate(one.candidates):
            measured = "it failed" if c.measured is None else f"{c.measured.median * 1e3:.0f}"
            best = "→ " if c.name == one.measured_best else ""
            rows.append([*(where if not i else ["", ""]), best + c.name, f"{c.predicted.total * 1e3:.0f}", measured])
    table(
        "cells of the map, measured: the best and the best of another kind as predicted; →: measured best",
        ["edge", "link", "candidate", "predicted, ms", "measured, ms"],
        rows,
        numbers=["predicted, ms", "measured, ms"],
    )
    gaps = [abs(gap) for one in checked for gap in one.gaps]
    apart = f"; measurements are {statistics.median(gaps):.0%} from predictions in the median" if gaps else ""
    say(f"the best is as predicted in {sum(one.as_predicted for one in checked)} of {len(checked)} cells{apart}")


def _region(cell: RegionCell, is_requested: bool) -> str:
    text = f"{cell.region} {cell.seconds * 1e3:.0f}" if cell.region else "-"
    return f"[{text}]" if is_requested else text


def _show_round_trips(cells: Sequence[Sequence[GridCell]]) -> None:
    """Print the best candidate by round trip and bandwidth, as letters with a legend."""
    names = list(dict.fromkeys(cell.best for row in cells for cell in row if cell.best))
    letters = dict(zip(names, _LETTERS, strict=False))
    rates = [format_rate(cell.conditions.up_bps).replace("bit/s", "") for cell in cells[0]]
    rows = [
        [
            format_duration(row[0].conditions.rtt_s),
            *(f"{letters.get(c.best, '?')} {c.seconds * 1e3:.0f}" if c.best else "-" for c in row),
        ]
        for row in cells
    ]
    table(
        "the best candidate by round trip and bit/s, and its ms, predicted",
        ["", *rates],
        rows,
        numbers=rates,
        drop=_every_other(rates),
    )
    for name, letter in letters.items():
        say(f"{letter}  {name}")


def _every_other(rates: Sequence[str]) -> list[str]:
    """The order in which a narrow terminal loses rates: the ends of the range stay longest."""
    return [*rates[1:-1:2], *rates[2:-1:2]]


def _name(plan: Plan, candidate: Candidate) -> str:
    return f"→ {candidate.name}" if candidate.name == plan.chosen else candidate.name


def _seen(candidate: Candidate) -> list[str]:
    m = candidate.measured
    if m is None:
        return ["", ""]
    spread = f" ({m.low * 1e3:.1f}–{m.high * 1e3:.1f})" if m.runs > 1 else ""
    return [f"{m.median * 1e3:.1f}{spread}", str(m.runs)]


def _apart(candidate: Candidate) -> str:
    return "" if candidate.relative_gap is None else f"{candidate.relative_gap:+.0%}"


def _error(candidate: Candidate) -> str:
    return "0" if candidate.error.relative == 0 else f"{candidate.error.relative:.1g}"
