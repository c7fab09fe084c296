# SPDX-License-Identifier: Apache-2.0
"""Tokens are required except on loopback; ports are bound first."""

import os
import signal
import socket

import pytest

from atlas_jax import errors
from rollout import tokens
from rollout.server import admission, listen

_TOKEN = "0123456789abcdef"


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
  for name in (tokens.VARIABLE, tokens.ADMIN_VARIABLE, tokens.FILE_VARIABLE):
    monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_accepts_but_does_not_require_a_token(host, monkeypatch):
  assert listen.read_token(host, None, os.environ) is None
  monkeypatch.setenv(tokens.VARIABLE, _TOKEN)
  assert listen.read_token(host, None, os.environ) == _TOKEN


@pytest.mark.parametrize(
  "host", ["0.0.0.0", "::", "10.0.0.1", "", "localhost.example", "127.1"]
)
def test_other_hosts_need_a_token(host, monkeypatch, tmp_path):
  with pytest.raises(errors.ConfigError, match="A token is required") as caught:
    listen.read_token(host, None, os.environ)
  assert caught.value.exit_code == 2
  monkeypatch.setenv(tokens.VARIABLE, _TOKEN)
  assert listen.read_token(host, None, os.environ) == _TOKEN
  (tmp_path / "token").write_text(f"{_TOKEN}x\n")
  assert listen.read_token(host, tmp_path / "token", os.environ) == _TOKEN + "x"


@pytest.mark.parametrize("text", ["", "short", "\u00e9" * 20])
def test_a_file_without_a_valid_token_is_rejected(tmp_path, text):
  (tmp_path / "token").write_text(text)
  for file in (tmp_path / "token", tmp_path / "absent"):
    with pytest.raises(errors.ConfigError):
      listen.read_token("127.0.0.1", file, os.environ)


def test_the_admin_token_must_differ_from_the_user_token(monkeypatch):
  environ = os.environ
  nobody = admission.Tokens(None, None)
  assert listen.read_tokens("127.0.0.1", None, environ) == nobody
  for user, admin in [("", _TOKEN), (_TOKEN, _TOKEN), (_TOKEN, "short")]:
    monkeypatch.setenv(tokens.VARIABLE, user)
    monkeypatch.setenv(tokens.ADMIN_VARIABLE, admin)
    with pytest.raises(errors.ConfigError, match=r"different|at least 16"):
      listen.read_tokens("127.0.0.1", None, environ)
  other = _TOKEN[::-1]
  monkeypatch.setenv(tokens.ADMIN_VARIABLE, other)
  assert listen.read_tokens("10.0.0.1", None, os.environ) == admission.Tokens(
    _TOKEN, other
  )
  # A trainer needs only the admin token, which grants access to everything.
  assert tokens.of_environment(os.environ) == other


def test_the_environment_may_name_a_file(tmp_path):
  file = tmp_path / "token"
  file.write_text(f"{_TOKEN}\n")
  environ = {tokens.FILE_VARIABLE: str(file)}
  assert listen.read_token("127.0.0.1", None, environ) == _TOKEN
  assert tokens.of_environment(environ) == _TOKEN
  both = {**environ, tokens.VARIABLE: "x" * 16}
  assert listen.read_token("127.0.0.1", None, both) == "x" * 16
  assert tokens.of_environment(both) == "x" * 16
  file.write_text("")
  # An empty file must not open the server.
  with pytest.raises(errors.ConfigError):
    listen.read_token("127.0.0.1", None, environ)


def test_a_port_in_use_is_reported_with_the_next_free_one():
  with listen.bind("127.0.0.1", 0) as first:
    port = first.getsockname()[1]
    first.listen()
    with pytest.raises(errors.ConfigError, match=str(port)) as caught:
      listen.bind("127.0.0.1", port)
    free = int(caught.value.fix.split("--port=")[1].split(",")[0])
    assert free > port
    listen.bind("127.0.0.1", free).close()


# 192.0.2.1 is reserved for documentation.
@pytest.mark.parametrize(
  ("host", "port"), [("127.0.0.1", 70_000), ("192.0.2.1", 8765)]
)
def test_invalid_addresses_are_rejected(host, port):
  with pytest.raises(errors.ConfigError, match="Cannot listen"):
    listen.bind(host, port)


def test_ipv6_addresses_can_be_bound():
  with listen.bind("::1", 0) as bound:
    assert bound.family == socket.AF_INET6


def test_an_unknown_host_is_resolved_once(monkeypatch):
  asked = []

  def fail(host, *_, **__):
    asked.append(host)
    raise socket.gaierror("not known")

  monkeypatch.setattr(socket, "getaddrinfo", fail)
  with pytest.raises(errors.ConfigError, match="Cannot resolve"):
    listen.bind("host.invalid", 8765)
  assert asked == ["host.invalid"]


def test_a_bound_port_accepts_no_connection_before_listening():
  with (
    listen.bind("127.0.0.1", 0) as bound,
    pytest.raises(ConnectionRefusedError),
  ):
    socket.create_connection(bound.getsockname())


def test_sigterm_leaves_the_block_without_an_error():
  before = signal.getsignal(signal.SIGTERM)
  reached = []
  with listen.stoppable():
    os.kill(os.getpid(), signal.SIGTERM)
    reached.append("not here")
  assert reached == []
  assert signal.getsignal(signal.SIGTERM) is before
