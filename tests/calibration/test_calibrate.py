"""Calibration from photos and arrays: what is learned, what is measured and published, and what data is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from isthmus.artifacts.bundle import Blob, digest_of, subject_digest
from isthmus.artifacts.choice import CODEC_IDS, INPUT_CODECS, Choice, Look
from isthmus.artifacts.fidelity import Entry, measure_for, model_digest, offered, read_fidelity, to_json
from isthmus.artifacts.plan import CloserLooks, Coding, read_plan
from isthmus.errors import CalibrationError
from isthmus.registry import FolderStore, Registry, SegmentCache
from isthmus_tools.calibration.boundary import CutBoundary, Spool
from isthmus_tools.calibration.calibrate import CHOICES, QUALITIES, CalibrationSpec, calibrate
from isthmus_tools.calibration.inputs import list_files, open_source, split
from isthmus_tools.graph import add_cuts
from isthmus_tools.planner.publishing import carry_over, publish_plan
from isthmus_tools.usecases.codec_choice import apply_command
from support.bundles import Published, pair_model, photo, publish, publish_photos
from support.cli import document, isthmus, refusal
from support.executors import executor_of
from support.plans import candidate, plan_for
from support.segments import run_whole

PLAIN = tuple(c for c in CHOICES if c.codec != "transform/4")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Published:
    return publish_photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture
def photos(original: Published, tmp_path: Path) -> Published:
    folder = tmp_path / "registry"
    shutil.copytree(original.folder, folder)
    return replace(original, folder=folder)


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("album")
    for seed in range(24):
        (folder / f"{seed}.png").write_bytes(photo((12, 10), seed))
    (folder / "notes.txt").write_text("where these were taken")
    return folder


@pytest.fixture(scope="module")
def calibrated(original: Published, album: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A registry with the model calibrated at one cut, and what the command printed."""
    folder = tmp_path_factory.mktemp("calibrated") / "registry"
    shutil.copytree(original.folder, folder)
    cuts = ("--cut", "6")
    return folder, document(
        isthmus("calibrate", "photos", "--data", album, *cuts, "--inputs", 32, "--registry", folder, "--json")
    )


# The command


def test_calibrating_publishes_tables_and_a_fidelity_as_the_next_version(calibrated: tuple[Path, Any]) -> None:
    said = calibrated[1]
    assert (said["name"], said["version"]) == ("photos", "2")
    assert said["inputs"] == {
        "source": said["inputs"]["source"],
        "files": 24,
        "calibrated": 16,
        "held_out": 16,
        "made": said["inputs"]["made"],
    }
    assert "parts" in said["inputs"]["made"]
    assert {e["cut"] for e in said["entries"]} == {"6"}
    assert set(said["tables"]) == {"p6"}
    assert {r["codec"] for r in said["references"]} == {"jpeg", "webp"}
    at6 = {(e["codec"], e["quality"]): e for e in said["entries"] if e["cut"] == "6"}
    assert at6["raw", 1.0]["bytes"] == 16 * 4 * 4 * 4
    assert at6["half/1", 1.0]["bytes"] == at6["raw", 1.0]["bytes"] // 2
    for e in at6.values():
        assert e["low"] <= e["measured"] <= e["high"]
        assert e["offered"] == (e["agreement"] >= said["limit"])
    exact = at6["lossless/3", 1.0]
    assert (exact["agreement"], exact["low"], exact["error"]) == (1, 1, 0)
    finest, coarsest = at6["transform/4", 1.0], at6["transform/4", 0.0]
    assert finest["bytes"] > coarsest["bytes"]
    assert finest["agreement"] >= coarsest["agreement"]


