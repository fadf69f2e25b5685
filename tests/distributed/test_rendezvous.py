import base64
import datetime
import os
import pickle
import shutil
import socket
import stat
import subprocess
import sys

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.api import RendezvousStateError

from igla_mega.config.errors import ConfigError
from igla_mega.distributed import addresses, rendezvous
from igla_mega.distributed.rendezvous import (
    LoopbackRendezvous,
    loopback_store,
    open_rendezvous,
    served_store,
    shared_key,
)


def listening_addresses(port: int) -> set[str]:
    """Local addresses, in hexadecimal, of this machine's listening sockets of a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as lines:
            for line in list(lines)[1:]:
                address, number = line.split()[1].split(":")
                if int(number, 16) == port and line.split()[3] == "0A":
                    found.add(address)
    return found


def test_the_store_of_one_machine_listens_on_the_loopback_interface_only():
    store, port = loopback_store()
    store.set("key", "value")
    assert listening_addresses(port) == {"0100007F"}  # 127.0.0.1
    assert store.get("key") == b"value"


def test_a_machine_meets_itself_and_ranks_that_start_again_find_nothing_of_the_ones_before():
    handler = LoopbackRendezvous("run")
    first, second = handler.next_rendezvous(), handler.next_rendezvous()
    assert (first.rank, first.world_size) == (second.rank, second.world_size) == (0, 1)
    assert first.bootstrap_store_info.master_addr == second.bootstrap_store_info.master_addr == "127.0.0.1"
    first.store.set("address of rank 0", "gone")
    assert not second.store.check(["address of rank 0"])
    assert handler.num_nodes_waiting() == 0 and handler.shutdown()


LIMIT = datetime.timedelta(seconds=60)


def test_rank_0_serves_the_store_of_the_ranks_at_the_master_address_only(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": "0", "WORLD_SIZE": "2"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    store = rendezvous._store_of_ranks(LIMIT, is_alone=False)
    assert listening_addresses(port) == {"0100007F"}
    # Other ranks find it as torch looks for it.
    theirs = rendezvous.dist.PrefixStore("default_pg", rendezvous.dist.TCPStore("127.0.0.1", port, is_master=False))
    store.set("key", "value")
    assert theirs.get("key") == b"value"
    for name, value in (("RANK", "1"), ("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_ADDR", "no-such-host.")):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert rendezvous._store_of_ranks(LIMIT, is_alone=False) is None


def test_a_second_launcher_on_a_machine_uses_the_store_of_the_first(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    first, second = (rendezvous._rendezvous_store(RendezvousParameters("c10d", address, "run", 1, 2)) for _ in range(2))
    first.set("key", "value")
    assert second.get("key") == b"value"


@pytest.mark.parametrize(
    ("host", "resolved", "alone", "address"),
    [
        ("10.0.0.7", ["10.0.0.7"], False, "10.0.0.7"),
        ("node7", ["192.0.2.1", "fd00::7"], False, "fd00::7"),
        ("127.0.0.1", ["127.0.0.1"], False, "127.0.0.1"),
        ("node7", ["127.0.1.1"], False, None),
        ("localhost", ["::1", "127.0.0.1"], False, None),
        ("localhost", ["::1", "127.0.0.1"], True, "::1"),
        ("gateway", ["192.0.2.1"], False, None),
        ("unknown", [], False, None),
    ],
)
def test_only_an_address_that_other_machines_use_is_bound(monkeypatch, host, resolved, alone, address):
    mine = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.7", "fd00::7"]}
    monkeypatch.setattr(addresses, "own_addresses", lambda: mine)
    monkeypatch.setattr(addresses, "_resolved", lambda host: resolved)
    assert addresses.bindable(host, is_alone=alone) == address


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="makes a network namespace: needs root and iproute2"
)
def test_another_machine_reaches_a_run_at_the_address_that_it_is_told_alone():
    """A network namespace stands for the other machine: it connects to the ports that runs open."""
    name, here, there, other = f"igla{os.getpid()}", "10.213.7.1", "10.213.7.2", "10.213.8.1"
    link = [f"ig{os.getpid()}a"[:15], f"ig{os.getpid()}b"[:15]]
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
    try:
        for words in (
            ["link", "add", link[0], "type", "veth", "peer", "name", link[1], "netns", name],
            ["addr", "add", f"{here}/24", "dev", link[0]],
            ["addr", "add", f"{other}/24", "dev", link[0]],
            ["link", "set", link[0], "up"],
            ["-n", name, "addr", "add", f"{there}/24", "dev", link[1]],
            ["-n", name, "link", "set", link[1], "up"],
            ["-n", name, "route", "add", "10.213.8.0/24", "dev", link[1]],
        ):
            subprocess.run(["ip", *words], check=True)

        def reached(address: str, port: int) -> str:
            probe = (
                "import socket; s = socket.socket(); s.settimeout(5)\n"
                f"try:\n s.connect(({address!r}, {port})); print('open')\n"
                "except OSError as error:\n print('refused')"
            )
            command = ["ip", "netns", "exec", name, sys.executable, "-c", probe]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()

        alone, port = loopback_store()
        assert reached(here, port) == reached(other, port) == "refused"
        assert addresses.bindable(other) == other and addresses.towards(there) == here
        # The ranks' store, and the one at which launchers meet, which hands its interface on to the ranks.
        ranks, port = served_store(other, 0, LIMIT)
        assert (reached(here, port), reached(other, port)) == ("refused", "open")
        with socket.create_server((here, 0)) as server:
            port = server.getsockname()[1]
        parameters = RendezvousParameters("c10d", f"{here}:{port}", "run", 1, 2)
        meeting = rendezvous._rendezvous_store(parameters)
        assert (reached(here, port), reached(other, port), parameters.local_addr) == ("open", "refused", here)
        del alone, ranks, meeting
    finally:
        subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", link[0]], check=False, capture_output=True)


class Attack:
    """What an attacker stores in place of the state: unpickling it creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_state_that_somebody_else_has_written_is_never_unpickled(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    handler = open_rendezvous(RendezvousParameters("c10d", f"127.0.0.1:{port}", "run", 1, 2), tmp_path)
    store = rendezvous.dist.TCPStore("127.0.0.1", port, is_master=False)
    (name,) = [f"torch.rendezvous.{handler.get_run_id()}"]
    for state in (pickle.dumps(Attack(tmp_path / "owned")), bytes(32) + pickle.dumps(Attack(tmp_path / "owned"))):
        store.set(name, base64.b64encode(state).decode())
        with pytest.raises(RendezvousStateError, match="not signed"):
            handler.num_nodes_waiting()
    assert not (tmp_path / "owned").exists()


def test_two_machines_of_one_folder_have_one_key_that_others_cannot_read(tmp_path):
    key = shared_key(tmp_path / "run")
    assert shared_key(tmp_path / "run") == key and len(key) == 32 and shared_key(tmp_path / "other") != key
    file = tmp_path / "run" / rendezvous.SECRET_FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [one.name for one in (tmp_path / "run").iterdir()] == [rendezvous.SECRET_FILE], "nothing temporary is left"


def test_machines_without_a_shared_folder_may_be_given_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv(rendezvous.SECRET_VARIABLE, "of the cluster")
    assert shared_key(tmp_path / "run") == b"of the cluster" and not (tmp_path / "run").exists()


def test_a_planted_link_is_not_followed(tmp_path):
    (tmp_path / "victim").write_text("of somebody else")
    (tmp_path / rendezvous.SECRET_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(ConfigError, match=rendezvous.SECRET_VARIABLE):
        shared_key(tmp_path)
    assert (tmp_path / "victim").read_text() == "of somebody else"


def test_a_key_that_a_power_cut_has_emptied_is_refused(tmp_path):
    for content in (b"", bytes(31)):
        (tmp_path / rendezvous.SECRET_FILE).write_bytes(content)
        with pytest.raises(ConfigError, match=f"has {len(content)} bytes, and a key has 32"):
            shared_key(tmp_path)
        assert (tmp_path / rendezvous.SECRET_FILE).read_bytes() == content
