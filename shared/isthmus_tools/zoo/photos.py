"""Real photos that installed packages carry, for the demo and for calibration: nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path

from isthmus.errors import ModelError, RequestMalformed

_PLACES = {
    "chelsea.png": ("skimage", "data"),
    "coffee.png": ("skimage", "data"),
    "rocket.jpg": ("skimage", "data"),
    "china.jpg": ("sklearn", "datasets/images"),
    "flower.jpg": ("sklearn", "datasets/images"),
}
_MORE = dict.fromkeys(
    [
        *("astronaut.png", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png", "camera.png"),
        *("moon.png", "brick.png", "grass.png", "gravel.png", "coins.png"),
    ],
    ("skimage", "data"),
)


def sample_photos() -> list[Path]:
    """The photos: a cat, an espresso, a rocket, a palace and a flower.

    Raises:
        ModelError: the packages that carry them are not installed.
    """
    return _find(_PLACES)


def varied_photos() -> list[Path]:
    """Those and eleven more, among them textures, a microscope's and a telescope's: no two of the same thing.

    Raises:
        ModelError: as `sample_photos`.
    """
    return _find(_PLACES | _MORE)


def read_photo(path: Path) -> bytes:
    """A photo as its file holds it.

    Raises:
        RequestMalformed: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise RequestMalformed(f"{path} cannot be read: {e.strerror}") from e


def _find(places: Mapping[str, tuple[str, str]]) -> list[Path]:
    found = []
    for name, (module, folder) in places.items():
        spec = importlib.util.find_spec(module)
        roots = list(spec.submodule_search_locations or []) if spec else []
        path = Path(roots[0], folder, name) if roots else Path()
        if not path.is_file():
            raise ModelError(f"the photo {name} is not there", hint="install the extra: pip install 'isthmus[zoo]'")
        found.append(path)
    return found
