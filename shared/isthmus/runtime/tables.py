"""What calibrated codecs need to unpack a frame, by reference to the bundle that it names."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from isthmus.admission import current_deadline
from isthmus.artifacts.bundle import Blob, Bundle, is_digest
from isthmus.codecs import Tables as CodecTables
from isthmus.codecs.image import Recipe
from isthmus.errors import FrameError, FrameMalformed, RegistryError
from isthmus.processing.image_budget import SHARED, ImageMemory
from isthmus.registry.lookups import Lookups
from isthmus.wire import frame as frames

MAX_KEPT = 64
"""Tables kept; frames name them, so there must be an end."""
_FORGET_S = 5.0
"""How long a table that cannot be had is not asked for again."""
MAX_TABLE_BYTES = 32 * 2**20


def tables_of(bundle: Bundle, digest: str, codec: str, tables: CodecTables) -> Callable[[str], object]:
    """The tables of one bundle for one codec, by the tensor's name; None for a tensor that calibration gave none."""
    return lambda tensor: tables(digest, tensor, codec) if tensor in bundle.tables else None


class Tables:
    """Looks tables up in bundles, through `bundle` and `blob`, and keeps those that were used last."""

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
        self._lookups = Lookups(_FORGET_S)
        self._kept: OrderedDict[str, object] = OrderedDict()

    def close(self) -> None:
        """Look nothing more up."""
        self._lookups.close()

    def __call__(self, digest: str, tensor: str, codec: str) -> object:
        """The table of `tensor` in that bundle, or the recipe that makes it of a photo; None where there is no recipe.

        Raises:
            FrameMalformed: the frame names no bundle, or one that was not calibrated for this tensor.
            RegistryError: the bundle, or the table, cannot be had.
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
            if (found := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return found
        if (deadline := current_deadline()) is None:
            table = self._read(blob, model)
        else:
            table = self._lookups.find(key, lambda: self._read(blob, model), deadline)
        with self._lock:
            self._kept[key] = table
            while len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        return table

    def _read(self, blob: Blob, model: str) -> object:
        from isthmus.codecs.transform.rows import read_table  # for those who are sent such tensors

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
        taken = next(s for s in bundle.inputs if s.name == tensor)
        return Recipe(spec, taken, self._max_pixels, self._memory)
