"""A removal and a move of an alias at the same time: no alias means a removed version, whatever the order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from isthmus.errors import Denied, Missing, RegistryError, RegistryUnavailable
from isthmus.registry import BlobStore, FolderStore, Registry
from isthmus.registry.versions import remove_version, roll_back
from support.fake_bundles import Fake, variant
from support.s3_server import PATIENCE


class Interrupted:
    """A store that runs something else, once, before its n-th call."""

    def __init__(self, store: BlobStore, at: int, other: Callable[[], object]) -> None:
        self._store, self._at, self._other = store, at, other
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._store, name)
        if not callable(value):
            return value

        def call(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self._at:
                self._other()
            return value(*arguments, **options)

        return call


def remove(registry: Registry) -> None:
    remove_version(registry, "fake", "2")


def remove_third(registry: Registry) -> None:
    remove_version(registry, "fake", "3")


def move(registry: Registry) -> None:
    registry.move_alias("fake", "prod", "2")


def name_first(registry: Registry) -> None:
    registry.move_alias("fake", "canary", "2")


def back(registry: Registry) -> None:
    roll_back(registry, "fake")


def with_three_versions(registry: Registry, fake: Fake) -> Registry:
    """Prod has meant 1 and 2, and means 3."""
    for note in "123":
        registry.publish(variant(fake, note).bundle, fake.files, alias="prod")
    return registry


@pytest.fixture
def published(registry: Registry, fake: Fake) -> Registry:
    return with_three_versions(registry, fake)


@pytest.mark.parametrize("first", [remove, move, name_first, back])
@pytest.mark.parametrize("second", [remove, remove_third, move, name_first, back])
def test_no_order_leaves_an_alias_of_a_removed_version(
    first: Callable[[Registry], None], second: Callable[[Registry], None], tmp_path: Path, fake: Fake
) -> None:
    interleave(first, second, with_three_versions(Registry(FolderStore(tmp_path / "registry"), PATIENCE), fake))


@pytest.mark.parametrize(("first", "second"), [(remove, move), (move, remove)])
def test_no_order_leaves_such_an_alias_in_any_store(
    first: Callable[[Registry], None], second: Callable[[Registry], None], published: Registry
) -> None:
    interleave(first, second, published)


def interleave(first: Callable[[Registry], None], second: Callable[[Registry], None], registry: Registry) -> None:
    """Run the second whole before each call of the first to the store, from the same state each time."""
    state = {key: registry.store.get(key, max_bytes=2**14) for key in registry.store.list("models/")}

    def quietly(run: Callable[[Registry], None], registry: Registry) -> None:
        with suppress(RegistryError):
            run(registry)

    calls = at = 0
    while calls >= at:
        at += 1
        for key in registry.store.list("models/"):
            if key not in state:
                registry.store.delete(key)
        for key, data in state.items():
            registry.store.put(key, data)
        store: Any = Interrupted(registry.store, at, lambda: quietly(second, Registry(registry.store, PATIENCE)))
        quietly(first, Registry(store, PATIENCE))
        calls = store.calls
        numbers = {version.version for version in registry.versions("fake")}
        assert set(registry.aliases("fake").values()) <= numbers, at
    assert at > 5


def test_a_move_to_a_version_that_goes_meanwhile_leaves_the_alias_as_it_was(published: Registry) -> None:
    removed = False

    def go() -> None:
        nonlocal removed
        if not removed:
            removed = True
            remove(published)

    put_if_match = published.store.put_if_match

    class Late(Interrupted):
        def put_if_match(self, key: str, data: bytes, tag: str) -> bool:
            if key.endswith("/aliases/prod"):
                go()
            return put_if_match(key, data, tag)

    store: Any = Late(published.store, 0, go)
    with pytest.raises(Missing, match="no version '2'"):
        move(Registry(store, PATIENCE))
    assert published.resolve("fake").version == "3"


def test_a_removal_that_was_killed_is_finished_by_another(published: Registry) -> None:
    digest = published.store.get("models/fake/versions/2", max_bytes=256)
    published.store.put("models/fake/removed/2", digest)
    with pytest.raises(RegistryUnavailable, match="being removed") as caught:
        move(published)
    assert "isthmus rm fake:2" in caught.value.hint
    assert published.resolve("fake").version == "3"
    remove(published)
    assert [version.version for version in published.versions("fake")] == ["1", "3"]


def test_a_removal_without_the_right_to_delete_changes_nothing(published: Registry) -> None:
    class NoDelete(Interrupted):
        def delete(self, key: str) -> None:
            raise Denied("no right to delete", registry="", blob=key)

    store: Any = NoDelete(published.store, 0, lambda: None)
    with pytest.raises(Denied):
        remove(Registry(store, PATIENCE))
    move(published)
    assert published.resolve("fake").version == "2"
