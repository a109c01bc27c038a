"""Real photos that installed packages carry, for the demo: nothing is downloaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from isthmus.errors import ModelError

_PLACES = {
    "chelsea.png": ("skimage", "data"),
    "coffee.png": ("skimage", "data"),
    "rocket.jpg": ("skimage", "data"),
    "china.jpg": ("sklearn", "datasets/images"),
    "flower.jpg": ("sklearn", "datasets/images"),
}


def sample_photos() -> list[Path]:
    """The photos: a cat, an espresso, a rocket, a palace and a flower.

    Raises:
        ModelError: the packages that carry them are not installed.
    """
    found = []
    for name, (module, folder) in _PLACES.items():
        spec = importlib.util.find_spec(module)
        places = list(spec.submodule_search_locations or []) if spec else []
        path = Path(places[0], folder, name) if places else Path()
        if not path.is_file():
            raise ModelError(f"the photo {name} is not there", hint="install the extra: pip install 'isthmus[zoo]'")
        found.append(path)
    return found
