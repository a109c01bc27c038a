"""`isthmus audit`: the entries, the verdict on the chain, and a checkpoint that was stored elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from isthmus.registry import FolderStore, RetryPolicy
from isthmus.security.audit import AuditLog
from support.cli import document, isthmus, refusal


def filled(folder: Path) -> FolderStore:
    folder.mkdir()
    store = FolderStore(folder)
    for version in "123":
        AuditLog(store, RetryPolicy()).append("ann@laptop", "promote", {"model": "m", "version": version})
    return store


def test_audit_lists_the_latest_entries_and_verifies_the_chain(tmp_path: Path) -> None:
    filled(tmp_path / "r")
    shown = document(isthmus("audit", "--verify", "--last", 2, "--registry", tmp_path / "r", "--json"))
    assert [entry["facts"]["version"] for entry in shown["entries"]] == ["2", "3"]
    assert (shown["count"], shown["verified"], shown["broken"]) == (3, True, None)
    text = isthmus("audit", "--registry", tmp_path / "r").stdout
    assert "ann@laptop" in text
    assert "model=m, version=3" in text


def test_a_long_fact_is_marked_as_cut(tmp_path: Path) -> None:
    facts = {"digest": "sha256:" + "ab" * 32, "reason": "x" * 200}
    (tmp_path / "r").mkdir()
    AuditLog(FolderStore(tmp_path / "r"), RetryPolicy()).append("ann@laptop", "promote", facts)
    text = isthmus("audit", "--registry", tmp_path / "r").stdout
    assert f"digest=sha256:{'ab' * 6}…" in text
    assert "xx…" in text


def test_audit_names_the_first_broken_entry_and_fails(tmp_path: Path) -> None:
    store = filled(tmp_path / "r")
    store.delete("audit/000000000002")
    result = isthmus("audit", "--verify", "--registry", tmp_path / "r", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["broken"] == {"number": 2, "reason": "it is missing"}
    assert "breaks at entry 2" in isthmus("audit", "--verify", "--registry", tmp_path / "r").stderr


def test_audit_holds_the_chain_against_a_checkpoint(tmp_path: Path) -> None:
    store = filled(tmp_path / "r")
    checkpoint = document(isthmus("audit", "--verify", "--registry", tmp_path / "r", "--json"))["checkpoint"]
    store.delete("audit/000000000003")
    store.delete("audit/head")
    assert isthmus("audit", "--verify", "--registry", tmp_path / "r").exit_code == 0
    assert isthmus("audit", "--checkpoint", checkpoint, "--registry", tmp_path / "r").exit_code == 1
    wrong = refusal(isthmus("audit", "--checkpoint", "3", "--registry", tmp_path / "r", "--json"))
    assert "is no checkpoint" in wrong["error"]


def test_a_registry_without_changes_has_an_empty_log(tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    shown = document(isthmus("audit", "--verify", "--registry", tmp_path / "r", "--json"))
    assert (shown["entries"], shown["count"], shown["verified"]) == ([], 0, True)
