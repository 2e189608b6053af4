"""`OwnerKey`: the key by which an owner's word is known, Ed25519 (RFC 8032), in `owner.key` of the worker's folder.

What must live here: making, keeping and using that key. What must not: what is signed, and what a signature permits.

NOTE [Two files]
`owner.key` is needed to sign, `owner.pub` to verify. A worker that only verifies opens only the second. A signature
says nothing of what its bytes are for, so whoever signs begins them with a purpose that nobody else uses
(`b"housecall policy 1\\0"`): a signature of one kind then never passes for another.
"""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from ..errors import PolicyError
from .files import create, read, replace

__all__ = ["KEY_FILE", "PUBLIC_FILE", "SIGNATURE_BYTES", "OwnerKey", "public_key", "verify"]

KEY_FILE = "owner.key"
PUBLIC_FILE = "owner.pub"
SIGNATURE_BYTES = 64
PUBLIC_BYTES = 32
_FILE_BYTES = 4096  # a key has 119


class OwnerKey:
    """An owner's private key. `public` is the other half: 32 bytes, for anyone."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public = key.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        """The public half; never the key."""
        return f"<OwnerKey {self.public.hex()[:16]}>"

    @classmethod
    def generate(cls) -> OwnerKey:
        """A new key that lies nowhere: for a worker in this process, and for tests."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def create(cls, folder: str | os.PathLike[str]) -> OwnerKey:
        """Make `owner.key` (mode 0600) and `owner.pub` in a worker's folder. Raises `PolicyError` if there is one."""
        made, folder = cls.generate(), Path(folder)
        pem = made._key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            if (folder / PUBLIC_FILE).exists():
                raise FileExistsError
            create(folder / KEY_FILE, pem)
            create(folder / PUBLIC_FILE, f"{made.public.hex()}\n".encode())
        except FileExistsError:
            raise PolicyError(
                f"an owner's key is in {folder} already: without it, what it signed counts no more"
            ) from None
        except OSError as error:
            raise PolicyError(f"no key can be made in {folder}: {error.strerror}") from None
        return made

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> OwnerKey:
        """The key in a worker's folder. Raises `PolicyError` if it is missing, damaged, or others may touch it."""
        path = Path(folder) / KEY_FILE
        try:
            key = serialization.load_pem_private_key(read(path, _FILE_BYTES, private=True), password=None)
        except FileNotFoundError:
            raise PolicyError(f"no {KEY_FILE} in {folder}: only the owner's key can sign") from None
        except (OSError, ValueError, TypeError) as error:
            raise PolicyError(f"{path} holds no key that can be used: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise PolicyError(f"{path} holds a {type(key).__name__}, expected an Ed25519 key")
        return cls(key)._paired(Path(folder))

    def _paired(self, folder: Path) -> OwnerKey:
        """This key, whose public half lies beside it: a crash may have come before that was written."""
        if not (folder / PUBLIC_FILE).exists():
            replace(folder / PUBLIC_FILE, f"{self.public.hex()}\n".encode())
        if public_key(folder) != self.public:
            raise PolicyError(f"{folder / PUBLIC_FILE} is not the public half of {KEY_FILE}: one of them was exchanged")
        return self

    def sign(self, message: bytes) -> bytes:
        """The signature of these bytes, 64 bytes. They begin with their purpose: see NOTE [Two files]."""
        return self._key.sign(message)


def public_key(folder: str | os.PathLike[str]) -> bytes:
    """The public half of the key in a worker's folder. Raises `PolicyError` if it is missing or damaged."""
    path = Path(folder) / PUBLIC_FILE
    try:
        found = bytes.fromhex(read(path, _FILE_BYTES).decode("ascii").strip())
    except FileNotFoundError:
        raise PolicyError(f"no {PUBLIC_FILE} in {folder}: it is made together with {KEY_FILE}") from None
    except (OSError, ValueError) as error:
        raise PolicyError(f"{path} cannot be read: {error}") from None
    if len(found) != PUBLIC_BYTES:
        raise PolicyError(f"{path} holds {len(found)} bytes, expected the {PUBLIC_BYTES} of an Ed25519 public key")
    return found


def verify(public: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the holder of the key whose public half this is signed exactly these bytes. Raises nothing."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True
