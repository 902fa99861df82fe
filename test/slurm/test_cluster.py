"""The testbed is a cluster: nodes with addresses of their own, links that can be shaped and pulled,
nodes that crash.

python -m pytest test/slurm -m slurm
"""

import re

import pytest

pytestmark = pytest.mark.slurm


def test_eight_nodes_with_addresses_of_their_own(cluster):
    printed = cluster(
        "exec",
        "srun",
        "-N8",
        "bash",
        "-c",
        "echo $(hostname) $(ip -4 -o addr show eth0 | awk '{print $4}')",
    )
    assert sorted(printed.split("\n")[:-1]) == [f"n{i} 10.77.0.{10 + i}/24" for i in range(1, 9)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("up",), "it is up already"),
        (("rate", "fast"), "rate takes Mbit/s, or off; not 'fast'"),
        (("crash", "9"), "'9' is no node; there are 1 to 8"),
        (("boot", "1"), "n1 is up already"),
        (("link", "1", "maybe"), "link N up, or link N down"),
        (("exec",), "exec what?"),
        (("reboot",), "test/slurm/cluster up"),
    ],
)
def test_mistakes_are_named(cluster, words, message):
    printed = cluster(*words, check=False)
    assert cluster.status and message in printed


def test_a_shaped_link_carries_so_much_and_no_more(cluster):
    """10 MB by a bare socket, at 200 Mbit/s: at least 0.4 s; what left the interface is 10 MB and
    headers."""
    send = (
        "import socket\n"
        "connection = socket.create_connection(('n2', 9999))\n"
        "connection.sendall(bytes(10**7))\n"
        "connection.close()\n"
    )
    take = (
        "import socket, time\n"
        "server = socket.create_server(('', 9999))\n"
        "print('up', flush=True)\n"
        "connection, _ = server.accept()\n"
        "start = time.time()\n"
        "received = 0\n"
        "while block := connection.recv(1 << 16):\n"
        "    received += len(block)\n"
        "print(received, time.time() - start, flush=True)\n"
    )
    cluster("rate", 200)
    try:
        receiver = cluster.popen("node", 2, "python3", "-c", take)
        assert receiver.stdout.readline().strip() == "up"
        before = int(cluster("node", 1, "awk", "/eth0/ {print $10}", "/proc/net/dev"))
        cluster("node", 1, "python3", "-c", send)
        n, seconds = receiver.communicate(timeout=30)[0].split()
        left = int(cluster("node", 1, "awk", "/eth0/ {print $10}", "/proc/net/dev")) - before
    finally:
        cluster("rate", "off")
    assert int(n) == 10**7 and 0.36 < float(seconds) < 2
    assert 10**7 < left < 1.08 * 10**7


def test_a_node_that_crashes_comes_back(healthy):
    """Its neighbours, who had spoken with it before, reach its slurmd as soon as `boot` returns."""
    knock = ("node", 7, "timeout", "1", "bash", "-c", "echo > /dev/tcp/10.77.0.18/6818")
    healthy(*knock)
    healthy("crash", 8)
    printed = healthy("crash", 8, check=False)
    assert "n8 is down already" in printed
    healthy("boot", 8)
    healthy(*knock)
    healthy("wait", 30)
    assert re.search(r"n8\s+1\s+main\*\s+idle", healthy("status"))
