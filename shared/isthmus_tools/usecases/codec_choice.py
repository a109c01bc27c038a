"""The Pareto front of bytes and agreement at a cut, the best entry, and the command that serves with an entry."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import TypeVar

from isthmus.artifacts.bundle import Bundle
from isthmus.artifacts.choice import RAW_ID
from isthmus.artifacts.fidelity import Entry, Fidelity, Reference, offered

Measured = TypeVar("Measured", Entry, Reference)


def pareto_front(entries: Sequence[Measured]) -> list[Measured]:
    """The entries that no other entry beats in bytes and agreement, fewest bytes first."""
    front: list[Measured] = []
    for entry in sorted(entries, key=lambda e: (e.bytes, -e.agreement)):
        if not front or entry.agreement > front[-1].agreement:
            front.append(entry)
    return front


def best_entry(fidelity: Fidelity, cut: str) -> Entry | None:
    """The entry of fewest bytes on offer at a cut, as in a plan; None where only raw is on offer."""
    return next((entry for entry in offered(fidelity, cut) if entry.codec != RAW_ID), None)


def apply_command(reference: str, bundle: Bundle, entry: Entry) -> str:
    """The command that serves a bundle at an entry's cut with its codec, past a plan.

    `reference` is NAME or NAME:VERSION. The settings are the router's, so a stack file may hold them, too.
    """
    settings = {"codec": str(entry.choice)}
    # A cut in the settings goes before a plan; the default cut needs none.
    if bundle.plan is not None or bundle.default_cuts != (entry.cut,):
        settings["cuts"] = entry.cut
    options = [f"--env {shlex.quote(f'router:{name}={value}')}" for name, value in settings.items()]
    return " ".join([f"isthmus up --model {reference}", *options])
