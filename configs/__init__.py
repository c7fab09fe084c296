# SPDX-License-Identifier: Apache-2.0
"""Run recipes and the blocks they are built from."""
