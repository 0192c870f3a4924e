"""What the shell scripts under tpu/ would do: their --dry-run prints every command and runs none."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = ("respond", "score", "select", "train", "evaluate")  # those that work as several processes
SETTINGS = {"TPU_PROJECT": "my-project", "TPU_ZONE": "us-west4-a", "TPU_NAME": "t1", "TPU_TYPE": "v5litepod-16"}


def commands(script, *arguments, **settings):
    """The printed commands, split as a shell splits them. No program but the shell's own can be found."""
    kept = {"PATH": os.environ["PATH"], "HOME": os.environ["HOME"]}
    done = subprocess.run(
        ["bash", ROOT / "tpu" / script, *arguments], env=kept | SETTINGS | settings, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_create():
    made, mounted, packed, copied, installed, checked = commands("create.sh", "--dry-run", TPU_SHARE="10.0.0.2:/share")
    assert made[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "create", "t1"]
    assert {"--zone=us-west4-a", "--accelerator-type=v5litepod-16", "--version=v2-alpha-tpuv5-lite"} <= set(made)
    assert "mount -t nfs 10.0.0.2:/share /mnt/jsfdd" in mounted[-1] and "--worker=all" in mounted
    assert packed[0] == "git" and copied[4] == "scp" and copied[5] == packed[-2]
    assert "./jsfdd[tpu]" in installed[-1] and "jsfdd --help" in checked[-1]


def test_a_spot_tpu_is_asked_for_through_a_queued_resource():
    asked, looked, *_ = commands("create.sh", "--dry-run", TPU_SPOT="1")
    assert asked[:5] == ["gcloud", "compute", "tpus", "queued-resources", "create"]
    assert {"--node-id=t1", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} <= set(asked)
    assert looked[4] == "describe"


@pytest.mark.parametrize("stage", STAGES)
def test_stages_run_on_all_hosts_and_find_each_other(stage):
    ((*gcloud, command),) = commands("run.sh", "--dry-run", stage, "--target", "my model", "--out", "run")
    assert gcloud[4] == "ssh" and "--worker=all" in gcloud
    inner = shlex.split(command.removeprefix("--command="))
    assert inner == [
        "cd", "/mnt/jsfdd", "&&", "$HOME/venv/bin/jsfdd", stage, "--target", "my model", "--out", "run", "--coordinator",
        "auto",
    ]  # fmt: skip


def test_other_commands_run_on_one_host():
    ((*gcloud, command),) = commands("run.sh", "--dry-run", "export", "--draft", "d", "--out", "e")
    assert "--worker=0" in gcloud and "--coordinator" not in command


def test_the_commands_of_the_page_reach_the_hosts():
    page = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8").replace("\\\n", " ")
    shown = [shlex.split(line) for line in re.findall(r"^tpu/run\.sh (.*)$", page, re.MULTILINE)]
    run = [commands("run.sh", "--dry-run", *words)[0] for words in shown]
    stages = [words[1] for words in shown if words[0] == "--until-done"]
    assert stages == ["score", "select", "train", "evaluate"] and len(run) == 6
    for words, (*_, last) in zip(shown, run, strict=True):
        assert ("--coordinator auto" in last) == (words[0] == "--until-done"), words


def test_fetch():
    (command,) = commands("run.sh", "--dry-run", "--fetch", "/mnt/jsfdd/run", "here")
    assert command[4:8] == ["scp", "--recurse", "t1:/mnt/jsfdd/run", "here"] and command[-1] == "--worker=0"


@pytest.mark.parametrize("stage", STAGES)
def test_slurm(stage):
    (command,) = commands("slurm.sh", "--dry-run", stage, "--out", "a b")
    assert command[0] == "srun" and command[2:] == ["jsfdd", stage, "--out", "a b", "--coordinator", "auto"]


@pytest.mark.parametrize("script, arguments", [("create.sh", ["--wet"]), ("run.sh", []), ("slurm.sh", ["export"])])
def test_wrong_use_says_the_right_one(script, arguments):
    done = subprocess.run(["bash", ROOT / "tpu" / script, *arguments], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and f"tpu/{script}" in done.stderr
