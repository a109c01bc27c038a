"""Plans of SmolLM2 for an edge at a quarter of a CPU: predicted beside measured seconds, by link.

edge-head and cloud-tail of stack.yml run on this machine, a thread each; the edge's CPU time counts four times, and the
link is emulated. Each link is planned twice: freely, and with the token ids at the edge. Every measured candidate has
its prediction beside it.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator

from harness import ROOT, STATE, Report, Row, arguments, at_most

from isthmus.artifacts.conditions import Conditions, Constraints
from isthmus.artifacts.plan import Candidate, Plan
from isthmus.settings import RegistrySettings
from isthmus_tools import FunctionUrls, ImportRequest, PlanRequest, import_model, local_functions, plan
from isthmus_tools.usecases.answer_size import AnswerSize

MODEL, CUT = "smollm2", "10"
REGISTRY = STATE / "llm-plan-registry"
EDGE_SLOWDOWN, RTT_S = 4.0, 0.02
RATES = {"4": 4e6, "16": 16e6, "100": 100e6}
# Predictions choose what is measured: they may be a fifth wrong, and the choice by them a tenth worse.
MAX_GAP, MAX_REGRET = 0.2, 0.1


def main() -> None:
    report = arguments("llm_plan", __doc__, ["numpy", "onnxruntime"], uplink=tuple(RATES))
    settings = RegistrySettings(registry=str(REGISTRY), cache_dir=str(STATE / "llm-cache"), cache_bytes=8 * 2**30)
    report.say("importing SmolLM2, once")
    REGISTRY.mkdir(parents=True, exist_ok=True)
    import_model(ImportRequest(model="llm:smollm2", registry=settings, name=MODEL, cuts=[CUT], if_absent=True))
    rates = report.chosen["uplink"] or (["16"] if report.quick else list(RATES))
    size = AnswerSize(prompt=128, tokens=32) if report.quick else AnswerSize(prompt=512, tokens=128)
    variables = {**os.environ, "ISTHMUS_REGISTRY": str(REGISTRY)}
    plans: dict[str, Plan] = {}
    with local_functions(ROOT / "stack.yml", variables, report.say, EDGE_SLOWDOWN) as functions:
        for rate in rates:
            for private in (0, 1):
                title = f"{rate} Mbit/s{', ids at the edge' if private else ''}"
                report.say(title)
                plans[title] = planned(settings, functions, size, RATES[rate], private, report)
    for title, each in plans.items():
        report.add(f"{title}: chosen is {each.chosen}", [row(c) for c in measured(each)])
    gaps = [abs(gap) for each in plans.values() for c in measured(each) for gap in gaps_of(c)]
    report.goals.append(at_most("measured against predicted seconds, median gap", statistics.median(gaps), MAX_GAP))
    worst = max(regret(each) for each in plans.values())
    report.goals.append(at_most("the choice by predictions, measured: behind the best", worst, MAX_REGRET))
    report.emit()


def planned(
    settings: RegistrySettings, functions: FunctionUrls, size: AnswerSize, rate: float, private: int, report: Report
) -> Plan:
    """The plan for a token's time over a link, measured."""
    request = PlanRequest(
        model=MODEL,
        registry=settings,
        conditions=Conditions(rate, rate, RTT_S),
        constraints=Constraints(private_depth=private),
        objective="per-token",
        functions=functions,
        answer=size,
    )
    with plan(request, report.say) as result:
        return result.plan


def measured(each: Plan) -> list[Candidate]:
    """The candidates with a measurement, the best first."""
    return sorted((c for c in each.candidates if c.measured is not None), key=lambda c: c.per_token_s)


def gaps_of(candidate: Candidate) -> Iterator[float]:
    """Measured over predicted seconds, less 1, of the first and of a further token."""
    if (costs := candidate.generation) is not None:
        yield candidate.first_token_s / costs.first_token.total - 1
        yield candidate.per_token_s / costs.per_token.total - 1


def regret(each: Plan) -> float:
    """How much longer a token takes, measured, with the best by prediction than with the best."""
    admissible = [c for c in measured(each) if not c.refused and c.generation is not None]
    by_prediction = min(admissible, key=lambda c: c.generation.per_token.total if c.generation else 0.0)
    return by_prediction.per_token_s / min(c.per_token_s for c in admissible) - 1


def row(candidate: Candidate) -> Row:
    """A measured candidate beside its prediction."""
    costs = candidate.generation
    assert costs is not None
    return {
        "candidate": candidate.name,
        "first_token_ms": candidate.first_token_s * 1e3,
        "predicted_first_ms": costs.first_token.total * 1e3,
        "token_ms": candidate.per_token_s * 1e3,
        "predicted_token_ms": costs.per_token.total * 1e3,
        "bytes_a_token": costs.token_up_bytes,
        "edge_mb": candidate.edge_memory_bytes / 1e6,
        "tokens_changed_percent": 100 * candidate.error.disagreement,
    }


if __name__ == "__main__":
    os.chdir(ROOT)
    main()
