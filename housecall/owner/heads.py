"""`Head`: a signed statement of where a ledger ends, small enough to keep and enough to hold its owner to it.

What must live here: what a head and a countersignature say, how both are signed and checked, and the ledger's own key.
What must not: entries, and where they lie.

NOTE [Why a key of its own]
The worker's identity changes its key at every renewal, and the owner's key, which permits, should not lie in a process
that serves strangers. So a ledger has an Ed25519 key (RFC 8032) that does nothing else, made once, never exchanged.

NOTE [What a head proves]
Whoever holds the ledger's key can write another history, and whoever can write its folder can put all of it back to an
older state. Neither can make a head that somebody else kept fit: a ledger that does not contain it, unchanged and in
its place, fails `verify(extends=head)`. A countersigned head shows the same to third parties: its signer saw it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Meta

from ..errors import LedgerError
from .files import create, read

__all__ = ["Countersigned", "Head", "Signer", "countersign"]

_HEAD = b"housecall ledger head 1\0"
_COUNTERSIGNATURE = b"housecall ledger countersignature 1\0"
_KEY_BYTES = 4096  # a key's file has 119
MAX_TEXT = 16 << 10  # of a head or a countersigned one, as text: common ones have 400 and 800

Hex32 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
Hex64 = Annotated[str, Meta(pattern=r"\A[0-9a-f]{128}\Z")]
# Hexadecimal, not base64: that has several texts for one value, and a changed text must be found.
Hex = Annotated[str, Meta(pattern=r"\A([0-9a-f]{2})+\Z", max_length=1024)]
Time = Annotated[datetime, Meta(tz=True)]


@dataclass(frozen=True, repr=False)
class Signer:
    """Whoever signs a ledger: `public`, the 32 bytes of an Ed25519 public key, and what signs with its other half."""

    public: bytes
    sign: Callable[[bytes], bytes]

    def __repr__(self) -> str:
        """The public half."""
        return f"<Signer {self.public.hex()[:16]}>"

    @classmethod
    def generate(cls) -> Signer:
        """A new key that lies nowhere: for a ledger in memory."""
        return _signer(Ed25519PrivateKey.generate())

    @classmethod
    def create(cls, path: Path) -> Signer:
        """Make a key file, mode 0600. Raises `LedgerError` if there is one, or it cannot be written."""
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            create(path, pem)
        except OSError as error:
            raise LedgerError(f"the ledger's key cannot be made in {path}: {error.strerror}") from None
        return _signer(key)

    @classmethod
    def load(cls, path: Path) -> Signer:
        """The key in a file. Raises `LedgerError` if it is damaged, unreadable, or others may touch it, and
        `FileNotFoundError` if there is none."""
        try:
            key = serialization.load_pem_private_key(read(path, _KEY_BYTES, private=True), password=None)
        except FileNotFoundError:
            raise
        except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise LedgerError(f"{path} holds no key that can be used: {error}") from None
        if not isinstance(key, Ed25519PrivateKey):
            raise LedgerError(f"{path} holds a {type(key).__name__}, expected an Ed25519 key")
        return _signer(key)


def _signer(key: Ed25519PrivateKey) -> Signer:
    return Signer(key.public_key().public_bytes_raw(), key.sign)


class Head(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="head", tag_field="kind"):
    """Where a ledger ended: the last entry's `sequence`, the SHA-256 of what it says, `hash`, and its `time`; signed by
    the ledger's `key`. Entry 0 is the ledger before anything was written. Bytes are hexadecimal."""

    sequence: Annotated[int, Meta(ge=0)]
    hash: Hex32
    time: Time
    key: Hex32
    signature: Hex64

    def signed_by(self, public: bytes) -> bool:
        """Whether that key, and none other, signed exactly this."""
        if self.key != public.hex():
            return False
        return signed(public, self.sequence, self.hash, self.time, bytes.fromhex(self.signature))

    def text(self) -> str:
        """As one line of JSON, to keep or to hand over."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str | bytes, source: str = "the head") -> Head:
        """The head in such a line; also the one within a countersigned head. Raises `LedgerError`; `source` is named.

        The signature is not checked: against which key, only the caller knows."""
        found: Head | Countersigned = _parse(text, Head | Countersigned, source)
        return found.head if isinstance(found, Countersigned) else found


class Countersigned(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="countersigned", tag_field="kind"):
    """A head that somebody else saw and signed as well: `by` says who, `time` when, as they say themselves. `key` is
    their public key (SubjectPublicKeyInfo in DER form), Ed25519 or P-256. Bytes are hexadecimal.

    Whether that key is theirs, a certificate must say: nothing here knows."""

    head: Head
    by: Annotated[str, Meta(min_length=1, max_length=200)]
    time: Time
    key: Hex
    signature: Hex

    def is_signed(self) -> bool:
        """Whether the holder of `key` signed exactly this."""
        try:
            key = serialization.load_der_public_key(bytes.fromhex(self.key))
            signature = bytes.fromhex(self.signature)
            if isinstance(key, Ed25519PublicKey):
                key.verify(signature, _seen(self.head, self.by, self.time))
            elif isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
                key.verify(signature, _seen(self.head, self.by, self.time), ec.ECDSA(hashes.SHA256()))
            else:
                return False
        except (InvalidSignature, UnsupportedAlgorithm, ValueError, TypeError):
            return False
        return True

    def text(self) -> str:
        """As one line of JSON, to hand back to the owner."""
        return msgspec.json.encode(self).decode()

    @classmethod
    def parse(cls, text: str | bytes, source: str = "the countersigned head") -> Countersigned:
        """The countersigned head in such a line, its countersignature checked. Raises `LedgerError`."""
        found: Countersigned = _parse(text, Countersigned, source)
        if not found.is_signed():
            raise LedgerError(f"{source}: the countersignature of {found.by!r} is not of this head and key")
        return found


def countersign(
    head: Head, by: str, public: bytes, sign: Callable[[bytes], bytes], clock: Callable[[], datetime]
) -> Countersigned:
    """Sign a head that one saw. `public` is the signer's key, SubjectPublicKeyInfo in DER form; `sign` is Ed25519's, or
    ECDSA's with P-256 and SHA-256. Raises `LedgerError` if the ledger's own signature is wrong, or the signer's is."""
    if not head.signed_by(bytes.fromhex(head.key)):
        raise LedgerError(f"the head of entry {head.sequence} is not signed by the key that it names: do not sign it")
    time = clock().astimezone(UTC)
    signature = sign(_seen(head, by, time)).hex()
    made = Countersigned(head, by, time, public.hex(), signature)
    return Countersigned.parse(made.text())


def statement(sequence: int, digest: str, time: datetime) -> bytes:
    """The bytes that a head's signature is of: its purpose, then what it says."""
    return _HEAD + msgspec.json.encode((sequence, digest, time))


def signed(public: bytes, sequence: int, digest: str, time: datetime, signature: bytes) -> bool:
    """Whether that key signed the head that says so. Raises nothing."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, statement(sequence, digest, time))
    except (InvalidSignature, ValueError):
        return False
    return True


def read_text(path: str | os.PathLike[str]) -> bytes:
    """A file with a head. Raises `LedgerError` if it cannot be read or is no such file."""
    try:
        return read(Path(path), MAX_TEXT)
    except (OSError, ValueError) as error:
        raise LedgerError(f"{path} cannot be read: {error}") from None


def _seen(head: Head, by: str, time: datetime) -> bytes:
    return _COUNTERSIGNATURE + msgspec.json.encode((head, by, time))


def _parse(text: str | bytes, kind: Any, source: str) -> Any:
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    if len(data) > MAX_TEXT:
        raise LedgerError(f"{source} has {len(data):,} bytes, expected {MAX_TEXT:,} at most")
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise LedgerError(f"{source} is none: {error}") from None
