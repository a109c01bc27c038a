"""Settings: frozen dataclasses, read from the environment once at start.

The variable of a field is its name, in lower case as usual with OpenFaaS. An empty value counts as unset. An unreadable
value stops the start and names the variable. docs/reference/settings.md lists all fields; a test compares the two.
"""

from __future__ import annotations

import errno
import re
import stat
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from isthmus.context import working_time
from isthmus.errors import SettingsError
from isthmus.units import parse_duration, parse_size

# Secrets are short; a larger file is a wrong mount.
_MAX_SECRET_BYTES = 64 * 2**10
# onnxruntime accepts any 32-bit number and would start as many threads.
MAX_THREADS = 1024
# A week; clocks of locks and sockets overflow beyond some larger number.
MAX_SECONDS = 7 * 86_400.0
# RFC 9110, 5.1: a token.
_HEADER_NAME = re.compile(r"[\w!#$%&'*+.^`|~-]{1,80}", re.ASCII)
# No URL holds this character unescaped (RFC 3986).
_REPLICA_SEPARATOR = "|"
# Gateways add these, and pass on what a caller has forged.
_FORGED_HEADERS = ("x-forwarded-", "forwarded")
# Sums and doubles of settings stay within 63 bits.
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
    """A documented dataclass field; required without a default.

    `minimum` and `maximum` bound numbers; seconds are at most MAX_SECONDS in any case. `same` is an alias of the
    variable, as in stack.yml: both may be set, to equal values only. `fallbacks` are variables of other tools, read in
    order if neither is set.
    """
    metadata = {"help": help, "same": same, "fallbacks": fallbacks, "minimum": minimum, "maximum": maximum}
    return field(default=default, metadata=metadata) if default is not MISSING else field(metadata=metadata)


def urls_of(tier: str) -> tuple[str, ...]:
    """What an entry of the setting `hops` names: the URLs of a tier's replicas, or `local`."""
    return tuple(tier.split(_REPLICA_SEPARATOR))


def tier_of(urls: Sequence[str]) -> str:
    """The entry of the setting `hops` that names these URLs."""
    return _REPLICA_SEPARATOR.join(urls)


def is_secret(text: str) -> bool:
    """Whether `text` is printable ASCII without spaces, as required of a key, password or token in a header."""
    return bool(text) and text.isascii() and text.isprintable() and " " not in text


def read_secret(folder: str, name: str) -> str:
    """The text of an OpenFaaS secret without a trailing line break of editors and `echo`; empty if absent.

    Raises:
        SettingsError: unreadable, or not a secret's text. The message never holds the secret, unlike the error of an
            HTTP library about a header.
    """
    data = read_secret_file(folder, name)
    # latin-1 decodes any bytes; is_secret refuses the rest without an error that quotes the secret.
    text = data.decode("latin-1").strip()
    if text and not is_secret(text):
        raise SettingsError(
            f"the secret {name} in the setting secrets_dir ({folder}) is no key: it holds a space, a line break or"
            " another character that no key has",
            hint=f"create it again from one line: faas-cli secret create {name} --from-literal=…",
            variable="secrets_dir",
            value=folder,
        )
    return text


