# SPDX-License-Identifier: Apache-2.0
"""Samples greedily with vLLM, in its own environment.

  python -m tests.vllm_greedy PROMPTS DIRECTORY...

PROMPTS is a JSON list of lists of token ids. Prints one line for each model
directory: `{"directory": ..., "completions": [[[id, logprob], ...], ...]}`.
"""

# pyright: reportMissingImports=false
import gc
import json
import os
import pathlib
import sys

# One process for all models: starting a process takes most of the time.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# Skips compiling the function that ranks sampled tokens; ranks are unused.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm
from vllm import distributed, inputs


def _register(directory):
  """Imports a model class here; vLLM would inspect it in a new process."""
  config = json.loads((pathlib.Path(directory) / "config.json").read_text())
  (name,) = config["architectures"]
  registry = vllm.ModelRegistry
  registry.register_model(name, registry.models[name].load_model_cls())


def _complete(directory, prompts):
  text = (pathlib.Path(directory) / "config.json").read_text()
  longest = json.loads(text)["max_position_embeddings"]
  llm = vllm.LLM(
    directory,
    dtype="float32",
    max_model_len=min(longest, 128),
    skip_tokenizer_init=True,
    generation_config="vllm",
    enforce_eager=True,
    kv_cache_memory_bytes=2**26,
  )
  outputs = llm.generate(
    [inputs.TokensPrompt(prompt_token_ids=ids) for ids in prompts],
    vllm.SamplingParams(
      temperature=0.0, max_tokens=8, detokenize=False, logprobs=0
    ),
    use_tqdm=False,
  )
  del llm
  distributed.cleanup_dist_env_and_memory()
  return [_pairs(output.outputs[0]) for output in outputs]


def _pairs(completion):
  return [
    (token_id, position[token_id].logprob)
    for token_id, position in zip(
      completion.token_ids, completion.logprobs, strict=True
    )
  ]


if __name__ == "__main__":
  prompts, *directories = sys.argv[1:]
  for directory in directories:
    _register(directory)
    gc.freeze()  # vLLM collects garbage often, and the modules are large.
    completions = _complete(directory, json.loads(prompts))
    line = {"directory": directory, "completions": completions}
    sys.stdout.write(json.dumps(line) + "\n")
