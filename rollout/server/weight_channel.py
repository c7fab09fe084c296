# SPDX-License-Identifier: Apache-2.0
"""Who may replace a server's weights, and with what.

A channel is opened by one trainer, which names itself, its tensors and its
tokenizer; until it is closed or its trainer falls silent, no other can open
one. Versions only grow within a channel. A new channel may start anywhere: a
trainer that resumes goes back to its last checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import pathlib
import time

from absl import logging

from rollout import manifest, process_name, wire


class RefusalError(Exception):
  """A request that is not carried out, with HTTP's word for it.

  `retry_after_s` is set where the same request may succeed later.
  """

  def __init__(
    self,
    status: int,
    error: str,
    *,
    what: str,
    why: str,
    fix: str,
    retry_after_s: int | None = None,
  ) -> None:
    super().__init__(what)
    self.status, self.retry_after_s = status, retry_after_s
    self.body = wire.Refusal(error=error, what=what, why=why, fix=fix)


class Channel:
  """The weight channel of one server."""

  def __init__(
    self,
    *,
    role: wire.Role,
    shapes: Mapping[str, tuple[int, ...]],
    tokenizer_digest: str,
    allowed_root: pathlib.Path | None,
    clock: Callable[[], float] = time.monotonic,
  ) -> None:
    """Begins closed.

    Args:
      role: a student's weights are never replaced.
      shapes: the tensors of the model that is served.
      tokenizer_digest: see `manifest.tokenizer_digest`.
      allowed_root: weights are taken from below it only; None for anywhere.
      clock: tells the time in seconds.
    """
    self._role, self._shapes = role, dict(shapes)
    self._tokenizer_digest = tokenizer_digest
    self._allowed_root, self._clock = allowed_root, clock
    self._open: wire.InitRequest | None = None
    self._heard_at, self._num_working = 0.0, 0
    self._last: int | None = None  # Pushed through this channel.
    self._held = wire.Version(version=0, digest="")
    self._loading: int | None = None

  @property
  def trainer_id(self) -> str | None:
    """Who holds the channel, if anyone alive."""
    if self._open and (why := self._lost(self._open)):
      logging.warning(
        "Trainer %r %s; its weight channel is closed.",
        *(self._open.trainer_id, why),
      )
      self._open = None
    return self._open.trainer_id if self._open else None

  @property
  def held(self) -> wire.Version:
    """Which weights are held, and which are being loaded."""
    return self._held.model_copy(update={"loading": self._loading})

  @contextlib.contextmanager
  def loading(self, version: int) -> Iterator[None]:
    """Lets nobody else in while weights are read and replaced."""
    self._loading = version
    try:
      yield
    finally:
      self._loading = None

  @contextlib.contextmanager
  def working(self) -> Iterator[None]:
    """Does not count time in which something is done as silence."""
    self._num_working += 1
    try:
      yield
    finally:
      self._num_working -= 1
      self._heard()

  def init(self, request: wire.InitRequest) -> None:
    """Opens the channel; again by the same trainer is a heartbeat.

    Raises:
      RefusalError: if it is another's, or the two sides differ.
      errors.CheckpointError: with a table, if the tensors differ.
    """
    self._check_holder(request.trainer_id)
    if request.role != self._role:
      raise RefusalError(
        409,
        "role",
        what=f"This server is a {self._role}, not a {request.role}.",
        why="Each role has its own servers; weights never cross.",
        fix=f"Give the address of a server started with --role={request.role}.",
      )
    if request.tokenizer_digest != self._tokenizer_digest:
      raise RefusalError(
        409,
        "tokenizer",
        what="The server's tokenizer is not the trainer's.",
        why=f"Digest {self._tokenizer_digest[:12]} here, "
        f"{request.tokenizer_digest[:12]} there: token ids or chat template "
        "would not mean the same.",
        fix="Start both on the same model directory.",
      )
    manifest.check_shapes(
      {tensor.name: tuple(tensor.shape) for tensor in request.tensors},
      self._shapes,
      where="/init_communicator",
    )
    self._check_root(request.weights_root)
    if self.trainer_id is None:
      logging.info("Trainer %r opened the weight channel.", request.trainer_id)
      self._last = None
    self._open = request
    self._heard()

  def accept(self, request: wire.UpdateRequest) -> pathlib.Path | None:
    """Decides about an update by what it says of itself.

    Returns:
      The directory that versions are pushed to, or None if this very version
      is held already.

    Raises:
      RefusalError: if the weights are frozen, the channel is not this
        trainer's, or the version is not a newer one.
    """
    if self._role == "student":
      raise RefusalError(
        409,
        "frozen",
        what="A student's weights are never replaced.",
        why="The reward is measured on one student that stays the same.",
        fix="Push to the servers started with --role=policy.",
      )
    self._check_holder(request.trainer_id)
    if self._open is None:
      raise RefusalError(
        409,
        "no_channel",
        what="There is no weight channel to update through.",
        why="None was opened, or its trainer was silent for too long.",
        fix="POST /init_communicator first, and again as a heartbeat.",
      )
    self._heard()
    asked = wire.Version(version=request.version, digest=request.digest)
    if asked == self._held:
      self._last = asked.version
      return None
    if self._last is not None and request.version <= self._last:
      raise RefusalError(
        409,
        "stale",
        what=f"Version {request.version} is not newer than {self._last}.",
        why="A late or repeated push must not undo a newer one.",
        fix="Ask GET /version, then push a larger one.",
      )
    return pathlib.Path(self._open.weights_root)

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """The tensors that every push must hold."""
    return self._shapes

  def publish(self, request: wire.UpdateRequest) -> None:
    """Notes that the weights of this update are loaded."""
    self._held = wire.Version(version=request.version, digest=request.digest)
    self._last = request.version
    self._heard()

  def close(self, request: wire.CloseRequest) -> bool:
    """Closes the channel; gives whether it was open.

    Raises:
      RefusalError: if it is another trainer's.
    """
    self._check_holder(request.trainer_id)
    was_open, self._open = self._open is not None, None
    return was_open

  def _heard(self) -> None:
    self._heard_at = self._clock()

  def _lost(self, held: wire.InitRequest) -> str:
    """Tells how the trainer was lost; "" if it was not, or not for certain."""
    if self._silence_s() > held.heartbeat_s:
      return f"was silent for {self._silence_s():.1f} s"
    # What it pushed is loaded to the end: another's weights must not mix in.
    if self._loading is None and process_name.has_ended(held.process):
      return "ended without a word"
    return ""

  def _silence_s(self) -> float:
    return 0.0 if self._num_working else self._clock() - self._heard_at

  def _check_holder(self, trainer_id: str) -> None:
    holder = self.trainer_id
    if holder is not None and holder != trainer_id:
      raise RefusalError(
        409,
        "other_trainer",
        what="The weight channel is another trainer's.",
        why="It is alive, and two would overwrite each other's weights.",
        fix="Stop that run, or give each run servers of its own.",
      )

  def _check_root(self, weights_root: str) -> None:
    root = pathlib.Path(weights_root)
    inside = self._allowed_root is None or root.resolve().is_relative_to(
      self._allowed_root.resolve()
    )
    if not (root.is_absolute() and root.is_dir() and inside):
      raise RefusalError(
        409,
        "weights_root",
        what=f"Weights cannot come from {weights_root!r}.",
        why="It must be an absolute directory that this server sees"
        + (f", below {self._allowed_root}." if self._allowed_root else "."),
        fix="Use a directory on a disk, or /dev/shm, that both machines share.",
      )
