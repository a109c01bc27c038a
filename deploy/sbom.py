"""Bills of materials of the functions' images, as CycloneDX 1.6 in JSON: `make sbom` writes build/sbom/NAME.cdx.json.

A bill has what an image is built from: every locked Python package with the hashes of its files, the base images, the
watchdog, and the browser libraries that are vendored. Debian's packages come with the base image, whose own bill has
them. The same locks give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom
from cyclonedx.model.component import Component, ComponentType
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL

from isthmus_tools.engine.stack import read_stack

ROOT = Path(__file__).resolve().parent.parent
TEMPLATE = ROOT / "template" / "python3-isthmus"
VENDORED = ROOT / "shared" / "isthmus" / "serving" / "static" / "VENDORED.md"
_TIMEOUT_S = 300


def locked_requirements(function: str, flavour: str) -> str:
    """What pip installs into the image of a function, each package once, with its hashes."""
    locks = (TEMPLATE / "requirements.txt", TEMPLATE / f"runtime-{flavour}.txt")
    packages: dict[str, None] = {}
    for path in (*locks, ROOT / "functions" / function / "requirements.txt"):
        lines = path.read_text().replace("\\\n", " ").splitlines()
        packages.update(dict.fromkeys(" ".join(line.split()) for line in lines if line.strip() and line[0] != "#"))
    return "\n".join(packages) + "\n"


def python_packages(requirements: str) -> Bom:
    """The bill of locked packages, by cyclonedx-bom."""
    command = [sys.executable, "-m", "cyclonedx_py", "requirements", "--no-validate", "--output-reproducible", "-"]
    done = subprocess.run(
        command, input=requirements, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True, cwd=ROOT
    )
    bom = Bom.from_json(json.loads(done.stdout))  # type: ignore[attr-defined]
    for component in bom.components:
        component.description = None  # the line of the lock once more
    return bom


def base_images() -> Iterator[Component]:
    """The images that the Dockerfile's arguments name; a digest in place of a tag is the version."""
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", (TEMPLATE / "Dockerfile").read_text(), re.MULTILINE))
    for name in ("PYTHON_IMAGE", "WATCHDOG_IMAGE"):
        image = re.sub(r"\$\{(\w+)\}", lambda hole: arguments[hole[1]], arguments[name])
        repository, _, version = image.partition("@") if "@" in image else image.rpartition(":")
        registry, slash, path = repository.rpartition("/")
        url = PackageURL("docker", None, path, version, {"repository_url": registry + slash + path} if registry else {})
        yield Component(type=ComponentType.CONTAINER, name=repository, version=version, purl=url, bom_ref=image)


def vendored_files() -> Iterator[Component]:
    """The files of VENDORED.md."""
    rows = re.findall(
        r"^\| (\S+) \| (\S+) \| ([\d.]+) \| [^|]+ \| ([0-9a-f]{64}) \|$", VENDORED.read_text(), re.MULTILINE
    )
    for file, package, version, digest in rows:
        yield Component(
            type=ComponentType.LIBRARY,
            name=package,
            version=version,
            purl=PackageURL("npm", None, package, version, None, file),
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
            bom_ref=f"{package}/{file}",
        )


def bill(function: str, image: str, flavour: str) -> str:
    """The bill of a function's image.

    Raises:
        ValueError: the document breaks CycloneDX's schema.
    """
    bom = python_packages(locked_requirements(function, flavour))
    for component in (*base_images(), *vendored_files()):
        bom.components.add(component)
    name, _, version = image.rpartition(":")
    root = Component(type=ComponentType.CONTAINER, name=name, version=version, bom_ref=f"image/{function}")
    bom.metadata.component = root
    bom.register_dependency(root, bom.components)
    document = JsonV1Dot6(bom).output_as_string(indent=1)
    if error := JsonStrictValidator(SchemaVersion.V1_6).validate_str(document):
        raise ValueError(f"the bill of {function} breaks CycloneDX's schema: {error}")
    # Without the time and the number that each run has of its own, bills can be compared.
    reproducible = json.loads(document)
    reproducible.pop("serialNumber", None)
    reproducible["metadata"].pop("timestamp", None)
    return json.dumps(reproducible, indent=1) + "\n"


def main() -> None:
    """Write the bills of a stack file's functions."""
    parser = argparse.ArgumentParser(description="Write a bill of materials for the image of each function.")
    parser.add_argument("--stack", type=Path, default=ROOT / "stack.yml", help="the stack file (default: stack.yml)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "sbom", help="the folder of the bills")
    parser.add_argument("functions", nargs="*", help="names of functions; by default all")
    given = parser.parse_args()
    arguments = {
        name: f.get("build_args") or {} for name, f in yaml.safe_load(given.stack.read_text())["functions"].items()
    }
    given.output.mkdir(parents=True, exist_ok=True)
    for name, function in read_stack(given.stack, {}).functions.items():
        if given.functions and name not in given.functions:
            continue
        path = given.output / f"{name}.cdx.json"
        path.write_text(bill(name, function.image, arguments[name].get("FLAVOUR", "cpu")))
        sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
