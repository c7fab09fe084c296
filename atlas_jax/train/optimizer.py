# SPDX-License-Identifier: Apache-2.0
"""Optimizers, as chains of optax transformations.

All of them are clip -> direction -> weight decay -> learning rate, restricted
to the parameters that are not frozen; they differ in the direction. They
compute in float32. Parameters stored in bfloat16 are rounded stochastically:
otherwise an update that is small for its parameter would be lost.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
import functools
import math
import operator
import re
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from atlas_jax import errors

Name = Literal["adamw", "lion", "adafactor", "muon"]
Rounding = Literal["nearest", "stochastic"]
_LossFn = Callable[[Any, Any], Any]  # Any: see `optimizer_step.LossFn`.

# Axes of the stacked kernels that form the rows and columns of a matrix; axis 0
# is the layer.
_MATRICES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
  r"layers/attention/[qkv]/kernel": ((1,), (2, 3)),
  r"layers/attention/o/kernel": ((1, 2), (3,)),
  r"layers/mlp/(gate|up|down)/kernel": ((1,), (2,)),
}
# The RMS of AdamW's updates. Scaled to it, Muon can share AdamW's learning rate
# and weight decay: Liu et al., arXiv:2502.16982, section 2.2.
_ADAMW_RMS = 0.2


def make_optimizer(  # noqa: PLR0913 - one argument per config key.
  schedule: optax.Schedule,
  *,
  name: Name,
  max_grad_norm: float,
  weight_decay: float,
  not_decayed: Sequence[str],
  frozen: Sequence[str],
  rounding: Rounding,
  adamw: Mapping[str, float],
  lion: Mapping[str, float],
  adafactor: Mapping[str, float],
  muon: Mapping[str, float],
) -> optax.GradientTransformationExtraArgs:
  """Creates an optimizer; its `update` takes the number of steps done, `step`.

  Patterns are regular expressions that match a whole `/`-joined path.

  Args:
    schedule: learning rate by `step`; it also scales the weight decay.
    name: which of the four sections is used.
    max_grad_norm: clips the gradient's global norm; 0.0 disables clipping.
    weight_decay: decoupled weight decay, arXiv:1711.05101.
    not_decayed: patterns of the parameters without weight decay.
    frozen: patterns of the parameters that are not updated and have no
      optimizer state. `freeze` excludes them from the gradient.
    rounding: how parameters are rounded to the dtype they are stored in; see
      `check_rounding`.
    adamw: keyword arguments of `_adamw`.
    lion: keyword arguments of `_lion`.
    adafactor: keyword arguments of `_adafactor`.
    muon: keyword arguments of `_muon`.

  Raises:
    errors.ConfigError: if the name is unknown; from `init`, if a pattern in
      `frozen` matches no parameter or `rounding` does not suit the parameters.
  """
  direction = _direction(
    name, adamw=adamw, lion=lion, adafactor=adafactor, muon=muon
  )
  clip = optax.clip_by_global_norm(max_grad_norm or math.inf)
  decay = optax.add_decayed_weights(
    weight_decay,
    lambda tree: jax.tree.map(operator.not_, _mask(tree, not_decayed)),
  )
  trained = optax.chain(
    *map(_in_float32, (clip, direction, decay)), _descend(schedule, rounding)
  )
  if not frozen:
    return trained
  return optax.partition(
    {"trained": trained, "frozen": optax.set_to_zero()},
    functools.partial(_frozen_labels, patterns=frozen),
  )


def freeze(loss_fn: _LossFn, frozen: Sequence[str]) -> _LossFn:
  """Returns the loss without gradients of the frozen parameters.

  So the gradient norm that is logged and clipped excludes them.
  """

  def frozen_loss(params: Any, batch: Any) -> Any:
    params = jax.tree.map(
      lambda x, is_frozen: jax.lax.stop_gradient(x) if is_frozen else x,
      params,
      _mask(params, frozen),
    )
    return loss_fn(params, batch)

  return frozen_loss


def check_rounding(rounding: str, dtypes: Collection[str]) -> None:
  """Checks that rounding suits the dtypes of the trained parameters.

  In bfloat16, numbers next to x are about |x| / 256 apart, so rounding to the
  nearest loses an update below |x| / 512. At learning rates of fine-tuning that
  is nearly every one.

  Args:
    rounding: "nearest", for parameters in float32 only, or "stochastic" if any
      is in bfloat16.
    dtypes: of the trained parameters.

  Raises:
    errors.ConfigError: if it does not.
  """
  if rounding not in typing.get_args(Rounding):
    raise errors.ConfigError(
      f"Unknown rounding {rounding!r}.",
      where=f"--config.optimizer.rounding={rounding}",
      why=f"Supported: {', '.join(typing.get_args(Rounding))}.",
      fix="Set one of them.",
    )
  is_low = "bfloat16" in dtypes
  if is_low and rounding == "nearest":
    raise errors.ConfigError(
      "Parameters stored in bfloat16 cannot be trained with rounding=nearest.",
      where="--config.model.param_dtype=bfloat16",
      why="Rounded to the nearest bfloat16, nearly all updates are lost, for "
      "example 98 % at a learning rate of 1e-5.",
      fix="Set --config.model.param_dtype=float32, or "
      "--config.optimizer.rounding=stochastic, or train adapters over the "
      "bfloat16 parameters: --config.lora.rank=16.",
    )
  if rounding == "stochastic" and not is_low:
    raise errors.ConfigError(
      "rounding=stochastic requires trained parameters in bfloat16.",
      where="--config.optimizer.rounding=stochastic",
      why="Adapters and parameters in float32 are not rounded.",
      fix="Set --config.optimizer.rounding=nearest.",
    )


def round_stochastically(key: jax.Array, values: jax.Array) -> jax.Array:
  """Rounds to one of the two nearest bfloat16, to the expected value.

  A value between neighbors a < b becomes b with probability (x - a) / (b - a).
  So updates far smaller than b - a are kept on average.

  Source: Gupta et al., arXiv:1502.02551, section 4; for bfloat16 parameters,
  Zamirai et al., arXiv:2010.06192.

  Args:
    key: PRNG key. The bits do not depend on how the values are sharded.
    values: float32.

  Returns:
    float32 of the same shape, each exactly a bfloat16.
  """
  # A bfloat16 is the upper half of a float32. The sum carries into the upper
  # half with the probability above, which is the lower half over 2^16.
  bits = jax.lax.bitcast_convert_type(values, jnp.uint32)
  noise = jax.random.bits(key, values.shape, jnp.uint16).astype(jnp.uint32)
  rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
  return jax.lax.bitcast_convert_type(rounded, jnp.float32)


def _in_float32(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Computes in float32, with a state in float32, whatever the parameters."""

  def init(params: Any) -> optax.OptState:
    return inner.init(optax.tree.cast(params, jnp.float32))

  def update(
    updates: Any, state: optax.OptState, params: Any = None, **extra: Any
  ) -> tuple[Any, optax.OptState]:
    del extra
    updates = optax.tree.cast(updates, jnp.float32)
    return inner.update(updates, state, optax.tree.cast(params, jnp.float32))

  return optax.GradientTransformationExtraArgs(init, update)


