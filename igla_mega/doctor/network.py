"""Name what a run of several machines opens to the network, and where that is more than necessary."""

import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence

from igla_mega.distributed.addresses import bindable, own_addresses

Interfaces = Mapping[str, Sequence[str]]
"""Addresses of each interface that is up."""
_VARIABLES = {"GLOO_SOCKET_IFNAME": "gloo", "NCCL_SOCKET_IFNAME": "NCCL"}
_OF_ONE_MACHINE = ("lo", "docker")
"""Interfaces that NCCL leaves out by default (`^docker,lo`)."""


def exposure(environment: Mapping[str, str] = os.environ, interfaces: Interfaces | None = None) -> list[str]:
    """Return a sentence for each way in which a run is open to more than its own machines.

    Under a launcher of one machine there is none: its ports are on the loopback interface. Without a launcher the
    sentences are about a run of several machines that this one would take part in.

    Args:
        environment: environment variables of the run.
        interfaces: interfaces of this machine; None: as they are.
    """
    if environment.get("WORLD_SIZE", "") == environment.get("LOCAL_WORLD_SIZE", "none"):
        return []
    found = own_addresses() if interfaces is None else interfaces
    outside = {name: own for name, own in found.items() if not name.startswith(_OF_ONE_MACHINE) and _reachable(own)}
    sentences = [*_master(environment)]
    for variable, library in _VARIABLES.items():
        named = [one.lstrip("=") for one in environment.get(variable, "").split(",") if one]
        if not named or named[0].startswith("^"):
            sentences += _unnamed(variable, library, outside)
            continue
        if not any(name.startswith(one.partition(":")[0]) for one in named for name in found):
            sentences.append(
                f"{variable}: no interface {' or '.join(named)} is up here; {', '.join(found)} are. Name one of them."
            )
        sentences += _public(library, {name: own for name, own in found.items() if name.startswith(tuple(named))})
    return list(dict.fromkeys(sentences))


def _master(environment: Mapping[str, str]) -> list[str]:
    """Return the sentences about the store at MASTER_ADDR, which rank 0 serves."""
    host = environment.get("MASTER_ADDR")
    if not host or environment.get("RANK", "0") != "0":
        return []
    address = bindable(host)
    if address is None:
        return [
            f"MASTER_ADDR: {host} is no address of an interface of this machine, so the store of the ranks listens on "
            "all interfaces. Set it to this machine's address in the network of the run."
        ]
    if _is_public(address):
        return [
            f"MASTER_ADDR: {address} is a public address, and the store of the ranks takes connections from anywhere. "
            "Use an address of a private network, or close the port to other machines."
        ]
    return []


def _unnamed(variable: str, library: str, outside: Interfaces) -> list[str]:
    """Return the sentences if a library chooses its interface by itself."""
    sentences = _public(library, outside)
    if len(outside) > 1:
        chosen = (
            f"the address of the host name {socket.gethostname()}"
            if library == "gloo"
            else "InfiniBand, else any of them"
        )
        sentences.append(
            f"{variable}: not set, and {', '.join(outside)} are up, so {library} listens on an interface of its choice "
            f"({chosen}). Set it to the interface of the network between the ranks."
        )
    return sentences


def _public(library: str, interfaces: Interfaces) -> list[str]:
    """Return a sentence for each public address at which a library may listen."""
    return [
        f"{name}: {address} is a public address, and {library} may listen there without a password. Keep its ports "
        "closed to other machines, or name another interface."
        for name, addresses in interfaces.items()
        for address in addresses
        if _is_public(address)
    ]


def _reachable(addresses: Sequence[str]) -> bool:
    """Return True if other machines may reach one of the addresses."""
    return any(not (one.is_loopback or one.is_link_local) for one in map(ipaddress.ip_address, addresses))


def _is_public(address: str) -> bool:
    return ipaddress.ip_address(address).is_global
