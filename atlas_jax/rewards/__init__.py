# SPDX-License-Identifier: Apache-2.0
"""Answers compared, teaching rewarded."""
