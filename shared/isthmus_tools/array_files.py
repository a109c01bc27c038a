"""Files of arrays in numpy's formats: .npy holds one array, .npz several by name."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from isthmus.arrays import DTYPES, Array, restore_bfloat16
from isthmus.artifacts.device import memory
from isthmus.errors import RequestMalformed

# A file's first bytes decide, not its suffix: np.load takes all other files for pickles.
_NPY = b"\x93NUMPY"
_NPZ = (b"PK\x03\x04", b"PK\x05\x06")
_MAX_REASON = 200


def read(path: Path) -> Array | Mapping[str, Array]:
    """The array of a .npy file, or the arrays of a .npz file by name, in this machine's byte order.

    Raises:
        ValueError: neither format, or an array with a dtype that no frame carries; the message names the file.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_NPY))
            if not start.startswith((_NPY, *_NPZ)):
                raise ValueError("it is empty" if not start else "it is another kind of file")
            file.seek(0)
            if start.startswith(_NPZ):
                _check_unpacked(file)
            loaded = np.load(file, allow_pickle=False)
            content = loaded if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    # On broken files numpy raises nearly anything: its own exceptions, zipfile's, zlib's and tokenize's.
    except Exception as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"{path} cannot be read as a .npy or .npz file: {why[:_MAX_REASON]}") from e
    if isinstance(content, np.ndarray):
        return _carried(content, str(path))
    return {name: _carried(array, f"{name} in {path}") for name, array in content.items()}


def read_one(path: Path) -> Array:
    """The array of a .npy file.

    Raises:
        ValueError: as `read`, or the file is an .npz file.
    """
    content = read(path)
    if isinstance(content, Mapping):
        raise ValueError(f"{path} holds several arrays ({', '.join(content)}); a .npy file holds one")
    return content


def write_npz(path: Path, arrays: Mapping[str, Array]) -> None:
    """Write arrays to an .npz file under any names.

    bfloat16 is written in numpy's form: two unnamed bytes per value; `isthmus.arrays.restore_bfloat16` reads that form.

    Raises:
        RequestMalformed: the file cannot be written.
    """
    # numpy's own `savez` takes arrays as keyword arguments, and refuses names such as `file`.
    try:
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    except OSError as e:
        raise RequestMalformed(f"{path} cannot be written: {e.strerror}", path=str(path)) from e


def _check_unpacked(file: BinaryIO) -> None:
    # Zeros are a thousandth of their size in an archive: a small file may fill the memory.
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > memory():
        raise ValueError(f"it unpacks to {size} bytes, more than this machine's memory")
    file.seek(0)


def _carried(array: Array, subject: str) -> Array:
    array = restore_bfloat16(array)
    if array.dtype.newbyteorder("<") not in DTYPES.values():
        raise ValueError(
            f"{subject} holds {array.dtype}; a tensor is one of {', '.join(DTYPES)}, where bfloat16 is what numpy"
            " writes of ml_dtypes.bfloat16: two bytes a value"
        )
    return array.astype(array.dtype.newbyteorder("="), copy=False)
