# SPDX-License-Identifier: Apache-2.0
"""TensorBoard, W&B and trackio, none of which can hold up a run.

Each gets its own thread and a bounded queue. What one of them does not take, or
takes too slowly, is dropped, and told once: `metrics.jsonl` holds everything.
"""

from collections.abc import Callable, Mapping, Sequence
import importlib
import importlib.util
import pathlib
import queue
import secrets
import threading
import time
from typing import Any, Protocol

from absl import logging

from atlas_jax import errors

# Of a table: column names to values that JSON can hold.
Row = Mapping[str, Any]  # Any: text, numbers or None.

NONE = "none"
_PACKAGES = {
  "tensorboard": "tensorboardX",
  "wandb": "wandb",
  "trackio": "trackio",
}
_ADVICE = {"wandb": "set WANDB_API_KEY, or WANDB_MODE=offline"}
_MAX_WAITING = 256
_MAX_CLOSE_S = 20.0


class Sink(Protocol):
  """Takes the metrics of a run somewhere; may raise, and may block."""

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Takes finite metrics after `step` steps."""
    ...

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    """Takes rows with the same columns; there is at least one."""
    ...

  def close(self) -> None:
    """Writes what is not written yet."""
    ...


def open_sinks(
  workdir: pathlib.Path,
  resolved: Mapping[str, Any],  # Any: a config's values, as JSON holds them.
  *,
  to: str,
  project: str,
  group: str,
  name: str,
) -> list["Background"]:
  """Makes the trackers of a run, which are yet to be started.

  Args:
    workdir: TensorBoard's files go to `tensorboard/` in it. Its name is the
      run's, if `name` is empty.
    resolved: the run's config, for the trackers that keep it.
    to: "none", or names of trackers, separated by commas.
    project: what W&B and trackio file the run under.
    group: likewise, within the project; may be empty.
    name: of the run.

  Raises:
    errors.ConfigError: for an unknown tracker, or one that is not installed.
  """
  chosen = [part.strip() for part in to.split(",") if part.strip() != NONE]
  for tracker in chosen:
    _check(tracker, to)
  tracked = {
    "project": project,
    "group": group or None,
    "name": name or workdir.resolve().name,
    "config": dict(resolved),
  }
  openers: dict[str, Callable[[], Sink]] = {
    "tensorboard": lambda: _TensorBoard(workdir / "tensorboard"),
    "wandb": lambda: _WandB(workdir, tracked),
    "trackio": lambda: _Trackio(tracked),
  }
  return [Background(tracker, openers[tracker]) for tracker in chosen]


def _check(tracker: str, to: str) -> None:
  """Refuses what cannot be had, before a run begins."""
  if tracker not in _PACKAGES:
    raise errors.ConfigError(
      f"There is no tracker {tracker!r}.",
      where=f"--config.report.to={to}",
      why=f"Known are {', '.join(_PACKAGES)}; {NONE} is for none of them.",
      fix="Name one of these, or several with commas between.",
    )
  package = _PACKAGES[tracker]
  if importlib.util.find_spec(package) is None:
    raise errors.ConfigError(
      f"The package of {tracker} is not installed.",
      where=f"--config.report.to={to}",
      why=f"There is no module {package}.",
      fix=f"pip install {package}, or leave {tracker} out.",
    )


class Background:
  """Feeds a sink from a thread, so that it can neither stop nor slow a run."""

  def __init__(self, name: str, open_sink: Callable[[], Sink]) -> None:
    """Opens nothing yet."""
    self._name, self._open_sink = name, open_sink
    self._jobs: queue.Queue[Callable[[Sink], None] | None] = queue.Queue(
      _MAX_WAITING
    )
    self._has_warned = False
    self._thread = threading.Thread(
      target=self._work, name=f"sink-{name}", daemon=True
    )

  def start(self) -> None:
    """Opens the sink, in the thread: that too may fail or block."""
    self._thread.start()

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Hands metrics over; does not wait."""
    self._put(lambda sink: sink.scalars(step, values))

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    """Hands a table over; does not wait."""
    self._put(lambda sink: sink.table(step, name, rows))

  def close(self, max_wait_s: float = _MAX_CLOSE_S) -> None:
    """Lets the sink finish, if it does so in time."""
    deadline = time.monotonic() + max_wait_s
    try:
      self._jobs.put(None, timeout=max_wait_s)
    except queue.Full:
      self._warn("it does not take what it is given")
      return
    self._thread.join(max(0.0, deadline - time.monotonic()))
    if self._thread.is_alive():
      self._warn(f"it was not done {max_wait_s:.0f} s after the end")

  def _put(self, job: Callable[[Sink], None]) -> None:
    try:
      self._jobs.put_nowait(job)
    except queue.Full:
      self._warn("it takes metrics more slowly than they come")

  def _work(self) -> None:
    sink: Sink | None = None
    with _Contained(self._warn_closed):
      sink = self._open_sink()
    while (job := self._jobs.get()) is not None:
      if sink is not None:
        with _Contained(self._warn):
          job(sink)
    if sink is not None:
      with _Contained(self._warn):
        sink.close()

  def _warn_closed(self, why: str) -> None:
    advice = _ADVICE.get(self._name)
    self._warn(f"{why} at its start{f' ({advice})' if advice else ''}")

  def _warn(self, why: str) -> None:
    if not self._has_warned:
      self._has_warned = True
      logging.warning(
        "Some metrics are missing in %s: %s. metrics.jsonl has them all.",
        *(self._name, why),
      )


