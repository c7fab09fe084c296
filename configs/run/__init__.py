# SPDX-License-Identifier: Apache-2.0
"""Run recipes, one file each."""
