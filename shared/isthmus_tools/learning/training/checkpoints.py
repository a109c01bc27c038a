"""Checkpoints of a training run: atomic files with a checksum; the last few stay.

A file is a line with the SHA-256 of the rest, then torch's archive of tensors and plain values; reading executes no
code. A file is written beside its place, synchronised and renamed, so that a kill leaves the file before.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from isthmus.errors import LearningError
from isthmus.files import sync_folder, write_whole

_MAGIC = b"isthmus.checkpoint/1 "
_NAME = re.compile(r"step-(\d{12})\.checkpoint")
State = dict[str, Any]


class Checkpoints:
    """Checkpoints in `folder`, the last `keep` of these. `warn` gets a sentence about each damaged file.

    `fingerprint` names configuration and data: any other checkpoint is refused.
    """

    def __init__(self, folder: Path, keep: int, fingerprint: str, warn: Callable[[str], None] = lambda _: None) -> None:
        self._folder, self._keep, self._fingerprint, self._warn = folder, keep, fingerprint, warn

    def exist(self) -> bool:
        """Whether there is a checkpoint, of any run."""
        return bool(self._files())

    def write(self, step: int, state: State) -> None:
        """Write the state after `step` steps, and remove the oldest beyond `keep`.

        Raises:
            LearningError: the folder cannot be written.
        """
        # In memory first: the checksum precedes the content.
        content = io.BytesIO()
        torch.save({"fingerprint": self._fingerprint, "step": step, "state": state}, content)
        body = content.getvalue()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"step-{step:012}.checkpoint"
            write_whole(path, _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            sync_folder(self._folder)
            # After the new file is on disk.
            for old in self._files()[: -self._keep]:
                old.unlink(missing_ok=True)
        except OSError as e:
            raise LearningError(f"no checkpoint can be written to {self._folder}: {e.strerror or e}") from e

    def latest(self) -> State | None:
        """The state of the newest whole checkpoint; a damaged file is skipped for the file before.

        Raises:
            LearningError: the newest whole checkpoint is of another configuration or of other data.
        """
        # The newest first.
        for path in reversed(self._files()):
            try:
                document = _read(path)
            except (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError) as e:
                self._warn(f"{path} is damaged, the checkpoint before it is taken: {e}")
                continue
            return self._own_state(document, path)
        return None

    def steps(self) -> list[int]:
        """The steps with a whole checkpoint, in order; each damaged file is warned of."""
        return [int(path.stem.removeprefix("step-")) for path in self._files() if self._is_whole(path)]

    def read(self, step: int) -> State:
        """The state after `step` steps.

        Raises:
            LearningError: absent, damaged, of another configuration or of other data.
        """
        path = self._folder / f"step-{step:012}.checkpoint"
        try:
            document = _read(path)
        except (OSError, ValueError, RuntimeError, EOFError, KeyError, UnpicklingError) as e:
            raise LearningError(f"{path} is absent or damaged: {e}", file=str(path)) from e
        return self._own_state(document, path)

    def remove(self) -> None:
        """Remove all checkpoints."""
        for path in self._files():
            path.unlink(missing_ok=True)

    def _is_whole(self, path: Path) -> bool:
        try:
            _checked_body(path)
        except (OSError, ValueError) as e:
            self._warn(f"{path} is damaged, the checkpoint before it is taken: {e}")
            return False
        return True

    def _own_state(self, document: dict[str, Any], path: Path) -> State:
        if document["fingerprint"] != self._fingerprint:
            raise LearningError(
                f"{path} is of another configuration or of other data",
                file=str(path),
                hint="--fresh starts anew; or restore what was changed",
            )
        state: State = document["state"]
        return state

    def _files(self) -> list[Path]:
        if not self._folder.is_dir():
            return []
        # Numbers have leading zeros: names sort as steps do.
        return sorted(p for p in self._folder.iterdir() if _NAME.fullmatch(p.name))


def _checked_body(path: Path) -> bytes:
    # Whole: a checkpoint fits in memory, as the network does.
    data = path.read_bytes()
    header, _, body = data.partition(b"\n")
    if header != _MAGIC + hashlib.sha256(body).hexdigest().encode():
        raise ValueError("its checksum does not match")
    return body


def _read(path: Path) -> dict[str, Any]:
    # weights_only: tensors and plain values, no code.
    document = torch.load(io.BytesIO(_checked_body(path)), map_location="cpu", weights_only=True)
    if not isinstance(document, dict) or not {"fingerprint", "state"} <= set(document):
        raise ValueError("it holds no state of a training run")
    return document
