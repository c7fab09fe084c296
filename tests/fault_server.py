# SPDX-License-Identifier: Apache-2.0
"""A fake rollout server that injects the faults a test scripts.

Runs an asyncio server in a thread. Faults are scripted per path and consumed in
order; probe requests use those of "/probe", if it is scripted:

  server.script["/generate"] = [Fault("reset"), Fault("status", 503)]
"""

import asyncio
import dataclasses
import json
import threading
from typing import Any

_FINE = '{"error": "e", "what": "No.", "why": "Because.", "fix": "Stop."}'


@dataclasses.dataclass
class Fault:
  """What happens to one request.

  `kind` is one of: status (with a code), busy (429, with Retry-After), hang,
  drip (seconds between bytes), truncate, reset, lose (processed, but no bytes
  are sent), garbage (bytes to send), edit (a function that changes the reply),
  die (processed, then killed before it replies), load (seconds until loaded).
  It happens `after_s` seconds after the request.
  """

  kind: str
  value: Any = None
  after_s: float = 0.0


class FaultServer:
  """Implements wire.py; every completion of p is [p[0], version + 1]."""

  def __init__(self, role="policy", max_model_len=64, tokenizer="t" * 64):
    self.script: dict[str, list[Fault]] = {}
    self.stuck: set[str] = set()  # Rows whose requests are never answered.
    self.requests: list[tuple[str, dict[str, Any]]] = []
    self.role, self.max_model_len, self.tokenizer = (
      role,
      max_model_len,
      tokenizer,
    )
    self.status, self.version, self.digest = "ok", 0, ""
    self.loading: int | None = None
    self.num_generated, self._answers = 0, {}
    self._writers: set[asyncio.StreamWriter] = set()
    self._loop = asyncio.new_event_loop()
    self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
    self._thread.start()
    self._server, self.port = None, 0
    self.start()

  @property
  def url(self):
    """The server's address."""
    return f"http://127.0.0.1:{self.port}"

  def start(self):
    """Listens on the same port as before."""
    self._server = self._run(
      asyncio.start_server(self._serve, "127.0.0.1", self.port)
    )
    self.port = self._server.sockets[0].getsockname()[1]

  def kill(self):
    """Aborts all connections and drops the pushed weights."""
    self._run(self._die())

  async def _die(self):
    self._server.close()
    for writer in list(self._writers):
      writer.transport.abort()
    self.version, self.digest, self._answers = 0, "", {}

  def close(self):
    """Stops the thread."""
    self.kill()

    async def end():
      others = asyncio.all_tasks() - {asyncio.current_task()}
      for task in others:
        task.cancel()
      await asyncio.gather(*others, return_exceptions=True)

    self._run(end())
    self._loop.call_soon_threadsafe(self._loop.stop)
    self._thread.join(5)
    self._loop.close()

  def paths(self):
    """Returns the paths of all requests, in order."""
    return [path for path, _ in self.requests]

  def _run(self, work):
    return asyncio.run_coroutine_threadsafe(work, self._loop).result(5)

  async def _serve(self, reader, writer):
    self._writers.add(writer)
    try:
      head = (await reader.readuntil(b"\r\n\r\n")).decode()
      _, path, _ = head.split("\r\n", 1)[0].split(" ")
      length = [
        int(line.split(":")[1])
        for line in head.lower().split("\r\n")
        if line.startswith("content-length:")
      ]
      raw = await reader.readexactly(length[0] if length else 0)
      body = json.loads(raw or "{}")
      self.requests.append((path, body))
      is_probe = body.get("prompts", [{}])[0].get("row_id") == "probe"
      name = "/probe" if is_probe and "/probe" in self.script else path
      faults = self.script.get(name, [])
      fault = faults.pop(0) if faults else None
      if self.stuck & {row["row_id"] for row in body.get("prompts", ())}:
        fault = Fault("hang")
      await asyncio.sleep(fault.after_s if fault else 0.0)
      await self._answer(writer, path, body, fault)
    except (asyncio.IncompleteReadError, ConnectionError):
      pass
    finally:
      self._writers.discard(writer)
      writer.close()

  async def _answer(self, writer, path, body, fault):
    kind, value = (fault.kind, fault.value) if fault else ("", None)
    if kind == "hang":
      await asyncio.sleep(3600)
    if kind == "reset":
      writer.transport.abort()
      return
    if kind in ("status", "busy"):
      code = 429 if kind == "busy" else value
      extra = f"Retry-After: {value}\r\n" if kind == "busy" else ""
      writer.write(_http(_FINE.encode(), code, extra))
      return
    if kind == "load":
      self.loading = body["version"]
      await asyncio.sleep(value)
      self.loading = None
    code, reply = self._reply(path, body)
    if kind == "die":
      await self._die()
      return
    if kind == "edit":
      value(reply)
    whole = _http(json.dumps(reply).encode(), code)
    if kind == "garbage":
      whole = _http(value)
    elif kind in ("truncate", "lose"):
      writer.write(whole[: len(whole) // 2 if kind == "truncate" else 0])
      return
    for i in range(len(whole) if kind == "drip" else 0):
      writer.write(whole[i : i + 1])
      await asyncio.sleep(value)
    writer.write(whole if kind != "drip" else b"")
    await writer.drain()

  def _reply(self, path, body):
    held = {
      "version": self.version,
      "digest": self.digest,
      "loading": self.loading,
    }
    if path == "/health":
      health = {
        "status": self.status,
        "role": self.role,
        "engine": "jax",
        "model": "fake",
        "max_model_len": self.max_model_len,
        "tokenizer_digest": self.tokenizer,
        "version": self.version,
        "num_running": 0,
        "num_waiting": 0,
      }
      return (200 if self.status == "ok" else 503), health
    if path == "/update_weights":
      self.version, self.digest = body["version"], body["digest"]
      return 200, {"version": self.version, "drain_s": 0.0, "load_s": 0.0}
    if path == "/generate":
      return self._generate(body)
    if path == "/close_communicator":
      return 200, {"message": "Closed."}
    return 200, held

  def _generate(self, body):
    if body["version"] not in (None, self.version):
      return 409, json.loads(_FINE)
    request_id = body["request_id"]
    if request_id not in self._answers:
      # Probes are not counted.
      self.num_generated += body["prompts"][0]["row_id"] != "probe"
      self._answers[request_id] = {
        "request_id": request_id,
        "version": self.version,
        "queue_s": 0.25,
        "completions": [
          [_completion(prompt, self.version, body["max_tokens"])] * body["n"]
          for prompt in body["prompts"]
        ],
      }
    return 200, json.loads(json.dumps(self._answers[request_id]))


def _completion(prompt, version, max_tokens):
  return {
    "token_ids": [prompt["token_ids"][0], version + 1][:max_tokens],
    "logprobs": [-0.5, -1.0][:max_tokens],
    "model_logprobs": None,
    "finish_reason": "stop",
  }


def _http(body, code=200, extra=""):
  head = (
    f"HTTP/1.1 {code} X\r\nContent-Type: application/json\r\n{extra}"
    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
  )
  return head.encode() + body
