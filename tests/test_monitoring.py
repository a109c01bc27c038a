"""Dashboard, alert rules and scrape configuration of deploy/: Prometheus takes them, and what they name exists."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import msgspec
import pytest
import yaml

from isthmus.security.caller_keys import CallerEntry, key_digest, new_key
from isthmus.security.callers import Role
from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.engine.stack import read_stack
from support.bundles import Published, framed, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.paths import ROOT
from support.patience import LONG_S, eventually
from support.prometheus_server import firing, prometheus, promtool, query

DEPLOY = ROOT / "deploy"
RULES = yaml.safe_load((DEPLOY / "alerts.yml").read_text())
ALERTS = [rule for group in RULES["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
METRICS = {
    name: {*re.findall(r"`(\w+)`", labels)}
    for name, labels in re.findall(
        r"^\| `(\w+)` \| \w+ \|([^|]*)\|", (ROOT / "docs" / "reference" / "metrics.md").read_text(), re.MULTILINE
    )
}
# Of Prometheus and of the scrape configuration.
SCRAPED = {"job", "instance", "function", "le"}


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Each metric in an expression with the labels that are asked of it."""
    for name, labels in re.findall(r"\b(isthmus_\w+)(?:\{([^}]*)\})?", expression):
        yield re.sub(r"_(bucket|sum|count)$", "", name), set(re.findall(r"(\w+)[=!]", labels))


@pytest.mark.parametrize(
    "arguments",
    [("check", "config", "prometheus.yml"), ("check", "rules", "alerts.yml"), ("test", "rules", "alerts_test.yml")],
    ids=lambda arguments: " ".join(arguments),
)
def test_promtool_takes_configuration_and_rules_and_their_tests_pass(arguments: tuple[str, str, str]) -> None:
    done = promtool(*arguments[:2], str(DEPLOY / arguments[2]))
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_as_it_fires_and_as_it_does_not_and_is_documented() -> None:
    cases = yaml.safe_load((DEPLOY / "alerts_test.yml").read_text())["tests"]
    tested: dict[bool, set[str]] = {True: set(), False: set()}
    for case in cases:
        for each in case["alert_rule_test"]:
            tested[bool(each.get("exp_alerts"))].add(each["alertname"])
    names = {rule["alert"] for rule in ALERTS}
    assert tested[True] == names
    # The others have series beside those that fire.
    assert names - tested[False] == {"IsthmusRefusals", "IsthmusRouteFlapping"}
    text = (ROOT / "docs" / "how-to" / "observe.md").read_text()
    assert set(re.findall(r"^\| `(Isthmus\w+)` \|", text, re.MULTILINE)) == names


def test_rules_and_dashboard_name_metrics_and_labels_that_exist() -> None:
    expressions = [rule["expr"] for rule in ALERTS] + QUERIES
    variables = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    found = [pair for expression in (*expressions, *variables) for pair in selectors(expression)]
    assert len(found) > 50
    for name, labels in found:
        assert name in METRICS, name
        assert labels <= METRICS[name] | SCRAPED, (name, labels)


def test_the_dashboards_panels_are_whole_and_lie_beside_each_other() -> None:
    assert DASHBOARD["schemaVersion"] >= 36
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names[0] == "datasource"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    places: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & places, panel["title"]
        assert max(x for x, _ in cells) < 24
        places |= cells
    for panel in PANELS:
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"].get("unit") or panel["type"] == "state-timeline"
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= {*names, "__rate_interval"}


def test_promtool_takes_the_dashboards_queries(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{i}", "expr": _filled(e)} for i, e in enumerate(QUERIES)]
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = promtool("check", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scrape_job_reads_functions_of_the_stack() -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"]
    functions = read_stack(ROOT / "stack.yml", {}).functions
    assert set(job["static_configs"][0]["targets"]) <= set(functions)
    assert f'job="{job["job_name"]}"' in next(r["expr"] for r in ALERTS if r["alert"] == "IsthmusFunctionDown")


def test_promtools_linter_finds_nothing_in_the_exposition(photos: Published, tmp_path: Path) -> None:
    segment = ready(create_segment_app(segment_settings(photos, tmp_path / "segment")).test_client())
    segment.post("/", data=framed(photos))
    router = ready(create_router_app(router_settings(photos, tmp_path / "router", ("local",))).test_client())
    router.post("/", data=photo())
    for client in (segment, router):
        done = promtool("check", "metrics", given=client.get("/metrics").get_data(as_text=True))
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_real_prometheus_reads_a_router_and_tells_that_its_tail_died(photos: Published, tmp_path: Path) -> None:
    with ExitStack() as tail, ExitStack() as apps:
        url = tail.enter_context(served(create_segment_app(segment_settings(photos, tmp_path / "tail"))))
        hops = ("local", url)
        settings = router_settings(photos, tmp_path / "router", hops, expose_details=False, secrets_dir=str(tmp_path))
        key = _key_of_a_caller(tmp_path)
        app = create_router_app(settings)
        apps.callback(app.extensions["isthmus"].close)
        client = ready(app.test_client())
        server = apps.enter_context(prometheus(_configuration(apps.enter_context(served(app)), tmp_path)))
        assert client.post("/", data=photo(), headers=key).status_code == 200
        eventually(lambda: _value(server, 'isthmus_requests_total{endpoint="answer",code="200"}') >= 1)
        assert _value(server, 'isthmus_breaker_state{hop="hop1",state="closed"}') == 1
        assert firing(server) == set()
        for expression in QUERIES:
            query(server, _filled(expression))
        tail.close()

        def is_told() -> bool:
            client.post("/", data=photo(), headers={"X-Timeout": "500ms"} | key)
            return ("IsthmusHopAway", "hop1") in firing(server)

        eventually(is_told, 2 * LONG_S)


def _key_of_a_caller(folder: Path) -> dict[str, str]:
    """The header of a key whose digest is in the secret `callers`, and which is in the file that deploy/ names."""
    key = new_key()
    entry = CallerEntry(name="all", key=key_digest(key), roles={Role.INFER: ["*"], Role.METRICS: ["*"]})
    (folder / "callers").write_bytes(msgspec.json.encode(entry))
    (folder / "isthmus-key").write_text(f"{key}\n")
    return {"X-API-Key": key}


def _configuration(address: str, folder: Path) -> Path:
    """deploy/'s job with its key, and rules, hurried: scraped every second, told at once, at this test's address."""
    commented, text = "    # authorization:\n    #   credentials_file", (DEPLOY / "prometheus.yml").read_text()
    assert commented in text
    configuration = yaml.safe_load(text.replace(commented, commented.replace("# ", "")))
    configuration["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    (job,) = configuration["scrape_configs"]
    job["static_configs"] = [{"targets": ["router"]}]
    *others, gateway = job["relabel_configs"]
    path = next(rule for rule in others if rule["target_label"] == "__metrics_path__")
    gateway["replacement"], path["replacement"] = address.removeprefix("http://").strip("/"), "/metrics"
    rules = re.sub(r"for: \w+", "for: 0s", (DEPLOY / "alerts.yml").read_text())
    (folder / "alerts.yml").write_text(rules)
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    return file


def _value(server: str, expression: str) -> float:
    samples = query(server, expression)
    return float(samples[0]["value"][1]) if samples else 0.0


def _filled(expression: str) -> str:
    """A dashboard's query with its variables filled in."""
    return re.sub(r"\$(job|instance|model)", ".*", expression.replace("$__rate_interval", "1m"))
