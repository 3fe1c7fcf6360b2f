"""What users get wrong ends in a message of a line or two that names it: no traceback, silence, hang or crash."""

import re
import signal

import pytest

from deem_plugin.cli import main

from . import of_commands, of_data, of_models, of_recipes

SECONDS = 120
ROWS = [*of_data.ROWS, *of_recipes.ROWS, *of_models.ROWS, *of_commands.ROWS]


@pytest.fixture
def in_time():
    """Ends a row that waits for ever."""

    def give_up(*_):
        pytest.fail(f"still running after {SECONDS} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def exit_code(argv) -> int:
    try:
        return main([str(argument) for argument in argv])
    except SystemExit as end:  # of argparse
        return end.code


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.name, marks=[pytest.mark.slow] if row.slow else []) for row in ROWS]
)
def test_a_fault_is_named(row, place, capfd, caplog, in_time, monkeypatch):
    monkeypatch.chdir(place.folder)
    argv = row.argv(place)

    code = exit_code(argv)

    output, errors = capfd.readouterr()
    told = (re.findall(r"deem(?: \w[\w-]*)*: .*", errors, re.S) or [""])[-1]
    assert code == row.code, output + errors
    if code:
        message = (told or output).strip()
        assert re.search(row.says, message, re.S), message
        assert len(message.splitlines()) <= row.lines, message
    else:
        assert not told and re.search(row.says, output + caplog.text + errors, re.S), output + caplog.text


def test_names_are_given_once():
    names = [row.name for row in ROWS]

    assert len(set(names)) == len(names) > 200
