# SPDX-License-Identifier: Apache-2.0
"""Arc-ATLAS-Teach in the prompt and tags that GRPO uses.

By default the dataset is read as three labelled paragraphs, as in the original,
which GRPO's prompts do not request. To use this format in a recipe:

  config.data.formats = arc_atlas.get_formats()
  config.data.format = "arc_atlas_tags"
"""

import ml_collections

from configs.data import prompts


def get_formats() -> ml_collections.ConfigDict:
  teach = prompts.get_templates().teach
  return ml_collections.ConfigDict(
    dict(
      arc_atlas_tags=dict(  # data.formats.Format
        like="arc_atlas_v0",  # Format whose other fields it has.
        system_prompt="",  # System message; empty: none.
        # User message, with columns in braces.
        question=teach.replace("{question}", "{problem_text}").replace(
          "{probe}", "{student_approach}"
        ),
        # Assistant message, with columns in braces.
        solution=(
          "<thinking>\n{teacher_diagnosis}\n</thinking>\n"
          "<teaching>\n{teacher_teaching}\n</teaching>"
        ),
        problem="{problem_text}",  # Identifies held-out problems.
      )
    )
  )
