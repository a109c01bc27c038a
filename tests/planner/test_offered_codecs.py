"""Which codecs candidates get: those that need no calibration, and of a calibrated bundle those that it offers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from msgspec import structs

from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.choice import CODEC_IDS, INPUT_CODECS, Choice, Look
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.fidelity import Entry, Fidelity, model_digest, to_json
from isthmus.codecs import find_codec
from isthmus_tools.planner.offered import offered_codecs, short_name
from support.bundles import Published, publish_photos
from support.candidate_sets import LINK, evaluated
from support.fidelities import entry, fidelity


def test_without_calibration_every_codec_that_needs_none_is_offered() -> None:
    found = [choice.codec for choice in offered_codecs(None, "3")]
    assert found[0] == "raw"
    assert set(found) == {c for c in CODEC_IDS if c not in INPUT_CODECS and not find_codec(c).calibrated}


def test_a_calibrated_cut_offers_each_codec_at_its_fewest_bytes() -> None:
    known = fidelity("sha256:" + "0" * 64)
    graded = (
        entry("transform/4", 0.9, 600),
        entry("transform/4", 0.5, 300),
        entry("transform/4", 0.2, 100, offered=False),
    )
    known = Fidelity(known.subject, 0.99, known.measure, known.inputs, (*known.entries, *graded))
    found = offered_codecs(known, "3")
    assert set(found) == {Choice("raw"), Choice("int8/1"), Choice("half/1"), Choice("transform/4", 0.5)}
    assert [short_name(c) for c in (Choice("int8/1"), Choice("transform/4", 0.55))] == ["int8", "transform-55"]


def followed(quality: float, size: int, *finer: float, offered: bool = True) -> Entry:
    looks, shares = tuple(Look(q, 0.5) for q in finer), tuple(0.5 / (n + 1) for n in range(len(finer)))
    return structs.replace(entry("transform/4", quality, size, offered=offered), looks=looks, shares=shares)


def test_a_further_closer_look_is_offered_only_if_it_saves_bytes() -> None:
    known = fidelity("sha256:" + "0" * 64)
    chains = (
        followed(0.8, 300),
        followed(0.6, 250, 0.8),
        followed(0.5, 240, 0.7),
        followed(0.3, 100, 0.5, offered=False),
        followed(0.4, 240, 0.6, 0.8),
        followed(0.3, 260, 0.5, 0.7),
        followed(0.2, 190, 0.4, 0.6, 0.8),
        followed(0.0, 180, 0.2, 0.4, 0.6, offered=False),
    )
    known = structs.replace(known, entries=(*known.entries, *chains))
    found = [choice for choice in offered_codecs(known, "3") if choice.codec == "transform/4"]
    assert [short_name(choice) for choice in found] == ["transform-80", "transform-50-70", "transform-20-40-60-80"]
    # Where only those are offered that look closer, they stay.
    without = structs.replace(known, entries=tuple(e for e in known.entries if e.looks))
    assert [short_name(c) for c in offered_codecs(without, "3")] == ["raw", "transform-50-70", "transform-20-40-60-80"]


def test_lossy_codecs_are_not_offered_at_cuts_that_calibration_did_not_measure() -> None:
    known = fidelity("sha256:" + "0" * 64)
    exact = (Choice("raw"), Choice("lossless/3"), Choice("sparse/2"))
    assert offered_codecs(known, "7") == offered_codecs(known, "") == exact


def calibrated(folder: Path) -> Published:
    published = publish_photos(folder)
    data = to_json(fidelity(model_digest(published.bundle)))
    (folder / "fidelity.json").write_bytes(data)
    blob = Blob(digest_of(data), len(data))
    bundle = structs.replace(published.bundle, fidelity=blob)
    version = published.registry.publish(bundle, {blob.digest: folder / "fidelity.json"}, alias="prod")
    return replace(published, bundle=bundle, version=version.version, digest=version.digest)


def test_a_calibrated_cut_is_a_candidate_with_the_errors_that_calibration_measured(tmp_path: Path) -> None:
    published = calibrated(tmp_path)
    with evaluated(published, max_cuts=1) as candidate_set:
        found = {c.name: c for c in candidate_set.predict(LINK)}
    assert {"split-3-raw", "split-3-int8", "split-3-half"} <= found.keys()
    assert "split-3-int4" not in found
    error = found["split-3-int8"].error
    assert (error.relative, error.inputs, round(error.disagreement, 6)) == (0.02, 200, 0.005)


def test_a_private_depth_goes_before_a_calibrated_cut(tmp_path: Path) -> None:
    published = calibrated(tmp_path)
    with evaluated(published, max_cuts=1, private_depth=5) as candidate_set:
        assert all(c.cuts != ("3",) for c in candidate_set.predict(Conditions(1e6)))
