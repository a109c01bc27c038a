"""Settings: frozen dataclasses read from the environment once, at start.

A field's name is the variable's name, in lower case as OpenFaaS writes them. An empty value counts as unset. A value
that cannot be read stops the start and names the variable. docs/reference/settings.md lists every field, and a test
compares the two.
"""

from __future__ import annotations

import errno
import stat
import typing
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from isthmus.context import working_time
from isthmus.errors import SettingsError
from isthmus.units import parse_duration, parse_size

_MAX_SECRET_BYTES = 64 * 2**10
MAX_THREADS = 1024
"""onnxruntime takes 32 bits and would start as many."""
MAX_SECONDS = 7 * 86_400.0
"""A week; the clocks of locks and sockets overflow at some more."""
_MAX_NUMBER = 2**62


def setting(
    help: str,
    default: Any = MISSING,
    *,
    same: str = "",
    fallbacks: tuple[str, ...] = (),
    minimum: float = 0,
    maximum: float = _MAX_NUMBER,
) -> Any:
    """A documented dataclass field; without a default it is required.

    `minimum` and `maximum` bound a number; one of seconds is at most MAX_SECONDS in any case.
    `same` is another name of its variable, as stack.yml has it: both may be set, but not to different values.
    `fallbacks` are variables of other tools, read in order where neither is set.
    """
    metadata = {"help": help, "same": same, "fallbacks": fallbacks, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


def is_secret(text: str) -> bool:
    """Whether `text` can be a key, a password or a token: printable ASCII without spaces, as a header carries it."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def read_secret(folder: str, name: str) -> str:
    """The text of an OpenFaaS secret without the line break that editors and `echo` leave; empty if it is not there.

    Raises:
        SettingsError: it cannot be read, or holds what no key holds. The message never holds the secret: an HTTP
            library that refuses a header would repeat all of it.
    """
    facts = {"variable": "secrets_dir", "value": folder}
    path = Path(folder) / name
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # reading would wait for a writer
            raise OSError(errno.EINVAL, "it is a pipe, not a file")
        with path.open("rb") as f:
            data = f.read(_MAX_SECRET_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    except OSError as e:
        raise SettingsError(
            f"the secret {name} in the setting secrets_dir ({folder}) cannot be read: {e.strerror}", **facts
        ) from e
    text = data.decode("latin-1").strip()
    if text and (len(data) > _MAX_SECRET_BYTES or not is_secret(text)):
        raise SettingsError(
            f"the secret {name} in the setting secrets_dir ({folder}) is no key: it holds a space, a line break or"
            f" another character that no key has, or more than {_MAX_SECRET_BYTES} bytes",
            hint=f"create it again from one line: faas-cli secret create {name} --from-literal=…",
            **facts,
        )
    return text


@dataclass(frozen=True, kw_only=True)
class EnvSettings:
    """Base of all settings: `from_env` reads each field from the variable of its name."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read every field from `env`.

        Raises:
            SettingsError: a required variable is missing, a value does not parse, or two names of one setting have
                different values; facts name the variable.
        """
        types = typing.get_type_hints(cls)
        values: dict[str, Any] = {}
        for f in fields(cls):
            text = _text(f.name, f.metadata, env)
            if text:
                values[f.name] = _parse(f.name, text, types[f.name])
            elif f.default is MISSING:
                raise SettingsError(
                    f"the setting {f.name} is missing: {f.metadata['help']}",
                    variable=f.name,
                    hint=f"set {f.name} in the function's environment",
                )
        made = cls(**values)
        made.check()
        return made

    def check(self) -> None:
        """Refuse values that parse but cannot be meant."""
        for f in fields(self):
            value, least, most = getattr(self, f.name), f.metadata["minimum"], f.metadata["maximum"]
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if f.name.endswith(("_s", "_timeout")):
                most = min(most, MAX_SECONDS)
            if not least <= value <= most:
                wanted = f"at most {most:,}" if value > most else f"at least {least}" if least else "not negative"
                raise SettingsError(f"the setting {f.name} is {value}; it is {wanted}", variable=f.name, value=value)


@dataclass(frozen=True, kw_only=True)
class RegistrySettings(EnvSettings):
    """Where bundles live, and where what is fetched from there is kept."""

    registry: str = setting("where bundles live: a folder's path, or s3://BUCKET/PREFIX", "")
    s3_endpoint: str = setting(
        "URL of an S3 server other than AWS, e.g. http://minio:9000 (path-style); S3_ENDPOINT is the same,"
        " AWS_ENDPOINT_URL_S3 and AWS_ENDPOINT_URL are read where neither is set",
        "",
        same="S3_ENDPOINT",
        fallbacks=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    )
    s3_region: str = setting(
        "region of the bucket; S3_REGION is the same, AWS_REGION and AWS_DEFAULT_REGION are read where neither is set,"
        " then the AWS profile's; us-east-1 where nothing names one",
        "",
        same="S3_REGION",
        fallbacks=("AWS_REGION", "AWS_DEFAULT_REGION"),
    )
    secrets_dir: str = setting(
        "folder of OpenFaaS secrets; s3-access-key-id and s3-secret-access-key are read from it if present",
        "/var/openfaas/secrets",
    )
    cache_dir: str = setting("folder for fetched segments and weights; the only folder written to", "/tmp/isthmus")  # noqa: S108
    cache_bytes: int = setting("bound on cache_dir; the least recently used weights are evicted first", 2**30)
    registry_attempts: int = setting("attempts for one read of the registry, the first included", 4, minimum=1)
    registry_timeout_s: float = setting("longest wait for one read of the registry, in seconds", 20.0, minimum=0.001)


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(RegistrySettings):
    """A function that runs segments: edge-head, cloud-tail, and a router with a hop in its own process."""

    preload: tuple[str, ...] = setting(
        "segments to load at start, comma-separated: NAME[:VERSION][@SEGMENT]; SEGMENT is an id such as ..65, or head"
        " or tail for the default partition's ends",
        (),
    )
    segment_dir: str = setting("folder of a segment baked into the image by `isthmus package`; no registry is read", "")
    providers: tuple[str, ...] = setting(
        "onnxruntime execution providers, first choice first", ("CPUExecutionProvider",)
    )
    threads: int = setting("threads of one run; 0 takes the container's CPU limit", 0, maximum=MAX_THREADS)
    max_loaded_bytes: int = setting(
        "bound on loaded segments' weights; the least recently used are evicted first", 4 * 2**30
    )
    max_concurrency: int = setting(
        "requests admitted at a time; beyond, the response is 429 with Retry-After", 32, minimum=1
    )
    max_request_bytes: int = setting(
        "longest request body, decompressed; also the bound on a frame's decoded tensors with the working memory of"
        " decoding",
        64 * 2**20,
    )
    max_working_bytes: int = setting(
        "bound on the memory of all requests together: bodies, parsed JSON, decompressed bodies, decoded tensors."
        " Beyond, the response is 429 with Retry-After; at least twice max_request_bytes",
        256 * 2**20,
    )
    deadline_s: float = setting(
        "longest time of a request, in seconds; its X-Timeout and exec_timeout shorten it, each less a margin",
        20.0,
        minimum=0.001,
    )
    exec_timeout: float = setting(
        "of-watchdog's own limit of a call: seconds, or a duration such as 1m30s; 0 is none. A request ends a margin"
        " before, a tenth of it and at most 1 s, so that its caller gets an error and not the watchdog's empty 504",
        30.0,
    )
    max_image_pixels: int = setting("largest image, in pixels, that is decoded", 64_000_000)
    image_memory_bytes: int = setting(
        "bound on the memory of decoding all images; an image that alone needs more is refused, others wait",
        384 * 2**20,
    )
    expose_details: bool = setting(
        "whether responses hold details of errors: URLs of other functions, the registry's location, names of other"
        " models; otherwise a sentence, and the log has the rest. The local engine turns it on",
        False,
    )
    log_level: str = setting("debug, info, warning or error", "info")

    @property
    def longest_s(self) -> float:
        """Seconds that a request may take at most, before its own X-Timeout is asked."""
        return min(self.deadline_s, working_time(self.exec_timeout)) if self.exec_timeout else self.deadline_s

    @property
    def working_bytes(self) -> int:
        """The bound of `max_working_bytes`, with which every body that may come alone fits while it grows."""
        return max(self.max_working_bytes, 2 * self.max_request_bytes)

    def check(self) -> None:
        super().check()
        if not self.registry and not self.segment_dir:
            raise SettingsError(
                "the setting registry is missing: a folder's path, or s3://BUCKET/PREFIX",
                variable="registry",
                hint="set registry in the function's environment; only a baked segment (segment_dir) needs none",
            )
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise SettingsError(
                f"the setting log_level is {self.log_level!r}; it is debug, info, warning or error",
                variable="log_level",
                value=self.log_level,
            )


@dataclass(frozen=True, kw_only=True)
class RouterSettings(SegmentSettings):
    """The router: which model answers on `/`, and where each of its segments runs."""

    model: str = setting("the model of POST /: NAME or NAME:VERSION, an alias or a number")
    hops: tuple[str, ...] = setting(
        "where the segments run, in order, comma-separated: a function's URL, or `local` for this process. The last hop"
        " also runs the segments beyond the number of hops"
    )
    cuts: str = setting(
        "the partition: names, positions or tensors of the bundle's cuts, in order, separated by /; empty for the"
        " bundle's own",
        "",
    )
    codec: str = setting(
        "codec of activations between segments over HTTP, unless a plan chooses: int8/1, half/1, transform/4@0.9 (a"
        " calibrated codec and its quality), transform/4@0.4+0.6:1.5 (a closer look at 0.6 where the prediction's"
        " margin is below 1.5; more may follow), …; raw encodes nothing and overrides the plan's codecs",
        "",
    )
    guard_share: float = setting(
        "share of the requests with encoded activations that are run again raw, in idle time, and compared; 0 for none",
        0.01,
        maximum=1,
    )
    plan: bool = setting("whether the plan in the model's bundle chooses the route, while `cuts` is empty", True)
    hop_attempts: int = setting(
        "attempts for a hop that is reached and fails, the first included, within the deadline; a starting hop (nothing"
        " listens, 503, the gateway's 404) is retried until the deadline. 1 turns retries off",
        4,
        minimum=1,
    )
    hop_connect_timeout_s: float = setting("longest wait for a connection to a hop, in seconds", 2.0, minimum=0.001)
    refresh_s: float = setting(
        "how long a looked-up alias, or a missing name, is cached before the registry is read again, in seconds",
        10.0,
    )


def _text(name: str, metadata: Mapping[str, Any], env: Mapping[str, str]) -> str:
    text, same = env.get(name, "").strip(), metadata.get("same", "")
    if other := env.get(same, "").strip():
        if text and text != other:
            # One of them would send the keys to a server that was not meant.
            raise SettingsError(
                f"{name} and {same} are one setting and have different values",
                variable=name,
                hint=f"unset one of {name} and {same}",
            )
        text = other
    return text or next((found for n in metadata.get("fallbacks", ()) if (found := env.get(n, "").strip())), "")


def _parse(name: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            return parse_size(text) if name.endswith("_bytes") else int(text)
        if kind is float:
            value = parse_duration(text) if name.endswith("_timeout") and not text.isdecimal() else float(text)
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError("not finite")
            return value
        if kind is str:
            return text
        return tuple(part.strip() for part in text.split(",") if part.strip())
    except (ValueError, KeyError) as e:
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a list")
        if name.endswith("_bytes"):
            wanted = "a size such as 500MB or 2GiB"
        if name.endswith("_timeout"):
            wanted = "seconds or a duration such as 1m30s"
        raise SettingsError(f"the setting {name} is {text!r}; it must be {wanted}", variable=name, value=text) from e
