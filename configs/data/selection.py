# SPDX-License-Identifier: Apache-2.0
"""Section `data`: which rows to read, and in which format."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  return ml_collections.ConfigDict(  # data.sets.Selection
    dict(
      # Files, folders or Hub datasets, separated by commas; required.
      path=config_dict.placeholder(str),
      format="auto",  # Name of the rows' format; auto: by their columns.
      formats=dict(),  # Formats of your own, by name.
      columns=dict(  # data.columns.Columns
        messages="",  # Your column with a conversation.
        text="",  # Your column with plain text, trained as a whole.
        system="",  # Your column with the first turn.
        question="",  # Your column with the user's turn.
        context="",  # Your column with what follows the question.
        thinking="",  # Your column with what precedes the solution.
        solution="",  # Your column with the worked solution, which is trained.
        answer="",  # Your column with the reference answer.
      ),
      weights=(),  # Share of each dataset; empty: every row once.
      max_rows=0,  # Rows to read of each dataset; 0: all.
      max_bad_rows=10,  # Invalid rows to leave out; more are an error.
    )
  )
