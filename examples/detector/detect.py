"""Boxes around lines of text in a photo, by the split model `detector`: detect.py PHOTO [ROUTER_URL]."""

import os
import sys

import numpy as np
from PIL import Image
from scipy import ndimage

from isthmus import Client, RegistrySettings
from isthmus_tools import LocalModel

HEIGHT, WIDTH = 320, 640
THRESHOLD, MIN_PIXELS = 0.3, 40


def as_input(photo: Image.Image) -> np.ndarray:
    """The network's input (1, 3, 320, 640), from -1 to 1."""
    pixels = np.asarray(photo.convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR), np.float32)
    return ((pixels / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None].copy()


def boxes(text_map: np.ndarray, photo: Image.Image) -> list[tuple[int, int, int, int]]:
    """Left, top, right and bottom of each connected region of text, in the photo's pixels, from the top down."""
    regions, _ = ndimage.label(text_map > THRESHOLD)
    scale_x, scale_y = photo.width / WIDTH, photo.height / HEIGHT
    found = []
    for rows, columns in ndimage.find_objects(regions):
        if (rows.stop - rows.start) * (columns.stop - columns.start) >= MIN_PIXELS:
            left, right = round(columns.start * scale_x), round(columns.stop * scale_x)
            found.append((left, round(rows.start * scale_y), right, round(rows.stop * scale_y)))
    return sorted(found, key=lambda box: box[1])


def main(path: str, url: str = "") -> None:
    """Run the network by a router, or in this process, and print its boxes."""
    photo = Image.open(path)
    arrays = {"x": as_input(photo)}
    if url:
        outputs = Client(url).infer(arrays, model="detector").outputs
    else:
        registry = RegistrySettings(registry=os.environ.get("ISTHMUS_REGISTRY", ".isthmus/registry"), cache_dir="cache")
        outputs = LocalModel("detector", registry).run(arrays).outputs
    (text_map,) = outputs.values()
    for box in boxes(text_map[0, 0], photo):
        print(*box)


if __name__ == "__main__":
    main(*sys.argv[1:])
