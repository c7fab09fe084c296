# SPDX-License-Identifier: Apache-2.0
"""A configured chat template must end turns at a token that stops sampling."""

import json

import pytest

from atlas_jax import errors
from scripts.job import tokenizers
from tests import fakes

_OTHER_END = fakes.CHATML.replace("<|im_end|>", "<|endoftext|>")


@pytest.fixture
def directory(tmp_path):
  fakes.write_tokenizer(tmp_path / "model")
  (tmp_path / "own.jinja").write_text(_OTHER_END)
  return tmp_path / "model"


def _open(directory, template):
  return tokenizers.open_tokenizer(
    directory, chat_template=template, chat_template_kwargs=""
  )


def test_turns_must_end_with_a_token_that_stops_sampling(directory):
  own = str(directory.parent / "own.jinja")
  with pytest.raises(errors.ConfigError, match="endoftext") as info:
    _open(directory, own)
  assert "add the token's id, 0, to" in info.value.fix
  (directory / "generation_config.json").write_text(
    json.dumps({"eos_token_id": [2, 0]})
  )
  assert _open(directory, own).chat_template == _OTHER_END


@pytest.mark.parametrize("template", ["", "chatml", "none"])
def test_other_templates_are_opened(directory, template):
  assert _open(directory, template).chat_template
