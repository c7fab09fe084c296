# SPDX-License-Identifier: Apache-2.0
"""The decoder and its configuration."""
