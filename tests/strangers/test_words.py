"""What strangers write reaches no terminal, status, event or log line but as what is seen."""

from __future__ import annotations

import io
import json
import logging

import pytest
import yaml
from rich.panel import Panel
from rich.text import Text

from orchestrator.api.job import Condition
from orchestrator.api.model_facts import ModelFacts
from orchestrator.api.reasons import ConditionType, Reason
from orchestrator.api.results import Failure, StageResult
from orchestrator.api.words import in_json, in_lines, on_one_line, without_logins
from orchestrator.cli.console import answers, say
from orchestrator.cli.formats import DataFormat
from orchestrator.cli.output import print_data, print_text
from orchestrator.controller.logs import JsonFormatter
from orchestrator.core.commands import WriteStatus
from orchestrator.core.decide import decide
from tests.builders import NOW, SMOLLM2_135M, exited, make_attempt, make_job, snapshot
from tests.strangers.harm import harmful

EVIL = "a\x1b[2J\x1b]0;title\x07b\r\nc\x9b2Jd\u202egnp\u2028e\u2029f\u2066g\u200fh\x85i\x7fj\td\x00"
KIND = "naïve café 模型 👩‍👩‍👧 a\u00a0b"


def test_every_harmful_character_is_escaped_and_no_other_is_touched() -> None:
    for code in range(0x110000):
        character = chr(code)
        assert harmful(on_one_line(character)) == []
        if harmful(character) == []:
            assert on_one_line(character) == character
    assert on_one_line(KIND) == in_lines(KIND) == KIND


def test_lines_stay_where_there_may_be_several() -> None:
    assert in_lines("a\n\tb\x1b[2J\rc") == "a\n\tb\\x1b[2J\\x0dc"
    assert on_one_line("a\n\tb\u2028c") == "a b c"


def test_logins_are_left_out_of_addresses_and_nothing_else_is() -> None:
    said = "at http://me:p@ss:w@host:5000/a@b, s3://bucket/key:1@2 and mail@host; \"https://token@host\" 'x://:p@h'"
    assert without_logins(said, instead="") == (
        "at http://host:5000/a@b, s3://bucket/key:1@2 and mail@host; \"https://host\" 'x://h'"
    )
    assert without_logins("sqlite:////home/a@b/mlflow.db") == "sqlite:////home/a@b/mlflow.db"


def test_json_says_the_same_in_its_own_escapes() -> None:
    text = in_json(json.dumps({EVIL: KIND}, ensure_ascii=False, indent=1))
    assert json.loads(text) == {EVIL: KIND}
    assert harmful(text.replace("\n", "")) == []


def test_a_status_an_event_and_a_result_hold_no_escape_sequences() -> None:
    job = make_job()
    attempt = make_attempt("prepare", 1, start_time=NOW, created_time=NOW)
    job = job.model_copy(update={"status": job.status.model_copy(update={"attempts": (attempt,), "attempts_total": 1})})
    told = StageResult.model_construct(failure=Failure.model_construct(reason=Reason.USER_ERROR, message=EVIL))
    [write] = [c for c in decide(snapshot(job, stages=(exited(job, 80, told),))) if isinstance(c, WriteStatus)]
    assert harmful(write.status.model_dump_json()) == []
    assert "\\\\x1b[2J" in write.status.model_dump_json()
    assert [harmful(event.message) for event in write.events] == [[]] * len(write.events)


def test_what_is_parsed_from_outside_holds_none() -> None:
    read = StageResult.model_validate_json(json.dumps({"failure": {"reason": "UserError", "message": EVIL * 10}}))
    assert read.failure is not None
    assert harmful(read.failure.message) == []
    model = ModelFacts.model_validate({**SMOLLM2_135M.to_wire(), "architecture": EVIL})
    assert harmful(model.architecture) == []
    condition = Condition(
        type=ConditionType.PREPARED,
        status="False",
        reason=Reason.PREPARING,
        message="\x00" * 2048,
        last_transition_time=NOW,
    )
    assert len(condition.message) == 2048


def test_a_log_line_is_one_line() -> None:
    record = logging.LogRecord("x", logging.ERROR, "f", 1, "%s", (EVIL,), None)
    line = JsonFormatter().format(record)
    assert harmful(line) == []
    assert json.loads(line)["message"] == EVIL


@pytest.mark.parametrize("form", [DataFormat.JSON, DataFormat.YAML])
def test_data_for_programs_is_exact_and_harmless(form: DataFormat, capsys: pytest.CaptureFixture[str]) -> None:
    print_data({"a": EVIL, "b": KIND}, form)
    written = capsys.readouterr().out
    assert harmful(written.replace("\n", "")) == []
    assert (json.loads if form is DataFormat.JSON else yaml.safe_load)(written) == {"a": EVIL, "b": KIND}


def test_nothing_that_is_printed_drives_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    print_text(f"{EVIL}\n{KIND}")
    say(EVIL)
    answers().print(Text(EVIL), Panel(EVIL), EVIL, markup=False)
    written = capsys.readouterr()
    assert KIND in written.out
    for text in (written.out, written.err):
        assert "[2J" in text
        assert harmful(text.replace("\n", "").replace("\t", "")) == []


def test_colors_are_riches_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the styles' sequences stay, and those of the text do not."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    answers().print(Text("\x1b[2Jred", style="red"))
    assert "\x1b[31m" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue()
