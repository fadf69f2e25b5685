"""Where launchers and ranks meet: on one machine behind the loopback interface, else with signed state.

torch's c10d rendezvous unpickles the state that it finds in its store (dynamic_rendezvous.py:444, torch 2.13), and that
store listens on all interfaces without a password: whoever reaches the port can run code in the launcher.
"""

import contextlib
import datetime
import errno
import hashlib
import hmac
import os
import secrets
import socket
import time
from pathlib import Path

import psutil
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousInfo, RendezvousParameters
from torch.distributed.elastic.rendezvous.api import (
    RendezvousConnectionError,
    RendezvousStateError,
    RendezvousStoreInfo,
)
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend, create_backend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import Token, create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from igla_mega.config.errors import ConfigError
from igla_mega.config.files import regular
from igla_mega.distributed.addresses import bindable, towards

LOOPBACK = "127.0.0.1"
SECRET_FILE = ".rendezvous"
"""File in the run folder with the key that signs the state; readable by its owner alone."""
SECRET_VARIABLE = "IGLA_RENDEZVOUS_SECRET"
"""Environment variable with that key, for machines that share no run folder."""
_SECRET_BYTES = 32
_GROUP_PREFIX = "default_pg"
"""Prefix of the keys of the default group (distributed_c10d.py:1897, torch 2.13), where the other ranks look."""
_WAIT_SECONDS = 30
"""Maximum time until another machine's file is visible here; network file systems remember that it was absent."""


class LoopbackRendezvous(RendezvousHandler):
    """Rendezvous of one machine with itself. Its store listens on the loopback interface only."""

    def __init__(self, run_id: str):
        self._run_id, self._port = run_id, 0
        self._store: dist.TCPStore | None = None

    def get_backend(self) -> str:
        """Return the name of this kind of rendezvous."""
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        """True: the ranks connect to this store, so no rank opens another one."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        """Return the store for the next start of the ranks."""
        # A new one each time, as torch expects (rendezvous.py:189): in the old one are the addresses of ranks that have
        # ended, to which the new ones would connect.
        self._store, self._port = loopback_store()
        address = RendezvousStoreInfo(LOOPBACK, self._port)
        return RendezvousInfo(dist.PrefixStore(self._run_id, self._store), 0, 1, address)

    def is_closed(self) -> bool:
        """Return False: there is nobody else who could close it."""
        return False

    def set_closed(self) -> None:
        """Do nothing: see `is_closed`."""

    def num_nodes_waiting(self) -> int:
        """Return 0: no other machine can join."""
        return 0

    def get_run_id(self) -> str:
        """Return the name of the run."""
        return self._run_id

    def shutdown(self) -> bool:
        """Close the store."""
        self._store = None
        return True


def loopback_store() -> tuple[dist.TCPStore, int]:
    """Return a store that listens on the loopback interface only, and its port."""
    return served_store(LOOPBACK, 0, datetime.timedelta(seconds=60))


def served_store(address: str, port: int, timeout: datetime.timedelta) -> tuple[dist.TCPStore, int]:
    """Return a store that listens at one address of this machine only, and its port.

    Args:
        port: 0 to take a free one.

    Raises:
        OSError: the port is in use.
    """
    # TCPStore binds to all interfaces by itself, whatever its host name is.
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        port = listener.getsockname()[1]
        listener.listen()  # a bound port is free to others until then
    except OSError:
        listener.close()
        raise
    store = dist.TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timeout,
        master_listen_fd=listener.detach(),
    )
    return store, port


def join(backend: str, timeout: datetime.timedelta) -> None:
    """Join the default process group as the rank that the launcher's environment variables name."""
    size = os.environ["WORLD_SIZE"]
    is_alone = os.environ.get("LOCAL_WORLD_SIZE") == size
    if is_alone:
        keep_to_loopback()
    store = _store_of_ranks(timeout, is_alone=is_alone)
    rank, world_size = (-1, -1) if store is None else (0, int(size))  # -1: torch reads the environment
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)


