"""Errors of obstore as errors of the registry.

obstore's exceptions carry a class for a few statuses and a text for all: status and code are read from the text. The
text of a service is never repeated beyond its code and status, since it may quote the request.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from isthmus.errors import Denied, RegistryError, RegistryUnavailable
from isthmus.registry.blobs import clock_refused, ended_early, missing_blob, missing_registry

_MAX_TEXT = 16 * 2**10
"""A server's error document may be of any length."""
# Of a response, or of one key in the response to Azure's bulk deletion.
_STATUS = re.compile(r'\b(?:status: |code: ")(\d{3})[,"]')
_CODE = re.compile(r"<Code>([A-Za-z]{1,64})</Code>")
_KIND = re.compile(r"\bkind: (Connect|Request|Timeout|Interrupted|Decode)\b")
_NO_BUCKET: Final = {"NoSuchBucket", "ContainerNotFound", "ResourceNotFound", "InvalidBucketName"}
_CLOCK: Final = ("Request date header", "RequestTimeTooSkewed", "reasonable timeframe")
"""Azure's shared keys, S3's signatures on GCS, and Google's token service."""
_TRANSIENT: Final = {"ServerBusy", "OperationTimedOut", "SlowDown", "ContainerBeingDeleted"}
# A token from the instance: an address without a route means that this machine is no instance.
_INSTANCE: Final = ("://169.254.169.254/", "://metadata.google.internal/", "://metadata/")
# Texts of object_store's builders and signers, before any request is sent.
_UNUSABLE: Final = ("credential error", "Access Key", "SAS", "pem file", "CryptoProvider", "InvalidHeaderValue")

_FOREIGN: Final = ("Unable to extract metadata", "Got invalid")


@dataclass(frozen=True)
class CloudFacts:
    """The names in messages: of the store, and of the secrets that its credentials come from."""

    url: str
    secrets: str
    endpoint_setting: str


def translated(error: BaseException, store: CloudFacts, key: str) -> RegistryError:
    """The registry's error for an exception of obstore; never a text that may hold a credential."""
    text = str(error)[:_MAX_TEXT]
    status, code = int(_group(_STATUS, text) or 0), _group(_CODE, text)
    facts = {"registry": store.url, "blob": key}
    reason = " ".join(part for part in (str(status or ""), code) if part)
    if "token request" in text:
        return _without_token(text, status, store, key)
    if any(word in text for word in _CLOCK):
        return clock_refused(store.url, key)
    if code in _NO_BUCKET or (status == 404 and not key):
        return missing_registry(store.url)
    if status == 404:
        return missing_blob(store.url, key)
    if status >= 500 or status in (408, 429) or code in _TRANSIENT:
        return RegistryUnavailable(f"{store.url} answered {reason} for {key}", **facts)
    if status in (401, 403):
        return Denied(f"{store.url} refused our credentials for {key} ({reason})", hint=_secrets_hint(store), **facts)
    # The second: the server sent all of an object that is shorter than the range's start.
    if status == 416 or "StartTooLarge" in text:
        return ended_early(store.url, key, 0, 1)
    if status:
        return RegistryError(f"{store.url} answered {reason} for {key}", **facts)
    if any(word in text for word in _UNUSABLE):
        return Denied(f"the credentials for {store.url} have no usable form", hint=_secrets_hint(store), **facts)
    if "non-partial" in text or "NotPartial" in text:
        return RegistryError(f"{store.url} ignores byte ranges: it cannot be a registry", **facts)
    if any(words in text for words in _FOREIGN):
        return RegistryError(
            f"{store.url} gave a response that is not this kind of store's for {key}",
            hint=f"see whether {store.endpoint_setting} names its API, and no console or proxy",
            **facts,
        )
    if "redirect" in text:
        return RegistryError(
            f"{store.url} answers with redirects",
            hint=f"set {store.endpoint_setting} to the server's own URL: https where http is redirected",
            **facts,
        )
    hint = f"see whether {store.endpoint_setting} names the right server" if "dns error" in text else ""
    return RegistryUnavailable(f"{store.url} did not answer for {key}: {_transport(text)}", hint=hint, **facts)


def _without_token(text: str, status: int, store: CloudFacts, key: str) -> RegistryError:
    """An instance without a token service has no credentials; a token service that fails may recover."""
    facts = {"registry": store.url, "blob": key}
    if any(word in text for word in _CLOCK):
        return clock_refused(store.url, key)
    if any(address in text for address in _INSTANCE):
        return Denied(f"there are no credentials for {store.url}", hint=_secrets_hint(store), **facts)
    if 400 <= status < 500 and status not in (408, 429):
        return Denied(
            f"the token service refused our credentials for {store.url} ({status})", hint=_secrets_hint(store), **facts
        )
    return RegistryUnavailable(f"the token service for {store.url} did not answer: {_transport(text)}", **facts)


def _secrets_hint(store: CloudFacts) -> str:
    return f"put {store.secrets} in the setting secrets_dir, and see which rights on the bucket they have"


def _transport(text: str) -> str:
    """The kind of a failure below HTTP; object_store's own sentence is the same for all kinds."""
    kind = _group(_KIND, text).lower() or "the connection failed"
    detail = next((words for words in ("dns error", "tcp connect error", "tls", "certificate") if words in text), "")
    return f"{kind} ({detail})" if detail else kind


def _group(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""
