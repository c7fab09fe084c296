# SPDX-License-Identifier: Apache-2.0
"""The two commands of the converter."""

from absl import app
import pytest

from scripts import convert
from tests import tiny


def test_inspect_lists_every_tensor(tmp_path, capsys):
  tiny.write_checkpoint(tmp_path / "hf", "qwen2", dtype="bfloat16")
  convert.main(["convert", "inspect", str(tmp_path / "hf")])
  out = capsys.readouterr().out
  assert "1,554  bfloat16  (37, 21)             lm_head.weight\n" in out
  assert out.endswith("bytes in 27 tensors\n")


def test_verify_tells_equal_from_different(tmp_path, capsys):
  a, b = str(tmp_path / "a"), str(tmp_path / "b")
  tiny.write_checkpoint(tmp_path / "a", "llama")
  tiny.write_checkpoint(tmp_path / "b", "llama", dtype="bfloat16")
  convert.main(["convert", "verify", a, a])
  assert "equal" in capsys.readouterr().out
  with pytest.raises(SystemExit) as caught:
    convert.main(["convert", "verify", a, b])
  assert caught.value.code == 5
  assert "21 tensors differ" in capsys.readouterr().err


def test_a_directory_that_is_not_there_is_exit_code_5(tmp_path):
  with pytest.raises(SystemExit) as caught:
    convert.main(["convert", "inspect", str(tmp_path / "absent")])
  assert caught.value.code == 5


@pytest.mark.parametrize("arguments", [[], ["verify", "a"], ["to_hf", "a"]])
def test_other_commands_are_usage_errors(arguments):
  with pytest.raises(app.UsageError, match="inspect DIR"):
    convert.main(["convert", *arguments])
