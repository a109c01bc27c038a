"""The example for Spark, in local mode before a router on a socket."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.bundles import Published, photo, router_settings
from support.bundles import photos as photos
from support.paths import ROOT
from support.routers import expected_classes, served_router


@pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java")
def test_photos_are_scored_from_spark(photos: Published, tmp_path: Path) -> None:
    pytest.importorskip("pyspark")
    parquet = pytest.importorskip("pyarrow.parquet")
    pytest.importorskip("pandas")
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(20):
        (folder / f"{seed}.png").write_bytes(photo(seed=seed))
    (folder / "notes.txt").write_text("no photo")
    example = ROOT / "examples" / "spark" / "classify.py"
    environment = os.environ | {
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_SUBMIT_ARGS": "--master local[2] --conf spark.ui.enabled=false pyspark-shell",
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(tmp_path / "spark"),
        "PYTHONPATH": str(ROOT / "shared"),
    }
    with served_router(router_settings(photos, tmp_path / "cache", ("local",))) as url:
        command = [sys.executable, str(example), str(folder), str(tmp_path / "results"), url]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = {Path(row["path"]).name: row for row in parquet.read_table(tmp_path / "results").to_pylist()}
    assert len(rows) == 21
    assert "looks like text" in rows.pop("notes.txt")["error"]
    for name, row in rows.items():
        best = expected_classes(photos, photo(seed=int(name.removesuffix(".png"))))[0]
        assert (row["label"], row["error"]) == (best["label"], None)
        assert row["probability"] == pytest.approx(best["probability"], abs=1e-5)
