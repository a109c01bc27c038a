"""The tree of errors and its table of statuses."""

from __future__ import annotations

from collections.abc import Iterator

from isthmus.errors import HTTP_STATUS, IsthmusError, http_status


def leaves(cls: type[IsthmusError]) -> Iterator[type[IsthmusError]]:
    below = cls.__subclasses__()
    if not below:
        yield cls
    for sub in below:
        yield from leaves(sub)


def test_every_leaf_has_a_status_of_its_own() -> None:
    assert {c for c in leaves(IsthmusError) if c.__module__ == "isthmus.errors"} <= HTTP_STATUS.keys()


def test_an_error_carries_its_facts_and_its_hint() -> None:
    error = IsthmusError("it broke", hint="mend it", size=3)
    assert (error.message, error.facts, error.hint) == ("it broke", {"size": 3}, "mend it")


def test_a_class_without_a_row_answers_as_its_nearest_ancestor() -> None:
    class Special(next(iter(leaves(IsthmusError)))):  # type: ignore[misc]
        pass

    assert http_status(Special("x")) == HTTP_STATUS[Special.__mro__[1]]
    assert http_status(IsthmusError("x")) == 500
