"""Long checks go on where they were, and never with lines of another pyspec."""

import io
import json

import pytest
import resume
from resume import Finished, work_through

UNITS = [{"kind": "greedy", "question_ids": [number]} for number in range(4)]


def test_finished_units_are_kept_until_something_changes(tmp_path, monkeypatch):
    path = tmp_path / "finished.jsonl"
    Finished(path, {"tokens": 8}).add(UNITS[1] | {"found": 5})
    with path.open("a") as file:
        file.write('{"kind": "gre')  # the run was killed here
    again = Finished(path, {"tokens": 8})
    assert again.line_of(UNITS[1]) == UNITS[1] | {"found": 5} and again.line_of(UNITS[2]) is None
    again.add(UNITS[2])
    assert [json.loads(line).get("question_ids") for line in path.read_text().splitlines()] == [None, [1], [2]]
    assert len(Finished(path, {"tokens": 8}).lines) == 2
    assert not Finished(path, {"tokens": 9}).lines
    Finished(path, {"tokens": 8}).add(UNITS[1])
    monkeypatch.setattr(resume, "fingerprint", lambda: "of another pyspec")
    assert not Finished(path, {"tokens": 8}).lines


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), width=200)
    path, done, expected = tmp_path / "finished.jsonl", [], []

    def run(interrupted_at=None):
        def work(unit):
            (number,) = unit["question_ids"]
            if number == interrupted_at:
                raise KeyboardInterrupt
            done.append(number)
            return {"square": number**2}

        def expected_seconds(remaining):
            expected.append(len(remaining))
            return 60.0

        return work_through(UNITS, Finished(path, {}), work, lambda unit: unit["kind"], expected_seconds, console)

    with pytest.raises(SystemExit, match="130"):
        run(interrupted_at=2)
    assert [line["square"] for line in run()] == [0, 1, 4, 9]
    assert [line["square"] for line in run()] == [0, 1, 4, 9]
    assert (done, expected) == ([0, 1, 2, 3], [4, 2])  # nothing twice, and no estimate where nothing is left
    assert "2 of 4 finished before" in console.file.getvalue()
