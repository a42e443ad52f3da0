"""The network interface of this host that `--interface` names. Used by `serve`; it sends nothing."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from dataclasses import dataclass

from launcher.errors import SettingsError

_SIOCGIFADDR = 0x8915
"""netdevice(7): the IPv4 address of an interface."""


@dataclass(frozen=True)
class Interface:
    """Over which hosts reach each other."""

    given: str
    """As the user named it: an interface, or a network like 10.0.0.0/8, which may be another interface elsewhere."""
    name: str
    """Of this host."""
    address: str
    """IPv4, of this host."""


def find_interface(given: str) -> Interface:
    """Raises SettingsError that names those that are there."""
    found = {}
    for _, name in socket.if_nameindex():
        if (address := _address(name)) is not None:
            found[name] = address
    there = ", ".join(f"{name} {address}" for name, address in found.items())
    if "/" in given:
        try:
            network = ipaddress.IPv4Network(given, strict=False)
        except ValueError:
            raise SettingsError(f"--interface {given}: write a network like 10.0.0.0/8") from None
        for name, address in found.items():
            if ipaddress.IPv4Address(address) in network:
                return Interface(given, name, address)
        raise SettingsError(f"--interface {given}: this host has no address in it; it has {there}")
    if given not in found:
        raise SettingsError(
            f"--interface {given}: this host has no such interface with an address; it has {there}"
        )
    return Interface(given, given, found[given])


def _address(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        try:
            answer = fcntl.ioctl(asked, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:  # it has none
            return None
    return socket.inet_ntoa(answer[20:24])
