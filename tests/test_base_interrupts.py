"""Signals: one line, the exit code that shells expect, whatever the main thread is in."""

import signal
import subprocess
import sys

import pytest

# The command line's own handling, around something else than a command.
SCRIPT = """
import sys
from jsfdd.base import interrupts
from jsfdd.commands import cli
interrupts.SECONDS = 1.0
def work(*_):
    print("ready", flush=True)
    {work}
cli._run, cli.parse = work, lambda *_: None
sys.exit(cli.main(["demo"]))
"""
SLEEP = "import time; time.sleep(60)"
C_CODE = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
SWALLOWED = """
    class Closing:
        def __del__(self):
            import time
            print("closing", flush=True)
            time.sleep(60)  # what is raised in here, Python prints and forgets, as JAX's callbacks do
    sys.unraisablehook = lambda *_: None
    Closing()
    import time; time.sleep(60)
"""
NOTED = """
    with interrupts.noted() as signalled:
        import time
        print("noting", flush=True)
        while not signalled():
            time.sleep(0.01)
        print("saved", flush=True)
"""


def ended(work, number):
    """(exit code, stdout from then on, stderr) of a process that gets the signal in the midst of its work."""
    script = SCRIPT.format(work=work)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        for word in ("closing", "noting"):
            if word in work:
                assert process.stdout.readline() == f"{word}\n"
        process.send_signal(number)
        out, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    return process.returncode, out, errors


@pytest.mark.slow
@pytest.mark.parametrize("work, number, words", [
    (SLEEP, signal.SIGINT, "interrupted"),
    (SLEEP, signal.SIGTERM, "terminated (SIGTERM)"),
    (SLEEP, signal.SIGHUP, "hung up (SIGHUP)"),
    (C_CODE, signal.SIGTERM, "terminated (SIGTERM)"),
    (SWALLOWED, signal.SIGINT, "interrupted"),
    (NOTED, signal.SIGHUP, "hung up (SIGHUP)"),
])  # fmt: skip
def test_a_signal_ends_a_command_with_one_line(work, number, words):
    code, out, errors = ended(work, number)
    assert code == 128 + number
    assert errors == f"jsfdd: {words}; the same command continues where it stopped\n"
    assert out == ("saved\n" if work == NOTED else "")
