"""Photos from installed packages, for the demo and for calibration; nothing is downloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from isthmus.errors import ModelError, RequestMalformed

# File name: package and folder within.
_SAMPLES = {
    "chelsea.png": ("skimage", "data"),
    "coffee.png": ("skimage", "data"),
    "rocket.jpg": ("skimage", "data"),
    "china.jpg": ("sklearn", "datasets/images"),
    "flower.jpg": ("sklearn", "datasets/images"),
}
# No two photos of the same subject, so that held-out photos differ from calibration photos.
_VARIED = dict.fromkeys(
    [
        *("astronaut.png", "motorcycle_left.png", "hubble_deep_field.jpg", "retina.jpg", "ihc.png", "camera.png"),
        *("moon.png", "brick.png", "grass.png", "gravel.png", "coins.png"),
    ],
    ("skimage", "data"),
)


def sample_photos() -> list[Path]:
    """Five photos: a cat, an espresso, a rocket, a palace and a flower.

    Raises:
        ModelError: the packages with the photos are not installed.
    """
    return _paths(_SAMPLES)


def varied_photos() -> list[Path]:
    """The sample photos and eleven more, such as textures, a microscope's image and a telescope's.

    Raises:
        ModelError: as `sample_photos`.
    """
    return _paths(_SAMPLES | _VARIED)


def photo_files(paths: Sequence[Path]) -> Iterator[Path]:
    """The files, and the files of folders by name.

    Raises:
        RequestMalformed: a folder without files.
    """
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        # Hidden files are the system's: .DS_Store.
        files = sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        if not files:
            raise RequestMalformed(
                f"{path} holds no files", path=str(path), hint="name the folders that hold the photos themselves"
            )
        yield from files


def read_photo(path: Path) -> bytes:
    """The bytes of a photo's file.

    Raises:
        RequestMalformed: the file cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as e:
        raise RequestMalformed(f"{path} cannot be read: {e.strerror}") from e


def _paths(places: Mapping[str, tuple[str, str]]) -> list[Path]:
    paths = []
    for name, (module, folder) in places.items():
        # Located without an import: scikit-image and scikit-learn take seconds.
        spec = importlib.util.find_spec(module)
        roots = list(spec.submodule_search_locations or []) if spec else []
        path = Path(roots[0], folder, name) if roots else Path()
        if not path.is_file():
            raise ModelError(f"the photo {name} is not there", hint="pip install 'isthmus_tools[zoo]'")
        paths.append(path)
    return paths
