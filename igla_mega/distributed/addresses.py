"""Find the address of this machine at which the other machines of a run reach it. No torch."""

import contextlib
import ipaddress
import socket

import psutil


def own_addresses() -> dict[str, list[str]]:
    """Return the addresses of each interface of this machine that is up, loopback included."""
    states = psutil.net_if_stats()
    found: dict[str, list[str]] = {}
    for name, entries in psutil.net_if_addrs().items():
        if name in states and states[name].isup:
            internet = [one for one in entries if one.family in (socket.AF_INET, socket.AF_INET6)]
            found[name] = [one.address.partition("%")[0] for one in internet]
    return {name: addresses for name, addresses in found.items() if addresses}


def bindable(host: str, *, is_alone: bool = False) -> str | None:
    """Return the address of `host` that belongs to this machine, or None if none is known to be the right one.

    A name for the loopback interface gives None: /etc/hosts of many machines maps their own name to 127.0.1.1, and a
    Kubeflow master gets `localhost`, though other machines have to reach it.

    Args:
        is_alone: True if no other machine takes part, so that a loopback address is right.
    """
    mine = {address for addresses in own_addresses().values() for address in addresses}
    for address in _resolved(host):
        if ipaddress.ip_address(address).is_loopback:
            if is_alone or address == host:
                return address
        elif address in mine:
            return address
    return None


def towards(host: str) -> str | None:
    """Return the address of this machine from which it reaches `host`; None if `host` is a name of this machine alone.

    Nothing is sent.
    """
    for address in _resolved(host):
        if ipaddress.ip_address(address).is_loopback and address != host:
            continue
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return str(probe.getsockname()[0])
    return None


def _resolved(host: str) -> list[str]:
    """Return the addresses of a name, or of an address itself; empty if it is not known."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return []
    return list(dict.fromkeys(str(entry[4][0]).partition("%")[0] for entry in found))
