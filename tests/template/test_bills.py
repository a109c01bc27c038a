"""Bills of materials: what a function's image is built from, and nothing that is not in the locks."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import pytest

from support.paths import ROOT
from support.patience import LONG_S

STATIC = ROOT / "shared" / "isthmus" / "serving" / "static"


@pytest.fixture(scope="module")
def bill(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("bills")
    command = [sys.executable, str(ROOT / "deploy" / "sbom.py"), "--stack", str(ROOT / "stack.pro.yml")]
    subprocess.run([*command, "--output", str(folder), "cloud-tail"], check=True, timeout=LONG_S, capture_output=True)
    assert [path.name for path in folder.iterdir()] == ["cloud-tail.cdx.json"]
    document: dict[str, Any] = json.loads((folder / "cloud-tail.cdx.json").read_text())
    return document


def test_a_bill_has_every_locked_package_with_its_hashes(bill: dict[str, Any]) -> None:
    locks = [*(ROOT / "template" / "python3-isthmus" / name for name in ("requirements.txt", "runtime-gpu.txt"))]
    locks.append(ROOT / "functions" / "cloud-tail" / "requirements.txt")
    lines = {line.split(" ")[0] for path in locks for line in path.read_text().splitlines() if "==" in line}
    pythons = [c for c in bill["components"] if c["purl"].startswith("pkg:pypi/")]
    assert sorted(f"{c['name']}=={c['version']}" for c in pythons) == sorted(lines)
    for component in pythons:
        (source,) = component["externalReferences"]
        assert {h["alg"] for h in source["hashes"]} == {"SHA-256"}


def test_a_bill_has_the_base_images_and_the_vendored_files(bill: dict[str, Any]) -> None:
    urls = {c["purl"].partition("?")[0]: c for c in bill["components"]}
    assert {"pkg:docker/python@3.11.14-slim-bookworm", "pkg:docker/of-watchdog@0.11.6"} <= urls.keys()
    digests = {c["hashes"][0]["content"] for c in urls.values() if c["purl"].startswith("pkg:npm/")}
    vendored = [path for path in STATIC.iterdir() if ".min." in path.name]
    assert digests == {hashlib.sha256(path.read_bytes()).hexdigest() for path in vendored}


def test_a_bill_is_of_the_image_and_depends_on_all_of_it(bill: dict[str, Any]) -> None:
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    root = bill["metadata"]["component"]
    assert (root["name"], root["version"]) == ("isthmus/cloud-tail-gpu", "latest")
    (needs,) = (d["dependsOn"] for d in bill["dependencies"] if d["ref"] == root["bom-ref"])
    assert sorted(needs) == sorted(c["bom-ref"] for c in bill["components"])


def test_the_same_locks_give_the_same_bill(bill: dict[str, Any]) -> None:
    assert "serialNumber" not in bill
    assert "timestamp" not in bill["metadata"]
