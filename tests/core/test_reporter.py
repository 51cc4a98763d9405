import pytest

from dacc.core import reporter as module
from dacc.core.errors import ConfigError
from dacc.core.reporter import Reporter, silent


def test_everything_goes_to_stderr(capsys):
    speaker = Reporter(verbose=True)
    speaker.say("a [bold]line[/bold]")
    speaker.detail("a detail")
    speaker.notice("a notice")
    with speaker.stage("work"):
        pass
    out, err = capsys.readouterr()
    assert out == ""
    assert "a [bold]line[/bold]" in err  # markup of names and paths is not interpreted
    assert "a detail" in err
    assert "notice: a notice" in err
    assert "work: 0.0 s" in err


def test_details_need_verbose(capsys):
    Reporter().detail("a detail")
    assert capsys.readouterr().err == ""


def test_a_quiet_reporter_prints_nothing_and_still_remembers(capsys):
    speaker = silent()
    speaker.say("a line")
    speaker.notice("a notice")
    assert list(speaker.progress([1, 2], "work")) == [1, 2]
    assert capsys.readouterr() == ("", "")
    assert speaker.notices == ["a notice"]


def test_a_notice_is_told_once():
    speaker = silent()
    speaker.notice("same")
    speaker.notice("same")
    assert speaker.notices == ["same"]


def test_strict_turns_a_notice_into_an_error():
    with pytest.raises(ConfigError, match="a notice") as caught:
        Reporter(quiet=True, strict=True).notice("a notice")
    assert "--strict" in caught.value.mend


def test_progress_in_a_log_is_a_line_now_and_then_with_the_time_left(capsys, monkeypatch):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    assert list(Reporter().progress(iter("abc"), "letters", total=3)) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("letters: 1/3, ")
    assert lines[0].endswith("s left")
    assert len(lines) == 3


def test_a_title_may_tell_how_it_goes(capsys, monkeypatch):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    seen = []
    for letter in Reporter().progress("ab", lambda: f"seen {''.join(seen)}"):
        seen.append(letter)
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["seen a", "seen ab"]


def test_progress_without_a_known_end_counts_only(capsys, monkeypatch):
    monkeypatch.setattr(module, "LOG_SECONDS", 0.0)
    list(Reporter().progress(iter("ab"), "letters"))
    assert capsys.readouterr().err.splitlines() == ["letters: 1/?", "letters: 2/?"]


def test_fast_progress_says_nothing_in_a_log(capsys):
    list(Reporter().progress(range(1000), "numbers"))
    assert capsys.readouterr().err == ""
