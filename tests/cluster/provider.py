"""Machines that can be lost: Ray's `fake_multinode` provider, whose list forgets what has died, as a cloud's does."""

from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class MortalMachines(FakeMultiNodeProvider):
    """Real raylets of this machine, begun and ended by Ray's autoscaler."""

    def non_terminated_nodes(self, tag_filters: Any) -> list[str]:
        with self.lock:
            machines: dict[str, dict[str, Any]] = dict(self._nodes)
            for name, machine in machines.items():
                if "node" in machine and "raylet" not in dict(machine["node"].live_processes()):
                    self.terminate_node(name)  # with what is left of it
        return super().non_terminated_nodes(tag_filters)
