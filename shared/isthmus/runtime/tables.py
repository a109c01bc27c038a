"""Tables of calibrated codecs, by the bundle that a frame names."""

from __future__ import annotations

import threading
from collections.abc import Callable

from cachetools import LRUCache

from isthmus.admission import current_deadline
from isthmus.artifacts.bundle import Blob, Bundle, is_digest
from isthmus.codecs import Tables as CodecTables
from isthmus.codecs.image import Recipe
from isthmus.errors import FrameError, FrameMalformed, RegistryError
from isthmus.processing.image_budget import SHARED, ImageMemory
from isthmus.registry.lookups import Lookups
from isthmus.wire import frame as frames

# Senders of frames choose the tables, so the cache needs a bound.
_MAX_TABLES = 64
MAX_TABLE_BYTES = 32 * 2**20
# A missing table is not looked up again for so long.
_MISSING_S = 5.0


def tables_of(bundle: Bundle, digest: str, codec: str, tables: CodecTables) -> Callable[[str], object]:
    """The tables of one bundle for one codec, by the tensor's name; None for a tensor without a table."""
    return lambda tensor: tables(digest, tensor, codec) if tensor in bundle.tables else None


class Tables:
    """Reads tables of bundles, through `bundle` and `blob`, with a cache."""

    def __init__(
        self,
        bundle: Callable[[str], Bundle],
        blob: Callable[[Blob], bytes],
        max_pixels: int,
        memory: ImageMemory = SHARED,
    ) -> None:
        self._memory = memory
        self._bundle, self._blob, self._max_pixels = bundle, blob, max_pixels
        self._lock = threading.Lock()
        self._lookups = Lookups(_MISSING_S)
        self._cache: LRUCache[str, object] = LRUCache(_MAX_TABLES)

    def close(self) -> None:
        """Stop looking up."""
        self._lookups.close()

    def __call__(self, digest: str, tensor: str, codec: str) -> object:
        """The table of `tensor` in that bundle, or for images its recipe; None without a recipe.

        Raises:
            FrameMalformed: the frame names no bundle, or a bundle without calibration of this tensor.
            RegistryError: the bundle or the table cannot be read.
        """
        if not is_digest(digest):
            raise FrameMalformed(f"{tensor!r} has codec {codec}, and the frame names no bundle's digest", rule="bundle")
        bundle = self._bundle(digest)
        if codec.startswith("photo/"):
            return self._recipe(bundle, tensor)
        if (blob := bundle.tables.get(tensor)) is None:
            raise FrameMalformed(
                f"{tensor!r} has codec {codec}, and the bundle has no calibration for it",
                rule="table",
                tensor=tensor,
                exists=sorted(bundle.tables),
                hint="calibrate it: isthmus calibrate MODEL --data FOLDER",
            )
        return self._table(blob, bundle.name)

    def _table(self, blob: Blob, model: str) -> object:
        key = blob.digest
        with self._lock:
            if (table := self._cache.get(key)) is not None:
                return table
        if (deadline := current_deadline()) is None:
            table = self._read(blob, model)
        else:
            table = self._lookups.find(key, lambda: self._read(blob, model), deadline)
        with self._lock:
            self._cache[key] = table
        return table

    def _read(self, blob: Blob, model: str) -> object:
        from isthmus.codecs.transform.rows import read_table  # imported on use

        if blob.size > MAX_TABLE_BYTES:
            raise RegistryError(f"a codec's table of {blob.size} bytes; at most {MAX_TABLE_BYTES}", blob=blob.digest)
        try:
            return read_table(frames.decode(self._blob(blob), max_bytes=MAX_TABLE_BYTES).tensors)
        except (ValueError, FrameError) as e:
            raise RegistryError(
                f"{blob.digest}, of {model}, is no codec's table of this version: {e}",
                blob=blob.digest,
                hint=f"another version may have written it; calibrate again: isthmus calibrate {model} --data FOLDER",
            ) from e

    def _recipe(self, bundle: Bundle, tensor: str) -> Recipe | None:
        spec = bundle.preprocess
        if spec is None or spec.get("input") != tensor:
            return None
        declared = next(s for s in bundle.inputs if s.name == tensor)
        return Recipe(spec, declared, self._max_pixels, self._memory)
