"""Keys of an issuer of JSON web tokens, made once for all tests of a process, and tokens signed with them."""

from __future__ import annotations

from typing import Any

from joserfc.jwk import ECKey, OKPKey, RSAKey
from joserfc.jws import JWSRegistry

RSA = RSAKey.generate_key(2048, {"kid": "rsa"}, private=True)
EC = ECKey.generate_key("P-256", {"kid": "ec"}, private=True)
ED = OKPKey.generate_key("Ed25519", {"kid": "ed"}, private=True)


class AnyAlgorithm(JWSRegistry):
    """Signs by any algorithm, without the warning of EdDSA's new name."""

    def get_alg(self, name: str) -> Any:
        return self.algorithms[name]
