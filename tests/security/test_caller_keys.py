"""API keys at rest: what the secret `callers` may hold, and what its errors never quote."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from isthmus.errors import RequestMalformed, SettingsError
from isthmus.security.caller_keys import CallerFile, key_digest, new_key, parse_caller_keys
from isthmus.security.callers import Role
from isthmus_tools.usecases.new_caller import NewCallerRequest, new_caller

KEY = new_key()
GOOD = f'{{"name":"ann","key":"{key_digest(KEY)}","roles":{{"infer":["m"]}}}}'


def test_a_key_is_random_and_only_its_digest_is_kept() -> None:
    made = new_caller(NewCallerRequest(name="ann", models=["m"], requests_per_s=2.0))
    assert made.key != KEY
    assert len(made.key) > 45
    assert made.key not in made.line
    assert made.key not in repr(made)
    caller = parse_caller_keys([made.line], where="here").find(made.key)
    assert caller is not None
    assert (caller.name, caller.may(Role.INFER, "m"), caller.may(Role.INFER, "n")) == ("ann", True, False)
    assert caller.limits is not None
    assert caller.limits.requests_per_s == 2.0


@pytest.mark.parametrize(
    "line",
    [
        KEY,
        "{",
        "[]",
        "null",
        "{}",
        GOOD.replace("ann", "a b"),
        GOOD.replace("ann", ""),
        GOOD.replace("ann", "a" * 65),
        GOOD.replace("ann", "jwt:ann"),
        GOOD.replace(key_digest(KEY), KEY),
        GOOD.replace("sha256:", "md5:"),
        GOOD.replace('["m"]', "[]"),
        GOOD.replace('["m"]', '["../m"]'),
        GOOD.replace('["m"]', '"m"'),
        GOOD.replace("infer", "root"),
        GOOD.replace('"roles"', f'"{KEY}":1,"roles"'),
        GOOD.replace('"roles"', '"requests_per_s":-1,"roles"'),
        GOOD.replace('"roles"', '"burst_s":1e9,"roles"'),
        "[" * 5000,
    ],
    ids=itertools.count(),  # the key is another in each process
)
def test_a_line_that_is_no_entry_stops_the_start_and_is_never_quoted(line: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_caller_keys([GOOD.replace("ann", "bob").replace(key_digest(KEY), "sha256:" + "0" * 64), line], where="w")
    assert "line 2" in caught.value.message
    assert KEY not in str(caught.value.document())
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("field", ["name", "key"])
def test_a_line_break_is_at_the_end_of_no_name_and_no_digest(field: str) -> None:
    document = {"name": "ann", "key": "sha256:" + "0" * 64, "roles": {}}
    assert len(parse_caller_keys([json.dumps(document)], where="here")) == 1
    with pytest.raises(SettingsError, match=f"see `\\$.{field}`"):
        parse_caller_keys([json.dumps(document | {field: f"{document[field]}\n"})], where="here")


def test_a_name_or_a_key_comes_once() -> None:
    for second in (GOOD, GOOD.replace("ann", "bob"), GOOD.replace(key_digest(KEY), "sha256:" + "0" * 64)):
        with pytest.raises(SettingsError, match="line 2"):
            parse_caller_keys([GOOD, second], where="here")


def test_a_list_has_a_bound() -> None:
    lines = [GOOD.replace("ann", f"a{n}").replace(key_digest(KEY), key_digest(str(n))) for n in range(257)]
    with pytest.raises(SettingsError, match="257 callers"):
        parse_caller_keys(lines, where="here")


def test_a_secret_that_is_no_text_or_cannot_be_read_stops_the_start_without_being_quoted(tmp_path: Path) -> None:
    secret = tmp_path / "callers"
    for content in (b"\xff" + KEY.encode(), GOOD.encode() + b" " * 70_000):
        secret.write_bytes(content)
        with pytest.raises(SettingsError) as caught:
            CallerFile(str(tmp_path), print)
        assert KEY not in str(caught.value.document())
    secret.unlink()
    os.mkfifo(secret)
    with pytest.raises(SettingsError, match="pipe"):
        CallerFile(str(tmp_path), print)


def test_a_key_with_a_line_break_in_the_middle_is_two_lines_and_never_quoted(tmp_path: Path) -> None:
    (tmp_path / "callers").write_text(GOOD[:40] + "\n" + GOOD[40:])
    with pytest.raises(SettingsError, match="line 1") as caught:
        CallerFile(str(tmp_path), print)
    assert key_digest(KEY)[:20] not in str(caught.value.document())


def test_an_empty_secret_is_a_list_of_nobody(tmp_path: Path) -> None:
    assert not CallerFile(str(tmp_path), print).is_configured
    (tmp_path / "callers").write_text("\n")
    empty = CallerFile(str(tmp_path), print)
    assert empty.is_configured
    assert empty.find(KEY) is None


def test_a_file_of_callers_grows_by_a_line_and_is_its_owners_alone(tmp_path: Path) -> None:
    file = tmp_path / "callers.jsonl"
    keys = [new_caller(NewCallerRequest(name=name, file=file)).key for name in ("ann", "bob")]
    assert file.stat().st_mode & 0o777 == 0o600
    callers = parse_caller_keys(file.read_text().splitlines(), where="here")
    assert [getattr(callers.find(key), "name", "") for key in keys] == ["ann", "bob"]
    with pytest.raises(RequestMalformed, match="has a caller ann already"):
        new_caller(NewCallerRequest(name="ann", file=file))
    assert len(file.read_text().splitlines()) == 2


def test_a_line_is_added_to_a_file_whose_last_line_has_no_end(tmp_path: Path) -> None:
    file = tmp_path / "callers.jsonl"
    file.write_text(new_caller(NewCallerRequest(name="ann")).line)
    new_caller(NewCallerRequest(name="bob", file=file))
    assert len(parse_caller_keys(file.read_text().splitlines(), where="here")) == 2


@pytest.mark.parametrize("wrong", [{"name": "a b"}, {"roles": ["root"]}, {"models": ["../x"]}, {"models": ["m:3"]}])
def test_names_roles_and_models_of_a_new_caller_are_checked(wrong: dict[str, object]) -> None:
    with pytest.raises(RequestMalformed):
        new_caller(NewCallerRequest(**({"name": "ann"} | wrong)))  # type: ignore[arg-type]
