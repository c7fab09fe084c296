# SPDX-License-Identifier: Apache-2.0
"""The recipes and the loop that runs them."""
