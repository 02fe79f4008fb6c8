"""Leases: one holder at a time, whatever the clocks, host names and processes of the takers are."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from mfcore.errors import UserInputError
from preprocessing.io import lease as lease_module
from preprocessing.io.lease import (
    LOCK,
    Lease,
    LeaseLostError,
    read_lease,
    remove_fenced,
    upload_fenced,
    verify_lease,
    write_fenced,
)
from preprocessing.io.storage import Store
from tests.helpers.object_store import BUCKET, s3_server

ROOT = Path(__file__).parents[3]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def plant(store: Store, name: str = LOCK, **changes: object) -> dict[str, object]:
    """Write the lease of a process that ended, as it left it; return its values."""
    values = json.loads(Lease(store)._content()) | {"pid": 2**22 + 1, **changes}
    store.write(name, json.dumps(values).encode())
    return values


def race(stores: list[Store]) -> list[Lease]:
    """Take the lease from several threads at once; return those that hold it."""
    won: list[Lease] = []
    errors: list[str] = []
    barrier = threading.Barrier(len(stores))

    def take(store: Store) -> None:
        lease = Lease(store)
        barrier.wait()
        try:
            won.append(lease.__enter__())
        except UserInputError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=take, args=(store,)) for store in stores]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("is being written by process" in error for error in errors)
    assert len(won) + len(errors) == len(stores), "a taker failed otherwise"
    return won


def check_races(make_store: Callable[[int], Store], races: int) -> None:
    """Take a free, a dead or a damaged lease with two to eight takers; exactly one succeeds each time."""
    for number in range(races):
        store = make_store(number)
        if number % 3 == 1:
            plant(store)
        elif number % 3 == 2:
            store.write(LOCK, b"")
        takers = 2 + number % 7
        (winner,) = race([Store(store.uri) for _ in range(takers)])
        verify_lease(store, winner.token)
        winner.__exit__(None, None, None)
        assert [name for name in store.list_entries() if name.startswith(LOCK)] == []


def test_one_of_several_takers_succeeds(tmp_path):
    check_races(lambda number: Store(str(tmp_path / str(number))), 50)


@pytest.mark.slow
def test_one_of_several_takers_succeeds_a_thousand_times(tmp_path):
    check_races(lambda number: Store(str(tmp_path / str(number))), 1000)


@pytest.mark.slow
def test_one_of_several_takers_succeeds_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", _refuse_link)
    check_races(lambda number: Store(str(tmp_path / str(number))), 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_one_of_several_takers_succeeds_on_s3(tmp_path):
    with s3_server(tmp_path / "log"):
        check_races(lambda number: Store(f"s3://{BUCKET}/race{number}"), 1000)


def _refuse_link(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


def test_a_lease_needs_no_hard_links(store, monkeypatch):
    monkeypatch.setattr(os, "link", _refuse_link)
    with Lease(store) as lease:
        verify_lease(store, lease.token)
        with pytest.raises(UserInputError, match="being written"):
            Lease(store).__enter__()
    assert store.list_entries() == []


def test_a_lease_of_another_machine_is_taken_once_it_stops_changing(store, capsys):
    """Its clock is a day ahead or behind; only changes count."""
    for expires in (time.time() + 86400, time.time() - 86400):
        plant(store, boot="another machine", expires=expires, seconds=0.4)
        began = time.monotonic()
        with Lease(store) as second:
            verify_lease(store, second.token)
        assert 0.4 <= time.monotonic() - began < 2
        assert "waiting up to 0 s" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["_boot_id", "_namespace"])
def test_a_living_lease_of_an_equal_host_name_is_not_taken(store, monkeypatch, other):
    """The taker is on another machine, or in another container with the same host name."""
    real = getattr(lease_module, other)
    with Lease(store, seconds=0.6) as first:
        monkeypatch.setattr(lease_module, other, lambda *kind: real(*kind)[::-1])
        monkeypatch.setattr(lease_module, "process_start_time", lambda pid: None)
        with pytest.raises(UserInputError, match="is being written by process"):
            Lease(store).__enter__()
        verify_lease(store, first.token)


def test_a_dead_process_of_this_machine_is_replaced_at_once(store):
    plant(store)
    began = time.monotonic()
    with Lease(store) as second:
        verify_lease(store, second.token)
    assert time.monotonic() - began < 0.3


@pytest.mark.parametrize("content", [b"", b"{}", b'{"token": "../../x", "host": "h", "pid": 1, "expires": 1.5}', b"[1"])
def test_a_damaged_lease_counts_as_absent_and_is_named(store, content, capsys):
    store.write(LOCK, content)
    with Lease(store) as lease:
        verify_lease(store, lease.token)
    assert f"{LOCK} is damaged" in capsys.readouterr().err
    assert store.list_entries() == []


def test_a_paused_holder_cannot_renew_or_return(store):
    """Its lease is taken over and released; a renewal that was under way changes nothing."""
    first = Lease(store, seconds=0.2)
    first._renewer.run = lambda: None  # as if the process were stopped
    first.__enter__()
    held = read_lease(store)
    assert held is not None
    time.sleep(0.25)
    second = Lease(store).__enter__()
    with pytest.raises(LeaseLostError):
        verify_lease(store, first.token)
    store.replace_exclusive(held.name, held.raw, first._content())
    verify_lease(store, second.token)
    second.__exit__(None, None, None)
    assert not store.replace_exclusive(held.name, held.raw, first._content())
    with Lease(store) as third:
        assert not store.replace_exclusive(held.name, held.raw, first._content())
        verify_lease(store, third.token)


def test_a_taker_paused_before_it_writes_its_lease_fails_as_a_slower_one(store, monkeypatch):
    """The temporary file of its lease is deleted by the driver that was faster."""
    real = os.link

    def link_too_late(*paths: Path) -> None:
        monkeypatch.setattr(os, "link", real)
        with Lease(store):
            store.delete_temporary()
        real(*paths)

    monkeypatch.setattr(os, "link", link_too_late)
    with Lease(store) as lease:
        verify_lease(store, lease.token)


def test_a_lease_is_renewed(store):
    with Lease(store, seconds=0.2) as lease:
        before = json.loads(store.read(LOCK))
        time.sleep(0.4)
        after = json.loads(store.read(LOCK))
        verify_lease(store, lease.token)
    assert after["renewals"] > before["renewals"]
    assert after["deadline"] > before["deadline"]


def test_leftovers_of_an_interrupted_release_are_removed(store):
    plant(store, f"{LOCK}-0123456789abcdef")
    with Lease(store):
        assert store.list_entries() == [LOCK]


def test_a_write_that_was_about_to_be_published_is_lost_with_the_lease(store, tmp_path, monkeypatch):
    """The driver passes its last check and is paused; the next driver works; the write comes too late."""
    (tmp_path / "local").write_bytes(b"of the first")
    for publish in (
        lambda token: write_fenced(store, token, "file", b"of the first"),
        lambda token: upload_fenced(store, token, tmp_path / "local", "file"),
        lambda token: remove_fenced(store, token, "file"),
    ):
        first = Lease(store)
        first._renewer.run = lambda: None
        first.__enter__()
        store.write("file", b"before")
        real = lease_module.verify_lease

        def verify_and_pause(place: Store, token: str, real=real, first=first) -> None:
            real(place, token)
            if token != first.token:
                return
            monkeypatch.setattr(lease_module, "verify_lease", real)
            held = json.loads(store.read(LOCK)) | {"pid": 2**22 + 1}
            store.write(LOCK, json.dumps(held).encode())
            with Lease(store) as second:
                store.delete_temporary()
                write_fenced(store, second.token, "file", b"of the second")

        monkeypatch.setattr(lease_module, "verify_lease", verify_and_pause)
        with pytest.raises(LeaseLostError):
            publish(first.token)
        assert store.read("file") == b"of the second"


@pytest.mark.slow
@pytest.mark.parametrize("publish", [partial(write_fenced, data=b"of the first"), remove_fenced])
def test_a_late_change_is_lost_on_s3(publish, tmp_path, monkeypatch):
    with s3_server(tmp_path / "log"):
        store = Store(f"s3://{BUCKET}/late")
        store.write("file", b"before")
        with Lease(store) as first:
            real = lease_module.verify_lease

            def verify_and_pause(place: Store, token: str) -> None:
                real(place, token)
                monkeypatch.setattr(lease_module, "verify_lease", real)
                store.remove(LOCK)
                with Lease(store) as second:
                    write_fenced(store, second.token, "file", b"of the second")

            monkeypatch.setattr(lease_module, "verify_lease", verify_and_pause)
            with pytest.raises(LeaseLostError):
                publish(store, first.token, name="file")
        assert store.read("file") == b"of the second"
        assert store.list_entries() == ["file"]
        with Lease(store) as third:
            remove_fenced(store, third.token, "file")
            remove_fenced(store, third.token, "file")
        assert store.list_entries() == []


def test_a_stopped_driver_is_replaced_after_its_lease(tmp_path):
    """SIGSTOP for longer than the lease, then SIGCONT: the first driver has lost it."""
    code = """if True:
        import sys, time
        from preprocessing.io.lease import Lease, verify_lease
        from preprocessing.io.storage import Store
        store = Store(sys.argv[1])
        with Lease(store, seconds=0.5) as lease:
            print("held", flush=True)
            while True:
                time.sleep(0.05)
                verify_lease(store, lease.token)
        """
    place = str(tmp_path / "out")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", code, place], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "held\n"
        with pytest.raises(UserInputError, match=f"process {child.pid} "):
            Lease(Store(place)).__enter__()
        child.send_signal(signal.SIGSTOP)
        time.sleep(0.6)
        with Lease(Store(place)) as second:
            child.send_signal(signal.SIGCONT)
            _, errors = child.communicate(timeout=20)
            assert "LeaseLostError" in errors
            verify_lease(Store(place), second.token)
