"""Ray's `fake_multinode` provider with nodes that can be killed; dead nodes leave its list, as in a cloud."""

import tempfile
from functools import partial
from typing import Any
from unittest import mock

from ray._private.parameter import RayParams
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class KillableNodeProvider(FakeMultiNodeProvider):
    """Provider of real raylets on this machine, started and stopped by Ray's autoscaler.

    Each node has a separate temporary folder below ``machines`` of the provider configuration. In a common folder the
    runtime environment of a new node replaces the working directory of running workers of another node.
    """

    def _create_node_with_resources_and_labels(self, *args: Any, **kwargs: Any) -> None:
        temp_dir = tempfile.mkdtemp(prefix="m", dir=self.provider_config["machines"])
        with self.lock, mock.patch("ray._private.parameter.RayParams", partial(RayParams, temp_dir=temp_dir)):
            super()._create_node_with_resources_and_labels(*args, **kwargs)

    def non_terminated_nodes(self, tag_filters: Any) -> list[str]:
        with self.lock:
            machines: dict[str, dict[str, Any]] = dict(self._nodes)
            for name, machine in machines.items():
                if "node" in machine and "raylet" not in dict(machine["node"].live_processes()):
                    self.terminate_node(name)  # ends its remaining processes
        return super().non_terminated_nodes(tag_filters)