def test_the_codec_command_shows_the_curves_and_finds_targets(calibrated: tuple[Path, Any], tmp_path: Path) -> None:
    folder, said = calibrated
    found = document(isthmus("codec", "photos", "--registry", folder, "--json"))
    assert found["entries"] == said["entries"]
    # Few or none: a look costs a frame's header of half a kB, which is half of all that crosses here.
    assert all(len(e["looks"]) == len(e["shares"]) for e in found["entries"])
    assert found["chosen"] == {}
    picture = tmp_path / "curves.svg"
    targets = ("--agreement", "0.99", "--picture", picture, "--all")
    result = isthmus("codec", "photos", "--cut", "6", *targets, "--registry", folder)
    assert result.exit_code == 0, result.output
    assert "keeps" in result.stdout
    assert "jpeg 85" in result.stdout
    assert "<svg" in picture.read_text()
    small = document(isthmus("codec", "photos", "--cut", "6", "--bytes", "300B", "--registry", folder, "--json"))
    assert small["chosen"]["6"]["bytes"] <= 300
    assert refusal(isthmus("codec", "photos", "--cut", "5", "--registry", folder, "--json"))["type"] == "Missing"
    nothing = refusal(isthmus("codec", "photos", "--bytes", "1B", "--registry", folder, "--json"))
    assert nothing["type"] == "CalibrationError"
    assert "closest" in nothing["facts"]
    assert (
        "not a size" in refusal(isthmus("codec", "photos", "--bytes", "few", "--registry", folder, "--json"))["error"]
    )


def test_the_codec_command_shows_the_front_with_the_choice_on_top_and_how_to_serve_it(
    calibrated: tuple[Path, Any],
) -> None:
    folder, said = calibrated
    text = isthmus("codec", "photos", "--registry", folder).stdout
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
    entries = {str(Choice(e["codec"], e["quality"], tuple(Look(**k) for k in e["looks"]))): e for e in said["entries"]}
    assert rows[0][0].startswith("→ ")
    top = entries[rows[0][0].removeprefix("→ ")]
    assert top["bytes"] == min(e["bytes"] for e in said["entries"] if e["offered"] and e["codec"] != "raw")
    front = [entries[row[0]] for row in rows[1:] if row[0] in entries]
    for entry in front:
        others = [e for e in said["entries"] if e != entry]
        assert not any(e["bytes"] <= entry["bytes"] and e["agreement"] > entry["agreement"] for e in others)
    assert 0 < len(front) < len(said["entries"]) - 1
    command = f"isthmus up --model photos:2 --env router:codec={top['codec']}"
    assert f"to serve with it: {command}" in text
    applied = document(isthmus("codec", "photos", "--registry", folder, "--json"))["apply"]
    assert applied["6"].startswith(command)


def test_the_command_that_applies_a_codec_goes_past_a_plan_and_another_default_cut(photos: Published) -> None:
    entry = Entry("6", "int8/1", 1.0, 1.0, 1.0, 1.0, 0.0, 10, 10, 8.0, 0.0, 0.0, 0.0, True, 1.0)
    bundle = structs.replace(photos.bundle, default_cuts=("6",))
    assert apply_command("m", bundle, entry) == "isthmus up --model m --env router:codec=int8/1"
    planned = structs.replace(bundle, plan=Blob(digest_of(b""), 0))
    for other in (structs.replace(bundle, default_cuts=("1",)), planned):
        assert apply_command("m", other, entry).endswith("--env router:codec=int8/1 --env router:cuts=6")


def test_calibrating_shows_a_table_for_people(photos: Published, album: Path) -> None:
    result = isthmus("calibrate", "photos", "--data", album, "--cut", "6", "--inputs", 16, "--registry", photos.folder)
    assert result.exit_code == 0, result.output
    assert "photos:2" in result.stdout
    assert "│ → " in result.stdout
    assert "more take more bytes for no more agreement" in result.stdout


def test_calibrating_keeps_a_plan_that_calibration_does_not_touch(photos: Published, album: Path) -> None:
    registry = Registry(FolderStore(photos.folder))
    publish_plan(registry, photos.bundle, {}, plan_for(photos.bundle, candidate()), alias="prod")
    common = ["calibrate", "photos", "--data", album, "--cut", "6", "--inputs", 16, "--registry", photos.folder]
    result = isthmus(*common)
    assert result.exit_code == 0, result.output
    serving = registry.resolve("photos")
    plan = read_plan(serving.bundle, registry.blob)
    assert (serving.version, plan and plan.chosen) == ("3", "edge-float")
    assert set(serving.bundle.tables) == {"p6"}
    assert "the plan stays in force: edge-float" in result.stdout
    assert "prod means photos:3 now; it meant photos:2" in result.stdout


