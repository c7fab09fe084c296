# SPDX-License-Identifier: Apache-2.0
"""Policy losses by name: settings of one objective."""
