# SPDX-License-Identifier: Apache-2.0
"""What of a model is trained: all of it, or adapters over what stays."""

import dataclasses
import functools

import jax

from atlas_jax import sharding
from atlas_jax.models import decoder, lora


@dataclasses.dataclass(frozen=True)
class Policy:
  """A model, split into what is trained and what is not.

  What is trained is an argument throughout, since every update replaces it.

  Attributes:
    model: of `whole` parameters.
    base: of `merged` parameters, and of `frozen` ones.
    frozen: the base's parameters where adapters are trained, else empty.
    adapters: what they are; None where all parameters are trained.
  """

  model: decoder.Model
  base: decoder.Model
  frozen: decoder.Params
  adapters: lora.Lora | None

  def whole(self, trained: decoder.Params) -> decoder.Params:
    """Gives all parameters, of what a step has trained; copies nothing."""
    return lora.join(self.frozen, trained)

  def merged(self, trained: decoder.Params) -> decoder.Params:
    """Gives the parameters of a model without adapters that says the same."""
    if self.adapters is None:
      return trained
    merged = _merge(self.frozen, trained, scale=self.adapters.scale)
    placed = jax.tree.map(lambda leaf: leaf.sharding, self.frozen)
    return jax.device_put(merged, placed)

  def identity(self) -> dict[str, str]:
    """Names what a checkpoint of the trained part belongs to."""
    config = self.base.config
    model = {
      f"model.{field.name}": str(getattr(config, field.name))
      for field in dataclasses.fields(config)
    }
    if self.adapters is None:
      return model
    sums = jax.jit(lora.checksums)(self.frozen)
    return {
      **model,
      "base": lora.fingerprint(sums),
      "lora.alpha": str(self.adapters.alpha),
    }


def whole(model: decoder.Model) -> Policy:
  """Gives the policy all of which is trained."""
  return Policy(model, model, {}, None)


def create(
  model: decoder.Model,
  params: decoder.Params,
  *,
  adapters: lora.Lora,
  mesh: jax.sharding.Mesh,
  key: jax.Array,
) -> tuple[Policy, decoder.Params]:
  """Splits a model into a policy and what of it is trained.

  Args:
    model: without adapters.
    params: its own.
    adapters: of rank 0 to train the parameters themselves.
    mesh: where the parameters are.
    key: decides where adapters start.

  Raises:
    errors.ConfigError: see `lora.adapt`.
  """
  policy, abstract = split(model, params, adapters)
  if policy.adapters is None:
    return policy, params
  trained = jax.jit(
    functools.partial(lora.init, abstract_adapters=abstract),
    out_shardings=sharding.of_params(mesh, abstract),
  )(key)
  return policy, trained


def split(
  model: decoder.Model, params: decoder.Params, adapters: lora.Lora
) -> tuple[Policy, decoder.Params]:
  """Tells what of a model is trained; computes nothing.

  Args:
    model: without adapters.
    params: its own, or what describes them.
    adapters: of rank 0 to train the parameters themselves.

  Returns:
    The policy, and the trained parameters as `jax.ShapeDtypeStruct`.

  Raises:
    errors.ConfigError: see `lora.adapt`.
  """
  if not adapters.rank:
    return whole(model), model.abstract_params
  adapted = lora.adapt(model, adapters)
  policy = Policy(adapted, model, params, adapters)
  return policy, lora.only(adapted.abstract_params)


# What comes out as it went in is not copied.
_merge = jax.jit(lora.merge, static_argnames="scale")
