# SPDX-License-Identifier: Apache-2.0
"""Tests memory bounds of converting a model as wide as Qwen3-8B.

It takes minutes, 4 GB of memory and three times the model on disk, so it runs
only on request (CONTRIBUTING.md). NUM_LAYERS=6 sets the number of layers.
"""

import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile

import pytest

from atlas_jax.models import decoder
from conversion import load, rules, save

_ROOT = pathlib.Path(__file__).parents[2]
_FIELDS = {
  "model_type": "qwen3",
  "architectures": ["Qwen3ForCausalLM"],
  "dtype": "bfloat16",
  "vocab_size": 151_936,
  "hidden_size": 4096,
  "intermediate_size": 12_288,
  "num_hidden_layers": int(os.environ.get("NUM_LAYERS", "1")),
  "num_attention_heads": 32,
  "num_key_value_heads": 8,
  "head_dim": 128,
  "hidden_act": "silu",
  "max_position_embeddings": 40_960,
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_PIECES = 2**28  # Bytes compared, hashed or written at a time.
_MAKE = """
import pathlib, sys
import numpy as np
from conversion import rules, shards
from tests.end_to_end import wide_test

source = pathlib.Path(sys.argv[1])
shapes = rules.shapes(wide_test.model(source))
values = np.random.default_rng(0).normal(0, 0.02, 2**20 + 7)
values = values.astype(np.float32)
shards.write(
  source,
  shapes,
  lambda name: np.resize(values, shapes[name]),
  dtype="bfloat16",
  max_shard_bytes=2 * 10**9,
)
"""
# One reader, for the lowest and most stable memory peak.
_CONVERT = """
import sys
from conversion import load
from scripts import convert
from scripts.bench import memory

load.NUM_READERS = 1
before = memory.of_process("VmRSS", reset=True)
code = convert.main(sys.argv[1:])
print("grown by", memory.of_process("VmHWM", reset=False) - before)
sys.exit(code)
"""


def model(directory):
  """Builds the model of a directory's config; allocates nothing."""
  config, _ = load.read_config(directory)
  return decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )


def _run(script, *words):
  child = subprocess.run(
    [sys.executable, "-c", script, *map(str, words)],
    cwd=_ROOT,
    env={**os.environ, "XLA_FLAGS": ""},
    capture_output=True,
    text=True,
    timeout=3000,
    check=False,
  )
  assert child.returncode == 0, child.stderr
  return child.stdout


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.timeout(9000)
def test_wide_model_is_converted_both_ways_in_bounded_memory(tmp_path):
  with tempfile.TemporaryDirectory(dir=tmp_path) as directory:
    home = pathlib.Path(directory)
    source = home / "source"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(_FIELDS))
    (source / "tokenizer.json").write_text("{}")
    _run(_MAKE, source)
    built = model(source)
    held = save.num_bytes(built, "bfloat16")
    largest = 2 * max(map(math.prod, rules.shapes(built).values()))
    commands = {
      "from_hf": (held, source, home / "orbax"),
      "to_hf": (held, home / "orbax", home / "hf", f"--source={source}"),
      "verify": (0, source, home / "hf"),
    }
    for command, (resident, *words) in commands.items():
      output = _run(_CONVERT, command, *words, "--nologits")
      more = int(output.split()[-1]) - resident
      print(  # noqa: T201 - reports the measurement.
        f"{command}: {held:,} bytes, the largest tensor {largest:,}; memory "
        f"above the {resident:,} bytes of parameters: {more:,}"
      )
      assert more <= 2 * largest + _PIECES, command
    assert "are equal, bit for bit" in output
