"""Machines that can be lost: Ray's `fake_multinode` provider, whose list forgets what has died, as a cloud's does."""

import tempfile
from functools import partial
from typing import Any
from unittest import mock

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class MortalMachines(FakeMultiNodeProvider):
    """Real raylets of this machine, begun and ended by Ray's autoscaler.

    Each has a temporary folder of its own in the folder ``machines`` of the provider's configuration, as each machine
    has a disk of its own: in a common one the runtime environment of a machine that comes replaces the working
    directory of workers that are running on another one.
    """

    def _create_node_with_resources_and_labels(self, *args: Any, **kwargs: Any) -> None:
        own = tempfile.mkdtemp(prefix="m", dir=self.provider_config["machines"])
        with self.lock, mock.patch("ray._private.parameter.RayParams", partial(RayParams, temp_dir=own)):
            super()._create_node_with_resources_and_labels(*args, **kwargs)

    def non_terminated_nodes(self, tag_filters: Any) -> list[str]:
        with self.lock:
            machines: dict[str, dict[str, Any]] = dict(self._nodes)
            for name, machine in machines.items():
                if "node" in machine and "raylet" not in dict(machine["node"].live_processes()):
                    self.terminate_node(name)  # with what is left of it
        return super().non_terminated_nodes(tag_filters)