def test_calibrating_renews_a_plan_whose_codec_has_new_tables(photos: Published, album: Path) -> None:
    registry = Registry(FolderStore(photos.folder))
    chosen = candidate("split-6-transform-50", "split", cuts=("6",), codecs={"p6": Coding("transform/4", 0.5)})
    publish_plan(registry, photos.bundle, {}, plan_for(photos.bundle, chosen), alias="prod")
    common = ["calibrate", "photos", "--data", album, "--inputs", 16, "--registry", photos.folder]
    done = document(isthmus(*common, "--cut", "1", "--json"))
    assert set(done["cuts"]) == {"1", "6"}  # the planned cut, too
    assert (done["alias_moved"], done["plan_dropped"], done["plan_renewed"]) == (True, False, True)
    serving = registry.resolve("photos")
    plan = read_plan(serving.bundle, registry.blob)
    assert plan is not None
    coding = plan.choice.codecs["p6"]
    fidelity = read_fidelity(serving.bundle, registry.blob)
    assert fidelity is not None
    entry = next(e for e in fidelity.entries if e.cut == "6" and e.choice == Choice(coding.codec, coding.quality))
    assert entry.offered
    assert coding.quality >= 0.5
    assert plan.choice.error.disagreement == pytest.approx(1 - entry.agreement)
    assert "renewed after a calibration" in plan.why[-1]
    assert done["serving"] == serving.version
    assert done["next"] == f"isthmus up --model photos --registry {photos.folder}"


def test_calibrating_takes_the_default_cuts_unless_asked_for_more(photos: Published, album: Path) -> None:
    common = ["calibrate", "photos", "--data", album, "--inputs", 16, "--registry", photos.folder, "--json"]
    assert document(isthmus(*common))["cuts"] == list(photos.bundle.default_cuts)
    assert set(document(isthmus(*common, "--all-cuts"))["cuts"]) == set(photos.bundle.cuts)


def test_calibrating_leaves_the_alias_with_a_plan_that_would_be_lost(photos: Published, album: Path) -> None:
    registry = Registry(FolderStore(photos.folder))
    # No calibration has this margin, so no entry can take the place of these closer looks.
    looks = CloserLooks.of("logits", (Look(0.9, 0.123456),), (0.5,))
    chosen = candidate("split-6-looks", "split", cuts=("6",), codecs={"p6": Coding("transform/4", 0.5)}, looks=looks)
    publish_plan(registry, photos.bundle, {}, plan_for(photos.bundle, chosen), alias="prod")
    common = ["calibrate", "photos", "--data", album, "--cut", "6", "--inputs", 16, "--registry", photos.folder]
    result = isthmus(*common)
    assert result.exit_code == 0, result.output
    assert registry.resolve("photos").version == "2"
    assert "prod stays at photos:2, which serves by a plan" in result.stdout
    assert "requests for photos reach version 2" in result.stdout
    assert "next: isthmus plan photos:3 --uplink 10Mbit/s --rtt 20ms" in result.stdout
    assert registry.resolve("photos:3").bundle.fidelity is not None
    moved = document(isthmus(*common, "--drop-plan", "--json"))
    assert (moved["alias_was"], moved["alias_moved"], moved["plan_dropped"]) == ("2", True, True)
    assert registry.resolve("photos").bundle.plan is None


def test_a_plan_is_carried_only_where_its_choice_runs_the_same(photos: Published) -> None:
    before, table = photos.bundle, Blob(digest_of(b"table"), 5)
    graded = candidate("split-6-t", "split", cuts=("6",), codecs={"p6": Coding("transform/4", 0.5)})
    edge, split = plan_for(before, candidate()), plan_for(before, graded)
    tabled = structs.replace(before, tables={"p6": table})
    kept = carry_over(edge, before, tabled, None)
    assert kept == structs.replace(edge, subject=subject_digest(tabled))
    assert carry_over(split, before, tabled, None) is None
    assert carry_over(split, tabled, structs.replace(tabled, default_cuts=("1",)), None) is not None
    other = structs.replace(before, weights=structs.replace(before.weights, blob=Blob(digest_of(b"others"), 9)))
    assert carry_over(edge, before, other, None) is None
    assert carry_over(edge, before, structs.replace(before, postprocess=None), None) is None
    assert carry_over(split, tabled, structs.replace(tabled, cut_list=()), None) is None


def test_a_bundle_that_was_not_calibrated_says_how(photos: Published) -> None:
    said = refusal(isthmus("codec", "photos", "--registry", photos.folder, "--json"))
    assert said["type"] == "CalibrationError"
    assert "isthmus calibrate photos" in said["hint"]


