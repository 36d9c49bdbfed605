"""The harness's own safety: what it cuts is a wire that it made, never this machine's."""

from __future__ import annotations

import pytest

from tests.launch import hosts
from tests.launch.hosts import Host, RayHosts


def test_a_host_that_is_this_machine_is_never_cut_off(monkeypatch):
    monkeypatch.setattr(hosts, "_ip", lambda words: pytest.fail(f"ran ip {words}"))
    here = [Host("node-0", "127.0.0.1"), Host("node-1", "127.0.0.1")]
    cluster = RayHosts(here, [1, 1], {}, port=1, raylets={0: 1, 1: 2})
    assert not cluster.can_cut_off
    with pytest.raises(AssertionError, match="must not be cut off"):
        cluster.cut_off_last()
    assert cluster.raylets == {0: 1, 1: 2}
