"""The view of a running training: a panel, plain lines, and nothing lost."""

import contextlib
import io
import sys

import pytest

from mlx_dmpo.machine import console, progress
from mlx_dmpo.report import live

rich_console = pytest.importorskip("rich.console")

LINE = {
    "step": 20,
    "loss": 0.4123,
    "margin": 0.31,
    "pair_accuracy": 0.625,
    "groups_per_second": 3.217,
    "peak_memory_gb": 6.14,
}
VALID = {"step": 20, "valid_loss": 0.5, "valid_margin": 0.2, "valid_pair_accuracy": 0.7}


class Time:
    """A clock that is set by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def panel(width=90, **how):
    screen = io.StringIO()
    terminal = rich_console.Console(file=screen, width=width, height=30, force_terminal=True, highlight=False)
    return live.Panel("dmpo", 100, terminal=terminal, **how), screen


def drawn(view, width=None):
    """The panel as text."""
    screen = io.StringIO()
    rich_console.Console(file=screen, width=width or view.console.width).print(view.render())
    return screen.getvalue()


def test_sparklines():
    assert live.sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert live.sparkline([0, 0, 7, 7], 2) == "▁█"  # means of 0 0 and 7 7
    assert live.sparkline([2.0] * 5, 10) == "▄▄▄▄▄" and live.sparkline([], 10) == "" and live.sparkline([1.0], 0) == ""
    assert len(live.sparkline(list(range(1000)), 40)) == 40


def test_durations():
    assert [live.duration(s) for s in (3, 89, 120, 5940, 11100)] == ["3 s", "89 s", "2 min", "99 min", "3 h 05 min"]


def test_time_left_counts_the_steps_of_this_process_only():
    now = Time()
    clock = live.Clock(100, 50, now)
    assert clock.left(50) == ""
    now.now = 20.0
    assert clock.left(60) == "80 s"  # 2 s a step, 40 steps left


def test_plain_lines(capsys):
    now = Time()
    view = live.Plain("dmpo", 100, now=now)
    with view:
        now.now = 40.0
        view.on_step(LINE)
        view.on_validation(VALID, best=True)
        view.notice("note: a title \x1b[31m")
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "dmpo step 20 of 100: loss 0.4123, margin +0.310, pair accuracy 0.625, 3.22 groups/s, 6.1 GB, 3 min left",
        "  step   20: validation loss 0.5000, margin +0.200, pair accuracy 0.700 (best)",
    ]
    assert err == "note: a title \\x1b[31m\n"


def test_plain_lines_of_sft_and_of_skipped_steps(capsys):
    view = live.Plain("sft", 10)
    view.on_step({"step": 5, "loss": 1.0})
    view.on_step({"step": 10, "bad_steps": 5})
    out = capsys.readouterr().out
    assert "sft step 5 of 10: loss 1.0000" in out and "margin" not in out and "every step was skipped" in out


def test_no_terminal_or_plain_means_lines(monkeypatch):
    assert isinstance(live.view("dmpo", 10), live.Plain)  # pytest's stderr is no terminal
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(live.view("dmpo", 10), live.Panel)
    assert isinstance(live.view("dmpo", 10, plain=True), live.Plain)
    monkeypatch.setattr(sys, "stderr", Terminal("ascii"))
    assert isinstance(live.view("dmpo", 10), live.Plain)
    assert type(live.view("dmpo", 10, shown=False)) is live.Silent


class Terminal(io.StringIO):
    def __init__(self, encoding="utf-8"):
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding

    def isatty(self):
        return True


def test_the_panel_shows_the_numbers():
    now = Time()
    view, _ = panel(memory=64e9, now=now)
    for step in range(1, 21):
        view.on_step(LINE | {"step": step, "loss": 1 / step})
    now.now = 40.0
    view.stepped(20)
    text = drawn(view)
    assert "dmpo: step 20 of 100" in text and "20 %" in text and "3 min left" in text
    assert "0.0500" in text and "+0.310" in text and "0.625" in text and "3.22" in text and "6.1 GB of 64" in text
    loss = next(line for line in text.splitlines() if "loss" in line)
    assert "█" in loss and loss.index("█") < loss.index("▁")  # it falls


@pytest.mark.parametrize("width", [30, 50, 80, 200])
def test_a_resized_terminal_is_no_loss(width):
    view, _ = panel()
    for step in range(1, 300):
        view.on_step(LINE | {"step": step})
    lines = drawn(view, width).splitlines()
    assert max(map(len, lines)) <= width and len(lines) < 30


def test_what_is_printed_meanwhile_stays_and_an_interrupt_leaves_the_last_state():
    view, screen = panel()
    with pytest.raises(KeyboardInterrupt), view:
        view.on_step(LINE)
        view.stepped(20)
        view.notice("note: [bold]this stays[/bold]")
        view.on_validation(VALID, best=True)
        raise KeyboardInterrupt
    shown = screen.getvalue()
    assert "note: [bold]this stays[/bold]" in shown and "validation loss 0.5000" in shown
    assert "step 20 of 100" in shown and shown.rstrip().endswith(("╯", "\x1b[?25h"))
    assert not view._live.is_started  # the cursor is back


def test_no_bar_is_drawn_over_the_panel(monkeypatch):
    """A bar beside the panel left the panel's first line on the screen at each validation."""
    view, _ = panel()
    screen = io.StringIO()
    other = rich_console.Console(file=screen, width=80, force_terminal=True)
    monkeypatch.setattr(progress, "_terminal", lambda: other)
    monkeypatch.setattr(progress, "DELAY", -1.0)
    for shown in (view, contextlib.nullcontext()):
        with shown, progress.Progress(3, "validation", "group") as bar:
            bar.update()
        assert ("validation" in screen.getvalue()) == (shown is not view)


