# SPDX-License-Identifier: Apache-2.0
"""What a run shows while it goes on: a bar on a terminal, else timed lines."""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import datetime
import sys
import time

from absl import logging
import rich.console
import rich.progress
import rich.table
import rich.text

# Beginnings and ends of metrics that would crowd the line.
_FILE_ONLY = (
  *("seconds", "rewards/", "rollout/", "groups/", "ratio_", "clip_", "num_"),
  *("teaching/num_", "teaching/seconds", "teaching/LR", "teaching/leak_rate"),
)
_BOUNDS = ("_low", "_high")
_MAX_SILENCE_S = 30.0
_MAX_CELL = 300


class Console:
  """Progress of a run on stderr; that nobody reads it is no failure."""

  def __init__(
    self,
    *,
    step: int,
    num_steps: int,
    now: Callable[[], float] = time.monotonic,
  ) -> None:
    """Begins at `step`; with a bar if stderr is a terminal."""
    self._num_steps, self._now = num_steps, now
    self._first_step, self._start = step, now()
    self._last_line = self._start
    self._bar = _Bar(step, num_steps) if sys.stderr.isatty() else None

  def advance(self, step: int) -> None:
    """Moves on to `step`; a line is written if there was none for long."""
    if self._bar is not None:
      self._bar.advance(step)
    elif self._now() - self._last_line > _MAX_SILENCE_S:
      self._line(step, "")

  def tell(self, step: int, values: Mapping[str, float]) -> None:
    """Writes a line of metrics."""
    self._line(
      step,
      " ".join(
        f"{name}={value:.4g}"
        for name, value in values.items()
        if not name.removeprefix("eval/").startswith(_FILE_ONLY)
        and not name.endswith(_BOUNDS)
      ),
    )

  def table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Shows rows on a terminal; in a log they would be hard to read."""
    if self._bar is not None and rows:
      self._bar.table(title, rows)

  def close(self) -> None:
    """Takes the bar away."""
    if self._bar is not None:
      self._bar.close()

  def _line(self, step: int, text: str) -> None:
    self._last_line = self._now()
    logging.info(
      "step %d/%d %s%s", step, self._num_steps, text, self._eta(step)
    )

  def _eta(self, step: int) -> str:
    done = step - self._first_step
    if done < 1 or step >= self._num_steps:
      return ""
    seconds = (self._now() - self._start) / done * (self._num_steps - step)
    left = datetime.timedelta(seconds=round(seconds))
    end = datetime.datetime.now().astimezone() + left
    return f" eta={left} ({end:%H:%M})"


class _Bar:
  """A bar below the lines of the log."""

  def __init__(self, step: int, num_steps: int) -> None:
    self._console = rich.console.Console(stderr=True)
    self._progress = rich.progress.Progress(
      rich.progress.TextColumn("step"),
      rich.progress.MofNCompleteColumn(),
      rich.progress.BarColumn(),
      rich.progress.TimeElapsedColumn(),
      rich.progress.TimeRemainingColumn(),
      console=self._console,
      transient=True,
      refresh_per_second=2,
    )
    self._task = self._progress.add_task("", completed=step, total=num_steps)
    # absl keeps the stderr it began with; lines must go around the bar.
    self._handler = logging.get_absl_handler().python_handler
    self._stream = self._handler.stream
    with contextlib.suppress(OSError):
      self._progress.start()
      self._handler.setStream(sys.stderr)

  def advance(self, step: int) -> None:
    self._progress.update(self._task, completed=step)

  def table(self, title: str, rows: Sequence[Mapping[str, object]]) -> None:
    table = rich.table.Table(*rows[0], title=title, show_lines=True)
    for row in rows:
      table.add_row(*(_cell(value) for value in row.values()))
    with contextlib.suppress(OSError):
      self._console.print(table)

  def close(self) -> None:
    self._handler.setStream(self._stream)
    with contextlib.suppress(OSError):
      self._progress.stop()


def _cell(value: object) -> rich.text.Text:
  """Shows the beginning of a value; brackets in it are no markup."""
  text = f"{value:.3f}" if isinstance(value, float) else str(value)
  return rich.text.Text(text[:_MAX_CELL] + "..." * (len(text) > _MAX_CELL))