# What is refused


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("empty", "no folder"),
        ("nowhere", "no folder"),
        ("text", "0 photos or arrays"),
        ("one", "1 photos or arrays"),
        ("mixed", "both photos and arrays"),
        ("broken", "cannot be used"),
        ("few", "inputs to calibrate with"),
        ("wrong-shape", "does not fit the model"),
        ("wrong-dtype", "does not fit the model"),
        ("wrong-name", "does not fit the model"),
        ("objects", "cannot be read as a .npy or .npz file"),
        ("torn", "cannot be read as a .npy or .npz file"),
    ],
)
def test_data_that_does_not_fit_is_refused(photos: Published, tmp_path: Path, data: str, said: str) -> None:
    folder = tmp_path / "data"
    x = np.zeros((1, 3, 8, 8), np.float32)
    if data != "nowhere":
        folder.mkdir()
    if data == "text":
        (folder / "a.txt").write_text("a")
    if data in ("one", "mixed", "broken"):
        (folder / "a.png").write_bytes(photo())
    if data == "mixed":
        np.save(folder / "b.npy", x)
    if data == "broken":
        for name in "bcdefg":
            (folder / f"{name}.png").write_bytes(photo()[:60])
    for i in range(8):
        if data == "few":
            np.save(folder / f"{i}.npy", x)
        elif data == "wrong-shape":
            np.save(folder / f"{i}.npy", x[:, :, :4])
        elif data == "wrong-dtype":
            np.save(folder / f"{i}.npy", x.astype(np.float64))
        elif data == "wrong-name":
            np.savez(folder / f"{i}.npz", y=x)
        elif data == "objects":
            np.save(folder / f"{i}.npy", np.array([{}], dtype=object), allow_pickle=True)
        elif data == "torn":
            (folder / f"{i}.npz").write_bytes(b"PK\x03\x04torn")
    found = refusal(
        isthmus("calibrate", "photos", "--data", folder, "--cut", "6", "--registry", photos.folder, "--json")
    )
    assert found["type"] == "CalibrationError"
    assert said in found["error"]


def test_photos_for_a_model_without_processing_are_refused(tmp_path: Path, album: Path) -> None:
    made = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), {}, partitions=[["1"]])
    with pytest.raises(CalibrationError, match="no pre-processing") as e:
        open_source(made.bundle, list_files(album), "album", 24)
    assert ".npz" in e.value.hint


def test_a_fidelity_of_another_model_is_refused(calibrated: tuple[Path, Any], tmp_path: Path) -> None:
    other = publish_photos(tmp_path, seed=1)
    registry = Registry(FolderStore(calibrated[0]))
    source = registry.resolve("photos").bundle
    assert source.fidelity is not None
    data = registry.blob(source.fidelity)
    carried = structs.replace(other.bundle, fidelity=Blob(digest_of(data), len(data)))
    with pytest.raises(CalibrationError, match="another model"):
        read_fidelity(carried, lambda _: data)
    assert read_fidelity(source, lambda _: data) is not None
    assert read_fidelity(other.bundle, lambda _: data) is None


def test_more_cuts_are_still_the_same_model(photos: Published, tmp_path: Path) -> None:
    cache = SegmentCache(photos.registry, tmp_path / "cache", 2**30)
    with cache.locate(photos.digest, "..") as whole:
        more, _ = add_cuts(photos.bundle, whole.path, [["0"]], tmp_path)
    assert more != photos.bundle
    assert model_digest(more) == model_digest(photos.bundle)


# Inputs and cuts


def test_no_file_is_on_both_sides_of_the_split(photos: Published, album: Path) -> None:
    source = open_source(photos.bundle, list_files(album), "album", 100)
    one, other = split(source, 100)
    assert len(one) == len(other) == 12
    assert not set(one) & set(other)
    examples = list(source.examples(one, 50))
    assert len(examples) == 50
    assert {e.group for e in examples} == {str(p) for p in one}
    again = list(source.examples(one, 50))
    assert all(np.array_equal(a.arrays["x"], b.arrays["x"]) for a, b in zip(examples, again, strict=True))
    assert len({e.arrays["x"].tobytes() for e in examples}) > 40


