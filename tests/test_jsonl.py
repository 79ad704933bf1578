"""The one reader and writer of JSON lines: whole lines, whatever happens to the process."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raco_optim.step_log import jsonl

RECORDS = [{"a": 1.5, "ç": ["x", None]}, {"b": {"c": True}}, {"d": "\n"}]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "records.jsonl"


def write(path, records=RECORDS):
    with jsonl.Appender(path) as file:
        for record in records:
            file.append(record)


def test_a_line_is_what_the_standard_library_reads(path):
    write(path, RECORDS[:1])
    write(path, RECORDS[1:])
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == RECORDS
    assert jsonl.read(path) == jsonl.Records(RECORDS, path.stat().st_size, b"", True)


def test_numbers_that_json_lacks_become_words_that_float_reads(path):
    values = [math.nan, math.inf, -math.inf, -0.0, 1e-310]
    words = jsonl.plain({"x": (values, 3)})
    assert words == {"x": [["NaN", "Infinity", "-Infinity", -0.0, 1e-310], 3]}
    write(path, [words])
    back = [float(word) for word in json.loads(path.read_bytes())["x"][0]]
    assert [repr(value) for value in back] == [repr(value) for value in values]


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_nan_in_a_record_is_refused(path, word):
    write(path)
    before = path.read_bytes()
    with pytest.raises(ValueError):
        write(path, [{"x": [float(word)]}])
    assert path.read_bytes() == before
    for end in (b"}\n", b"}", b', "cut sho'):  # the last line, too
        path.write_bytes(before + b'{"x": ' + word.encode() + end)
        with pytest.raises(jsonl.BadLine, match=f"^{word} is not JSON") as raised:
            jsonl.read(path)
        assert raised.value.number == 4


def test_cut_anywhere_the_rest_is_read_and_gone_on_with(path):
    write(path)
    data = path.read_bytes()
    for cut in range(len(data) + 1):
        path.write_bytes(data[:cut])
        found = jsonl.read(path)
        # A line is whole without its newline.
        whole = sum(cut >= end for end in (i for i, x in enumerate(data) if x == ord("\n")))
        assert found.entries == RECORDS[:whole]
        assert data[: found.size] + found.torn == data[:cut]
        with jsonl.Appender(path) as file:
            file.cut(found)
            file.append({"last": cut})
        assert jsonl.read(path).entries == [*RECORDS[:whole], {"last": cut}]


def test_a_torn_line_is_told_from_other_content():
    head = b'{"point": '
    assert all(jsonl.may_begin(torn, head) for torn in (b"", b"{", head, head + b'{"meth'))
    assert not any(jsonl.may_begin(torn, head) for torn in (b"notes", b'{"pairs": ', b"["))


class Interrupted:
    """A file whose second write is interrupted after some bytes."""

    def __init__(self, file, error):
        self.file, self.error, self.writes = file, error, 0

    def write(self, data):
        self.writes += 1
        if self.writes == 2:
            raise self.error
        return self.file.write(data[:5])

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_write_that_is_broken_off_is_taken_back(path, error):
    write(path)
    before = path.read_bytes()
    with jsonl.Appender(path) as file:
        real = file._file
        file._file = Interrupted(real, error)
        with pytest.raises(type(error)):
            file.append({"x": 1})
        assert path.read_bytes() == before
        file._file = real
        file.append({"x": 2})
    assert jsonl.read(path).entries == [*RECORDS, {"x": 2}]


def test_two_writers_are_noticed(path):
    with jsonl.Appender(path) as first, jsonl.Appender(path) as second:
        second.append({"x": 1})
        with pytest.raises(OSError, match="`path` must be written by one process at a time; got "):
            first.append({"x": 2})
    assert jsonl.read(path).entries == [{"x": 1}]


def test_sync_waits_for_this_file(path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_size))
    with jsonl.Appender(path) as file:
        file.append({"x": 1})
        assert synced == []
        file.sync()
    assert synced == [path.stat().st_size]


SCRIPT = """
import sys
from pathlib import Path
import jsonl

with jsonl.Appender(Path(sys.argv[1])) as file:
    for i in range(10**9):
        file.append({"i": i, "text": "x" * 100_000})
        if i == 0:
            print("ready", flush=True)
"""


def test_a_killed_process_leaves_whole_lines_and_at_most_one_torn(path):
    """The module imports the standard library alone, so that the process starts at once."""
    folder = str(Path(jsonl.__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, cwd=folder
    )
    process.stdout.readline()
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    entries = jsonl.read(path).entries
    assert entries
    assert [entry["i"] for entry in entries] == list(range(len(entries)))
    assert all(len(entry["text"]) == 100_000 for entry in entries)
