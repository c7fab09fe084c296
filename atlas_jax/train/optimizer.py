# SPDX-License-Identifier: Apache-2.0
"""The optimizers, put together from optax.

Each is a direction. Clipping before it, weight decay and the learning rate
after it are the same for all, and so are the parameters that stay frozen.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
import math
import operator
import re
from typing import Any, Literal

import jax
import numpy as np
import optax
import optax.contrib

from atlas_jax import errors

Name = Literal["adamw", "lion", "adafactor", "muon"]
_LossFn = Callable[[Any, Any], Any]  # Any: see `step.LossFn`.

# The axes of stacked kernels that are the rows and the columns of one matrix.
_MATRICES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
  r"layers/attention/[qkv]/kernel": ((1,), (2, 3)),
  r"layers/attention/o/kernel": ((1, 2), (3,)),
  r"layers/mlp/(gate|up|down)/kernel": ((1,), (2,)),
}
# The root mean square of AdamW's updates. With it a learning rate and a weight
# decay serve Muon too: Liu et al., arXiv:2502.16982, section 2.2.
_ADAMW_RMS = 0.2


def make_optimizer(  # noqa: PLR0913 - one argument per config key.
  schedule: optax.Schedule,
  *,
  name: Name,
  max_grad_norm: float,
  weight_decay: float,
  not_decayed: Sequence[str],
  frozen: Sequence[str],
  adamw: Mapping[str, float],
  lion: Mapping[str, float],
  adafactor: Mapping[str, float],
  muon: Mapping[str, float],
) -> optax.GradientTransformation:
  """Makes an optimizer.

  Patterns are regular expressions that match a whole `/`-joined path.

  Args:
    schedule: the learning rate, which scales the weight decay too.
    name: which of the four sections counts.
    max_grad_norm: the gradient's global norm is clipped to it; 0.0 for never.
    weight_decay: decoupled from the gradient, arXiv:1711.05101.
    not_decayed: patterns of the parameters without weight decay.
    frozen: patterns of the parameters that stay as they are, and for which
      nothing is stored. `freeze` keeps them out of the gradient.
    adamw: keyword arguments of `_adamw`; the next three likewise.
    lion: of `_lion`.
    adafactor: of `_adafactor`.
    muon: of `_muon`.

  Raises:
    errors.ConfigError: if there is no optimizer of that name; out of `init`,
      if a pattern of `frozen` matches no parameter.
  """
  direction = _direction(
    name, adamw=adamw, lion=lion, adafactor=adafactor, muon=muon
  )
  clip = optax.clip_by_global_norm(max_grad_norm or math.inf)
  trained = optax.chain(
    clip,
    direction,
    optax.add_decayed_weights(
      weight_decay,
      lambda tree: jax.tree.map(operator.not_, _mask(tree, not_decayed)),
    ),
    optax.scale_by_learning_rate(schedule),
  )
  if not frozen:
    return trained
  return optax.partition(
    {"trained": trained, "frozen": optax.set_to_zero()},
    functools.partial(_frozen_labels, patterns=frozen),
  )


def freeze(loss_fn: _LossFn, frozen: Sequence[str]) -> _LossFn:
  """Makes a loss constant in parameters: no gradient of them is computed.

  So the gradient's norm, which is logged and clipped, is that of the others.
  """

  def partly_constant(params: Any, batch: Any) -> Any:
    params = jax.tree.map(
      lambda x, is_frozen: jax.lax.stop_gradient(x) if is_frozen else x,
      params,
      _mask(params, frozen),
    )
    return loss_fn(params, batch)

  return partly_constant


def _direction(
  name: Name, **sections: Mapping[str, float]
) -> optax.GradientTransformation:
  """Makes the optimizer of that name by its section."""
  directions = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
  }
  if name not in directions:
    raise errors.ConfigError(
      f"There is no optimizer {name!r}.",
      where="--config.optimizer.name",
      why=f"They are {', '.join(directions)}. Their states are float32; those "
      "of 8 bits are in no library this is built on.",
      fix="Name one of them; adafactor takes the least memory.",
    )
  return directions[name](**sections[name])


def _adamw(
  *, beta1: float, beta2: float, epsilon: float
) -> optax.GradientTransformation:
  """Kingma and Ba, arXiv:1412.6980."""
  return optax.scale_by_adam(beta1, beta2, epsilon)


def _lion(*, beta1: float, beta2: float) -> optax.GradientTransformation:
  """Chen et al., arXiv:2302.06675: the sign of a momentum."""
  return optax.scale_by_lion(beta1, beta2)


def _adafactor(*, decay_exponent: float) -> optax.GradientTransformation:
  """Shazeer and Stern, arXiv:1804.04235, with absolute learning rates.

  The second moment is stored as one row and one column per matrix, spanned by
  a parameter's two largest axes. All layers are one parameter: the clipping of
  updates, to a root mean square of 1, sees them together.

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
  """Jordan et al., 2024: orthogonal updates of the layers' matrices.

  Each layer's matrix counts for itself. Embeddings, the head, norms and biases
  get AdamW.

  Args:
    momentum: of the matrices; Nesterov's.
    beta1: of AdamW for the rest; the next two likewise.
    beta2: see above.
    epsilon: see above.
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
  """Tells what Muon sees as the matrix of a parameter; None if nothing."""
  for pattern, axes in _MATRICES.items():
    if re.fullmatch(pattern, path):
      return optax.contrib.MuonDimensionNumbers(*axes)
  return None


def _scale_to_adamw(updates: Any, params: Any) -> Any:
  """Scales orthogonal matrices to the root mean square of AdamW's updates."""
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
  """Labels each parameter "frozen" or "trained"; every pattern must count."""
  paths = jax.tree.leaves(_map_paths(str, tree))
  for pattern in patterns:
    if not any(re.fullmatch(pattern, path) for path in paths):
      raise errors.ConfigError(
        f"No parameter is called {pattern!r}.",
        where="--config.optimizer.frozen",
        why=f"The parameters are {', '.join(paths)}.",
        fix="Write a regular expression that matches a whole name.",
      )
  return jax.tree.map(
    lambda is_frozen: "frozen" if is_frozen else "trained",
    _mask(tree, patterns),
  )


def _mask(tree: Any, patterns: Sequence[str]) -> Any:  # Any: mirrors the tree.
  """Tells for each parameter whether one of the patterns matches its path."""
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
