"""A cluster of several nodes on this machine, one of which can be taken away at a stroke."""

from __future__ import annotations

import os
import random
import shutil
import tempfile
from typing import Any

from ray.cluster_utils import Cluster

NODES, CPUS_A_NODE = 3, 3  # one node less still holds the five CPUs of a run
# Even small tables then lie on their node, as the large ones of a real run do.
SMALL_OBJECTS = {"RAY_max_direct_call_object_size": "1000", "RAY_worker_niceness": "0"}


class Nodes:
    """The head holds no work; the driver connects to it."""

    def __init__(self, nodes: int = NODES) -> None:
        self._directory = tempfile.mkdtemp(prefix="tip-nodes-")
        os.environ.update(SMALL_OBJECTS, RAY_TMPDIR=self._directory)
        head = {"num_cpus": 0, "include_dashboard": False}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._nodes = [self._add() for _ in range(nodes)]

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=CPUS_A_NODE)

    def lose_one(self, draw: random.Random) -> None:
        """A node that holds work, or may, is gone without a word."""
        self.lose(draw.choice(self._nodes).node_id)

    def lose(self, node_id: str) -> None:
        """This node is."""
        node = next(node for node in self._nodes if node.node_id == node_id)
        self._nodes.remove(node)
        self._cluster.remove_node(node, allow_graceful=False)

    def add_one(self) -> None:
        self._nodes.append(self._add())

    def close(self) -> None:
        self._cluster.shutdown()
        for name in (*SMALL_OBJECTS, "RAY_TMPDIR"):
            os.environ.pop(name, None)
        shutil.rmtree(self._directory, ignore_errors=True)
