"""What split learning and federated averaging share: the digest of a run, the settings of its calls, and the hop."""

from __future__ import annotations

import hashlib
from dataclasses import fields
from pathlib import Path

import msgspec

from isthmus.errors import LearningError
from isthmus.http.pool import is_url
from isthmus.http.tls import open_trust
from isthmus.pipeline.hop import HttpHop
from isthmus.security.protected_call import open_protection
from isthmus.settings import RegistrySettings, SegmentSettings
from isthmus_tools.learning.training.config import TrainConfig

# Weights of a network in one frame; the same bound holds for frames in either direction.
MAX_FRAME_BYTES = 512 * 2**20
# A step on a slow CPU behind a slow link; a caller that waits for less says so itself.
_CALL_S = 120.0
_ATTEMPTS, _CONNECT_S = 10, 5.0


def run_digest(config: TrainConfig, terms: msgspec.Struct) -> str:
    """The digest of all that the sides of a run must have in common, whatever their data."""
    # How checkpoints are kept, and on what the side computes, are its own affair.
    loop = msgspec.structs.replace(config.training, keep=1, checkpoint_every=0, threads=1, device="cpu")
    network = msgspec.structs.replace(config.network, name=Path(config.network_name).name)
    parts = [config.seed, network, loop, config.data.classes, terms]
    digest = hashlib.sha256(msgspec.json.encode(parts, enc_hook=float))
    digest.update(config.network_code())
    return f"sha256:{digest.hexdigest()}"


def training_settings(registry: RegistrySettings) -> SegmentSettings:
    """The settings of a training's server and calls: secrets and TLS as for functions, bounds for whole networks."""
    values = {field.name: getattr(registry, field.name) for field in fields(RegistrySettings)}
    return SegmentSettings(
        **values,
        max_request_bytes=MAX_FRAME_BYTES,
        max_working_bytes=4 * MAX_FRAME_BYTES,
        deadline_s=_CALL_S,
        exec_timeout=0.0,
        # Steps take turns anyway: nothing would be learned from the times of calls that wait for each other.
        adaptive_concurrency=False,
        # Callers have the keys, or are of this machine.
        expose_details=True,
        log_level="error",
    )


def connect(url: str, settings: SegmentSettings) -> HttpHop:
    """The hop to the server of a training.

    Raises:
        LearningError: not a URL.
        SettingsError: the secret hop-keys, or a file for TLS, cannot be used.
    """
    if not is_url(url):
        raise LearningError(f"{url!r} is no URL such as https://cloud.example/train or http://127.0.0.1:9100")
    return HttpHop(
        url,
        attempts=_ATTEMPTS,
        connect_timeout_s=_CONNECT_S,
        max_reply_bytes=settings.max_request_bytes,
        protection=open_protection(settings),
        trust=open_trust(settings),
    )
