"""Send each new picture of a folder to the queue of a trigger.

Run: python watch.py TRIGGER.toml FOLDER

The folder is looked at twice a second: the kernel's notifications do not come where a camera writes by way of a
network, and tell of pictures that are half written.
"""

import os
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from isthmus import RegistrySettings
from isthmus.errors import BrokerUnavailable
from isthmus.events.configuration import TriggerConfiguration, read_configuration
from isthmus_tools.usecases.send import SendRequest, send_files

LOOK_S, RETRY_S = 0.5, 5.0


def complete_files(folder: Path) -> Iterator[Path]:
    """The files of a folder, for ever: each once its size and time have stayed the same from one look to the next."""
    before = yielded = frozenset[tuple[Path, int, int]]()
    while True:
        now = frozenset(looked_at(folder))
        complete = now & before
        yield from sorted(path for path, *_ in complete - yielded)
        before, yielded = now, complete
        time.sleep(LOOK_S)


def looked_at(folder: Path) -> Iterator[tuple[Path, int, int]]:
    """Files, without hidden ones, with size and time of the last change."""
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # gone or renamed meanwhile
            status = path.stat()
            if path.is_file() and not path.name.startswith("."):
                yield path, status.st_size, status.st_mtime_ns


def watch(configuration: TriggerConfiguration, settings: RegistrySettings, folder: Path) -> None:
    """Send pictures for ever; after an outage of the broker all again, whose ids show which are repetitions."""
    while True:
        request = SendRequest(configuration=configuration, settings=settings, files=complete_files(folder))
        try:
            for sent in send_files(request):
                print(f"{Path(sent.file).name}: {sent.error or 'sent'}", flush=True)
        except BrokerUnavailable as e:
            print(f"again in {RETRY_S:g} s: {e.message}", file=sys.stderr)
            time.sleep(RETRY_S)


def main(configuration: str, folder: str) -> None:
    """Send pictures until Ctrl-C."""
    settings = RegistrySettings.from_env({"secrets_dir": ".isthmus/secrets", **os.environ})
    with suppress(KeyboardInterrupt):
        watch(read_configuration(configuration, dict(os.environ)), settings, Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
