"""Files that commands read and write: told from names, checked before the work that they take, written as named."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from isthmus.errors import RequestMalformed

PICTURES = (".png", ".svg")


def check_output(path: Path, option: str, endings: Sequence[str] = ()) -> None:
    """See that a file can be written at `path`, before anything is computed for it.

    Raises:
        RequestMalformed: its name ends in none of `endings`, its folder is not there or not writable, or it is a folder
            itself.
    """
    folder = path.absolute().parent
    if endings and path.suffix.lower() not in endings:
        why = f"its name ends in {' or '.join(endings)}"
    elif not folder.is_dir():
        why = f"there is no folder {folder}"
    elif path.is_dir():
        why = "that is a folder; name a file in it"
    elif not os.access(path if path.exists() else folder, os.W_OK):
        why = "it cannot be written: permission denied"
    else:
        return
    raise RequestMalformed(f"{option} is {path}; {why}", option=option, path=str(path))


def write_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Write arrays to one .npz file under any names; numpy's own `savez` takes some names for its parameters.

    bfloat16 is written as numpy writes it: two bytes a value, without a name. `isthmus.arrays.restored` reads it.

    Raises:
        RequestMalformed: the file cannot be written.
    """
    import zipfile

    import numpy as np

    try:
        with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
    except OSError as e:
        raise RequestMalformed(f"{path} cannot be written: {e.strerror}", path=str(path)) from e


def named_file(entry: str) -> tuple[str, str]:
    """The two sides of NAME=FILE; of several "=", the first one behind which there is a file parts them."""
    splits = [(entry[: found.start()], entry[found.end() :]) for found in re.finditer("=", entry)]
    return next((split for split in splits if Path(split[1]).is_file()), splits[0] if splits else ("", entry))
