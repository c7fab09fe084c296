# SPDX-License-Identifier: Apache-2.0
"""Run recipes and the sections they are built from."""
