"""Times of methods side by side, with commands that only pretend to run."""

from dacc.benchmarks import quantize_time
from dacc.benchmarks.quantize_time import Spent, compare, default_run


def test_methods_take_turns_and_sets_are_made_once_and_not_counted(tmp_path, monkeypatch):
    ran = []

    def spend(*arguments):
        ran.append(arguments)
        if arguments[0] == "calibrate":
            (tmp_path / arguments[arguments.index("-o") + 1]).mkdir()
            return Spent(1000.0, 1000.0, "")
        number = sum(command[0] == "quantize" for command in ran)
        return Spent(60.0, 10.0 * number, "x\none update takes 0.1 s here: 50 updates each\n")

    monkeypatch.setattr(quantize_time, "spend", spend)
    rows = compare("zoo:shapes-sd", tmp_path, repeats=3)
    assert rows == ["| zoo:shapes-sd | qdiffusion | 30 s | 1.00 |", "| zoo:shapes-sd | tfmq | 40 s | 1.33 |"]
    made = [command for command in ran if command[0] == "calibrate"]
    assert [command[command.index("--strategy") + 1] for command in made] == ["uniform", "every-step"]
    methods = [command[command.index("--method") + 1] for command in ran if command[0] == "quantize"]
    assert methods == ["qdiffusion", "tfmq"] * 3
    assert default_run(tmp_path).endswith("(one update takes 0.1 s here: 50 updates each).")
    assert "1.0 minutes" in default_run(tmp_path)
    assert not any("iterations" in word for word in ran[-1])
