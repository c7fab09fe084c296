# SPDX-License-Identifier: Apache-2.0
"""Tests the file that passes a token from the launcher to its processes."""

import stat

import pytest

from atlas_jax import errors
from rollout import tokens


def test_a_new_file_is_private_and_removed(tmp_path):
  directory = tmp_path / "servers"
  seen = []
  for _ in range(2):
    with tokens.new_file(directory) as path:
      assert stat.S_IMODE(path.stat().st_mode) == 0o600
      seen.append(tokens.read(path))
    assert not path.exists()
  assert len(set(seen)) == 2
  assert all(len(token) == 64 for token in seen)


def test_the_file_of_a_killed_launcher_is_replaced(tmp_path):
  secret = tmp_path / "secret"
  secret.write_text("old")
  (tmp_path / "token").symlink_to(secret)
  with tokens.new_file(tmp_path) as path:
    assert not path.is_symlink()
  assert secret.read_text() == "old"


def test_a_missing_file_is_reported_by_its_path(tmp_path):
  environ = {tokens.FILE_VARIABLE: str(tmp_path / "absent")}
  with pytest.raises(errors.ConfigError, match="token file") as caught:
    tokens.of_environment(environ)
  assert "absent" in caught.value.where
  assert tokens.of_environment({}) is None
