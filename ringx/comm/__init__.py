"""What the ranks of one context-parallel group send each other, and how many bytes that is.

group.py         a process group as one of its ranks sees it; the errors that name a rank
collectives.py   the table of messages: names, torch's operators, bytes sent
transport.py     the messages as methods of Transport; Pending, a message in flight
torch_transport.py, thread_transport.py, recording.py, fake.py     the ways to carry them
streams.py       blocks of all ranks one after another
accounting.py    ``traffic()``, which counts bytes, and ``phase()``, which names what they are for
"""

from .accounting import Traffic, phase, traffic
from .collectives import COLLECTIVES, Collective
from .fake import FakeTransport
from .group import Disagreement, Group, PeerError, cpu_group
from .recording import RecordingTransport
from .thread_transport import ThreadExchange, ThreadTransport
from .torch_transport import TorchTransport, connect
from .transport import Done, Pending, Transport

__all__ = [
    "COLLECTIVES",
    "Collective",
    "Disagreement",
    "Done",
    "FakeTransport",
    "Group",
    "PeerError",
    "Pending",
    "RecordingTransport",
    "ThreadExchange",
    "ThreadTransport",
    "TorchTransport",
    "Traffic",
    "Transport",
    "connect",
    "cpu_group",
    "phase",
    "traffic",
]
