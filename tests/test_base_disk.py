"""Full disks: every kind of write ends in one error with file, bytes wanted and free, and leaves no open part.

/dev/full refuses every write as a full disk does; a link to it stands where a stage is about to write.
"""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors import SafetensorError
from toy import toy_config, toy_draft

from jsfdd.base.disk import DiskError, free_bytes, refusal, writing
from jsfdd.base.files import write_json
from jsfdd.base.lock import sole_writer
from jsfdd.base.records import Sample, TrainState
from jsfdd.commands.cli import main
from jsfdd.data import samples
from jsfdd.decoding import conversation_log
from jsfdd.decoding.conversation_log import AnsweredBatch
from jsfdd.hidden.writer import HiddenWriter
from jsfdd.training import journal
from jsfdd.weights import checkpoint, export


def full(path):
    path.symlink_to("/dev/full")


def test_a_file_that_is_written_whole(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    full(tmp_path / "x.json.tmp")
    with pytest.raises(
        DiskError, match=r"x\.json: no space left on device: \d+ bytes wanted, .* free; make room.*the same command again"
    ):
        write_json(tmp_path / "x.json", {"a": 2})
    assert '"a": 1' in (tmp_path / "x.json").read_text() and len(list(tmp_path.iterdir())) == 1


def test_a_shard(tmp_path):
    with HiddenWriter(tmp_path, 64, "float32", {}, 1 << 20) as writer:
        writer.add("a", np.ones((3, 64)))
    with pytest.raises(DiskError, match=r"shard-00001\.bin: no space left on device: 768 bytes wanted"):
        with HiddenWriter(tmp_path, 64, "float32", {}, 1 << 20) as writer:
            full(tmp_path / "open-shard-0.tmp")
            writer.add("b", np.ones((3, 64)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["manifest.json", "shard-00000.bin"]
    with HiddenWriter(tmp_path, 64, "float32", {}, 1 << 20) as writer:
        assert list(writer.ids) == ["a"]


@pytest.mark.parametrize("name, write", [
    ("metrics.jsonl", lambda out: journal._append(out / "metrics.jsonl", {"step": 1})),
    ("answers.parts", lambda out: conversation_log.append_batch(out / "answers.parts", AnsweredBatch(0, [], [], []))),
])  # fmt: skip
def test_a_log(tmp_path, name, write):
    full(tmp_path / name)
    with pytest.raises(DiskError, match=rf"{name}: no space left on device: \d+ bytes wanted"):
        write(tmp_path)


def test_a_checkpoint_whose_writer_wraps_the_error(tmp_path, monkeypatch):
    draft, params = toy_draft(toy_config())
    state = TrainState(params, optax.adamw(1e-3).init(params), jnp.int32(3), jax.random.key(7))
    with checkpoint.Checkpoints(tmp_path, draft, {}) as checkpoints:

        def refuse(*_, **__):
            (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
            raise ValueError("RESOURCE_EXHAUSTED: Failed to write 2029 bytes to file 4: No space left on device")

        monkeypatch.setattr(checkpoints._manager, "save", refuse)
        with pytest.raises(DiskError, match=r"checkpoints/3: no space left on device: \d.* wanted"):
            checkpoints.save(state)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_an_export(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "save_file", refuse)
    draft, params = toy_draft(toy_config())
    with pytest.raises(DiskError, match=r"draft: no space left on device: \d.* wanted"):
        export.write_draft(tmp_path / "draft", draft, params, "vllm")
    assert not list(tmp_path.iterdir())


def test_other_errors_pass_as_they_are():
    with pytest.raises(ValueError, match="something else"), writing("x", also=(ValueError,)):
        raise ValueError("something else")
    with pytest.raises(PermissionError), writing("x"):
        raise PermissionError(errno.EACCES, "denied")
    for number in (errno.EDQUOT, errno.EIO, errno.EROFS):
        assert refusal(OSError(number, os.strerror(number))) == number == refusal(RuntimeError(f"X: {os.strerror(number)} [1]"))


def test_a_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("jsfdd.base.lock.os.pwrite", refuse)
    with pytest.raises(DiskError, match=r"\.lock: disk quota exceeded: \d+ bytes wanted"), sole_writer(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_the_temporary_files_of_samples(monkeypatch):
    monkeypatch.setattr(samples.tempfile, "TemporaryFile", lambda: open("/dev/full", "wb"))  # noqa: SIM115
    monkeypatch.setattr(samples.tempfile, "gettempdir", lambda: "/somewhere")
    writer = samples.SampleWriter()
    writer.append(Sample("a", "chat", np.zeros(9, np.int32), np.ones(9, bool)))
    with pytest.raises(DiskError, match="/somewhere: no space left on device"):
        writer.finish()


@pytest.mark.parametrize("name, place", [("b/out", "b/out"), (None, "the output")])
def test_where_no_room_expects_it(name, place, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device", name)

    monkeypatch.setattr("jsfdd.commands.cli._run", refuse)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err.startswith(f"jsfdd: error: {place}: no space left on device: ")


def test_what_is_free_is_known_before_a_directory_is_made(tmp_path):
    assert free_bytes(tmp_path / "a" / "b") > 0


def test_a_command_says_one_line(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        with writing(tmp_path / "scores.parquet", 123456789):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("jsfdd.commands.cli._run", refuse)
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"jsfdd: error: {tmp_path}/scores.parquet: no space left on device: 123.5 MB wanted, ")
    assert said.count("\n") == 1