def _store_of_ranks(timeout: datetime.timedelta, *, is_alone: bool) -> dist.Store | None:
    """Return the store that rank 0 serves at MASTER_ADDR, on the interface of that address; None to leave it to torch.

    It is left to torch on other ranks, if the launcher serves the store, and if it is unknown which interface to use.
    torch then listens on all of them.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if os.environ["RANK"] != "0" or is_served or not port.isdigit():
        return None
    if (address := bindable(host, is_alone=is_alone)) is None:
        return None
    with contextlib.suppress(OSError):  # torch's error names the port
        return dist.PrefixStore(_GROUP_PREFIX, served_store(address, int(port), timeout)[0])
    return None


def keep_to_loopback() -> None:
    """Make gloo and NCCL of the ranks to come listen on the loopback interface; variables that are set stay."""
    addresses = psutil.net_if_addrs()
    name = next((name for name, given in addresses.items() if any(one.address == LOOPBACK for one in given)), None)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", name)


class _SignedBackend(C10dRendezvousBackend):
    """c10d's backend, except that state without a valid signature never reaches the unpickler."""

    def __init__(self, store: dist.Store, run_id: str, key: bytes):
        self._key_bytes = key
        super().__init__(store, run_id)

    def get_state(self) -> tuple[bytes, Token] | None:
        """Return the state and its token; None if there is none."""
        found = super().get_state()
        return None if found is None else (self._verified(found[0]), found[1])

    def set_state(self, state: bytes, token: Token | None = None) -> tuple[bytes, Token, bool] | None:
        """Replace the state that `token` belongs to; return what is stored now, and True if that is `state`."""
        if token is not None and not isinstance(token, bytes):  # no valid token: c10d would only read
            found = self.get_state()
            return None if found is None else (*found, False)
        outcome = super().set_state(self._signature(state) + state, token)
        return None if outcome is None else (self._verified(outcome[0]), outcome[1], outcome[2])

    def _signature(self, state: bytes) -> bytes:
        return hmac.digest(self._key_bytes, state, hashlib.sha256)

    def _verified(self, signed: bytes) -> bytes:
        signature, state = signed[: hashlib.sha256().digest_size], signed[hashlib.sha256().digest_size :]
        if not hmac.compare_digest(signature, self._signature(state)):
            raise RendezvousStateError(
                "the state in the store is not signed with the key of this run. Another run uses the same port, or "
                "somebody has written to it."
            )
        return state


def open_rendezvous(parameters: RendezvousParameters, run_dir: Path) -> RendezvousHandler:
    """Return the rendezvous of several machines, whose state is signed with a key that they share.

    Args:
        run_dir: folder that all machines share; it keeps the key.

    Raises:
        ConfigError: the key cannot be read or written there.
    """
    key = shared_key(run_dir)
    # The run id names the state in the store: part of the key in it keeps runs of one name apart.
    parameters.run_id += "-" + hashlib.sha256(key).hexdigest()[:16]
    store = _rendezvous_store(parameters)
    return create_handler(store, _SignedBackend(store, parameters.run_id, key), parameters)


def _rendezvous_store(parameters: RendezvousParameters) -> dist.Store:
    """Return the store at which the launchers meet; the launcher at its address serves it, at that address only."""
    host, port = parse_rendezvous_endpoint(parameters.endpoint, default_port=29400)
    # The ranks meet at this address too, if rank 0 is here (`RendezvousStoreInfo.build`).
    parameters.local_addr = parameters.local_addr or towards(host)
    if (address := bindable(host)) is not None:
        try:
            return served_store(address, port, datetime.timedelta(seconds=60))[0]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise RendezvousConnectionError(str(error)) from error
            parameters.config["is_host"] = "False"  # another launcher on this machine serves it
    return create_backend(parameters)[1]


def shared_key(run_dir: Path) -> bytes:
    """Return the key that the machines of a run share, made by the first one.

    Raises:
        ConfigError: it cannot be read or written.
    """
    if given := os.environ.get(SECRET_VARIABLE):
        return given.encode()
    file = run_dir / SECRET_FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = run_dir / f"{SECRET_FILE}.{secrets.token_hex(8)}"
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "wb") as stream:
            stream.write(secrets.token_bytes(_SECRET_BYTES))
            stream.flush()
            os.fsync(stream.fileno())  # an empty key, as a power cut would leave it, signs for everybody
        try:
            os.link(temporary, file)  # fails if another machine was first, and is never half written
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        key = _read_key(file)
    except OSError as error:
        raise ConfigError(
            f"{file}: the key that the machines share cannot be read or written ({error.strerror}).\n"
            f"  Give a --run folder that all machines share, or set {SECRET_VARIABLE} to the same value on each."
        ) from None
    if len(key) != _SECRET_BYTES:
        raise ConfigError(
            f"{file}: has {len(key)} bytes, and a key has {_SECRET_BYTES}.\n  Remove it: the next start makes another."
        )
    return key


def _read_key(file: Path) -> bytes:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            with open(regular(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
                return stream.read(_SECRET_BYTES)
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
