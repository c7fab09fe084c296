# SPDX-License-Identifier: Apache-2.0
"""From an app to a process that listens, and ends when it is asked to."""

import asyncio
from collections.abc import Callable, Iterator
import contextlib
import ipaddress
import math
import os
import pathlib
import signal
import socket

from absl import logging
import fastapi
import h11
import uvicorn
from uvicorn.protocols.http import h11_impl

from atlas_jax import errors
from rollout.server import admission

TOKEN_VARIABLE = "ATLAS_ROLLOUT_TOKEN"
ADMIN_TOKEN_VARIABLE = "ATLAS_ROLLOUT_ADMIN_TOKEN"
_HEAD_S = 20.0  # For the head of a request to arrive, and before its first.
_MIN_TOKEN_CHARACTERS = 16


def read_token(host: str, file: pathlib.Path | None) -> str | None:
  """Finds the token which clients must send.

  Args:
    host: where the server will listen.
    file: holds the token; None for the environment variable. Never an argument
      of the command line, where every user of the machine would see it.

  Returns:
    The token, or None if there is none and only this machine can connect.

  Raises:
    errors.ConfigError: if there is none and others can connect, or it is too
      short to be one.
  """
  try:
    text = (
      file.read_text(encoding="utf-8")
      if file
      else os.environ.get(TOKEN_VARIABLE, "")
    )
  except (OSError, ValueError) as error:
    raise errors.ConfigError(
      "The token cannot be read.",
      where=f"--token_file={file}",
      why=str(error),
      fix="Give a file that this user may read.",
    ) from error
  token = text.strip()
  if not token and not file and is_loopback(host):
    return None
  _check_token(token, where=f"--host={host}")
  return token


def read_tokens(host: str, file: pathlib.Path | None) -> admission.Tokens:
  """Finds the token of those who sample, and of those who replace weights.

  The second is `ADMIN_TOKEN_VARIABLE` and may be left out: then the first, see
  `read_token`, opens everything.

  Raises:
    errors.ConfigError: if one is missing or too short, or both are the same.
  """
  user = read_token(host, file)
  admin = os.environ.get(ADMIN_TOKEN_VARIABLE, "").strip() or None
  if admin is not None:
    _check_token(admin, where=ADMIN_TOKEN_VARIABLE)
    if user is None or user == admin:
      raise errors.ConfigError(
        "The admin's token separates nobody.",
        where=ADMIN_TOKEN_VARIABLE,
        why=f"{TOKEN_VARIABLE} is " + ("not set." if user is None else "it."),
        fix=f"Set {TOKEN_VARIABLE} to another token, or only that one.",
      )
  return admission.Tokens(user=user, admin=admin)


def bind(host: str, port: int) -> socket.socket:
  """Takes the port before anything slow is done; nobody can connect yet.

  Raises:
    errors.ConfigError: if it is taken, naming the next free one.
  """
  where = f"--host={host} --port={port}"
  try:
    family, kind, _, _, address = socket.getaddrinfo(
      host, None, type=socket.SOCK_STREAM
    )[0]
  except OSError as error:
    raise errors.ConfigError(
      f"The host {host!r} is unknown.",
      where=where,
      why=str(error),
      fix="Use an address of this machine, such as 127.0.0.1.",
    ) from error

  def take(port: int) -> socket.socket:
    bound = socket.socket(family, kind)
    # What a closed connection leaves behind is no obstacle.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      bound.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError):
      bound.close()
      raise
    return bound

  try:
    return take(port)
  except (OSError, OverflowError) as error:
    raise errors.ConfigError(
      f"Cannot listen on port {port}.",
      where=where,
      why=str(error),
      fix=_advice(take, port),
    ) from error


async def serve(
  app: fastapi.FastAPI, bound: socket.socket, *, drain_s: float
) -> None:
  """Listens until SIGTERM or SIGINT, then lets what runs come to its end.

  Args:
    app: what is served.
    bound: see `bind`.
    drain_s: how long running requests may take after the signal.
  """
  config = uvicorn.Config(
    app,
    http=_Impatient,
    log_level="warning",
    # One line per request of ours says more than an access log.
    access_log=False,
    timeout_graceful_shutdown=math.ceil(drain_s),
  )
  await uvicorn.Server(config).serve(sockets=[bound])


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
  """Makes SIGTERM end the block, at any point, as Ctrl-C does, and no more.

  While `serve` listens, it has both signals for itself.
  """

  def stop(number: int, frame: object) -> None:
    del number, frame
    raise KeyboardInterrupt

  signals = (signal.SIGTERM, signal.SIGINT)
  old = {number: signal.signal(number, stop) for number in signals}
  try:
    yield
  except KeyboardInterrupt:
    logging.info("Stopped.")
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


def is_loopback(host: str) -> bool:
  """Whether only this machine can reach what listens on `host`."""
  try:
    return host == "localhost" or ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _check_token(token: str, *, where: str) -> None:
  if len(token) < _MIN_TOKEN_CHARACTERS or not token.isascii():
    raise errors.ConfigError(
      "A token is needed to listen here."
      if not token
      else "The token is not one.",
      where=where,
      why="Whoever reaches the server can use it and replace its weights; "
      f"a token has at least {_MIN_TOKEN_CHARACTERS} ASCII characters.",
      fix=f"Set {TOKEN_VARIABLE} (openssl rand -hex 32) or --token_file on "
      "both sides, or listen on --host=127.0.0.1.",
    )


class _Impatient(h11_impl.H11Protocol):
  """Hangs up on who does not get to the end of a request's head.

  uvicorn itself waits for ever: for the first byte, and for each after it.
  """

  _hang_up: asyncio.TimerHandle | None = None

  def connection_made(self, transport: asyncio.Transport) -> None:
    super().connection_made(transport)
    self._wait_for_head()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    self._wait_for_head()

  def connection_lost(self, exc: Exception | None) -> None:
    super().connection_lost(exc)
    self._stop_waiting()

  def _wait_for_head(self) -> None:
    if self.conn.their_state is not h11.IDLE:
      self._stop_waiting()
    elif self._hang_up is None:
      self._hang_up = self.loop.call_later(_HEAD_S, self.transport.abort)

  def _stop_waiting(self) -> None:
    if self._hang_up is not None:
      self._hang_up.cancel()
      self._hang_up = None


def _advice(take: Callable[[int], socket.socket], port: int) -> str:
  """Names the next free port, if one of the next hundred is."""
  for other in range(port + 1, port + 101):
    with contextlib.suppress(OSError, OverflowError), take(other):
      return f"Use --port={other}, or stop what listens there."
  return "Use a --port below 65536, and a --host of this machine."