def read_secret_file(folder: str, name: str) -> bytes:
    """The bytes of an OpenFaaS secret that is a file, such as a key in PEM; empty if absent.

    Raises:
        SettingsError: unreadable, or longer than a secret. The message never holds the secret.
    """
    facts = {"variable": "secrets_dir", "value": folder}
    path = Path(folder) / name
    try:
        if stat.S_ISFIFO(path.stat().st_mode):  # a read would block until a writer opens the pipe
            raise OSError(errno.EINVAL, "it is a pipe, not a file")
        with path.open("rb") as f:
            data = f.read(_MAX_SECRET_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    except OSError as e:
        raise SettingsError(
            f"the secret {name} in the setting secrets_dir ({folder}) cannot be read: {e.strerror}", **facts
        ) from e
    if len(data) > _MAX_SECRET_BYTES:
        raise SettingsError(
            f"the secret {name} in the setting secrets_dir ({folder}) has more than {_MAX_SECRET_BYTES} bytes", **facts
        )
    return data


# OpenTelemetry's, in the order of its specification.
_TRACE_RECEIVERS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")


def wants_traces(env: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's variables name a receiver of traces, and no other of them turns traces off.

    Raises:
        SettingsError: the receiver's address is no URL, as that of a receiver of gRPC.
    """
    if env.get("OTEL_SDK_DISABLED", "").lower() == "true" or env.get("OTEL_TRACES_EXPORTER", "") == "none":
        return False
    for name in _TRACE_RECEIVERS:
        if url := env.get(name, ""):
            if not url.startswith(("http://", "https://")):
                raise SettingsError(
                    f"the setting {name} is {url!r}; it is the URL of a receiver of OTLP over HTTP, such as"
                    " http://127.0.0.1:4318",
                    variable=name,
                    value=url,
                )
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class EnvSettings:
    """Base of all settings."""

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Self:
        """Read all fields from `env`.

        Raises:
            SettingsError: a required variable is absent, a value does not parse, or two aliases differ; facts name the
                variable.
        """
        # Annotations are strings under `from __future__ import annotations`.
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
        settings = cls(**values)
        settings.check()
        return settings

    def check(self) -> None:
        """Refuse values out of range."""
        for f in fields(self):
            value, minimum, maximum = getattr(self, f.name), f.metadata["minimum"], f.metadata["maximum"]
            # bool is a subclass of int.
            if not isinstance(value, int | float) or isinstance(value, bool):
                continue
            if f.name.endswith(("_s", "_timeout")):
                maximum = min(maximum, MAX_SECONDS)
            if not minimum <= value <= maximum:
                bound = (
                    f"at most {maximum:,}" if value > maximum else f"at least {minimum}" if minimum else "not negative"
                )
                raise SettingsError(f"the setting {f.name} is {value}; it is {bound}", variable=f.name, value=value)

    def _check_choice(self, name: str, *choices: str) -> None:
        if (value := getattr(self, name)) not in choices:
            *others, last = choices
            raise SettingsError(
                f"the setting {name} is {value!r}; it is {', '.join(others)} or {last}", variable=name, value=value
            )


@dataclass(frozen=True, kw_only=True)
class RegistrySettings(EnvSettings):
    """The registry of bundles, and the cache of fetched content."""

    registry: str = setting(
        "location of the bundles: a folder path, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or"
        " hdfs://HOST:PORT/PATH",
        "",
    )
    s3_endpoint: str = setting(
        "URL of an S3 server other than AWS, e.g. http://minio:9000 (path-style); alias S3_ENDPOINT; "
        "fallbacks AWS_ENDPOINT_URL_S3, then AWS_ENDPOINT_URL",
        "",
        same="S3_ENDPOINT",
        fallbacks=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    )
    s3_region: str = setting(
        "region of the bucket; alias S3_REGION; fallbacks AWS_REGION, AWS_DEFAULT_REGION, the AWS profile's "
        "region, us-east-1",
        "",
        same="S3_REGION",
        fallbacks=("AWS_REGION", "AWS_DEFAULT_REGION"),
    )
    gcs_endpoint: str = setting(
        "URL of a server with the XML API of Google Cloud Storage other than Google's; alias GCS_ENDPOINT; fallback"
        " GOOGLE_BASE_URL",
        "",
        same="GCS_ENDPOINT",
        fallbacks=("GOOGLE_BASE_URL",),
    )
    azure_account: str = setting(
        "storage account of the container in az://CONTAINER; alias AZURE_ACCOUNT; fallback AZURE_STORAGE_ACCOUNT_NAME",
        "",
        same="AZURE_ACCOUNT",
        fallbacks=("AZURE_STORAGE_ACCOUNT_NAME",),
    )
    azure_endpoint: str = setting(
        "URL of the blob service where it is not https://ACCOUNT.blob.core.windows.net; alias AZURE_BLOB_ENDPOINT;"
        " fallback AZURE_STORAGE_ENDPOINT",
        "",
        same="AZURE_BLOB_ENDPOINT",
        fallbacks=("AZURE_STORAGE_ENDPOINT",),
    )
    secrets_dir: str = setting(
        "folder of OpenFaaS secrets; source of s3-access-key-id and s3-secret-access-key, gcs-service-account,"
        " azure-account-key or azure-sas-token, hop-keys, recipient-key and trusted-keys, if present",
        "/var/openfaas/secrets",
    )
    trusted_keys: str = setting(
        "keyring whose keys sign versions and aliases: a file's path, or `none`. With a keyring nothing unsigned is"
        " loaded or run. Empty means the secret trusted-keys, and no demand of signatures where that is absent",
        "",
    )
    hop_ca: str = setting(
        "file of CA certificates in PEM that alone vouch for https hops; empty means the secret hop-ca, or without"
        " that the system's CAs",
        "",
    )
    hop_client_cert: str = setting(
        "file of a certificate in PEM that https hops are shown; empty means the secret hop-client-cert, if present", ""
    )
    hop_client_key: str = setting(
        "file of that certificate's key, without a passphrase; empty means the secret hop-client-key, or the"
        " certificate's own file",
        "",
    )
    cache_dir: str = setting(
        "folder of the cache of segments and weights; functions write nowhere else",
        "/tmp/isthmus",  # noqa: S108 - in a container of its own
    )
    cache_bytes: int = setting("maximum size of the cache; the least recently used weights are evicted first", 2**30)
    registry_attempts: int = setting("attempts per registry read, including the first", 4, minimum=1)
    registry_timeout_s: float = setting("maximum total time of a registry read, in seconds", 20.0, minimum=0.001)


@dataclass(frozen=True, kw_only=True)
class AccessSettings(RegistrySettings):
    """Who may call a function: API keys of the secret `callers`, tokens of an issuer, or whoever the setting says."""

    access: str = setting(
        "who may call where neither the secret `callers` nor jwt_issuer names callers: `loopback`, requests of this"
        " machine that came over no other host, and behind of-watchdog, where that cannot be known, nobody; or"
        " `anyone`, who reaches the function. With callers, `anyone` lets requests without a key in too",
        "loopback",
    )
    jwt_issuer: str = setting(
        "issuer (claim iss) whose JSON web tokens are taken: RS256, ES256 or EdDSA; empty takes no tokens", ""
    )
    jwt_audience: str = setting("audience (claim aud) that tokens must name; required with jwt_issuer", "")
    jwt_keys: str = setting(
        "the issuer's public keys, a JSON web key set: a URL of https://, of http:// on this machine or in this"
        " cluster, or the path of a file; required with jwt_issuer",
        "",
    )
    jwt_clock_skew_s: float = setting(
        "by how much a token's times may differ from this machine's clock, in seconds", 30.0, maximum=300
    )
    jwt_keys_refresh_s: float = setting(
        "age at which the key set is fetched again, in seconds; a token with an unknown key id has it fetched earlier,"
        " at most every 10 s",
        300.0,
        minimum=10,
    )
    jwt_keys_max_age_s: float = setting(
        "age beyond which a key set that cannot be fetched again is not used, in seconds; requests with a token get 503"
        " then",
        86_400.0,
        minimum=10,
    )
    jwt_caller_claim: str = setting("claim that names the caller", "sub")
    jwt_roles_claim: str = setting(
        "claim of the caller's roles, a list or a text with spaces: infer, pin, metrics, profile, administer; others"
        " mean nothing. Dots lead into objects: realm_access.roles",
        "roles",
    )
    jwt_models_claim: str = setting(
        "claim of the models that the roles are for, a list or a text with spaces; empty means every model", ""
    )
    caller_requests_per_s: float = setting(
        "requests per second of each caller without a limit of its own; 0 means no limit. Each replica counts alone",
        0.0,
    )
    caller_bytes_per_s: int = setting("the same for bytes of request bodies", 0)
    caller_burst_s: float = setting(
        "how many seconds of its rates a caller may use at once, after a pause", 10.0, minimum=0.1, maximum=3600
    )
    fprocess: str = setting(
        "of-watchdog's command, which is in the environment of every function image. Requests come from the watchdog"
        " there, whoever sent them, so `access=loopback` lets nobody in",
        "",
    )

    @property
    def takes_tokens(self) -> bool:
        """Whether tokens of an issuer are taken."""
        return bool(self.jwt_issuer)

    def check(self) -> None:
        super().check()
        self._check_choice("access", "loopback", "anyone")
        for name in ("jwt_audience", "jwt_keys"):
            if bool(getattr(self, name)) != self.takes_tokens:
                missing = name if self.takes_tokens else "jwt_issuer"
                raise SettingsError(
                    f"the setting {missing} is missing: jwt_issuer, jwt_audience and jwt_keys are set together",
                    variable=missing,
                )


@dataclass(frozen=True, kw_only=True)
class FunctionSettings(AccessSettings):
    """What every function has: bounds on its requests, error responses, log."""

    max_concurrency: int = setting(
        "maximum concurrent requests, up to 4096; further requests wait in the queue of max_queued",
        32,
        minimum=1,
        maximum=4096,
    )
    max_queued: int = setting(
        "maximum requests that wait to be worked on, up to 4096; a request waits only while its deadline can be met,"
        " and further requests are answered 429 with Retry-After. 0 means no queue",
        64,
        maximum=4096,
    )
    adaptive_concurrency: bool = setting(
        "whether fewer requests than max_concurrency are worked on at a time where more would only slow each other"
        " down; otherwise always max_concurrency",
        True,
    )
    caller_header: str = setting(
        "request header that names the caller where requests are not authenticated, such as X-Caller: callers take"
        " turns in the queue, and none fills it alone. Name a header that a proxy sets or checks, as callers can forge"
        " others. Empty means that all such requests are of one caller",
        "",
    )
    max_request_bytes: int = setting(
        "maximum size of a request body after decompression; also bounds a frame's decoded tensors together "
        "with the memory for decoding",
        64 * 2**20,
    )
    max_working_bytes: int = setting(
        "maximum memory of all requests in progress for bodies, decompression, parsed JSON and decoded tensors;"
        " requests beyond this bound are answered 429 with Retry-After. The effective bound is at least twice"
        " max_request_bytes",
        256 * 2**20,
    )
    deadline_s: float = setting(
        "maximum time of a request, in seconds; shortened by the request's X-Timeout and by exec_timeout, "
        "each less a margin",
        20.0,
        minimum=0.001,
    )
    exec_timeout: float = setting(
        "of-watchdog's limit per call: seconds, or a duration such as 1m30s; 0 means none. Requests end a "
        "margin earlier (a tenth, at most 1 s), so that callers get an error document instead of the "
        "watchdog's empty 504",
        30.0,
    )
    expose_details: bool = setting(
        "whether error responses include details: URLs of other functions, the registry's location, names of "
        "other models. If false, responses hold a general sentence and the details go to the log. The local "
        "engine sets true",
        False,
    )
    log_level: str = setting("debug, info, warning or error", "info")

    @property
    def longest_s(self) -> float:
        """Maximum seconds of a request, before its own X-Timeout."""
        return self._within_watchdog(self.deadline_s)

    def _within_watchdog(self, seconds: float) -> float:
        return min(seconds, working_time(self.exec_timeout)) if self.exec_timeout else seconds

    @property
    def working_bytes(self) -> int:
        """The bound of `max_working_bytes`, raised so that a body of maximal size fits while its buffer grows."""
        return max(self.max_working_bytes, 2 * self.max_request_bytes)

    def check(self) -> None:
        super().check()
        self._check_choice("log_level", "debug", "info", "warning", "error")
        header = self.caller_header
        if header and (not _HEADER_NAME.fullmatch(header) or header.lower().startswith(_FORGED_HEADERS)):
            raise SettingsError(
                f"the setting caller_header is {header!r}; it is the name of a header such as X-Caller, and none of"
                " Forwarded and X-Forwarded-…, which any caller can send and gateways pass on",
                variable="caller_header",
                value=header,
            )


@dataclass(frozen=True, kw_only=True)
class SegmentSettings(FunctionSettings):
    """A function that runs segments: edge-head, cloud-tail, and a router with a hop in its own process."""

    preload: tuple[str, ...] = setting(
        "segments to load at start, comma-separated: NAME[:VERSION][@SEGMENT]; SEGMENT is an id such as ..65, "
        "or head or tail for the first or last segment of the default partition",
        (),
    )
    segment_dir: str = setting(
        "folder of a segment baked into the image by `isthmus package`; the registry is not read", ""
    )
    providers: tuple[str, ...] = setting(
        "onnxruntime execution providers, in order of preference", ("CPUExecutionProvider",)
    )
    threads: int = setting("threads per run; 0 means the container's CPU limit", 0, maximum=MAX_THREADS)
    batching: str = setting(
        "whether requests that wait for a CPU run together as one batch: `auto`, where a trial on this machine showed"
        " equal results and at least a tenth more throughput, or `off`",
        "auto",
    )
    batch_window_ms: float = setting(
        "how long a run with a free CPU waits for others to form a batch, where batches pay; 0 means that only"
        " requests which wait anyway run together",
        0.0,
        maximum=1000,
    )
    max_loaded_bytes: int = setting(
        "maximum weight bytes of loaded segments; the least recently used segment is unloaded first", 4 * 2**30
    )
    max_sessions: int = setting(
        "maximum number of sessions that a segment with state keeps; a new one takes the place of one that is idle, or"
        " is answered 429",
        16,
        minimum=1,
        maximum=4096,
    )
    session_bytes: int = setting("maximum memory of the state of all sessions", 2**30)
    max_session_tokens: int = setting(
        "maximum number of tokens of a session, at most the model's own", 4096, minimum=16, maximum=2**20
    )
    session_idle_s: float = setting(
        "how long a session without a step is kept where another needs its place, in seconds", 60.0
    )
    session_expiry_s: float = setting(
        "how long a session without a step is kept at all, in seconds; its memory goes back to the system then",
        600.0,
        minimum=1.0,
    )
    hop_security: str = setting(
        "how calls between router and segment functions are protected where the secret `hop-keys` is there: `sealed`,"
        " encrypted and authenticated, or `signed`, authenticated alone. A function that seals takes sealed calls only",
        "sealed",
    )
    hop_clock_skew_s: float = setting(
        "by how much the time of a protected call may differ from this machine's clock, in seconds; so long an observed"
        " call could be sent again, to a function that was restarted since or to another replica",
        30.0,
        minimum=1,
        maximum=3600,
    )
    max_image_pixels: int = setting("maximum number of pixels of a decoded image", 64_000_000)
    image_memory_bytes: int = setting(
        "maximum memory for decoding all images in progress; an image beyond this bound by itself is refused, "
        "further images wait",
        384 * 2**20,
    )

    def check(self) -> None:
        super().check()
        self._check_choice("batching", "auto", "off")
        self._check_choice("hop_security", "sealed", "signed")
        # A baked segment is complete without a registry.
        if not self.registry and not self.segment_dir:
            raise SettingsError(
                "the setting registry is missing: a folder's path, or an address such as s3://BUCKET/PREFIX",
                variable="registry",
                hint="set registry in the function's environment; only a baked segment (segment_dir) needs none",
            )


@dataclass(frozen=True, kw_only=True)
class RouterSettings(SegmentSettings):
    """The router: the served model, and the hops that run its segments."""

    model: str = setting("model served on POST /: NAME or NAME:VERSION; VERSION is an alias or a number")
    hops: tuple[str, ...] = setting(
        "functions that run the segments, in order, comma-separated: URLs, or `local` for the router's own "
        "process. Several URLs with a vertical bar between them are replicas of one hop: a call goes to the least busy "
        "one, and to the next if that fails or is slow. If the partition has more segments than hops, the last hop "
        "runs the remaining segments"
    )
    cuts: str = setting(
        "partition: cuts of the bundle by name, position or tensors, in order, separated by /; empty means "
        "the bundle's default cuts",
        "",
    )
    codec: str = setting(
        "codec of the activations between segments over HTTP, if no plan decides: int8/1, half/1, "
        "transform/4@0.9 (a calibrated codec and its quality), transform/4@0.4+0.6:1.5 (a closer look at "
        "quality 0.6 if the prediction's margin is below 1.5; further looks may follow), …; for a language model "
        "int8-token/1, half/1, bfloat16/1, lossless/3 or transform/4; raw sends activations unencoded even under a "
        "plan",
        "",
    )
    guard_share: float = setting(
        "share of requests with encoded activations that the router repeats with raw activations, in idle "
        "time, to compare the predictions, and of those that met an exit, which it repeats in full where they ended"
        " there; 0 disables the comparison",
        0.01,
        maximum=1,
    )
    canary_header: str = setting(
        "request header that keeps callers without a name on one version where an alias has a canary, such as"
        " X-Session; empty means that each of their requests is drawn by itself",
        "",
    )
    canary_compared: float = setting(
        "share of the requests of an alias with a canary that the router repeats with the other version, in idle time,"
        " to compare the predictions; 0 disables the comparison",
        0.25,
        maximum=1,
    )
    plan: bool = setting("whether the router follows the plan in the model's bundle, if `cuts` is empty", True)
    exits: bool = setting(
        "whether requests end at the exits of a model: of a plan's routes those that the plan has, without a plan the"
        " exit of the first cut, where the bundle has one. A caller asks for the full model by the header"
        " `Isthmus-Exit: off`",
        True,
    )
    exit_when_cut_off: bool = setting(
        "whether the unsure prediction of a route's exit is the response, marked as degraded, where the segments behind"
        " the exit give no response and no other route does; otherwise that is an error",
        False,
    )
    adapt: bool = setting(
        "whether the router chooses the route of each request among the candidates of the plan, and takes another where"
        " a hop gives no response; otherwise every request takes the plan's choice",
        True,
    )
    fallback: tuple[str, ...] = setting(
        "routes that take over where a hop of the chosen route gives no response, in order, comma-separated names of"
        " the plan's candidates. Empty means every candidate that the plan allows, exact ones before degraded ones;"
        " `none` means no other route",
        (),
    )
    generation_s: float = setting(
        "maximum time of the generation of a text, in seconds, in place of deadline_s; shortened by the request's"
        " X-Timeout and by exec_timeout, each less a margin",
        600.0,
        minimum=0.001,
    )
    generation_silence_s: float = setting(
        "how long a generation may go without a token or a further chunk of its prompt, in seconds, functions that"
        " restart included",
        60.0,
        minimum=0.001,
    )
    replay_bytes: int = setting(
        "maximum memory of the boundary tensors that are stored for one generation, from which a function without its"
        " state is rebuilt; beyond it the segments before the cut run again",
        32 * 2**20,
    )
    total_replay_bytes: int = setting("the same for all generations together", 256 * 2**20)
    draft: str = setting(
        "language model of the same vocabulary, NAME or NAME:VERSION, whose tokens are proposed for those of the served"
        " one; it runs whole on the first of `hops`, where its weights and a session for each generation take memory"
        " too. The version is the one at the start; empty means no drafts",
        "",
    )
    hop_attempts: int = setting(
        "attempts per call of a hop that is reached and fails, including the first, within the deadline. "
        "Calls of a starting hop (connection refused, 503, the gateway's 404) are retried until the deadline. "
        "1 disables all retries",
        4,
        minimum=1,
    )
    hop_connect_timeout_s: float = setting("maximum time to connect to a hop, in seconds", 2.0, minimum=0.001)
    refresh_s: float = setting(
        "maximum age of a resolved alias, and of a failed look-up of a name, in seconds",
        10.0,
    )
    explain_runs: int = setting(
        "maximum runs of the segments behind the cut for one explanation; 0 allows no explanations", 256
    )
    event_buckets: tuple[str, ...] = setting(
        "buckets, comma-separated, whose objects may be named by notifications of an object store; the router reads"
        " them with the settings s3_endpoint, s3_region and the registry's S3 secrets. Empty refuses notifications",
        (),
    )
    claims: str = setting(
        "where the bodies of claim checks are: a folder or an address, as of registry; empty refuses claim checks", ""
    )
    page: bool = setting(
        "whether browsers get a page at GET /, which sends photos along the model's routes, and one of the API at"
        " GET /docs; anybody who can call the function sees them. The local engine turns it on",
        False,
    )

    @property
    def longest_generation_s(self) -> float:
        """Maximum seconds of a generation, before the request's own X-Timeout."""
        return self._within_watchdog(self.generation_s)

    @property
    def model_name(self) -> str:
        """The name of `model`, without its version."""
        return self.model.partition(":")[0]

    def tells_of(self, name: str) -> bool:
        """Whether callers may be told of the model `name`; names of models beside `model` are details."""
        return self.expose_details or name == self.model_name


@dataclass(frozen=True, kw_only=True)
class TriggerSettings(FunctionSettings):
    """The trigger: its configuration, and bounds on calls over HTTP."""

    trigger_config: str = setting(
        "the trigger's configuration: the path of a TOML file, relative to the function's own folder, or the file's"
        " text. Without a configuration the function answers 503 and reads no queue",
        "trigger.toml",
    )
    public_url: str = setting(
        "URL or path under which callers reach this function, for the header Location of a queued call; / is the"
        " function's own address",
        "/function/trigger",
    )
    max_waiters: int = setting(
        "how many of max_concurrency may wait for the end of a call, by `wait` or as an event stream; further ones are"
        " answered 429",
        24,
        minimum=1,
        maximum=4095,
    )
    max_backlog: int = setting(
        "messages that may wait in the source's queue before further calls are answered 429; brokers that do not say"
        " how many wait have no such bound",
        10_000,
        minimum=1,
    )

    def check(self) -> None:
        super().check()
        if self.max_waiters >= self.max_concurrency:
            raise SettingsError(
                f"the setting max_waiters is {self.max_waiters}; it is less than max_concurrency"
                f" ({self.max_concurrency}), so that calls are taken while others wait",
                variable="max_waiters",
                value=self.max_waiters,
            )


def _text(name: str, metadata: Mapping[str, Any], env: Mapping[str, str]) -> str:
    text, same = env.get(name, "").strip(), metadata.get("same", "")
    if other := env.get(same, "").strip():
        if text and text != other:
            # A silent choice could send the credentials to the wrong server.
            raise SettingsError(
                f"{name} and {same} are one setting and have different values",
                variable=name,
                hint=f"unset one of {name} and {same}",
            )
        text = other
    return text or next((value for n in metadata.get("fallbacks", ()) if (value := env.get(n, "").strip())), "")


def _parse(name: str, text: str, kind: Any) -> Any:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if kind is int:
            return parse_size(text) if name.endswith("_bytes") else int(text)
        if kind is float:
            # The watchdog's variables use Go's syntax; the project's own durations are numbers of seconds.
            value = parse_duration(text) if name.endswith("_timeout") and not text.isdecimal() else float(text)
            # float() accepts nan and inf; neither compares against bounds in a useful way.
            if value != value or value in (float("inf"), float("-inf")):
                raise ValueError("not finite")
            return value
        if kind is str:
            return text
        return tuple(part.strip() for part in text.split(",") if part.strip())
    except (ValueError, KeyError) as e:
        expected = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "a list")
        if name.endswith("_bytes"):
            expected = "a size such as 500MB or 2GiB"
        if name.endswith("_timeout"):
            expected = "seconds or a duration such as 1m30s"
        raise SettingsError(f"the setting {name} is {text!r}; it must be {expected}", variable=name, value=text) from e
