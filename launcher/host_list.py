"""`--hosts`: the hosts of a deployment, as a list on the command line or as a file in the dialect of Open MPI, MPICH
or Intel MPI. Used by the settings, `serve` and `doctor`; it asks nobody and resolves no name."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.errors import SettingsError

_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
"""Of Open MPI's files; those that last to the end of the line begin with # or //."""
_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
_HOST = re.compile(
    rf"(?:(?P<user>[^\s@:=\[\]]+)@)?(?:\[(?P<address>[^\]\s]+)\]|(?P<name>{_NAME}))(?::(?P<count>\d+))?"
)
_KEYS = {
    **dict.fromkeys(("slots", "cpu", "count"), "slots"),
    **{f"{word}{mark}max": "max_slots" for word in ("slots", "cpu", "count") for mark in "-_"},
    **{f"max{mark}{word}": "max_slots" for word in ("slots", "cpu", "count") for mark in "-_"},
    **dict.fromkeys(("user", "username", "user-name", "user_name"), "user"),
    "port": "port",
    "binding": "binding",
}
"""What may follow a host, by what it means; slots first, Open MPI has three words for them."""
_LOOKS_LIKE_A_FILE = re.compile(r"/|\.(?:txt|hosts?|hostfile|machines?|cfg|conf|list)$")


@dataclass(frozen=True)
class Host:
    """A machine, and how many ranks of a world it may hold."""

    name: str
    """A name or an address; IPv6 without brackets."""
    slots: int
    user: str = ""
    """Who logs in there; empty: the same user as here."""
    port: int | None = None
    """Of its sshd, where it is not ssh's own choice."""
    binding: str = ""
    """MPICH's `binding=`, as it stands in the file."""


def parse_hosts(text: str) -> tuple[Host, ...]:
    """`host:slots,host:slots`, or the path of a file with a host a line: `host slots=N max_slots=M`, as Open MPI has
    it, or `host:N`, as MPICH and Intel MPI do, with their comments, `user=`, `port=` and `binding=`. Without a number
    one slot, or as many as max_slots. A host that comes again adds its slots. Raises SettingsError."""
    path = Path(text).expanduser()
    if text and path.is_file():
        entries = _entries_of(path)
    elif _LOOKS_LIKE_A_FILE.search(text) and "," not in text:
        raise SettingsError(
            f"--hosts {text}: there is no such file; give one, or write host:slots,host:slots"
        )
    else:
        entries = (("--hosts", entry) for entry in text.split(","))
    hosts: dict[str, Host] = {}
    for where, entry in entries:
        if entry.strip():
            host = _parse(entry.strip(), where)
            if (earlier := hosts.get(host.name)) is not None:
                host = _join(earlier, host, where)
            hosts[host.name] = host
    if text and not hosts:
        raise SettingsError(f"--hosts {text}: names no host")
    return tuple(hosts.values())


def _entries_of(path: Path) -> Iterator[tuple[str, str]]:
    """The lines, without comments, each with where it stands."""
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text"
        raise SettingsError(f"--hosts {path}: cannot be read ({reason})") from None
    text = _COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text)
    for number, line in enumerate(text.splitlines(), 1):
        yield f"--hosts {path}, line {number}", re.split(r"#|//", line, maxsplit=1)[0]


def _parse(entry: str, where: str) -> Host:
    first, *rest = re.sub(r"\s*=\s*", "=", entry).split()
    if first[0] in "^+":
        raise SettingsError(
            f"{where}: {first!r} names no host by itself; write the names of the hosts to use"
        )
    user, name, count = _parse_first(first, where)
    given: dict[str, str] = {}
    for token in rest:
        key, separator, value = token.partition("=")
        meaning = _KEYS.get(key.lower())
        if meaning is None or not separator or not value:
            raise SettingsError(
                f"{where}: cannot read {token!r}; after a host there may be slots=N, max_slots=N, user=NAME, port=N "
                "and binding=WHERE"
            )
        if meaning in given:
            raise SettingsError(f"{where}: {key} is given twice")
        given[meaning] = value.strip('"')
    numbers = {key: _number(given[key], key, where) for key in ("slots", "max_slots", "port") if key in given}
    if count is not None and "slots" in numbers:
        raise SettingsError(f"{where}: {first!r} has its number of slots already; leave out slots=")
    slots = int(count) if count is not None else numbers.get("slots", numbers.get("max_slots", 1))
    if slots < 1:
        raise SettingsError(f"{where}: {name} has no slot; give it one or more, or leave it out")
    if slots > numbers.get("max_slots", slots):
        raise SettingsError(f"{where}: {name} has more slots than max_slots; the one bounds the other")
    user = given.get("user", user)
    return Host(name, slots, user, numbers.get("port"), given.get("binding", ""))


def _parse_first(first: str, where: str) -> tuple[str, str, str | None]:
    """User, name or address, and the number behind it."""
    user, at, address = first.rpartition("@")
    if _is_ipv6(address):  # without brackets, as in Open MPI's files: nothing can follow it
        return user if at else "", address, None
    match = _HOST.fullmatch(first)
    if match is None or (match["address"] is not None and not _is_ipv6(match["address"])):
        raise SettingsError(
            f"{where}: cannot read {first!r}; write host:slots,host:slots or give a file with a `host slots=N` or "
            "`host:N` line for each host (an IPv6 address in brackets)"
        )
    return match["user"] or "", match["address"] or match["name"], match["count"]


def _is_ipv6(text: str) -> bool:
    try:
        return bool(ipaddress.IPv6Address(text))
    except ValueError:
        return False


def _number(text: str, key: str, where: str) -> int:
    if not text.isdecimal():
        raise SettingsError(f"{where}: {key}={text} must be a whole number")
    return int(text)


def _join(earlier: Host, host: Host, where: str) -> Host:
    """The same host again: Open MPI's files name it once for each slot."""
    told = {}
    for key in ("user", "port", "binding"):
        one, other = getattr(earlier, key), getattr(host, key)
        if one and other and one != other:
            raise SettingsError(
                f"{where}: {host.name} has {key}={one} and {key}={other}; leave out one of them"
            )
        told[key] = one or other
    return Host(host.name, earlier.slots + host.slots, **told)
