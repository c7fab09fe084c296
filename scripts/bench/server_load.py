# SPDX-License-Identifier: Apache-2.0
"""Measures how long /health takes while a rollout server is flooded.

  python -m scripts.serve --engine=jax --role=policy --model=DIR &
  python -m scripts.bench.server_load --url=http://127.0.0.1:8765

Each load is sent by a separate process. Meanwhile /health is requested every
50 ms, each time on a new connection. The token comes from the environment, as
for all clients.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import http.client
import json
import multiprocessing
import os
import statistics
import time
import urllib.parse

from absl import flags
import httpx2

from rollout import tokens
from scripts import program

_URL = flags.DEFINE_string(
  "url", "http://127.0.0.1:8765", "Address of the server."
)
_MIN_S = flags.DEFINE_float("min_s", 5.0, "Shortest time to measure a load.")
_MAX_S = flags.DEFINE_float("max_s", 60.0, "Longest time to measure a load.")
_PERIOD_S = 0.05
_NUM_SLOW, _SLOW_S, _SLOW_PIECES = 40, 0.5, 40
_WORDS = "to be or not to be, "
_ROW = "| {:<22} | {:>8} | {:>9} | {:>8} | {:>8} | {} |"


def main() -> None:
  """Prints a table of latencies, one row per load."""
  print(
    _ROW.format("load", "requests", "median ms", "99 % ms", "max ms", "answers")
  )
  print("|---|--:|--:|--:|--:|---|")
  for name, send in (
    ("none", None),
    ("4 bodies of 31 MiB", _send_large),
    ("4 of 8 M numbers", _send_dense),
    ("4 of 0.5 M tokens", _send_tokens),
    (f"{_NUM_SLOW} slow bodies", _send_slow),
    ("1 text of 30 MB", _send_long_text),
    ("4 texts of 1 MB", _send_texts),
  ):
    _measure(name, send)


def _measure(name: str, send: Callable[[str], list[str]] | None) -> None:
  """Sends a load from a separate process and prints the latencies."""
  seconds: list[float] = []
  spawning = multiprocessing.get_context("spawn")
  with contextlib.ExitStack() as opened:
    sending = None
    if send is not None:
      pool = opened.enter_context(
        concurrent.futures.ProcessPoolExecutor(1, mp_context=spawning)
      )
      pool.submit(time.sleep, 0).result()  # Starts the process.
      sending = pool.submit(send, _URL.value)
    start = time.perf_counter()
    while (passed_s := time.perf_counter() - start) < _MAX_S.value and (
      passed_s < _MIN_S.value or (sending and not sending.done())
    ):
      seconds.append(_health_s())
      time.sleep(_PERIOD_S)
    answers = sorted(sending.result()) if sending else []
  milliseconds = sorted(1000 * s for s in seconds)
  print(
    _ROW.format(
      name,
      len(milliseconds),
      f"{statistics.median(milliseconds):.1f}",
      f"{milliseconds[int(0.99 * (len(milliseconds) - 1))]:.1f}",
      f"{milliseconds[-1]:.1f}",
      ", ".join(f"{answers.count(a)} x {a}" for a in dict.fromkeys(answers))
      or "-",
    ),
    flush=True,
  )


def _health_s() -> float:
  """Returns how long one request of /health takes."""
  address = urllib.parse.urlsplit(_URL.value).netloc
  start = time.perf_counter()
  # Not httpx2, which reads the CA certificates for 50 ms.
  with (
    contextlib.closing(
      http.client.HTTPConnection(address, timeout=_MAX_S.value)
    ) as server,
    contextlib.suppress(TimeoutError),
  ):
    server.request("GET", "/health", headers=_headers())
    server.getresponse().read()
  return time.perf_counter() - start


def _headers() -> dict[str, str]:
  token = tokens.of_environment(os.environ)
  headers = {"Content-Type": "application/json"}
  return headers | ({"Authorization": f"Bearer {token}"} if token else {})


def _client(url: str) -> httpx2.Client:
  return httpx2.Client(
    base_url=url,
    headers=_headers(),
    timeout=600.0,
    limits=httpx2.Limits(max_connections=None),
    trust_env=False,
  )


def _send_large(url: str) -> list[str]:
  """Sends more bytes than the limit."""
  return _post_all(url, _prompts(31 * 2**20 // 6, 1000), 4)


def _send_dense(url: str) -> list[str]:
  """Sends more numbers than the limit, in fewer bytes than the limit."""
  prompt = {"row_id": "x", "token_ids": [1] * 8_000_000}
  return _post_all(url, [prompt], 4, separators=(",", ":"))


def _send_tokens(url: str) -> list[str]:
  """Sends almost as many tokens as the limit; the last prompt is invalid."""
  invalid = {"row_id": "x", "token_ids": [10**9]}
  return _post_all(url, [*_prompts(500_000, 1000), invalid], 4)


def _send_long_text(url: str) -> list[str]:
  return _post_all(url, [{"row_id": "x", "text": _WORDS * 1_500_000}], 1)


def _send_texts(url: str) -> list[str]:
  """Sends almost as many characters as the limit; too many tokens."""
  return _post_all(url, [{"row_id": "x", "text": _WORDS * 50_000}], 4)


def _prompts(num_tokens: int, length: int) -> list[dict[str, object]]:
  prompt = {"row_id": "x", "token_ids": list(range(length, 2 * length))}
  return [prompt] * (num_tokens // length)


def _post_all(
  url: str,
  prompts: list[dict[str, object]],
  count: int,
  separators: tuple[str, str] = (", ", ": "),
) -> list[str]:
  """Posts a request `count` times at once; returns how each was answered."""
  request = {
    "request_id": "x",
    "prompts": prompts,
    "n": 1,
    "max_tokens": 8,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 0,
  }
  content = json.dumps(request, separators=separators).encode()

  def post(number: int) -> str:
    # Another id makes another request.
    own = content.replace(b'"x"', f'"{number}"'.encode(), 1)
    try:
      return str(server.post("/generate", content=own).status_code)
    except httpx2.TransportError as error:
      return type(error).__name__

  with (
    _client(url) as server,
    concurrent.futures.ThreadPoolExecutor(count) as pool,
  ):
    return list(pool.map(post, range(count)))


def _send_slow(url: str) -> list[str]:
  """Sends bodies of 1 MiB in pieces, with pauses."""
  piece = b" " * (2**20 // _SLOW_PIECES)

  def pieces() -> Iterator[bytes]:
    for _ in range(_SLOW_PIECES):
      yield piece
      time.sleep(_SLOW_S)

  def post(number: int) -> str:
    del number
    length = {"Content-Length": str(len(piece) * _SLOW_PIECES)}
    try:
      reply = server.post("/generate", content=pieces(), headers=length)
      return str(reply.status_code)
    except httpx2.TransportError as error:
      return type(error).__name__

  with (
    _client(url) as server,
    concurrent.futures.ThreadPoolExecutor(_NUM_SLOW) as pool,
  ):
    return list(pool.map(post, range(_NUM_SLOW)))


if __name__ == "__main__":
  program.run(main)