def test_arrays_may_hold_many_inputs_each(tmp_path: Path) -> None:
    made = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), {}, partitions=[["1"]])
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(4):
        x = rng.standard_normal((20, 1, 32)).astype(np.float32)
        np.savez(data / f"{i}.npz", x=x, mask=np.ones((20, 1, 32), np.float32))
    source = open_source(made.bundle, list_files(data), "data", 40)
    examples = list(source.examples(source.files, 40))
    assert len(examples) == 40
    assert all(e.arrays["x"].shape == (1, 32) for e in examples)


def test_a_model_of_several_inputs_and_early_outputs_is_measured_by_closeness(tmp_path: Path) -> None:
    made = publish(tmp_path, pair_model(tmp_path / "pair.onnx"), {}, partitions=[["1"]])
    rng = np.random.default_rng(0)
    data = tmp_path / "data"
    data.mkdir()
    for i in range(20):
        arrays = {name: rng.standard_normal((1, 32)).astype(np.float32) for name in ("x", "mask")}
        np.savez(data / f"{i}.npz", **arrays)  # type: ignore[arg-type]
    found = calibrate(
        executor_of(made, tmp_path / "cache"),
        open_source(made.bundle, list_files(data), "data", 20),
        CalibrationSpec(["1"], 20, 0.99, measure_for(made.bundle), PLAIN),
        tmp_path,
    )
    entries = {e.codec: e for e in found.fidelity.entries if e.quality == 1}
    assert found.fidelity.measure.kind == "close"
    assert set(found.fidelity.measure.scales) == {"early", "late"}
    assert entries["half/1"].agreement == 1
    assert 0 < entries["int8/1"].error < 0.05
    assert entries["int4/1"].error > entries["int8/1"].error
    assert "raw" in [e.codec for e in offered(found.fidelity, "1")]
    assert found.fidelity.references == ()
    assert set(found.files) == found.bundle.blobs() - made.bundle.blobs()
    assert len(to_json(found.fidelity)) == found.bundle.fidelity.size  # type: ignore[union-attr]


def test_a_cut_of_a_longer_partition_is_reached_through_its_segments(photos: Published, tmp_path: Path) -> None:
    direct = CutBoundary.at(photos.bundle, "1")
    ids = lambda c: ([s.id for s in c.head], [s.id for s in c.tail])  # noqa: E731
    assert ids(direct) == (["..1"], ["1.."])
    fewer = {k: v for k, v in photos.bundle.segments.items() if k not in ("1..", "..6")}
    around = structs.replace(photos.bundle, segment_list=tuple(fewer.values()))
    assert ids(CutBoundary.at(around, "1")) == (["..1"], ["1..6", "6.."])
    assert ids(CutBoundary.at(around, "6")) == (["..1", "1..6"], ["6.."])
    executor = executor_of(photos, tmp_path / "cache")
    whole = run_whole(photos.onnx, [photos.inputs])[0]["logits"]
    for cut in ("1", "6", "3"):
        at = CutBoundary.at(around, cut)
        boundary = at.select(executor.execute(at.head, photos.inputs).tensors)
        assert np.allclose(at.tail_outputs(executor, boundary)["logits"], whole, rtol=1e-5, atol=1e-5)
    with pytest.raises(CalibrationError, match="no segments"):
        CutBoundary.at(structs.replace(photos.bundle, segment_list=(photos.bundle.segment(".."),)), "1")


def test_what_crosses_is_kept_in_files_and_read_as_often_as_asked(photos: Published, tmp_path: Path) -> None:
    spool = Spool([CutBoundary.at(photos.bundle, "6")], executor_of(photos, tmp_path / "cache"), tmp_path)
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((1, 3, 8, 8)).astype(np.float32)
        spool.add({"x": x})
    samples = spool.samples("6").tensor("p6")
    first, second = list(samples), list(samples)
    assert [a.shape for a in first] == [(1, 16, 4, 4)] * 3
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert len(list(tmp_path.glob("*.frame"))) == 3


def test_every_codec_of_tensors_is_measured() -> None:
    assert {c.codec for c in CHOICES} == set(CODEC_IDS) - INPUT_CODECS
    assert len(set(CHOICES)) == len(CHOICES)
    assert (QUALITIES[0], QUALITIES[-1]) == (0, 1)
    assert all(Choice.parse(str(c)) == c for c in CHOICES)
