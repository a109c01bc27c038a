"""Calibrations shipped with ready models, so that a demo need not learn tables: codec tables and their fidelity; and
the text that measures the codecs of language models.

Each was learned by `isthmus calibrate` and copied here from a registry by `python -m isthmus_tools.zoo.calibration`
(`make demo-data`). It holds for a single export of a model: another export has another digest.
"""

from __future__ import annotations

import sys
from pathlib import Path

from msgspec.structs import replace

from isthmus.artifacts.bundle import Blob, Bundle, digest_of
from isthmus.artifacts.fidelity import from_json, model_digest
from isthmus.errors import CalibrationError
from isthmus.registry import open_registry
from isthmus.settings import RegistrySettings

FOLDER = Path(__file__).parent / "calibrated"
_FIDELITY, _TABLE = "fidelity.json", ".table"
# In words of our own, of several kinds: some 3,170 tokens of SmolLM2's, so that six windows of 512 are full.
PROSE = Path(__file__).with_name("prose.txt")


def shipped_calibration(bundle: Bundle, folder: Path = FOLDER) -> tuple[Bundle, dict[str, Path]] | None:
    """The bundle with the shipped calibration of its model, and the calibration's files by digest.

    None without a calibration, or with the calibration of another export, of other tensors or of another format.
    """
    place = folder / bundle.name
    path = place / _FIDELITY
    if not path.is_file():
        return None
    try:
        fidelity = from_json(path.read_bytes())
    except CalibrationError:
        return None  # written by another version of Isthmus
    crossing = {t.name for cut in fidelity.cuts() if cut in bundle.cuts for t in bundle.cuts[cut].tensors}
    tables = {file.name.removesuffix(_TABLE): file for file in place.glob(f"*{_TABLE}")}
    if fidelity.subject != model_digest(bundle) or not tables or not tables.keys() <= crossing:
        return None
    files: dict[str, Path] = {}
    blobs = {tensor: _blob(file, files) for tensor, file in tables.items()}
    return replace(bundle, tables=blobs, fidelity=_blob(path, files), plan=None), files


def copy_calibration(model: str, registry: RegistrySettings, folder: Path = FOLDER) -> Path:
    """Copy the calibration of a model in a registry to `folder`; returns the model's folder there.

    Raises:
        CalibrationError: the model was not calibrated.
        RegistryError: no such model, or the registry cannot be read.
    """
    store = open_registry(registry)
    bundle = store.resolve(model).bundle
    if bundle.fidelity is None:
        raise CalibrationError(f"{model} was not calibrated", model=model, hint=f"isthmus calibrate {model}")
    place = folder / bundle.name
    place.mkdir(parents=True, exist_ok=True)
    for old in (*place.glob(f"*{_TABLE}"), place / _FIDELITY):
        old.unlink(missing_ok=True)
    (place / _FIDELITY).write_bytes(store.blob(bundle.fidelity))
    for tensor, blob in bundle.tables.items():
        (place / f"{tensor}{_TABLE}").write_bytes(store.blob(blob))
    return place


def _blob(path: Path, files: dict[str, Path]) -> Blob:
    data = path.read_bytes()
    digest = digest_of(data)
    files[digest] = path
    return Blob(digest, len(data))


if __name__ == "__main__":
    # Model and registry.
    copy_calibration(sys.argv[1], RegistrySettings(registry=sys.argv[2]))
