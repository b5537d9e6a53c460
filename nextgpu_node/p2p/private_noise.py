"""Noise with a pre-shared key, for private networks.

    Noise_XXpsk0_25519_ChaChaPoly_SHA256        Noise specification, section 9

The key is mixed in before the first message (psk0), whose tag then already fails for an outsider:
the listener has shown neither its identity nor its Noise key by then, and takes nothing else from
him.  libp2p's own private networks (its XOR of a Salsa20 stream) authenticate nothing, and 0.8.1
speaks a variant of them that other implementations do not.
"""

from __future__ import annotations

from typing import Any, Final

from libp2p.crypto.keys import KeyPair, PrivateKey
from libp2p.custom_types import TProtocol
from libp2p.security.noise.patterns import IPattern, PatternXX
from libp2p.security.noise.transport import Transport

PROTOCOL_ID: Final = TProtocol("/nextgpu/noise-psk/1")
_PROTOCOL_NAME: Final = b"Noise_XXpsk0_25519_ChaChaPoly_SHA256"


class _PrivatePattern(PatternXX):  # type: ignore[misc]
    def __init__(self, psk: bytes, *args: Any) -> None:
        super().__init__(*args)
        self.protocol_name = _PROTOCOL_NAME
        self._psk = psk

    def create_noise_state(self, prologue: bytes | None = None) -> Any:
        state = super().create_noise_state(prologue)
        state.set_psks(psk=self._psk)
        return state


class PrivateNoise(Transport):  # type: ignore[misc]
    """libp2p's Noise transport for those who hold `psk`, 32 bytes."""

    def __init__(self, keys: KeyPair, noise_privkey: PrivateKey, psk: bytes) -> None:
        super().__init__(keys, noise_privkey=noise_privkey)
        self._psk = psk

    def get_pattern(self) -> IPattern:
        return _PrivatePattern(
            self._psk, self.local_peer, self.libp2p_privkey, self.noise_privkey, self.early_data
        )
