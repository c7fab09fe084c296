# SPDX-License-Identifier: Apache-2.0
"""Reads request bodies within limits, and parses them off the event loop.

A thread parses one body after the other. The parser does not release Python's
lock, so what it may parse at once is bounded too.
"""

import asyncio
import concurrent.futures
import dataclasses
import hashlib
from typing import Generic, TypeVar

import fastapi
import pydantic
import pydantic_core

from rollout import wire
from rollout.server import refusal

_Message = TypeVar("_Message", bound=pydantic.BaseModel)

_BODY_S = 60.0  # Limit for a whole body to arrive.
_RETRY_AFTER_S = 1
# What JSON may contain, by character. Objects and their keys take ten times as
# long to parse as numbers.
_MAX_COUNTS = {b",": wire.MAX_COMMAS, b"[": 2**17, b"{": 2**17, b":": 2**17}
_SLICE = 2**20  # Bytes; between slices the event loop can run.
_MAX_SHOWN = 8  # Invalid fields in a response.


@dataclasses.dataclass(frozen=True)
class Body(Generic[_Message]):
  """A parsed body, and the digest of its bytes."""

  message: _Message
  digest: str


class Bodies:
  """The bodies that are being received or parsed."""

  def __init__(self, *, max_bytes: int, max_total_bytes: int) -> None:
    """Sets the limits of one body and of all unfinished ones together."""
    self._max_bytes, self._max_total_bytes = max_bytes, max_total_bytes
    self._num_bytes = 0
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "bodies")

  async def receive(
    self, request: fastapi.Request, kind: type[_Message]
  ) -> Body[_Message]:
    """Receives and parses the body of a request.

    Raises:
      refusal.RefusalError: if it is too large, too slow or invalid, or there
        are too many unfinished bodies.
      starlette.requests.ClientDisconnect: if the client disconnects before the
        body is complete.
    """
    headers = request.headers
    kind_sent = headers.get("content-type", "").partition(";")[0]
    if kind_sent.strip().lower() != "application/json":
      raise _not_json(kind_sent)
    if "transfer-encoding" in headers:
      raise _chunked()
    if int(headers.get("content-length", 0)) > self._max_bytes:
      raise self._too_large()
    body = bytearray()
    try:
      async with asyncio.timeout(_BODY_S):
        async for chunk in request.stream():
          body += chunk
          self._num_bytes += len(chunk)
          if self._num_bytes > self._max_total_bytes:
            raise _too_many()
      loop = asyncio.get_running_loop()
      return await loop.run_in_executor(self._thread, parse, body, kind)
    except TimeoutError as error:
      raise _too_slow() from error
    finally:
      self._num_bytes -= len(body)

  def _too_large(self) -> refusal.RefusalError:
    return refusal.RefusalError(
      413,
      "limit",
      what=f"The request body exceeds {self._max_bytes} bytes.",
      why="The limit is --max_body_bytes.",
      fix="Send fewer prompts per request.",
    )


def parse(body: bytearray, kind: type[_Message]) -> Body[_Message]:
  """Parses a body.

  Raises:
    refusal.RefusalError: if it is invalid, or too much to parse at once. The
      error names fields, but not their values, which may contain a prompt.
  """
  for character, limit in _MAX_COUNTS.items():
    count = sum(
      body.count(character, i, i + _SLICE) for i in range(0, len(body), _SLICE)
    )
    if count > limit:
      raise refusal.RefusalError(
        422,
        "limit",
        what=f"A body may contain {character.decode()!r} at most {limit} "
        f"times, got {count}.",
        why="The limit bounds how long the server parses one request.",
        fix="Send fewer prompts per request.",
      )
  try:
    # Two calls: between them the event loop can run.
    values = pydantic_core.from_json(bytes(body))
    message = kind.model_validate(values)
  except pydantic.ValidationError as error:
    shown = error.errors(
      include_url=False, include_context=False, include_input=False
    )[:_MAX_SHOWN]
    why = "; ".join(
      f"{'.'.join(map(str, ('body', *one['loc'])))}: {one['msg']}"
      for one in shown
    )
    raise _invalid(why) from error
  except ValueError as error:
    # The message of a syntax error contains a position only.
    raise _invalid(f"The body is not JSON: {error}") from error
  return Body(message, hashlib.sha256(body).hexdigest())


def _invalid(why: str) -> refusal.RefusalError:
  return refusal.RefusalError(
    422,
    "invalid",
    what="Invalid request.",
    why=why,
    fix="See GET /docs for the fields.",
  )


def _not_json(kind: str) -> refusal.RefusalError:
  return refusal.RefusalError(
    415,
    "content_type",
    what=f"Content-Type must be application/json, got {kind[:64]!r}.",
    why="Any website may send other types from a browser on this machine.",
    fix="Send the header Content-Type: application/json.",
  )


def _chunked() -> refusal.RefusalError:
  return refusal.RefusalError(
    411,
    "chunked",
    what="The length of the body is unknown.",
    why="Chunks of one byte would take minutes to receive.",
    fix="Send Content-Length instead of Transfer-Encoding.",
  )


def _too_slow() -> refusal.RefusalError:
  return refusal.RefusalError(
    408,
    "too_slow",
    what="Timed out while receiving the request body.",
    why=f"The whole body must arrive within {_BODY_S:g} s.",
    fix="Send fewer prompts per request, or check the network.",
  )


def _too_many() -> refusal.RefusalError:
  return refusal.RefusalError(
    503,
    "bodies",
    what="Too many request bodies are being received.",
    why="Together they exceed --max_total_body_bytes.",
    fix="Retry later, or add servers.",
    retry_after_s=_RETRY_AFTER_S,
  )
