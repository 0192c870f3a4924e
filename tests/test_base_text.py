"""Text on its way to a terminal."""

from jsfdd.base.progress import console
from jsfdd.base.text import printable, shortened
from jsfdd.commands.cli import main
from jsfdd.doctor.findings import Diagnosis, Finding, print_diagnosis

EVIL = "\x1b]0;title\x07\x1b[31m\x9b"


def test_nothing_that_a_terminal_obeys_is_left():
    assert printable(f"é\n\t{EVIL}名") == "é\n\t\ufffd]0;title\ufffd\ufffd[31m\ufffd名"
    assert shortened("a" * 1000 + "b" * 1500 + "c" * 500) == "a" * 1000 + "b" * 333 + " … " + "b" * 167 + "c" * 500


def test_names_are_shown_clean_wherever_they_come_from(tmp_path, capsys):
    console.print(f"{EVIL}.jsonl: 3 read")
    assert main(["select", "--scores", str(tmp_path / EVIL), "--out", str(tmp_path)]) == 2
    diagnosis = Diagnosis((Finding("data", "error", f"sample {EVIL} is bad", f"look at {EVIL}"),), EVIL, ())
    print_diagnosis(diagnosis, console)
    said = capsys.readouterr().err
    assert "title" in said and not any(character in said for character in EVIL if not character.isprintable())
