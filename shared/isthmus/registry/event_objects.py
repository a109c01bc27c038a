"""Objects that a notification names, read from the buckets that a setting allows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from isthmus.errors import BucketRefused, RegistryError, RequestTooLarge
from isthmus.registry.blobs import BlobStore


class EventObjects:
    """Reads objects of allowed buckets; `open_bucket` makes the store of a bucket, once.

    A notification is a request of a caller: without the list, callers could have the router read whatever its own
    credentials can.
    """

    def __init__(self, buckets: Sequence[str], open_bucket: Callable[[str], BlobStore]) -> None:
        self._stores = {bucket: open_bucket(bucket) for bucket in buckets}

    def get(self, bucket: str, key: str, *, max_bytes: int) -> bytes:
        """The object's bytes.

        Raises:
            BucketRefused: the bucket is not allowed.
            Missing: no such object.
            RequestTooLarge: longer than `max_bytes`; the rest was not read.
            RegistryError: as `BlobStore.get`.
        """
        if (store := self._stores.get(bucket)) is None:
            raise BucketRefused(
                f"the notification names the bucket {bucket[:80]!r}, whose objects this function does not read",
                bucket=bucket[:80],
                hint="name the bucket in the setting event_buckets",
            )
        try:
            return store.get(key, max_bytes=max_bytes)
        except RegistryError as e:
            if "limit" not in e.facts:
                raise
            raise RequestTooLarge(f"s3://{bucket}/{key} has more than {max_bytes} bytes", limit=max_bytes) from e
