"""Closer looks as calibration measures them: a small real model is calibrated, shown and served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flask.testing import FlaskClient
from typer.testing import CliRunner

from isthmus.artifacts.fidelity import Measure, from_json, to_json
from isthmus.serving import create_router_app, create_segment_app
from isthmus_tools.cli import app
from isthmus_tools.figures.fidelity import draw
from support.bundles import Published, photo, ready, router_settings, segment_settings, served
from support.bundles import photos as photos
from support.calibrated_photos import QUALITIES, Known, calibrated
from support.calibrated_photos import known as known


def isthmus(*arguments: object) -> Any:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_calibration_measures_closer_looks_that_the_document_keeps(known: Known) -> None:
    entry = known.chain
    assert entry.low <= entry.measured <= entry.high
    assert 1 > entry.shares[0] > entry.shares[1] > 0
    plain = {e.choice: e for e in known.fidelity.entries}
    finest = plain[entry.choice.last]
    assert plain[entry.choice.once].agreement < entry.agreement <= finest.agreement
    assert entry.bits < 0.9 * finest.bits
    assert from_json(to_json(known.fidelity)) == known.fidelity


def test_answers_that_are_no_classes_get_none(photos: Published, tmp_path: Path) -> None:
    found = calibrated(photos, tmp_path, Measure("close")).fidelity
    assert not any(e.looks or e.shares for e in found.entries)
    assert {e.quality for e in found.entries if e.codec == "transform/4"} == set(QUALITIES)


def test_the_codec_command_names_them(known: Known, tmp_path: Path) -> None:
    where = ("--registry", known.published.folder)
    said = json.loads(isthmus("codec", "photos", "--cut", 6, "--agreement", known.chain.agreement, *where, "--json"))
    looks = [{"quality": look.quality, "margin": look.margin} for look in known.chain.looks]
    assert (looks, list(known.chain.shares)) in [(e.get("looks"), e.get("shares")) for e in said["entries"]]
    picture = tmp_path / "curves.svg"
    table = isthmus("codec", "photos", "--cut", 6, "--all", "--picture", picture, *where)
    (line,) = [x for x in table.splitlines() if str(known.chain.choice) in x and "│" in x]
    assert "looks " + " ".join(f"{share:.0%}" for share in known.chain.shares) in line
    assert table.count(", looks ") == sum(bool(e.looks) for e in known.fidelity.entries)
    assert draw(known.fidelity, {"6": known.chain}, "photos:2").startswith(b"\x89PNG")


def test_a_router_serves_what_the_codec_command_writes_with_the_calibrations_own_classes(
    known: Known, tmp_path: Path
) -> None:
    published = known.published
    with served(create_segment_app(segment_settings(published, tmp_path / "tail"))) as url:

        def router(codec: str) -> FlaskClient:
            settings = router_settings(
                published, tmp_path / "router", ("local", url), codec=codec, cuts="6", guard_share=0.0
            )
            return ready(create_router_app(settings).test_client())

        closer, coarse = router(str(known.chain.choice)), router(str(known.chain.choice.once))
        taken = set()
        for seed in range(40):
            found, first = (client.post("/", data=photo(seed=seed)).json for client in (closer, coarse))
            route = found["route"]
            assert all(s["codecs"] == {"p6": "transform/4"} for s in route["segments"][1:])
            assert (found["classes"] == first["classes"]) or route["looks"]
            taken.add(route["looks"])
        assert {0, 2} <= taken <= {0, 1, 2}
