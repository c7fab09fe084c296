# SPDX-License-Identifier: Apache-2.0
"""Tests how the launcher passes a token to servers and training."""

import pathlib

import pytest

from rollout import supervisor, tokens
from scripts import launch_servers


@pytest.fixture(autouse=True)
def _no_token(monkeypatch):
  for name in (tokens.VARIABLE, tokens.ADMIN_VARIABLE, tokens.FILE_VARIABLE):
    monkeypatch.delenv(name, raising=False)


def _command(name):
  return supervisor.Command(name, ("run", name), {"A": "b"}, None, 1.0)


_SERVER = supervisor.Server("policy", "http://127.0.0.1:1", _command("server"))


def test_servers_and_training_get_the_path_of_one_token(tmp_path):
  with launch_servers.share_token(
    [_SERVER], _command("training"), tmp_path
  ) as ((server,), training):
    commands = (server.command, training)
    found = {tokens.of_environment(command.env) for command in commands}
    (token,) = found
    assert len(token) == 64
    for command, name in zip(commands, ("server", "training"), strict=True):
      assert command.argv == ("run", name)
      assert command.env["A"] == "b"
      assert token not in str(command.env)
  assert not pathlib.Path(training.env[tokens.FILE_VARIABLE]).exists()


def test_a_given_token_and_servers_that_run_elsewhere_are_left_alone(
  tmp_path, monkeypatch
):
  training = _command("training")
  shared = launch_servers.share_token([], training, tmp_path)
  with shared as (servers, same):
    assert (servers, same) == ([], training)
  monkeypatch.setenv(tokens.VARIABLE, "x" * 16)
  shared = launch_servers.share_token([_SERVER], training, tmp_path)
  with shared as (servers, same):
    assert (servers, same) == ([_SERVER], training)
  assert not list(tmp_path.iterdir())
