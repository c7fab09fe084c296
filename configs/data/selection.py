# SPDX-License-Identifier: Apache-2.0
"""Section `data`: which rows to read, and in which format."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # data.sets.Selection
    dict(
      path=config_dict.placeholder(str),
      format="auto",
      formats=dict(),
      weights=(),
      max_rows=0,
      max_bad_rows=10,
    )
  )
