"""JSON web tokens of callers: signature, issuer, audience and times, and roles from their claims.

Sources: RFC 7519; RFC 8725 (best current practices), with section numbers at the decisions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from joserfc import jwt
from joserfc.errors import ClaimError, ExpiredTokenError, JoseError, UnsupportedAlgorithmError
from joserfc.jws import JWSRegistry, extract_compact

from isthmus.errors import CallerUnauthenticated
from isthmus.security.callers import Caller, grants
from isthmus.security.key_sets import IssuerKeys, key_set_source
from isthmus.settings import AccessSettings

# RFC 8725, 3.1: the verifier chooses, never the token. Symmetric algorithms and `none` are not among these.
ALGORITHMS = ("RS256", "ES256", "EdDSA", "Ed25519")
TOKEN_LABEL = "token"  # noqa: S105
_MAX_NAME = 128
_MAX_MODELS = 256


class _Algorithms(JWSRegistry):
    """The algorithms; the library's own registry warns of the name EdDSA, still in use by issuers (RFC 9864)."""

    max_header_length = 4096  # some issuers add the chain of their certificates

    def __init__(self) -> None:
        # RFC 7515, 4: parameters that are not understood are ignored, but critical ones.
        super().__init__(algorithms=ALGORITHMS, strict_check_header=False)

    def get_alg(self, name: str) -> Any:
        """See `JWSRegistry.get_alg`."""
        if name not in ALGORITHMS or name not in self.algorithms:
            raise UnsupportedAlgorithmError(name)
        return self.algorithms[name]


_REGISTRY = _Algorithms()


class TokenVerifier:
    """Verifies the tokens of an issuer; thread-safe."""

    def __init__(self, settings: AccessSettings, keys: IssuerKeys, clock: Callable[[], float] = time.time) -> None:
        self._settings, self._keys, self._clock = settings, keys, clock
        self._claims = jwt.JWTClaimsRegistry(
            now=lambda: int(clock()),
            leeway=int(settings.jwt_clock_skew_s),
            iss={"essential": True, "value": settings.jwt_issuer},
            aud={"essential": True, "value": settings.jwt_audience},
            exp={"essential": True},
        )

    def verify(self, token: str) -> Caller:
        """The caller of a token.

        Raises:
            CallerUnauthenticated: with the reason; the token is never quoted.
            IssuerUnavailable: the issuer's keys cannot be had.
        """
        algorithm, key_id = _header(token)
        # RFC 9864 renamed the algorithm; keys are the same.
        if (key := self._keys.find("EdDSA" if algorithm == "Ed25519" else algorithm, key_id)) is None:
            raise _refused("signature", f"the issuer has no key of the token's id for {algorithm}")
        try:
            claims = jwt.decode(token, key, registry=_REGISTRY).claims
        except (JoseError, ValueError, TypeError, RecursionError):
            raise _refused("signature", "its signature is not the issuer's") from None
        self._check(claims)
        return self._caller(claims)

    def _check(self, claims: Mapping[str, Any]) -> None:
        try:
            self._claims.validate(dict(claims))
        except ExpiredTokenError:
            raise _refused("expired", "it has expired", hint=self._clock_hint(claims.get("exp"))) from None
        except ClaimError as e:
            claim = str(e.claim)
            if claim in ("nbf", "iat"):
                hint = self._clock_hint(claims.get(claim))
                raise _refused("not_yet", "it is of the future", hint=hint) from None
            reason = {"iss": "issuer", "aud": "audience"}.get(claim, "claims")
            raise _refused(reason, f"its claim {claim} is missing, or not what this function takes") from None
        except (JoseError, ValueError, TypeError, OverflowError):
            raise _refused("claims", "its claims cannot be read") from None

    def _clock_hint(self, moment: Any) -> str:
        if isinstance(moment, bool) or not isinstance(moment, int | float):
            return ""
        off_s = moment - self._clock()
        return f"the token says {abs(off_s):.0f} s {'ago' if off_s < 0 else 'from now'} by this machine's clock"

    def _caller(self, claims: Mapping[str, Any]) -> Caller:
        settings = self._settings
        subject = _claim(claims, settings.jwt_caller_claim)
        if not isinstance(subject, str) or not subject:
            raise _refused("claims", f"its claim {settings.jwt_caller_claim} names nobody")
        # A colon is in no name of a key: a token's subject cannot pass for a key's name.
        name = "jwt:" + "".join(c if c.isprintable() and c.isascii() else "?" for c in subject)[:_MAX_NAME]
        models = frozenset[str]()
        if settings.jwt_models_claim:
            models = _words(_claim(claims, settings.jwt_models_claim))
            if not models or len(models) > _MAX_MODELS:
                raise _refused("claims", f"its claim {settings.jwt_models_claim} names no model, or too many")
        return Caller(name, TOKEN_LABEL, grants(_words(_claim(claims, settings.jwt_roles_claim)), models))


def open_tokens(settings: AccessSettings) -> TokenVerifier:
    """The verifier that the settings describe; its keys are read with the first token.

    Raises:
        SettingsError: `jwt_keys` is neither a path nor a URL that is safe.
    """
    keys = IssuerKeys(
        key_set_source(settings.jwt_keys),
        refresh_s=settings.jwt_keys_refresh_s,
        max_age_s=settings.jwt_keys_max_age_s,
    )
    return TokenVerifier(settings, keys)


def _header(token: str) -> tuple[str, str]:
    """A token's algorithm and key id, unverified.

    Raises:
        CallerUnauthenticated: no token, an algorithm that is not taken, or a header that demands more.
    """
    try:
        header = extract_compact(token.encode("ascii"), registry=_REGISTRY).headers()
    except (JoseError, ValueError, TypeError, RecursionError):
        raise _refused("malformed", "it is no signed JSON web token") from None
    algorithm, key_id = header.get("alg"), header.get("kid", "")
    if algorithm not in ALGORITHMS:
        raise _refused("algorithm", f"its algorithm is not among {', '.join(ALGORITHMS)}")
    # RFC 7515, 4.1.11: whoever does not understand an extension refuses. RFC 8725, 3.11: no keys from the token.
    if "crit" in header or not isinstance(key_id, str):
        raise _refused("malformed", "its header asks for what this function does not know")
    return algorithm, key_id[:256]


def _claim(claims: Mapping[str, Any], path: str) -> Any:
    """A claim by its name, or by its place in objects where no claim has the whole name; None where there is none."""
    if path in claims:  # names of claims may be URLs, with dots
        return claims[path]
    value: Any = claims
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _words(value: Any) -> frozenset[str]:
    """The texts of a list, or of a text with spaces; of anything else none."""
    words = value.split() if isinstance(value, str) else value if isinstance(value, list) else ()
    return frozenset(word for word in words if isinstance(word, str))


def _refused(reason: str, text: str, hint: str = "") -> CallerUnauthenticated:
    return CallerUnauthenticated(f"the token is refused: {text}", reason=reason, hint=hint)