def _descend(
  schedule: optax.Schedule, rounding: Rounding
) -> optax.GradientTransformationExtraArgs:
  """Returns updates of minus the learning rate of a step times the direction.

  With stochastic rounding, `optax.apply_updates` adds them to parameters in
  bfloat16 without rounding again. The state counts updates, as that of
  `optax.scale_by_learning_rate`, and selects the random bits.
  """

  def init(params: Any) -> optax.ScaleByScheduleState:
    check_rounding(rounding, {str(x.dtype) for x in jax.tree.leaves(params)})
    return optax.ScaleByScheduleState(jnp.zeros((), jnp.int32))

  def update(
    updates: Any,
    state: Any,  # Any: `optax.ScaleByScheduleState`; optax declares any tree.
    params: Any = None,
    **extra: Any,
  ) -> tuple[Any, optax.ScaleByScheduleState]:
    rate = jnp.asarray(schedule(extra["step"]))
    updates = jax.tree.map(lambda direction: -rate * direction, updates)
    if rounding == "stochastic":
      key = jax.random.key(state.count, impl="threefry2x32")
      leaves, structure = jax.tree.flatten(params)
      keys = structure.unflatten(jax.random.split(key, len(leaves)))
      updates = jax.tree.map(_to_rounded, updates, params, keys)
    count = optax.safe_increment(state.count)
    return updates, optax.ScaleByScheduleState(count)

  return optax.GradientTransformationExtraArgs(init, update)


def _to_rounded(
  update: jax.Array, param: jax.Array, key: jax.Array
) -> jax.Array:
  """Returns the update of a parameter to its rounded new value."""
  if param.dtype != jnp.bfloat16:
    return update
  old = param.astype(jnp.float32)
  return round_stochastically(key, old + update) - old


