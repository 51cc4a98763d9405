from dacc.evaluate.table import human_bytes, human_count, human_seconds, plain_lines


def test_plain_tables_are_aligned() -> None:
    assert plain_lines(["name", "size"], [["a", "10 MB"], ["long", "1 B"]]) == [
        "name   size",
        "a     10 MB",
        "long    1 B",
    ]


def test_human_units() -> None:
    assert [human_bytes(value) for value in (0, 999, 8_890_000)] == ["0 B", "999 B", "8.89 MB"]
    assert [human_count(value) for value in (12, 4_440_000)] == ["12", "4.44 M"]
    assert [human_seconds(value) for value in (0.0031, 2.41, 600)] == ["3.1 ms", "2.41 s", "10 min"]
