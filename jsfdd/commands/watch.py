"""`jsfdd watch`: a page that follows a run while it works, from the run's files, on this machine alone."""

from __future__ import annotations

import dataclasses
import errno
from pathlib import Path

import tyro

from jsfdd.commands.options import check
from jsfdd.commands.outcome import Outcome, described

EXAMPLES = """
jsfdd watch demo-run
jsfdd watch draft --port 8888
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Show a run in a browser while it works: loss, τ, tokens/s and remaining time."""

    run: tyro.conf.Positional[Path]
    """Directory of `jsfdd run`, `jsfdd demo` or `jsfdd train`, which another process writes or has written."""
    port: int = 8008
    """Port of this machine, which serves no other; 0 takes a free one."""

    def __post_init__(self):
        check("--port", self.port, 0 <= self.port < 65536, "a port from 1 to 65535, or 0 for a free one")


def prepare(config: WatchConfig) -> None:
    """Check that the directory holds a run. What it holds is read again for each page."""
    from jsfdd.report.live import check_run

    check_run(config.run)


def run(config: WatchConfig, _: None) -> Outcome:
    """Serve until a signal ends the command."""
    from jsfdd.base.progress import console
    from jsfdd.report.serve import make_server

    try:
        server = make_server(config.run, config.port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "another program listens there" if error.errno == errno.EADDRINUSE else "ports below 1024 are the system's"
        raise ValueError(f"--port {config.port}: {why}; choose another, or 0 for a free one") from None
    with server:
        console.print(f"{config.run}: http://127.0.0.1:{server.server_port}/ (Ctrl-C ends)", soft_wrap=True)
        server.serve_forever()
    return Outcome({"command": "watch"}, "")


def describe(config: WatchConfig, _: None) -> Outcome:
    where = f"http://127.0.0.1:{config.port}/" if config.port else "a free port of 127.0.0.1"
    return described(
        "watch", {"run": config.run, "port": config.port}, [f"serve {config.run} at {where}, to this machine alone"]
    )
