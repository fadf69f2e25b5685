import pytest

from igla_mega.doctor import network

ONE = {"lo": ["127.0.0.1", "::1"], "eth0": ["10.0.0.7", "fe80::7"], "docker0": ["172.17.0.1"]}
TWO = {**ONE, "ib0": ["192.168.5.7"]}
PUBLIC = {**ONE, "eth0": ["8.8.4.4"]}
RANK = {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.7"}
NAMED = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "=eth0"}


@pytest.fixture(autouse=True)
def this_machine(monkeypatch):
    """Rank 0's machine has every address that is no name."""
    monkeypatch.setattr(network, "bindable", lambda host: host if host[0].isdigit() else None)


@pytest.mark.parametrize(
    ("environment", "interfaces", "warned"),
    [
        ({}, ONE, []),
        (RANK, ONE, []),
        ({**RANK, **NAMED}, TWO, []),
        ({**RANK, "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "8.8.4.4"}, PUBLIC, []),
        ({}, TWO, ["GLOO_SOCKET_IFNAME: not set, and eth0, ib0 are up", "NCCL_SOCKET_IFNAME: not set"]),
        ({**RANK, **NAMED, "NCCL_SOCKET_IFNAME": "^lo"}, TWO, ["NCCL_SOCKET_IFNAME: not set"]),
        ({**RANK, **NAMED, "GLOO_SOCKET_IFNAME": "eth9"}, TWO, ["GLOO_SOCKET_IFNAME: no interface eth9 is up here"]),
        (RANK, PUBLIC, ["eth0: 8.8.4.4 is a public address, and gloo", "eth0: 8.8.4.4 is a public address, and NCCL"]),
        ({**RANK, **NAMED}, PUBLIC, ["eth0: 8.8.4.4 is a public address, and gloo", "eth0: 8.8.4.4 is a public"]),
        ({**RANK, "MASTER_ADDR": "8.8.4.4"}, ONE, ["MASTER_ADDR: 8.8.4.4 is a public address"]),
        ({**RANK, "MASTER_ADDR": "node7"}, ONE, ["MASTER_ADDR: node7 is no address of an interface of this machine"]),
        ({**RANK, "RANK": "3", "MASTER_ADDR": "node7"}, ONE, []),
    ],
)
def test_what_is_open_to_more_than_the_machines_of_a_run_is_named(environment, interfaces, warned):
    said = network.exposure(environment, interfaces)
    assert [line[: len(start)] for line, start in zip(said, warned, strict=True)] == warned


def test_this_machine_is_described():
    assert all(isinstance(line, str) for line in network.exposure({}))
