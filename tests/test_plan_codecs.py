"""Which codecs candidates get: those that need no calibration, and of a calibrated bundle those that it offers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from isthmus.artifacts.agreement import Measure
from isthmus.artifacts.bundle import Blob, digest_of
from isthmus.artifacts.choice import KNOWN, NEVER_CHOSEN, Choice, Look
from isthmus.artifacts.conditions import Conditions
from isthmus.artifacts.fidelity import Entry, Fidelity, Inputs
from isthmus.artifacts.fidelity_document import model_digest, to_json
from isthmus.codecs import find_codec
from isthmus_tools.planner.offered import offered_codecs, short_name
from support.bundles import Published, publish_photos
from test_plan_draft import LINK, drafted


def entry(codec: str, quality: float, size: int, *, agreement: float = 1.0, offered: bool = True) -> Entry:
    return Entry("3", codec, quality, agreement, 0.9, 1.0, 0.02, size, size, 4.0, 0.1, 0.1, 0.0, offered, agreement)


def fidelity(subject: str) -> Fidelity:
    entries = (
        entry("raw", 1.0, 4000),
        entry("int8/1", 1.0, 1000, agreement=0.995),
        entry("int4/1", 1.0, 500, agreement=0.6, offered=False),
        entry("half/1", 1.0, 2000),
    )
    return Fidelity(subject, 0.99, Measure("top1", "logits"), Inputs("photos", 10, 5, 200), entries)


def test_without_calibration_every_codec_that_needs_none_is_usable() -> None:
    found = [choice.codec for choice in offered_codecs(None, "3")]
    assert found[0] == "raw"
    assert set(found) == {c for c in KNOWN if c not in NEVER_CHOSEN and not find_codec(c).calibrated}


def test_a_calibrated_cut_has_what_it_offers_each_at_its_smallest() -> None:
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
    return replace(entry("transform/4", quality, size, offered=offered), looks=looks, shares=shares)


def test_each_number_of_closer_looks_is_usable_that_takes_fewer_bytes_than_fewer_of_them() -> None:
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
    known = replace(known, entries=(*known.entries, *chains))
    found = [choice for choice in offered_codecs(known, "3") if choice.codec == "transform/4"]
    assert [short_name(choice) for choice in found] == ["transform-80", "transform-50-70", "transform-20-40-60-80"]
    # Where only those are offered that look closer, they stay.
    without = replace(known, entries=tuple(e for e in known.entries if e.looks))
    assert [short_name(c) for c in offered_codecs(without, "3")] == ["raw", "transform-50-70", "transform-20-40-60-80"]


def test_what_changes_values_is_not_usable_where_a_calibrated_bundle_did_not_measure_it() -> None:
    known = fidelity("sha256:" + "0" * 64)
    exact = (Choice("raw"), Choice("lossless/3"), Choice("sparse/2"))
    assert offered_codecs(known, "7") == offered_codecs(known, "") == exact


def calibrated(folder: Path) -> Published:
    published = publish_photos(folder)
    data = to_json(fidelity(model_digest(published.bundle)))
    (folder / "fidelity.json").write_bytes(data)
    blob = Blob(digest_of(data), len(data))
    bundle = replace(published.bundle, fidelity=blob)
    version = published.registry.publish(bundle, {blob.digest: folder / "fidelity.json"}, alias="prod")
    return replace(published, bundle=bundle, version=version.version, digest=version.digest)


def test_a_calibrated_cut_is_a_candidate_with_the_errors_that_calibration_measured(tmp_path: Path) -> None:
    published = calibrated(tmp_path)
    with drafted(published, max_cuts=1) as draft:
        found = {c.name: c for c in draft.predict(LINK)}
    assert {"split-3-raw", "split-3-int8", "split-3-half"} <= found.keys()
    assert "split-3-int4" not in found
    error = found["split-3-int8"].error
    assert (error.relative, error.inputs, round(error.disagreement, 6)) == (0.02, 200, 0.005)


def test_a_private_depth_goes_before_a_calibrated_cut(tmp_path: Path) -> None:
    published = calibrated(tmp_path)
    with drafted(published, max_cuts=1, private_depth=5) as draft:
        assert all(c.cuts != ("3",) for c in draft.predict(Conditions(1e6)))
