"""Write scikit-learn's 1,797 handwritten digits as PNG files: digits/train/CLASS/ and digits/test/CLASS/."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

HELD_OUT, SIDE = 200, 64


def main() -> None:
    """Write the files; the first 200 are held out."""
    digits = load_digits()
    # 0 to 16 become 0 to 255.
    pixels = np.round(digits.images / 16 * 255).astype(np.uint8)
    for i, (image, digit) in enumerate(zip(pixels, digits.target, strict=True)):
        folder = Path("digits", "test" if i < HELD_OUT else "train", str(digit))
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.NEAREST).save(folder / f"{i:04}.png")


if __name__ == "__main__":
    main()
