"""Plans of language models as text: candidates by the time of the first and of a further token, and memory."""

from __future__ import annotations

from collections.abc import Sequence

from isthmus.artifacts.plan import TERMS, Candidate, Plan
from isthmus.units import format_size
from isthmus_tools.cli.console import say, table
from isthmus_tools.planner.choice import VALUES
from isthmus_tools.planner.language_choice import binding_term

# Rows for a terminal; --json has all.
SHOWN = 12


def show_answers(plan: Plan, over: str) -> None:
    """Print the candidates: measured ones first, the best by the plan's objective first, refused ones last."""
    load = plan.generation
    if load is None:
        return
    ranked = _ranked(plan)
    columns = ["candidate", "first token, ms", "a token, ms", "predicted", "answer, s", "bytes a token", "edge memory"]
    columns += ["of it sessions", "most of a token", "tokens changed"]
    rows = [_row(plan, candidate, load.sessions) for candidate in ranked[:SHOWN]]
    for column, amount in ((f"price, {plan.currency}".rstrip(", "), "price"), ("energy, J", "energy_j")):
        amounts = [getattr(candidate, amount) for candidate in ranked[:SHOWN]]
        # A price file may lack what the other of the two takes.
        if any(value is not None for value in amounts):
            columns.append(column)
            rows = [[*row, "" if v is None else f"{v:.3g}"] for row, v in zip(rows, amounts, strict=True)]
    title = (
        f"{plan.model} for {plan.objective}, {over}: {load.prompt} tokens of prompt, {load.tokens} of answer,"
        f" {load.sessions} {'session' if load.sessions == 1 else 'sessions'} of {load.context}"
    )
    drop = ["of it sessions", "tokens changed", "answer, s", "predicted", "bytes a token", "edge memory"]
    table(title, columns, rows, numbers=[*columns[1:8], *columns[10:]], drop=drop)
    if len(ranked) > SHOWN:
        say(f"and {len(plan.candidates) - SHOWN} more: --json has all, every codec at every cut")
    say("predicted: the first and a further token, ms; without a measurement the times before are predictions too")


def _ranked(plan: Plan) -> list[Candidate]:
    """The candidates in the table's order; of those without a measurement the best of each cut alone."""
    value = VALUES[plan.objective]
    ranked = sorted(plan.candidates, key=lambda c: (bool(c.refused), c.measured is None, value(c)))
    # Codecs at one cut differ little, and the reader looks for the cut.
    best_at = {(c.kind, c.cuts): c.name for c in reversed(ranked) if c.measured is None}
    return [c for c in ranked if c.measured is not None or best_at[c.kind, c.cuts] == c.name]


def show_answer_refusals(plan: Plan) -> None:
    """Print each reason of a refusal with the candidates that it is for: a bound refuses whole ranges of cuts."""
    by_reason: dict[str, list[str]] = {}
    for candidate in plan.candidates:
        if candidate.refused:
            by_reason.setdefault(candidate.refused, []).append(candidate.name)
    if by_reason:
        say("refused:")
    for reason, names in list(by_reason.items())[:SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"  {names[0]}{more}: {reason}")
    if len(by_reason) > SHOWN:
        say(f"  and {len(by_reason) - SHOWN} more reasons: --json has all")


def show_answer_terms(plan: Plan, columns: Sequence[Candidate]) -> None:
    """Print the predicted terms of a further token, and the sums of both kinds beside their measurements."""
    rows: list[list[str]] = []
    costs = [(c, c.generation) for c in columns if c.generation is not None]
    for term in TERMS:
        seconds = [cost.per_token.seconds[term] for _, cost in costs]
        # A term without seconds explains no difference.
        if any(seconds):
            rows.append([term.replace("_", " "), *(f"{s * 1e3:.2f}" if s else "" for s in seconds)])
    for title, attribute, part in (
        ("a token", "per_token", "per_token"),
        ("the first token", "first_token", "first_token"),
    ):
        rows.append([f"{title}, predicted", *(f"{getattr(cost, attribute).total * 1e3:.2f}" for _, cost in costs)])
        seen = [None if c.measured is None else c.measured.parts.get(part) for c, _ in costs]
        rows.append([f"{title}, measured", *("" if s is None else f"{s * 1e3:.2f}" for s in seen)])
    rows.append(["edge run is", *(cost.per_token.sources.edge for _, cost in costs)])
    rows.append(["cloud run is", *(cost.per_token.sources.cloud for _, cost in costs)])
    names = [c.name for c, _ in costs]
    title = f"{plan.model}: the terms of a token of {plan.chosen} and of those behind it, ms"
    table(title, ["term", *names], rows, numbers=names, drop=names[:1:-1])


def _row(plan: Plan, candidate: Candidate, sessions: int) -> list[str]:
    costs = candidate.generation
    if costs is None:
        return []
    name = f"→ {candidate.name}" if candidate.name == plan.chosen else candidate.name
    first, each = costs.first_token.total, costs.per_token.total
    term, share = binding_term(candidate)
    return [
        name,
        f"{candidate.first_token_s * 1e3:.0f}",
        f"{candidate.per_token_s * 1e3:.1f}",
        "" if candidate.measured is None else f"{first * 1e3:.0f}, {each * 1e3:.1f}",
        f"{candidate.seconds:.2f}",
        str(costs.token_up_bytes),
        format_size(candidate.edge_memory_bytes),
        format_size(sessions * costs.edge_state_bytes),
        f"{term} {share:.0%}",
        f"{candidate.error.disagreement:.1%}" if candidate.error.inputs else "",
    ]
