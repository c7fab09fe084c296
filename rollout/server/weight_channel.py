# SPDX-License-Identifier: Apache-2.0
"""The weight channel: controls who may replace a server's weights.

A trainer opens the channel with its id, tensor shapes and tokenizer digest. No
other trainer can open it until it is closed or the trainer's heartbeat expires.
Versions increase within a channel. A new channel may start at any version: a
resumed trainer returns to its last checkpoint.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import pathlib
import time

from absl import logging

from rollout import manifest, process_name, wire
from rollout.server import refusal


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
    """Creates a closed channel.

    Args:
      role: of the server; a student's weights are never replaced.
      shapes: tensor names and shapes of the served model.
      tokenizer_digest: see `manifest.tokenizer_digest`.
      allowed_root: weights must be below this directory; None to allow any.
      clock: returns the time in seconds.
    """
    self._role, self._shapes = role, dict(shapes)
    self._tokenizer_digest = tokenizer_digest
    self._allowed_root, self._clock = allowed_root, clock
    self._open: wire.InitRequest | None = None
    self._heard_at, self._num_working = 0.0, 0
    self._last: int | None = None  # Last version pushed through this channel.
    self._held = wire.Version(version=0, digest="")
    self._loading: int | None = None

  @property
  def trainer_id(self) -> str | None:
    """The trainer that holds the channel; None if closed or it was lost."""
    if self._open and (why := self._lost(self._open)):
      logging.warning(
        "Closed the weight channel: trainer %r %s.", self._open.trainer_id, why
      )
      self._open = None
    return self._open.trainer_id if self._open else None

  @property
  def held(self) -> wire.Version:
    """The version that is loaded, and the one being loaded, if any."""
    return self._held.model_copy(update={"loading": self._loading})

  @contextlib.contextmanager
  def loading(self, version: int) -> Iterator[None]:
    """Marks `version` as being loaded; the channel stays with its trainer."""
    self._loading = version
    try:
      yield
    finally:
      self._loading = None

  @contextlib.contextmanager
  def working(self) -> Iterator[None]:
    """Suspends the heartbeat timeout while a request is processed."""
    self._num_working += 1
    try:
      yield
    finally:
      self._num_working -= 1
      self._heard()

  def init(self, request: wire.InitRequest) -> None:
    """Opens the channel; a repeated call by the same trainer is a heartbeat.

    Raises:
      refusal.RefusalError: if another trainer holds the channel, or the role,
        the tokenizer or the weights root does not match.
      errors.CheckpointError: if the tensors differ; lists the differences.
    """
    self._check_holder(request.trainer_id)
    if request.role != self._role:
      raise refusal.RefusalError(
        409,
        "role",
        what=f"This server is a {self._role}, not a {request.role}.",
        why="Policy and student weights are served by separate servers.",
        fix=f"Use the address of a server started with --role={request.role}.",
      )
    if request.tokenizer_digest != self._tokenizer_digest:
      raise refusal.RefusalError(
        409,
        "tokenizer",
        what="The server's tokenizer differs from the trainer's.",
        why=f"Its digest is {self._tokenizer_digest[:12]}, the trainer's "
        f"{request.tokenizer_digest[:12]}: token ids or chat templates would "
        "not match.",
        fix="Start server and trainer with the same model directory.",
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
    """Validates an update request.

    Returns:
      The directory that versions are pushed to, or None if this version is
      already loaded.

    Raises:
      refusal.RefusalError: if the server is a student, the trainer does not
        hold the channel, or the version is not newer than the last one.
    """
    if self._role == "student":
      raise refusal.RefusalError(
        409,
        "frozen",
        what="A student's weights are never replaced.",
        why="Rewards are comparable only if measured on a fixed student.",
        fix="Push to servers started with --role=policy.",
      )
    self._check_holder(request.trainer_id)
    if self._open is None:
      raise refusal.RefusalError(
        409,
        "no_channel",
        what="No weight channel is open.",
        why="It was never opened, or the trainer's heartbeat expired.",
        fix="POST /init_communicator first, and repeat it as a heartbeat.",
      )
    self._heard()
    asked = wire.Version(version=request.version, digest=request.digest)
    if asked == self._held:
      self._last = asked.version
      return None
    if self._last is not None and request.version <= self._last:
      raise refusal.RefusalError(
        409,
        "stale",
        what=f"Version {request.version} is not newer than {self._last}.",
        why="A late or repeated push must not overwrite newer weights.",
        fix="Push a version larger than that of GET /version.",
      )
    return pathlib.Path(self._open.weights_root)

  @property
  def shapes(self) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of the tensors that every push must contain."""
    return self._shapes

  def publish(self, request: wire.UpdateRequest) -> None:
    """Records that the weights of this update are loaded."""
    self._held = wire.Version(version=request.version, digest=request.digest)
    self._last = request.version
    self._heard()

  def close(self, request: wire.CloseRequest) -> bool:
    """Closes the channel; returns whether it was open.

    Raises:
      refusal.RefusalError: if another trainer holds it.
    """
    self._check_holder(request.trainer_id)
    was_open, self._open = self._open is not None, None
    return was_open

  def _heard(self) -> None:
    self._heard_at = self._clock()

  def _lost(self, held: wire.InitRequest) -> str:
    """Returns how the trainer was lost, or "" if it may be alive."""
    if self._silence_s() > held.heartbeat_s:
      return f"sent no heartbeat for {self._silence_s():.1f} s"
    # A load in progress finishes first: another trainer must not interfere.
    if self._loading is None and process_name.has_ended(held.process):
      return "exited without closing it"
    return ""

  def _silence_s(self) -> float:
    return 0.0 if self._num_working else self._clock() - self._heard_at

  def _check_holder(self, trainer_id: str) -> None:
    holder = self.trainer_id
    if holder is not None and holder != trainer_id:
      raise refusal.RefusalError(
        409,
        "other_trainer",
        what="Another trainer holds the weight channel.",
        why="Two trainers would overwrite each other's weights.",
        fix="Stop the other run, or start separate servers for each run.",
      )

  def _check_root(self, weights_root: str) -> None:
    root = pathlib.Path(weights_root)
    try:
      is_valid = root.is_absolute() and root.is_dir()
      if self._allowed_root is not None:
        allowed = self._allowed_root.resolve()
        is_valid = is_valid and root.resolve().is_relative_to(allowed)
    except OSError:  # A name that is too long, or a forbidden directory.
      is_valid = False
    if not is_valid:
      raise refusal.RefusalError(
        409,
        "weights_root",
        what=f"Invalid weights_root {weights_root!r}.",
        why="It must be the absolute path of a directory on the server"
        + (f", below {self._allowed_root}." if self._allowed_root else "."),
        fix="Use a directory that trainer and server share: a network disk, or "
        "/dev/shm on one machine.",
      )
