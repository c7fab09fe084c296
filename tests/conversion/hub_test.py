# SPDX-License-Identifier: Apache-2.0
"""A model is downloaded by revision, without code or pickled weights."""

from collections.abc import Iterator
import contextlib
import functools
import hashlib
import http.server
import json
import os
import threading

import huggingface_hub
from huggingface_hub import constants
import pytest

from conversion import load

_COMMIT = "c0ffee" * 6 + "abcd"
_FILES = {
  "config.json": b"{}",
  "model.safetensors": b"weights",
  "tokenizer.json": b"{}",
  "modeling_own.py": b"raise SystemExit",
  "pytorch_model.bin": b"\x80\x04.",
  "original/model.pth": b"\x80\x04.",
}


class _Hub(http.server.BaseHTTPRequestHandler):
  """Serves one repository and records the requests."""

  asked: list[str]

  def do_HEAD(self) -> None:
    self._answer(with_body=False)

  def do_GET(self) -> None:
    self._answer(with_body=True)

  def log_message(self, *_: object) -> None:
    pass

  def _answer(self, *, with_body: bool) -> None:
    self.asked.append(self.path)
    name = self.path.partition(f"/resolve/{_COMMIT}/")[2]
    if "/revision/" in self.path:
      names = [{"rfilename": name} for name in _FILES]
      body = json.dumps({"id": "o/n", "sha": _COMMIT, "siblings": names})
      body = body.encode()
    elif "/tree/" in self.path:
      body = json.dumps(
        [
          {"type": "file", "path": name, "size": len(data), "oid": "0"}
          for name, data in _FILES.items()
        ]
      ).encode()
    else:
      body = _FILES[name]
    self.send_response(200)
    self.send_header("Content-Length", str(len(body)))
    self.send_header("X-Repo-Commit", _COMMIT)
    self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
    self.end_headers()
    if with_body:
      self.wfile.write(body)


@contextlib.contextmanager
def _serving(handler: type[_Hub]) -> Iterator[str]:
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
  thread = threading.Thread(target=server.serve_forever)
  thread.start()
  try:
    yield f"http://127.0.0.1:{server.server_port}"
  finally:
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("revision", ["", "v1", _COMMIT])
def test_code_and_pickled_weights_are_not_downloaded(
  tmp_path, monkeypatch, revision
):
  handler = type("Hub", (_Hub,), {"asked": []})
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
  with _serving(handler) as endpoint:
    monkeypatch.setattr(
      huggingface_hub,
      "snapshot_download",
      functools.partial(
        huggingface_hub.snapshot_download,
        endpoint=endpoint,
        cache_dir=tmp_path,
      ),
    )
    found = load.resolve(f"o/n@{revision}" if revision else "o/n")
  wanted = {"config.json", "model.safetensors", "tokenizer.json"}
  assert set(os.listdir(found)) == wanted
  assert found.name == _COMMIT
  fetched = {path.rpartition("/")[2] for path in handler.asked}
  assert not fetched & {"modeling_own.py", "pytorch_model.bin", "model.pth"}
  assert any(f"/{revision or 'main'}" in path for path in handler.asked)
