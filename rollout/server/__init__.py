# SPDX-License-Identifier: Apache-2.0
"""The rollout server: its HTTP app and its engines."""
