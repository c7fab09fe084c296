# SPDX-License-Identifier: Apache-2.0
"""Tokens, log-probabilities and invariances of the JAX sampler."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from atlas_jax import errors, sharding, types
from atlas_jax.models import decoder
from rollout import jax_sampler
from tests import tiny

# Divides over two devices of each mesh axis.
_EVEN = {
  "vocab_size": 38,
  "hidden_size": 24,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
}
_SAMPLING = types.SamplingParams(
  group_size=3,
  max_completion_tokens=8,
  temperature=0.8,
  top_p=1.0,
  top_k=0,
  seed=0,
)
_GREEDY = dataclasses.replace(_SAMPLING, temperature=0.0, group_size=1)
_LENGTHS = (5, 40, 1, 16)


@functools.cache
def _world():
  model = tiny.build("qwen3", **_EVEN)
  return model, tiny.params_of(model)


def _open(model, params, *, mesh=None, stop_token_ids=(), max_rows=64):
  return jax_sampler.JaxSampler(
    model,
    params,
    mesh=mesh or tiny.mesh(),
    stop_token_ids=stop_token_ids,
    max_rows=max_rows,
  )


@functools.cache
def _sampler():
  """Returns a sampler shared by tests that do not change its weights."""
  return _open(*_world())


def _prompt(length, row_id="row", seed=0):
  token_ids = np.random.default_rng((seed, length)).integers(0, 38, length)
  return types.Prompt(row_id, "", tuple(token_ids.tolist()))


def _prompts():
  return [_prompt(n, f"row {i}") for i, n in enumerate(_LENGTHS)]


@functools.cache
def _full_forward():
  return jax.jit(_world()[0].logits)


def _logits(prompt, completion):
  """Computes, without a cache, the logits of each sampled token."""
  length = 64  # One shape, one program.
  tokens = (*prompt.token_ids, *completion.token_ids)
  tokens_BT = np.zeros((1, length), np.int32)
  tokens_BT[0, : len(tokens)] = tokens
  segments_BT = (np.arange(length) < len(tokens)).astype(np.int32)[None]
  positions_BT = np.arange(length)[None]
  logits_BTV = _full_forward()(
    _world()[1], tokens_BT, positions_BT, segments_BT
  )
  start = len(prompt.token_ids) - 1
  return np.asarray(logits_BTV[0, start : len(tokens) - 1], np.float64)


def _logprobs(logits_NV, *, temperature=1.0, top_k=0, top_p=1.0):
  """Computes the distribution to sample from, one token at a time."""
  rows = []
  for logits_V in logits_NV / temperature:
    order = np.argsort(-logits_V)
    if top_k:
      order = order[:top_k]
    probs = np.exp(logits_V[order] - logits_V[order[0]])
    probs /= probs.sum()
    # The fewest tokens whose mass reaches top_p.
    size = int(np.sum(np.cumsum(probs) < top_p - 1e-9)) + 1
    kept = np.full_like(logits_V, -np.inf)
    kept[order[:size]] = np.log(probs[:size] / probs[:size].sum())
    rows.append(kept)
  return np.stack(rows)


def _of_tokens(logprobs_NV, completion):
  return logprobs_NV[np.arange(len(logprobs_NV)), completion.token_ids]


def _tokens(groups):
  return [[c.token_ids for c in group] for group in groups]


def _flat(groups):
  return [completion for group in groups for completion in group]


def test_samples_do_not_depend_on_the_batch_or_bucket():
  prompts = _prompts()
  sampler = _sampler()

  together = _tokens(sampler.sample(prompts, _SAMPLING))

  alone = [_tokens(sampler.sample([p], _SAMPLING))[0] for p in prompts]
  assert together == alone
  assert together[::-1] == _tokens(sampler.sample(prompts[::-1], _SAMPLING))
  by_twos = _open(*_world(), max_rows=6).sample(prompts, _SAMPLING)
  assert together == _tokens(by_twos)


def test_a_larger_group_and_limit_only_extend_the_samples():
  (short,) = _sampler().sample([_prompt(5)], _SAMPLING)
  larger = dataclasses.replace(
    _SAMPLING, group_size=5, max_completion_tokens=12
  )

  (long,) = _sampler().sample([_prompt(5)], larger)

  assert [c.token_ids for c in short] == [c.token_ids[:8] for c in long[:3]]


def test_seed_row_id_and_group_index_each_change_the_samples():
  sampler, prompt = _sampler(), _prompt(5)
  reseeded = dataclasses.replace(_SAMPLING, seed=1)
  renamed = dataclasses.replace(prompt, row_id="another")

  drawn = _tokens(
    sampler.sample([prompt], _SAMPLING)
    + sampler.sample([renamed], _SAMPLING)
    + sampler.sample([prompt], reseeded)
  )

  assert len({tokens for group in drawn for tokens in group}) == 9
  assert drawn[0] == _tokens(sampler.sample([prompt], _SAMPLING))[0]


def test_greedy_is_the_argmax_of_the_full_forward_pass():
  prompts = _prompts()
  for prompt, (completion,) in zip(
    prompts, _sampler().sample(prompts, _GREEDY), strict=True
  ):
    logits_NV = _logits(prompt, completion)
    assert completion.token_ids == tuple(np.argmax(logits_NV, axis=1))
    expected = _of_tokens(_logprobs(logits_NV), completion)
    np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
    assert completion.logprobs == completion.model_logprobs


@pytest.mark.parametrize(
  "cut",
  [
    {"temperature": 1.0},
    {"temperature": 0.6},
    {"temperature": 1.5, "top_k": 4},
    {"temperature": 1.5, "top_p": 0.5},
    {"temperature": 0.9, "top_p": 0.8, "top_k": 6},
  ],
  ids=str,
)
def test_logprobs_are_those_of_the_sampled_distribution(cut):
  prompts = _prompts()
  params = dataclasses.replace(_SAMPLING, **cut)

  groups = _sampler().sample(prompts, params)

  for prompt, group in zip(prompts, groups, strict=True):
    for completion in group:
      logits_NV = _logits(prompt, completion)
      # Of tokens outside the nucleus or the top k these are minus infinity.
      expected = _of_tokens(_logprobs(logits_NV, **cut), completion)
      np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)
      models = _of_tokens(_logprobs(logits_NV), completion)
      np.testing.assert_allclose(completion.model_logprobs, models, atol=1e-4)


@pytest.mark.parametrize("cut", [{"top_k": 1}, {"top_p": 1e-6}], ids=str)
def test_a_cut_to_one_token_is_greedy(cut):
  params = dataclasses.replace(_SAMPLING, **cut)
  greedy = _tokens(_sampler().sample(_prompts(), _GREEDY))

  groups = _sampler().sample(_prompts(), params)

  assert _tokens(groups) == [group * 3 for group in greedy]
  assert {x for group in groups for c in group for x in c.logprobs} == {0.0}


@pytest.mark.parametrize(
  "cut", [{"temperature": 1.3}, {"temperature": 1.3, "top_p": 0.7}], ids=str
)
def test_samples_follow_the_softmax(cut):
  prompts = [_prompt(5, f"row {i}") for i in range(64)]
  params = dataclasses.replace(
    _SAMPLING, group_size=64, max_completion_tokens=1, **cut
  )
  sampler = _open(*_world(), max_rows=4096)

  groups = sampler.sample(prompts, params)

  drawn = [c.token_ids[0] for group in groups for c in group]
  observed = np.bincount(drawn, minlength=38) / len(drawn)
  expected = np.exp(_logprobs(_logits(prompts[0], groups[0][0]), **cut)[0])
  # About 0.03 is expected for 4096 samples.
  assert np.abs(observed - expected).sum() / 2 < 0.05
  assert np.all(observed[expected == 0] == 0)


def test_samples_of_rows_group_members_and_tokens_are_independent():
  model, params = _world()
  even = _open(model, jax.tree.map(jnp.zeros_like, params), max_rows=256)
  size = 16
  params = dataclasses.replace(
    _SAMPLING, group_size=size, max_completion_tokens=size
  )

  groups = even.sample([_prompt(5, f"row {i}") for i in range(size)], params)

  # All 38 tokens are equally likely in every context.
  drawn = np.array(_tokens(groups))
  assert drawn.shape == (size, size, size)
  for axis in range(3):
    repeated = np.mean(np.diff(drawn, axis=axis) == 0)
    assert abs(repeated - 1 / 38) < 0.01, f"axis {axis}"


def test_a_stop_token_ends_a_completion_and_is_its_last_token():
  prompts = _prompts()
  params = dataclasses.replace(_SAMPLING, max_completion_tokens=12)
  endless = _sampler().sample(prompts, params)
  stops = (3, 7, 20, 31)

  groups = _open(*_world(), stop_token_ids=stops).sample(prompts, params)

  reasons = set()
  for free, completion in zip(_flat(endless), _flat(groups), strict=True):
    ends = [i for i, token in enumerate(free.token_ids) if token in stops]
    length = ends[0] + 1 if ends else 12
    assert completion.token_ids == free.token_ids[:length]
    assert len(completion.logprobs) == len(completion.model_logprobs) == length
    assert completion.finish_reason == ("stop" if ends else "length")
    assert free.finish_reason == "length"
    reasons.add(completion.finish_reason)
  assert reasons == {"stop", "length"}


def test_a_stop_token_at_the_limit_counts_as_a_stop():
  (endless,) = _sampler().sample([_prompt(5)], _GREEDY)[0]
  first = endless.token_ids[:1]
  params = dataclasses.replace(_GREEDY, max_completion_tokens=1)

  sampler = _open(*_world(), stop_token_ids=first)
  (completion,) = sampler.sample([_prompt(5)], params)[0]

  assert (completion.token_ids, completion.finish_reason) == (first, "stop")


@pytest.mark.parametrize("length", [0, 121])
def test_a_prompt_that_does_not_fit_is_rejected_with_its_row(length):
  prompts = [_prompt(120, "good"), _prompt(length, "question 7")]

  with pytest.raises(errors.ConfigError, match="row question 7"):
    _sampler().sample(prompts, _SAMPLING)


def test_a_prompt_and_its_completion_may_fill_the_context():
  (completion,) = _sampler().sample([_prompt(120)], _GREEDY)[0]
  assert len(completion.token_ids) == 8


def test_no_prompts_return_no_completions():
  assert _sampler().sample([], _SAMPLING) == []


@dataclasses.dataclass(frozen=True)
class _Spied(decoder.Model):
  """A model that records each traced program, and each decoding step run.

  Of a prefill the shape of its tokens, of a decoding loop that of its slots.
  """

  prefills: list = dataclasses.field(default_factory=list)
  decodes: list = dataclasses.field(default_factory=list)
  steps: list = dataclasses.field(default_factory=list)

  def cached(self, params, tokens_BT, *args):
    if tokens_BT.shape[1] > 1:
      self.prefills.append(tokens_BT.shape)
    else:
      self.decodes.append(args[2].positions_BS.shape)
      jax.debug.callback(lambda: self.steps.append("decoded"))
    return super().cached(params, tokens_BT, *args)


def _spied(model):
  return _Spied(
    **{f.name: getattr(model, f.name) for f in dataclasses.fields(model)}
  )


def test_prompt_lengths_share_few_programs():
  model, params = _world()
  spied = _spied(model)
  sampler = _open(spied, params)
  greedy = dataclasses.replace(_GREEDY, max_completion_tokens=2)

  for length in range(1, 64, 3):
    sampler.sample([_prompt(length)], greedy)
  sampler.update_weights(params, version=1)
  for length in range(2, 64, 3):
    sampler.sample([_prompt(length)], dataclasses.replace(greedy, seed=length))

  assert spied.prefills == [(1, n) for n in (16, 32, 48, 64)]
  assert spied.decodes == spied.prefills
  assert sampler.num_programs == 8


def test_groups_and_limits_share_a_decode_program():
  model, params = _world()
  spied = _spied(model)
  sampler = _open(spied, params)

  for group_size, max_new in ((1, 8), (2, 9), (4, 10)):
    sampler.sample(
      [_prompt(5, str(i)) for i in range(8 // group_size)],
      dataclasses.replace(
        _SAMPLING, group_size=group_size, max_completion_tokens=max_new
      ),
    )

  assert spied.prefills == [(8, 16), (4, 16), (2, 16)]
  assert spied.decodes == [(8, 16)]
  assert sampler.num_programs == 4


def test_slots_of_padding_are_cut_off_without_effect():
  model = _spied(
    tiny.build("qwen3", **{**_EVEN, "max_position_embeddings": 256})
  )
  sampler = _open(model, _world()[1])
  prompt = _prompt(131)

  alone = sampler.sample([prompt], _SAMPLING)
  together = sampler.sample([prompt, _prompt(190, "longer")], _SAMPLING)

  assert model.prefills == [(1, 192), (2, 192)]
  assert model.decodes == [(3, 160), (6, 224)]
  assert _tokens(alone) == _tokens(together)[:1]


def test_temperature_seed_and_cut_do_not_need_another_program():
  model, params = _world()
  spied = _spied(model)
  sampler = _open(spied, params)

  for top_k, temperature in ((3, 0.5), (4, 0.7), (5, 2.0)):
    changed = {"top_k": top_k, "temperature": temperature, "seed": top_k}
    sampler.sample([_prompt(5)], dataclasses.replace(_SAMPLING, **changed))

  assert len(spied.prefills) == len(spied.decodes) == 1
  assert sampler.num_programs == 2


def test_rows_that_only_fill_a_bucket_are_not_waited_for():
  model, params = _world()
  (endless,) = _sampler().sample([_prompt(5)], _GREEDY)[0]
  spied = _spied(model)
  sampler = _open(
    spied,
    params,
    mesh=tiny.mesh(data=4),
    stop_token_ids=endless.token_ids[:1],
  )

  sampler.sample([_prompt(5)], _GREEDY)
  jax.effects_barrier()

  # One row per device; the only real one stops after one token.
  assert spied.prefills == [(4, 16)]
  assert len(spied.steps) == 1


@pytest.mark.parametrize(
  ("sizes", "max_rows", "most"),
  [({}, 17, 17), ({"data": 2}, 16, 16), ({"data": 4}, 6, 12)],
)
def test_at_most_max_rows_are_decoded_at_once(sizes, max_rows, most):
  model, params = _world()
  spied = _spied(model)
  sampler = _open(spied, params, mesh=tiny.mesh(**sizes), max_rows=max_rows)
  params = dataclasses.replace(_SAMPLING, max_completion_tokens=1)

  sampler.sample([_prompt(5, str(i)) for i in range(11)], params)

  # One group per device is the minimum.
  assert most / 2 < max(rows for rows, _ in spied.decodes) <= most


def test_samples_do_not_depend_on_the_mesh():
  model, params = _world()
  prompts = _prompts()
  expected = _sampler().sample(prompts, _SAMPLING)
  for sizes in ({"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}):
    mesh = tiny.mesh(**sizes)
    sharded = jax.device_put(
      params, sharding.of_params(mesh, model.abstract_params)
    )

    groups = _open(model, sharded, mesh=mesh).sample(prompts, _SAMPLING)

    assert _tokens(groups) == _tokens(expected)
    for got, want in zip(_flat(groups), _flat(expected), strict=True):
      np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def test_new_weights_change_the_samples_and_their_version():
  model, params = _world()
  others = tiny.params_of(model, seed=5)
  expected = _open(model, others).sample(_prompts(), _SAMPLING)
  sampler = _open(model, params)
  before = sampler.sample(_prompts(), _SAMPLING)
  assert sampler.version == 0

  sampler.update_weights(others, version=12)
  after = sampler.sample(_prompts(), _SAMPLING)

  assert sampler.version == 12
  assert {c.version for group in before for c in group} == {0}
  assert {c.version for group in after for c in group} == {12}
  assert _tokens(before) != _tokens(after)
  assert _tokens(after) == _tokens(expected)


def test_weights_are_copied_so_the_caller_may_donate_them():
  model, params = _world()
  expected = _sampler().sample(_prompts(), _SAMPLING)
  first, second = (jax.tree.map(jnp.copy, params) for _ in range(2))
  sampler = _open(model, first)

  jax.tree.map(lambda leaf: leaf.delete(), first)
  assert _tokens(sampler.sample(_prompts(), _SAMPLING)) == _tokens(expected)

  sampler.update_weights(second, version=1)
  jax.tree.map(lambda leaf: leaf.delete(), second)
  assert _tokens(sampler.sample(_prompts(), _SAMPLING)) == _tokens(expected)


def test_copies_keep_the_sharding_of_the_weights():
  model, params = _world()
  mesh = tiny.mesh(data=2, fsdp=2, tensor=2)
  shardings = sharding.of_params(mesh, model.abstract_params)
  spied = _spied(model)
  sampler = _open(spied, jax.device_put(params, shardings), mesh=mesh)
  sampler.sample([_prompt(5)], _GREEDY)

  # Weights with another sharding would need other programs.
  sampler.update_weights(jax.device_put(params, shardings), version=1)
  sampler.sample([_prompt(5)], _GREEDY)

  assert len(spied.prefills) == len(spied.decodes) == 1
