"""Python runs this first in ranks that share a GPU: each takes itself for a machine of its own.

NCCL refuses two ranks on one GPU of one machine. As machines of their own they connect by sockets:
slower, but the same collectives, and the path that ranks on several machines take.
"""

import os
import socket

if "RANK" in os.environ:
    name = os.environ["NCCL_HOSTID"] = f"rank-{os.environ['RANK']}"
    socket.gethostname = lambda: name
    os.environ["NCCL_SOCKET_IFNAME"] = "lo"
