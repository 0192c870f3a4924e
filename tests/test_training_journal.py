"""A run's logs: what a changed, cut or foreign line comes to."""

import json

import pytest

from jsfdd.training.journal import CHECKSUM, METRICS, TIMINGS, Journal, check_metrics, read_lines, read_metrics


@pytest.fixture
def run(tmp_path):
    with Journal(tmp_path, 0) as journal:
        for step in (10, 20, 30):
            journal.note({"step": step, "loss": 0.1 * step})
            journal.note_timing({"step": step, "seconds": 1.5})
            if step < 30:
                journal.seal(step)
    return tmp_path


def test_every_flipped_bit_up_to_the_checkpoint_is_found(run):
    path = run / METRICS
    data = path.read_bytes()
    sealed = data.index(b'{"step": 30')
    assert [line["step"] for line in read_metrics(run)] == [10, 20, 30]
    for place in range(sealed):
        for bit in range(7):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            try:
                lines = read_metrics(run)
            except ValueError as error:
                assert "metrics.jsonl" in str(error)
            else:
                assert [line for line in lines if line["step"] < 30] == [{"step": 10, "loss": 1.0}, {"step": 20, "loss": 2.0}]


def test_a_run_goes_on_only_from_its_own_lines(run):
    path = run / METRICS
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # cut short by a kill: dropped, as are the lines after the checkpoint
    check_metrics(run)
    with Journal(run, 20):
        assert [line["step"] for line in read_metrics(run)] == [10, 20]
    path.write_text(path.read_text().replace("2.0", "2.5"))
    with pytest.raises(ValueError, match="metrics.jsonl: not the lines that the run wrote up to step 20; delete this run's"):
        Journal(run, 20)
    with Journal(run, 0):  # from the beginning, all is written again
        assert path.read_text() == ""


def test_a_kill_after_the_later_lines_were_dropped_leaves_a_run_that_goes_on(run):
    for start in (10, 10, 0, 0):  # each is killed before it writes a line
        with Journal(run, start):
            assert [line["step"] for line in read_metrics(run)] == [10][: start // 10]


def test_a_kill_before_later_lines_are_dropped_leaves_a_run_that_goes_on(run, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for start in (10, 0):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("jsfdd.training.journal._drop_after", killed)
            Journal(run, start)
        check_metrics(run)
        with Journal(run, start):
            pass


def test_a_checkpoint_before_the_first_line_has_a_checksum_too(tmp_path):
    with Journal(tmp_path, 0) as journal:
        journal.seal(2)
    with Journal(tmp_path, 2) as journal:
        journal.note({"step": 3})
    check_metrics(tmp_path)


@pytest.mark.parametrize("name, line", [
    (METRICS, b'{"step": ' + b"9" * 5000 + b"}\n"),
    (METRICS, b"[" * 100_000),
    (METRICS, b"\xff\n"),
    (METRICS, b'{"step": "1"}\n'),
    (TIMINGS, b'{"step": 1}\n'),
    (TIMINGS, b'{"step": 1, "seconds": "2"}\n'),
    (TIMINGS, b'{"step": 1, "seconds": NaN}\n'),
])  # fmt: skip
def test_a_line_that_is_none_is_named(tmp_path, name, line):
    (tmp_path / name).write_bytes(line)
    with pytest.raises(ValueError, match=f"{name}.*delete this run's directory"):
        read_lines(tmp_path / name)


def test_a_foreign_checksum_is_named(run):
    (run / CHECKSUM).write_text(json.dumps({"step": "20", "sha256": 1}))
    with pytest.raises(ValueError, match="metrics.sha256.json: not a step and a checksum"):
        read_metrics(run)
