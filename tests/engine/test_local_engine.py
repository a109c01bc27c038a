"""The engine runs real functions as processes and speaks OpenFaaS's provider API."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import site
import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest
import urllib3

from isthmus.errors import LocalError
from isthmus_tools.engine import Engine, Event, supervisor
from isthmus_tools.engine.credentials import PASSWORD_FILE
from isthmus_tools.engine.replica import store_keys
from support.local_stack import STACK, http, login_header, system, write_stack
from support.patience import LONG_S, eventually


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_stack(tmp_path_factory.mktemp("stack")).parent


@pytest.fixture(scope="module")
def engine(root: Path) -> Iterator[Engine]:
    environment = {"other": {"busy_file": str(root / "busy"), "not_ready_file": str(root / "not-ready")}}
    with Engine(root / "stack.yml", replicas={"echo": 2}, environment=environment, drain_s=LONG_S) as engine:
        engine.wait_ready(LONG_S)
        yield engine


def describe(engine: Engine, name: str) -> dict[str, Any]:
    found: dict[str, Any] = system(engine, "GET", f"/system/function/{name}").json()
    return found


def pid(engine: Engine, name: str) -> int:
    return int(http("POST", f"{engine.url}/function/{name}", body=b"").headers["X-Pid"])


def test_functions_are_listed_as_they_were_deployed(engine: Engine) -> None:
    functions = system(engine, "GET", "/system/functions").json()
    assert [f["name"] for f in functions] == ["echo", "other"]
    echo = functions[0]
    assert (echo["replicas"], echo["availableReplicas"], echo["namespace"]) == (2, 2, "openfaas-fn")
    assert echo["image"] == "example/echo:latest"
    assert echo["envVars"]["gateway_url"] == "http://gateway.openfaas.svc.cluster.local:8080/function/other"
    assert datetime.fromisoformat(echo["createdAt"]).tzinfo is not None


def test_a_call_is_proxied_with_its_body_and_openfaas_headers(engine: Engine) -> None:
    body = os.urandom(300_000)
    reply = http("POST", f"{engine.url}/function/echo", body=body, headers={"X-Call-Id": "c1", "Content-Type": "x/y"})
    assert (reply.status, reply.data, reply.headers["Content-Type"]) == (200, body, "x/y")
    assert reply.headers["X-Call-Id"] == reply.headers["X-Seen-Call-Id"] == "c1"
    assert float(reply.headers["X-Duration-Seconds"]) > 0
    assert int(reply.headers["X-Start-Time"]) > 10**18
    assert len(reply.headers.getlist("Set-Cookie")) == 2


def test_a_chunked_body_arrives_whole(engine: Engine) -> None:
    pieces = [os.urandom(1000) for _ in range(50)]
    reply = http("POST", f"{engine.url}/function/echo.openfaas-fn", body=iter(pieces))
    assert reply.data == b"".join(pieces)


def test_path_and_query_arrive_as_they_were_sent(engine: Engine) -> None:
    facts = http("GET", f"{engine.url}/function/echo/facts/a%20b?q=1%2F2&q=3").json()
    assert (facts["rest"], facts["query"]) == ("a b", "q=1%2F2&q=3")


def test_the_in_cluster_gateway_is_this_engine(engine: Engine) -> None:
    env = http("GET", f"{engine.url}/function/echo/facts/x").json()["env"]
    assert env["gateway_url"] == f"{engine.url}/function/other"
    assert env["flag"] == "true"


def test_a_function_gets_its_own_environment_and_not_the_engines(
    engine: Engine, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = http("GET", f"{engine.url}/function/echo/facts/x").json()
    assert "PYTEST_VERSION" not in facts["env"]
    assert facts["cwd"].startswith(str(root / ".isthmus" / "build"))
    assert (Path(facts["cwd"]) / "function" / "common" / "words.py").is_file()


def test_a_function_finds_the_stores_keys_where_commands_do(engine: Engine) -> None:
    env = http("GET", f"{engine.url}/function/echo/facts/x").json()["env"]
    files = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
    for name, file in files.items():
        assert env[name] == os.environ.get(name, str(Path.home() / ".aws" / file))
    keys = {"AWS_ACCESS_KEY_ID": "K", "AWS_SECRET_ACCESS_KEY": "S", "AWS_CONFIG_FILE": "/c"}
    keys |= {"GOOGLE_APPLICATION_CREDENTIALS": "/g", "AZURE_STORAGE_ACCOUNT_KEY": "A", "HADOOP_USER_NAME": "h"}
    assert store_keys({**keys, "PYTHONPATH": "/p"}).items() >= keys.items()
    assert store_keys({**keys, "PYTHONPATH": "/p"}).keys() == keys.keys() | files.keys()


def test_nobody_else_can_put_code_where_a_function_looks_for_it(engine: Engine) -> None:
    facts = http("GET", f"{engine.url}/function/echo/facts/x").json()
    engines_own = Path(facts["env"]["HOME"]).parent
    assert engines_own.stat().st_mode & 0o077 == 0
    assert Path(facts["cwd"]).is_relative_to(engines_own)
    # Python takes packages from below this folder, or else from below HOME.
    assert facts["env"]["PYTHONUSERBASE"] == site.getuserbase()


def test_one_connection_serves_calls_and_then_the_rest_of_the_gateway(engine: Engine) -> None:
    host = engine.url.removeprefix("http://")
    with contextlib.closing(HTTPConnection(host, timeout=LONG_S)) as connection:
        for path, status in (
            ("/function/echo/facts/x", 200),
            ("/function/nothing", 404),
            ("/function/echo/facts/x", 200),
        ):
            connection.request("GET", path)
            reply = connection.getresponse()
            assert (reply.status, bool(reply.read())) == (status, True)
        connection.request("GET", "/system/functions", headers=login_header(engine))
        assert len(json.loads(connection.getresponse().read())) == 2


def test_calls_are_spread_over_the_replicas(engine: Engine) -> None:
    assert len({pid(engine, "echo") for _ in range(6)}) == 2


def test_an_unknown_function_is_404(engine: Engine) -> None:
    for path in ("/function/nothing", "/system/function/nothing", "/function/echo.elsewhere"):
        reply = system(engine, "GET", path)
        assert reply.status == 404
        assert b"error finding function" in reply.data
    assert http("POST", f"{engine.url}/async-function/nothing").status == 404


def test_a_killed_replica_is_restarted(engine: Engine) -> None:
    before = pid(engine, "other")
    os.kill(before, signal.SIGKILL)
    eventually(lambda: http("POST", f"{engine.url}/function/other", body=b"").status == 200)
    assert pid(engine, "other") != before


def test_no_ready_replica_is_503_with_retry_after(engine: Engine, root: Path) -> None:
    marker = root / "not-ready"
    marker.touch()
    os.kill(pid(engine, "other"), signal.SIGKILL)
    eventually(lambda: describe(engine, "other")["availableReplicas"] == 0)
    reply = http("POST", f"{engine.url}/function/other", body=b"x")
    assert (reply.status, reply.headers["Retry-After"]) == (503, "1")
    assert reply.headers["X-OpenFaaS-Internal"] == "proxy"
    assert b"No endpoints available for: other" in reply.data
    marker.unlink()
    eventually(lambda: describe(engine, "other")["availableReplicas"] == 1)


def test_scaling_adds_and_removes_replicas(engine: Engine) -> None:
    def scale(n: int) -> int:
        body = json.dumps({"serviceName": "other", "replicas": n})
        return system(engine, "POST", "/system/scale-function/other", body=body).status

    assert scale(2) == 202
    eventually(lambda: describe(engine, "other")["availableReplicas"] == 2)
    assert scale(1) == 202
    eventually(lambda: describe(engine, "other")["availableReplicas"] == 1)
    assert scale(99) == 400


def test_a_request_under_way_is_answered_while_its_replica_drains(engine: Engine) -> None:
    answers: list[int] = []

    def call() -> None:
        answers.append(http("POST", f"{engine.url}/function/echo?sleep=1", body=b"x").status)

    callers = [threading.Thread(target=call) for _ in range(2)]
    for caller in callers:
        caller.start()
    deploy(engine, "PUT", "echo", "example/echo:latest", {"flag": "changed"})
    for caller in callers:
        caller.join()
    assert answers == [200, 200]
    eventually(lambda: http("GET", f"{engine.url}/function/echo/facts/x").json()["env"]["flag"] == "changed")
    eventually(lambda: describe(engine, "echo")["availableReplicas"] == 2)


def deploy(engine: Engine, method: str, name: str, image: str, env: dict[str, str]) -> urllib3.BaseHTTPResponse:
    body = json.dumps({"service": name, "image": image, "envVars": env, "namespace": ""})
    return system(engine, method, "/system/functions", body=body)


def test_a_removed_function_can_be_deployed_again(engine: Engine) -> None:
    assert system(engine, "DELETE", "/system/functions", body=json.dumps({"functionName": "other"})).status == 202
    assert http("POST", f"{engine.url}/function/other").status == 404
    env = {"busy_file": "/nowhere"}
    assert deploy(engine, "PUT", "other", "example/other:latest", env).status == 404
    assert deploy(engine, "POST", "other", "example/other:latest", env).status == 202
    eventually(lambda: describe(engine, "other")["availableReplicas"] == 1)


@pytest.mark.parametrize(
    ("name", "image", "said"),
    [("else", "example/else:latest", "pulls no images"), ("echo", "example/echo:v2", "cannot pull 'example/echo:v2'")],
)
def test_what_cannot_be_run_here_is_refused_with_a_reason(engine: Engine, name: str, image: str, said: str) -> None:
    reply = deploy(engine, "POST", name, image, {})
    assert reply.status == 400
    assert said in reply.data.decode()


@pytest.mark.parametrize("name", ["PYTHONPATH", "LD_PRELOAD", "PATH", "PYTHONSTARTUP", "A=B", ""])
def test_a_variable_that_nothing_here_reads_is_refused_by_its_name(engine: Engine, name: str) -> None:
    before = describe(engine, "echo")
    reply = deploy(engine, "PUT", "echo", "example/echo:latest", {"flag": "x", name: "/code"})
    assert (reply.status, repr(name) in reply.data.decode()) == (400, True)
    assert "flag" not in reply.data.decode().partition(":")[0]
    assert describe(engine, "echo") | {"invocationCount": 0} == before | {"invocationCount": 0}


def test_variables_of_the_stack_the_settings_and_the_watchdog_are_taken(engine: Engine) -> None:
    env = {"flag": "true", "max_concurrency": "7", "exec_timeout": "20s", "gateway_url": "http://gateway:8080/x"}
    assert deploy(engine, "PUT", "echo", "example/echo:latest", env).status == 202
    eventually(lambda: http("GET", f"{engine.url}/function/echo/facts/x").json()["env"].get("exec_timeout") == "20s")
    eventually(lambda: describe(engine, "echo")["availableReplicas"] == 2)


@pytest.mark.parametrize(
    "broken",
    [
        {"envVars": {"flag": "a\0b"}},
        {"envVars": {"flag": "\ud800"}},
        {"envVars": {"ready_path": "@example.com/"}},
        {"envVars": {"ready_path": "/a b"}},
        {"envVars": ["flag"]},
        {"secrets": 5},
        {"constraints": {"a": "b"}},
        {"labels": {"a": 1}},
        {"image": 7},
    ],
)
def test_a_malformed_deployment_is_400_and_changes_nothing(engine: Engine, broken: dict[str, Any]) -> None:
    before = describe(engine, "echo")["createdAt"]
    body = json.dumps({"service": "echo", "image": "example/echo:latest", **broken})
    assert system(engine, "PUT", "/system/functions", body=body).status == 400
    assert describe(engine, "echo")["createdAt"] == before


def test_the_system_api_asks_for_the_credentials(engine: Engine) -> None:
    wrong = [{}, {"Authorization": "Bearer "}, {"Authorization": "Basic"}, {"Authorization": "Basic é"}]
    wrong += [
        dict(urllib3.make_headers(basic_auth=given)) for given in ("admin:", "admin:x", f"root:{engine.login[1]}")
    ]
    for headers in wrong:
        for method, path in (
            ("GET", "/system/functions"),
            ("PUT", "/system/functions"),
            ("GET", "/%73ystem/functions"),
            ("GET", "/system/function/echo"),
            ("POST", "/system/scale-function/echo"),
            ("GET", "/system/secrets"),
            ("GET", "/system/logs?name=echo"),
            ("GET", "/system/info"),
            ("GET", "/system/nothing"),
        ):
            reply = http(method, engine.url + path, headers=headers)
            assert (reply.status, reply.headers["WWW-Authenticate"][:5]) == (401, "Basic"), (method, path)
    assert system(engine, "GET", "/system/nothing").status == 404


def test_a_connection_serves_the_next_request_unless_the_response_says_that_it_closes(engine: Engine) -> None:
    host, login = engine.url.removeprefix("http://"), login_header(engine)
    bodies = [json.dumps({"service": name, "image": f"example/{name}:latest"}) for name in ("echo", "nothing")]
    requests = [("PUT", "/system/functions", body, login) for body in (*bodies, "{")]
    requests += [("PUT", "/system/functions", "x" * 3_000_000, login), ("PUT", "/system/functions", bodies[0], {})]
    requests += [(method, "/system/functions", None, login) for method in ("GET", "HEAD", "PATCH")]
    requests += [("POST", "/async-function/echo", b"x", {}), ("POST", "/async-function/nothing", b"x" * 300_000, {})]
    requests += [("GET", path, None, {}) for path in ("/healthz", "/metrics", "/nothing")]
    for method, path, body, headers in requests:
        with contextlib.closing(HTTPConnection(host, timeout=LONG_S)) as connection:
            connection.request(method, path, body, headers)
            with connection.getresponse() as reply:
                reply.read()
            if reply.will_close:
                continue
            sock = connection.sock
            connection.request("GET", "/healthz")
            with connection.getresponse() as reply:
                assert (reply.read(), connection.sock) == (b"OK", sock), (method, path)
    eventually(lambda: describe(engine, "echo")["availableReplicas"] == 2)


def test_a_stack_is_deployed_over_one_client(engine: Engine) -> None:
    with urllib3.PoolManager(retries=False) as pool:
        for _ in range(3):
            for name in ("echo", "other"):
                body = json.dumps({"service": name, "image": f"example/{name}:latest"})
                reply = pool.request("PUT", f"{engine.url}/system/functions", body=body, headers=login_header(engine))
                assert reply.status == 202
    eventually(lambda: all(describe(engine, name)["availableReplicas"] for name in ("echo", "other")))


@pytest.mark.skipif(shutil.which("faas-cli") is None, reason="faas-cli is not installed")
def test_faas_cli_logs_in_deploys_the_stack_and_calls_a_function(
    engine: Engine, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def faas_cli(*arguments: str, stdin: bytes = b"") -> str:
        command = ["faas-cli", *arguments, "--gateway", engine.url]
        ran = subprocess.run(command, input=stdin, stdout=-1, stderr=-2, timeout=LONG_S, cwd=root, check=False)
        return f"{ran.returncode} {ran.stdout.decode()}"

    assert "Unauthorized" in faas_cli("list")
    login = ("login", "--username", "admin", "--password-stdin")
    assert faas_cli(*login, stdin=b"wrong").startswith("1 ")
    assert faas_cli(*login, stdin=(root / ".isthmus" / PASSWORD_FILE).read_bytes()).startswith("0 ")
    deployed = faas_cli("deploy", "-f", "stack.yml")
    assert (deployed[:2], deployed.count("202 Accepted")) == ("0 ", 2)
    eventually(lambda: describe(engine, "echo")["availableReplicas"] == 2)
    assert re.search(r"^echo +\t\d+ +\t2", faas_cli("list"), re.MULTILINE)
    assert "example/echo:latest" in faas_cli("describe", "echo")
    assert "no differences" in faas_cli("diff", "-f", "stack.yml")
    assert faas_cli("invoke", "echo", stdin=b"hello") == "0 hello"
    refused = faas_cli("deploy", "-f", "stack.yml", "--env", "PYTHONPATH=/code")
    assert (refused[:2], "'PYTHONPATH'" in refused) == ("1 ", True)


def test_calls_health_and_metrics_need_no_login(engine: Engine) -> None:
    assert http("POST", f"{engine.url}/function/echo", body=b"").status == 200
    assert http("POST", f"{engine.url}/async-function/echo", body=b"").status == 202
    assert http("GET", f"{engine.url}/healthz").status == 200
    assert http("GET", f"{engine.url}/metrics").status == 200


def test_the_gateways_root_leads_to_the_page_of_a_router(engine: Engine, tmp_path: Path) -> None:
    assert http("GET", f"{engine.url}/").status == 404
    stack = write_stack(tmp_path)
    stack.write_text(STACK.replace("flag: true", "hops: local"))
    with Engine(stack, replicas={"echo": 0, "other": 0}) as own:
        reply = http("GET", f"{own.url}/", redirect=False)
        assert (reply.status, reply.headers["Location"]) == (302, "/function/echo/")


def test_the_page_is_on_here_unless_the_stack_says_otherwise(engine: Engine) -> None:
    assert http("GET", f"{engine.url}/function/echo/facts/x").json()["env"]["page"] == "true"


def test_the_password_lies_where_only_its_user_reads_it(engine: Engine, root: Path) -> None:
    path = root / ".isthmus" / PASSWORD_FILE
    assert engine.login == ("admin", path.read_text().strip())
    assert path.stat().st_mode & 0o777 == 0o600
    assert PASSWORD_FILE not in [s["name"] for s in system(engine, "GET", "/system/secrets").json()]


def test_a_variable_that_was_added_to_the_stack_is_taken(tmp_path: Path) -> None:
    stack = write_stack(tmp_path)
    with Engine(stack, replicas={"echo": 0, "other": 0}) as engine:
        assert deploy(engine, "PUT", "echo", "example/echo:latest", {"added": "1"}).status == 400
        stack.write_text(STACK.replace("flag: true", "added: 1"))
        assert deploy(engine, "PUT", "echo", "example/echo:latest", {"added": "1"}).status == 202
        assert describe(engine, "echo")["envVars"] == {"added": "1"}
        stack.write_text("functions: {")
        assert b"not YAML" in deploy(engine, "PUT", "echo", "example/echo:latest", {}).data


def test_a_deployment_with_a_missing_secret_is_refused(engine: Engine) -> None:
    body = json.dumps({"service": "echo", "image": "example/echo:latest", "secrets": ["absent"]})
    reply = system(engine, "PUT", "/system/functions", body=body)
    assert (reply.status, b"absent" in reply.data) == (400, True)


def test_secrets_are_files_that_functions_can_read(engine: Engine, root: Path) -> None:
    def secrets(method: str, **doc: str) -> int:
        return system(engine, method, "/system/secrets", body=json.dumps(doc)).status

    assert secrets("POST", name="key", value="one") == 202
    assert secrets("POST", name="key", value="two") == 409
    assert secrets("PUT", name="key", rawValue=base64.b64encode(b"t\0o").decode()) == 202
    assert {"name": "key", "namespace": "openfaas-fn"} in system(engine, "GET", "/system/secrets").json()
    folder = Path(http("GET", f"{engine.url}/function/echo/facts/x").json()["env"]["secrets_dir"])
    assert (folder / "key").read_bytes() == b"t\0o"
    assert (folder / "key").stat().st_mode & 0o077 == 0
    assert secrets("DELETE", name="key") == 202
    assert secrets("DELETE", name="key") == 404
    assert secrets("PUT", name="key", value="x") == 404
    assert secrets("POST", name="../key", value="x") == 400


def test_logs_hold_what_a_function_printed(engine: Engine) -> None:
    before = datetime.now(UTC)
    for text in ("first", "second", "x" * 200_000):
        assert http("POST", f"{engine.url}/function/echo/say", body=text).status == 204
    path = f"/system/logs?name=echo&since={before.strftime('%Y-%m-%dT%H:%M:%SZ')}"
    eventually(lambda: b"xxx" in system(engine, "GET", path).data)
    lines = [json.loads(line) for line in system(engine, "GET", path).data.splitlines()]
    assert [x["text"] for x in lines if x["text"] in ("first", "second")] == ["first", "second"]
    assert lines[0]["name"] == "echo"
    later = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    assert system(engine, "GET", f"/system/logs?name=echo&since={later}").data == b""
    assert len(system(engine, "GET", "/system/logs?name=echo&tail=2").data.splitlines()) == 2
    assert system(engine, "GET", "/system/logs?name=echo&since=yesterday").status == 400
    for odd in ("%C2%B2", "9" * 5000, "-1"):
        assert system(engine, "GET", f"/system/logs?name=echo&tail={odd}").status == 200


def test_a_log_can_be_followed(engine: Engine) -> None:
    with urllib3.PoolManager(retries=False) as pool:
        url = f"{engine.url}/system/logs?name=echo&follow=true&tail=1"
        reply = pool.request("GET", url, preload_content=False, timeout=LONG_S, headers=login_header(engine))
        http("POST", f"{engine.url}/function/echo/say", body="followed")
        for line in reply:
            if json.loads(line)["text"] == "followed":
                break
        reply.close()


def test_the_gateways_metrics_count_calls(engine: Engine) -> None:
    eventually(lambda: describe(engine, "echo")["availableReplicas"] == 2)
    http("POST", f"{engine.url}/function/echo", body=b"")
    text = http("GET", f"{engine.url}/metrics").data.decode()
    assert 'gateway_function_invocation_total{code="200",function_name="echo.openfaas-fn"}' in text
    assert 'gateway_service_count{function_name="echo.openfaas-fn"} 2.0' in text


def test_system_is_closed_to_web_pages(engine: Engine) -> None:
    assert system(engine, "GET", "/system/functions", headers={"Origin": "https://example.com"}).status == 403
    assert system(engine, "GET", "/system/functions", headers={"Host": "example.com"}).status == 403
    assert http("GET", f"{engine.url}/healthz").status == 200


def test_info_names_the_provider(engine: Engine) -> None:
    assert system(engine, "GET", "/system/info").json()["provider"]["orchestration"] == "processes"
    assert system(engine, "GET", "/system/namespaces").json() == ["openfaas-fn"]


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    stack = write_stack(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(LocalError, match=f"cannot listen on 127.0.0.1:{port}") as caught:
            Engine(stack, port=port).start()
    assert "--port" in caught.value.hint


def test_a_function_that_cannot_start_is_named_with_its_last_words(tmp_path: Path) -> None:
    stack = write_stack(tmp_path)
    with (
        Engine(stack, environment={"other": {"max_concurrency": "many"}}) as engine,
        pytest.raises(
            LocalError, match=r"other does not start: exit status 78: cannot start: .*max_concurrency is 'many'"
        ),
    ):
        engine.wait_ready(LONG_S)


def starts(events: list[Event], name: str) -> int:
    return sum(e.kind == "starting" and e.function == name for e in events)


def test_a_function_whose_settings_are_wrong_starts_once_until_it_is_deployed_anew(tmp_path: Path) -> None:
    stack = write_stack(tmp_path, STACK.replace("flag: true", "max_concurrency: many"))
    events: list[Event] = []
    with Engine(stack, on_event=events.append) as engine:
        eventually(lambda: any(e.kind == "failed" for e in events))
        (failed,) = [e.text for e in events if e.kind == "failed"]
        assert "the setting max_concurrency is 'many'" in failed
        assert "not started again" in failed
        reply = http("POST", f"{engine.url}/function/echo", body=b"")
        assert (reply.status, "max_concurrency is 'many'" in reply.data.decode()) == (503, True)
        assert system(engine, "POST", "/system/scale-function/echo", body='{"replicas": 1}').status == 202
        eventually(lambda: sum(e.kind == "failed" for e in events) == 2)
        assert (starts(events, "echo"), describe(engine, "echo")["availableReplicas"]) == (2, 0)
        assert deploy(engine, "PUT", "echo", "example/echo:latest", {"max_concurrency": "3"}).status == 202
        engine.wait_ready(LONG_S)


def test_the_event_of_a_ready_replica_has_its_process(tmp_path: Path) -> None:
    events: list[Event] = []
    with Engine(write_stack(tmp_path), replicas={"other": 0}, on_event=events.append) as engine:
        engine.wait_ready(LONG_S)
        assert [e.pid for e in events if e.pid] == [pid(engine, "echo")]


def test_a_function_that_never_gets_ready_is_given_up_after_some_tries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "MAX_FAILED_STARTS", 3)
    events: list[Event] = []
    with Engine(
        write_stack(tmp_path), replicas={"other": 0}, environment={"echo": {"broken": "1"}}, on_event=events.append
    ):
        eventually(lambda: any(e.kind == "failed" for e in events))
        (failed,) = [e.text for e in events if e.kind == "failed"]
        assert failed.startswith("exit status 1: cannot start: RuntimeError: broken was set; not started again")
        assert starts(events, "echo") == 3


def test_a_503_has_the_functions_last_words_only_where_details_are_exposed(tmp_path: Path) -> None:
    events: list[Event] = []
    environment = {"*": {"broken": "1"}, "other": {"expose_details": "false"}}
    with Engine(write_stack(tmp_path), environment=environment, on_event=events.append) as engine:
        for name, has_them in (("echo", True), ("other", False)):
            eventually(lambda name=name: starts(events, name) > 1)  # type: ignore[misc]
            reply = http("POST", f"{engine.url}/function/{name}", body=b"")
            text = reply.data.decode()
            assert (
                reply.status,
                "broken was set" in text,
                text.startswith(f"No endpoints available for: {name}."),
            ) == (
                503,
                has_them,
                True,
            )
        assert all(any("broken was set" in e.text for e in events if e.function == name) for name in ("echo", "other"))


def test_a_listener_that_fails_ends_nothing_of_the_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(event: Event) -> None:
        raise RuntimeError(event.text)

    with Engine(write_stack(tmp_path), replicas={"other": 0}, on_event=fail) as engine:
        engine.wait_ready(LONG_S)
        assert http("POST", f"{engine.url}/function/echo/say", body="said").status == 204
        eventually(lambda: b'"said"' in system(engine, "GET", "/system/logs?name=echo").data)
    assert "an event was not told" in caplog.text


def processes(root: Path, name: str) -> int:
    """How many processes of a function run."""
    folder, count = str(root / ".isthmus" / "build"), 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            count += process.cwd().startswith(folder) and process.cwd().endswith(f"/{name}")
    return count


def laid_out(root: Path, name: str) -> int:
    """How many folders a function is laid out in."""
    return len(list((root / ".isthmus" / "build").glob(f"*/*/{name}")))


def test_deployments_that_never_get_ready_do_not_pile_up(engine: Engine, root: Path) -> None:
    marker = root / "not-ready"
    assert deploy(engine, "PUT", "other", "example/other:latest", {}).status == 202
    eventually(lambda: (describe(engine, "other")["availableReplicas"], processes(root, "other")) == (1, 1))
    marker.touch()
    for _ in range(4):
        assert deploy(engine, "PUT", "other", "example/other:latest", {}).status == 202
    eventually(lambda: processes(root, "other") == 2)  # the one that serves, and the last one
    eventually(lambda: laid_out(root, "other") == 2)
    found = describe(engine, "other")
    assert (found["replicas"], found["availableReplicas"]) == (0, 0)
    assert http("POST", f"{engine.url}/function/other", body=b"still").data == b"still"
    marker.unlink()
    eventually(lambda: (describe(engine, "other")["availableReplicas"], processes(root, "other")) == (1, 1))
    eventually(lambda: laid_out(root, "other") == 1)


def test_a_deployment_from_a_shell_without_the_engines_variables_runs_with_the_engines_values(tmp_path: Path) -> None:
    text = STACK.replace("flag: true", "registry: ${ISTHMUS_REGISTRY:-s3://nowhere}")
    stack = write_stack(tmp_path, text)
    events: list[Event] = []
    options: dict[str, Any] = {"replicas": {"other": 0}, "on_event": events.append}
    with Engine(stack, variables={"ISTHMUS_REGISTRY": "/my/registry"}, **options) as engine:
        engine.wait_ready(LONG_S)

        def registry() -> tuple[str, str]:
            env = http("GET", f"{engine.url}/function/echo/facts/x").json()["env"]
            return describe(engine, "echo")["envVars"]["registry"], env["registry"]

        assert deploy(engine, "PUT", "echo", "example/echo:latest", {"registry": "s3://nowhere"}).status == 202
        engine.wait_ready(LONG_S)
        assert registry() == ("/my/registry", "/my/registry")
        (told,) = [e.text for e in events if e.kind == "deployed"]
        assert "stack.yml's default for registry" in told
        assert deploy(engine, "PUT", "echo", "example/echo:latest", {"registry": "s3://mine"}).status == 202
        engine.wait_ready(LONG_S)
        assert registry() == ("s3://mine", "s3://mine")
        assert deploy(engine, "PUT", "echo", "example/echo:latest", {"registry": ".isthmus/registry"}).status == 202
        engine.wait_ready(LONG_S)
        assert registry() == (".isthmus/registry", str(tmp_path / ".isthmus" / "registry"))
        assert deploy(engine, "PUT", "echo", "example/echo:latest", {"registry": "function/common"}).status == 202
        engine.wait_ready(LONG_S)
        assert registry() == ("function/common", "function/common")  # laid out with the function


def test_an_unknown_function_in_the_options_is_refused(tmp_path: Path) -> None:
    stack = write_stack(tmp_path, STACK)
    with pytest.raises(LocalError, match="no function 'nothing'"):
        Engine(stack, replicas={"nothing": 2}).start()
    with pytest.raises(LocalError, match="no function 'nothing'"):
        Engine(stack, environment={"nothing": {}}).start()
