"""What a name, a role, a host and an address may be. Pure: nothing here knows a file, a key or a socket."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from ..errors import IdentityError

__all__ = ["AUTHORITY", "AUTHORITY_HOST", "ROLES", "check_hosts", "check_name", "check_role", "target"]

ROLES = ("worker", "scientist")  # who may be invited
AUTHORITY = "authority"  # the role of the authority's own server: never invited, never renewed over the wire

# What a newcomer expects to read in the certificate of the authority's server, wherever that is reached. `.invalid`
# is nobody's (RFC 6761, section 6.4) and `check_hosts` refuses it: no worker's certificate can stand in for it.
AUTHORITY_HOST = "ca.housecall.invalid"

MAX_HOSTS = 32
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")  # RFC 1123, section 2.1
_DIGITS = re.compile(r"[0-9]+")
_ADDRESS = re.compile(r"(?:grpcs://)?((?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]{1,253}):([0-9]{1,5}))")


def check_name(name: str) -> str:
    """The name, if it is one. Raises `IdentityError`."""
    if not _NAME.fullmatch(name):
        raise IdentityError(
            f"{name[:80]!r} is no name: it has 1 to 63 letters (a-z, A-Z), digits and '-._', a letter or digit first "
            "and last"
        )
    return name


def check_role(role: str) -> str:
    """The role, if somebody may be invited to it. Raises `IdentityError`."""
    if role not in ROLES:
        raise IdentityError(f"{role[:80]!r} is no role: expected {' or '.join(ROLES)}")
    return role


def check_hosts(hosts: Iterable[str], role: str) -> tuple[str, ...]:
    """Host names in lower case and IP addresses in their shortest form, without repeats. Raises `IdentityError`."""
    found = tuple(dict.fromkeys(_host(host) for host in hosts))
    if len(found) > MAX_HOSTS:
        raise IdentityError(f"{len(found)} hosts for one certificate, at most {MAX_HOSTS}")
    if found and role != "worker":
        raise IdentityError(f"a {role} serves nobody, so its certificate names no host; found {', '.join(found)}")
    return found


def _host(host: str) -> str:
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        labels = host.lower().split(".")
    whole = len(host) <= 253 and all(_LABEL.fullmatch(label) for label in labels)
    if not whole or _DIGITS.fullmatch(labels[-1]) or labels[-1] == "invalid":
        raise IdentityError(
            f"{host[:80]!r} is no host: expected a DNS name without wildcards and port, or an IP address"
        )
    return host.lower()


def target(url: str) -> str:
    """`host:port` of `grpcs://host:port` or `host:port`, the only two forms. Raises `IdentityError`."""
    found = _ADDRESS.fullmatch(url)
    if not found or int(found[2]) > 65535:
        raise IdentityError(f"{url[:80]!r} is no address of an authority: expected HOST:PORT, or grpcs://HOST:PORT")
    return found[1]