@pytest.mark.parametrize("width", [30, 80])
def test_lines_are_broken_between_words_on_a_terminal(width, monkeypatch):
    line = "  rule: negatives: up to 5 of the user's disliked items among them, drawn by seed, with-a-hyphen at the end"
    command = "next: mlx-dmpo sft --data data/mine --adapter-path runs/sft --learning-rate 1e-4 --epochs 3 --seed 1"
    screen = io.StringIO()
    assert console.folded(line, screen) == line  # a file or pipe
    monkeypatch.setattr(screen, "isatty", lambda: True)
    monkeypatch.setattr(screen, "fileno", lambda: 1)
    monkeypatch.setattr(console.os, "get_terminal_size", lambda n: console.os.terminal_size((width, 24)))
    found = console.folded(line, screen)
    assert found.replace("\n   ", "") == line and max(map(len, found.split("\n"))) <= width and "\n" in found
    assert console.folded(command, screen) == command  # to be copied


def test_a_resumed_run_shows_its_earlier_curve():
    view, _ = panel(history=[LINE | {"step": s, "loss": 2.0 - s / 10} for s in range(1, 10)] + [VALID])
    assert len(view.values["loss"]) == 9 and view.last["step"] == 9


# --- in a training run


@pytest.fixture
def sft_settings(model_directory, data_directory, tmp_path):
    from mlx_dmpo.config import Lora, SftSettings

    return SftSettings(
        model=str(model_directory),
        data=str(data_directory),
        adapter_path=str(tmp_path / "sft"),
        iters=4,
        steps_per_report=2,
        steps_per_eval=2,
        batch_size=2,
        lora_parameters=Lora(rank=2),
        max_seq_length=512,
    )


def test_a_run_prints_what_it_writes(sft_settings, capsys):
    from mlx_dmpo.machine import files
    from mlx_dmpo.train.run import train

    path = train(sft_settings, "test")
    shown = capsys.readouterr().out
    for line in files.read_lines(path / "metrics.jsonl"):
        key = "valid_loss" if "valid_loss" in line else "loss"
        assert f"loss {line[key]:.4f}" in shown
        assert f"step {line['step']} of 4" in shown


def test_a_run_in_a_terminal(sft_settings, tmp_path):
    """In a pseudo-terminal: the panel is drawn, what is printed stays, and the cursor is shown again at the end."""
    import os
    import pty
    import subprocess
    import textwrap

    code = f"""
        import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
        from mlx_dmpo.config import Lora, SftSettings
        from mlx_dmpo.train.run import train
        train(SftSettings(model={sft_settings.model!r}, data={sft_settings.data!r},
              adapter_path={sft_settings.adapter_path!r},
              iters=4, steps_per_report=1, steps_per_eval=2, batch_size=2, max_seq_length=512), "test")
    """
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40", "PYTHONIOENCODING": "utf-8"}
    run = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(master)
    text = seen.decode(errors="replace")
    assert run.wait(timeout=60) == 0, text
    assert "sft: step 4 of 4" in text and "╭" in text and "validation loss" in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")  # the cursor is shown again


def test_tensorboard_gets_every_number(sft_settings):
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from dataclasses import replace

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from mlx_dmpo.machine import files
    from mlx_dmpo.train.run import train

    path = train(replace(sft_settings, report_to="tensorboard"), "test")
    events = EventAccumulator(str(path / "tensorboard")).Reload()
    for line in files.read_lines(path / "metrics.jsonl"):
        group = "valid" if "valid_loss" in line else "train"
        for name, value in line.items():
            if name != "step":
                scalars = {e.step: e.value for e in events.Scalars(f"{group}/{name.removeprefix('valid_')}")}
                assert scalars[line["step"]] == pytest.approx(value, rel=1e-6)
