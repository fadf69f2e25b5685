from igla_mega.evaluate import bar


def test_a_count_in_a_file_is_one_plain_line_with_count_rate_and_time(capsys):
    with bar.counting("web", 1000, "tokens") as advance:
        for _ in range(10):
            advance(100)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("web: 1,000 of 1,000 tokens, ") and "tokens/s, " in line and line.endswith(" s")


def test_a_long_count_is_a_line_at_intervals(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(bar.time, "monotonic", lambda: now[0])
    said: list[str] = []
    lines = bar.Lines("web", 100, "samples", said.append)
    for _ in range(4):
        now[0] += 6
        lines.advance(25)
    lines.close()
    assert said == [
        "web: 50 of 100 samples, 4 samples/s, 12.0 s, 12 s left",
        "web: 100 of 100 samples, 4 samples/s, 24.0 s",
    ]
