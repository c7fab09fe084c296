# SPDX-License-Identifier: Apache-2.0
"""Which rows are read, and how; every recipe begins with this."""

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
