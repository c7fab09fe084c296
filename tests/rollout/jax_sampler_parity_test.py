# SPDX-License-Identifier: Apache-2.0
"""Greedy completions against transformers' `generate`."""

import pytest

from atlas_jax import sharding, types
from atlas_jax.models import decoder
from conversion import load
from rollout import jax_sampler
from tests import tiny

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_NUM_TOKENS = 20
_GREEDY = types.SamplingParams(
  group_size=1,
  max_completion_tokens=_NUM_TOKENS,
  temperature=0.0,
  top_p=1.0,
  top_k=0,
  seed=0,
)


def _reference(family, directory):
  """Writes a random transformers model with well separated logits."""
  torch.set_num_threads(1)
  torch.manual_seed(0)
  fields = tiny.fields(family, initializer_range=0.4)
  config = transformers.AutoConfig.for_model(**fields)
  config._experts_implementation = "eager"  # The fused one needs even sizes.
  reference = transformers.AutoModelForCausalLM.from_config(config).eval()
  reference.save_pretrained(directory)
  return reference


def _generate(reference, token_ids, stop_token_ids):
  prompt = torch.tensor([token_ids])
  with torch.no_grad():
    tokens = reference.generate(
      prompt,
      attention_mask=torch.ones_like(prompt),
      max_new_tokens=_NUM_TOKENS,
      do_sample=False,
      eos_token_id=stop_token_ids,
      pad_token_id=0,
    )
  return tuple(tokens[0, len(token_ids) :].tolist())


def _sample(directory, prompts, stop_token_ids):
  config, _ = load.read_config(directory)
  model = decoder.build(
    config, dtype="float32", attention="xla", remat="none", unroll=1
  )
  mesh = sharding.make_mesh(data=-1, fsdp=1, tensor=1)
  params = load.load(
    directory,
    model,
    param_dtype="float32",
    shardings=sharding.of_params(mesh, model.abstract_params),
  )
  sampler = jax_sampler.JaxSampler(
    model,
    params,
    mesh=mesh,
    stop_token_ids=stop_token_ids,
    max_rows=64,
  )
  return [group[0] for group in sampler.sample(prompts, _GREEDY)]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_greedy_completions_match_generate(tmp_path, family):
  reference = _reference(family, tmp_path)
  # Llama's scaling starts at 16 positions; one prompt is far longer.
  prompts = [
    types.Prompt(
      str(length), "", tuple(torch.randint(0, 37, (length,)).tolist())
    )
    for length in (1, 4, 11, 16, 50)
  ]
  stops = [6]

  completions = _sample(tmp_path, prompts, stops)

  expected = [_generate(reference, p.token_ids, stops) for p in prompts]
  assert [c.token_ids for c in completions] == expected
  # A model that repeats one token would match too easily.
  assert len({token for tokens in expected for token in tokens}) > 5
  assert max(map(len, expected)) == _NUM_TOKENS > min(map(len, expected))