class _Contained:
  """Ends a block that raises, whatever it raises, and tells of it.

  A tracker's code is not ours, and may fail in any way it likes.
  """

  def __init__(self, tell: Callable[[str], None]) -> None:
    self._tell = tell

  def __enter__(self) -> None:
    pass

  def __exit__(self, kind: type[BaseException] | None, *error: object) -> bool:
    del error  # A library's message may hold a key, or an address with one.
    if kind is not None:
      self._tell(f"it raised {kind.__name__}")
    return True


class _TensorBoard:
  """Event files, by tensorboardX: it needs no TensorFlow and no torch."""

  def __init__(self, directory: pathlib.Path) -> None:
    writer = importlib.import_module("tensorboardX").SummaryWriter
    self._writer = writer(str(directory), flush_secs=10)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
      self._writer.add_scalar(name, value, step)

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    self._writer.add_text(name, markdown(rows), step)

  def close(self) -> None:
    self._writer.close()


class _WandB:
  """A run of Weights & Biases, the same one after a resume."""

  def __init__(
    self,
    workdir: pathlib.Path,
    tracked: Mapping[str, Any],  # Any: as in `open_sinks`.
  ) -> None:
    self._wandb = importlib.import_module("wandb")
    path = workdir / "wandb_id"
    if not path.exists():
      path.write_text(secrets.token_hex(8), encoding="utf-8")
    self._run = self._wandb.init(
      **tracked, dir=workdir, id=path.read_text("utf-8"), resume="allow"
    )
    # W&B's own step never goes back, as ours does after a crash.
    self._run.define_metric("*", step_metric="step")

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log({"step": step, **values})

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    columns = list(rows[0])
    data = [[row[column] for column in columns] for row in rows]
    table = self._wandb.Table(columns=columns, data=data)
    self._run.log({"step": step, name: table})

  def close(self) -> None:
    self._run.finish()


class _Trackio:
  """A run of trackio, kept on this machine."""

  def __init__(self, tracked: Mapping[str, Any]) -> None:  # Any: as above.
    module = importlib.import_module("trackio")
    self._text = module.Markdown
    self._run = module.init(**tracked, resume="allow", embed=False)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    self._run.log(dict(values), step=step)

  def table(self, step: int, name: str, rows: Sequence[Row]) -> None:
    self._run.log({name: self._text(markdown(rows))}, step=step)

  def close(self) -> None:
    self._run.finish()


def markdown(rows: Sequence[Row]) -> str:
  """Writes rows as a Markdown table."""
  lines = [list(rows[0]), ["---"] * len(rows[0])]
  lines += [[_cell(value) for value in row.values()] for row in rows]
  return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:  # Any: as in `Row`.
  text = f"{value:.4g}" if isinstance(value, float) else str(value)
  return text.replace("|", "\\|").replace("\n", "<br>")
