"""One directory, one writer: among processes, after a death, and where a file system passes no locks on."""

import errno
import fcntl
import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from jsfdd.base import lock
from jsfdd.base.lock import sole_writer

HOLD = """
import sys, time
from pathlib import Path
from jsfdd.base.lock import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock on `tmp_path`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()


def _pretend(path, **holder):
    path.write_text(json.dumps(holder))


@pytest.mark.slow
def test_a_second_process_is_refused_by_name_until_the_first_is_dead(tmp_path, holder):
    with pytest.raises(ValueError, match=f"process {holder.pid} on .*choose another --out"):
        with sole_writer(tmp_path):
            pass
    holder.kill()
    holder.wait()
    with sole_writer(tmp_path):  # at once: the system took the lock back, and the dead one was of this host
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_the_lock_of_what_is_moved_into_place_has_one_name_before_and_after(tmp_path):
    out = tmp_path / "draft"
    with sole_writer(out, moved=True):
        assert (tmp_path / ".draft.lock").exists()
        out.mkdir()
    _pretend(tmp_path / ".draft.lock", host=socket.gethostname(), pid=1)  # of a process that was killed just then
    with sole_writer(out, moved=True):
        pass
    assert list(tmp_path.iterdir()) == [out] and not list(out.iterdir())


def test_a_stage_of_a_run_may_lock_what_the_run_has_locked(tmp_path):
    with sole_writer(tmp_path), sole_writer(tmp_path):
        pass
    with sole_writer(tmp_path / "answers.jsonl"), sole_writer(tmp_path / "other.jsonl"):
        assert {path.name for path in tmp_path.iterdir()} == {".answers.jsonl.lock", ".other.jsonl.lock"}
    assert not list(tmp_path.iterdir())


def test_an_error_gives_the_lock_back(tmp_path):
    with pytest.raises(KeyError), sole_writer(tmp_path):
        raise KeyError
    with sole_writer(tmp_path):
        pass


@pytest.mark.parametrize("alive", [True, False])
def test_another_hosts_sign_of_life_counts_where_its_lock_is_not_seen(tmp_path, monkeypatch, alive):
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_SILENCE", 0.5)
    path = tmp_path / ".lock"
    _pretend(path, host="elsewhere", pid=7)
    ended = threading.Event()
    if alive:
        descriptor = os.open(path, os.O_RDWR)
        threading.Thread(target=lock._show_life, args=(descriptor, ended), daemon=True).start()
        with pytest.raises(ValueError, match="process 7 on elsewhere"), sole_writer(tmp_path):
            pass
        ended.set()
    else:
        with sole_writer(tmp_path):
            pass


def test_a_file_system_without_locks_is_watched_too(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    monkeypatch.setattr(lock, "_BEAT", 0.05)
    monkeypatch.setattr(lock, "_SILENCE", 0.3)
    with sole_writer(tmp_path):
        before = lock._touched(tmp_path / ".lock")
        time.sleep(0.2)
        assert lock._touched(tmp_path / ".lock") > before  # a sign of life
        taken, refusal = lock._take(tmp_path / ".lock")
        assert taken is None and str(os.getpid()) in refusal


def test_a_damaged_lock_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").write_bytes(b"\xff{")
    with sole_writer(tmp_path):
        pass