def _direction(
  name: Name, **sections: Mapping[str, float]
) -> optax.GradientTransformation:
  """Returns the named direction, configured by its section."""
  directions = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
  }
  if name not in directions:
    raise errors.ConfigError(
      f"Unknown optimizer {name!r}.",
      where="--config.optimizer.name",
      why=f"Supported optimizers: {', '.join(directions)}. Their states are "
      "float32; 8-bit states are not supported.",
      fix="Set one of them; adafactor uses the least memory.",
    )
  return directions[name](**sections[name])


def _adamw(
  *, beta1: float, beta2: float, epsilon: float
) -> optax.GradientTransformation:
  """Adam: Kingma and Ba, arXiv:1412.6980."""
  return optax.scale_by_adam(beta1, beta2, epsilon)


def _lion(*, beta1: float, beta2: float) -> optax.GradientTransformation:
  """Lion, the sign of a momentum: Chen et al., arXiv:2302.06675."""
  return optax.scale_by_lion(beta1, beta2)


def _adafactor(*, decay_exponent: float) -> optax.GradientTransformation:
  """Adafactor with absolute learning rates.

  The second moment of a matrix, spanned by a parameter's two largest axes, is
  stored as one row and one column. The layers are stacked in one parameter, so
  updates are clipped to an RMS of 1 over all layers together.

  Source: Shazeer and Stern, arXiv:1804.04235.

  Args:
    decay_exponent: the second moment's decay at update t is 1 - t^-exponent.
  """
  return optax.chain(
    optax.scale_by_factored_rms(decay_rate=decay_exponent),
    optax.clip_by_block_rms(1.0),
  )


def _muon(
  *, momentum: float, beta1: float, beta2: float, epsilon: float
) -> optax.GradientTransformation:
  """Muon, orthogonalized updates of the layers' matrices: Jordan et al., 2024.

  Each layer's matrix is orthogonalized separately. Embeddings, head, norms and
  biases use AdamW.

  Args:
    momentum: Nesterov momentum of the matrices.
    beta1: AdamW's beta1, for the other parameters.
    beta2: AdamW's beta2.
    epsilon: AdamW's epsilon.
  """
  matrices = optax.chain(
    optax.contrib.scale_by_muon(
      beta=momentum,
      weight_dimension_numbers=functools.partial(_map_paths, _axes),
    ),
    optax.stateless(_scale_to_adamw),
  )
  return optax.partition(
    {
      "matrices": matrices,
      "rest": _adamw(beta1=beta1, beta2=beta2, epsilon=epsilon),
    },
    functools.partial(
      _map_paths, lambda path: "matrices" if _axes(path) else "rest"
    ),
  )


def _axes(path: str) -> optax.contrib.MuonDimensionNumbers | None:
  """Returns a parameter's matrix axes; None if Muon does not apply to it."""
  for pattern, axes in _MATRICES.items():
    if re.fullmatch(pattern, path):
      return optax.contrib.MuonDimensionNumbers(*axes)
  return None


def _scale_to_adamw(updates: Any, params: Any) -> Any:
  """Scales orthogonal updates to the RMS of AdamW's updates.

  An orthogonal matrix of sides m and n has an RMS of 1 / sqrt(max(m, n)).
  """
  del params

  def scale(
    x: jax.Array, axes: optax.contrib.MuonDimensionNumbers
  ) -> jax.Array:
    sides = [
      math.prod(x.shape[axis] for axis in np.ravel(side)) for side in axes
    ]
    return x * (_ADAMW_RMS * math.sqrt(max(sides)))

  return jax.tree.map(scale, updates, _map_paths(_axes, updates))


def _frozen_labels(tree: Any, *, patterns: Sequence[str]) -> Any:
  """Labels parameters "frozen" or "trained"; every pattern must match one."""
  paths = jax.tree.leaves(_map_paths(str, tree))
  for pattern in patterns:
    if not any(re.fullmatch(pattern, path) for path in paths):
      raise errors.ConfigError(
        f"Pattern {pattern!r} matches no parameter.",
        where="--config.optimizer.frozen",
        why=f"The parameters are {', '.join(paths)}.",
        fix="Use a regular expression that matches a whole path.",
      )
  return jax.tree.map(
    lambda is_frozen: "frozen" if is_frozen else "trained",
    _mask(tree, patterns),
  )


def _mask(tree: Any, patterns: Sequence[str]) -> Any:  # Any: mirrors the tree.
  """Returns, for each parameter, whether any pattern matches its path."""
  return _map_paths(
    lambda path: any(re.fullmatch(p, path) for p in patterns), tree
  )


def _map_paths(function: Callable[[str], Any], tree: Any) -> Any:
  """Applies a function to the `/`-joined path of every leaf."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: function(
      jax.tree_util.keystr(path, simple=True, separator="/")
    ),
    tree,
  )
