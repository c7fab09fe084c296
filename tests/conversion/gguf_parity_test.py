# SPDX-License-Identifier: Apache-2.0
"""Logits of converted GGUF files match transformers' own loading of them."""

import pathlib

import numpy as np
import pytest

from scripts import convert
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip(
  "gguf", reason="No package gguf; install requirements/real.txt."
)
from tests import tiny_gguf  # noqa: E402 - it imports gguf.


@pytest.mark.parametrize("family", tiny_gguf.FAMILIES)
def test_logits_match_transformers_reading_the_file(tmp_path, family):
  torch.set_num_threads(1)
  model, _ = tiny_gguf.write_source(tmp_path / "source", family)
  path = tiny_gguf.write(tmp_path / "model.gguf", tmp_path / "source")
  assert convert.main(["from_gguf", str(path), str(tmp_path / "out")]) == 0
  tokens_BT = np.asarray(tiny.batch(model, num_tokens=12)[0])

  converted = _logits(tmp_path / "out", tokens_BT)
  direct = _logits(tmp_path, tokens_BT, gguf_file=path.name)

  assert np.abs(direct).max() > 0.5  # Small logits would agree trivially.
  np.testing.assert_allclose(converted, direct, atol=1e-4, rtol=0)


def _logits(directory: pathlib.Path, tokens_BT, **kwargs):
  model = transformers.AutoModelForCausalLM.from_pretrained(
    directory, dtype=torch.float32, experts_implementation="eager", **kwargs
  )
  with torch.no_grad():
    return model.eval()(torch.tensor(tokens_BT)).logits.numpy()
