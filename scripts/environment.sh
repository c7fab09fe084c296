# SPDX-License-Identifier: Apache-2.0
# Sourced, from the repository root, by the scripts that need .venv.

# Prints a Python that the pins of requirements/ support.
_find_python() {
  local candidate
  for candidate in python3.11 python3 python3.12; do
    # Run, not looked up: a version manager leaves names of absent versions.
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
      >/dev/null 2>&1; then
      echo "$candidate"
      return
    fi
  done
  echo "No Python 3.11 or newer was found on PATH. Install python3.11 (with" \
    "its venv module) and run this line again." >&2
  return 2
}

# ensure_environment NAME...: makes .venv hold requirements/NAME.txt of each
# name. A copy of each file in .venv tells what is installed already.
ensure_environment() {
  local name python missing="" files=()
  for name in "$@"; do
    files+=(-r "requirements/$name.txt")
    cmp -s "requirements/$name.txt" ".venv/installed/$name.txt" || missing=1
  done
  [[ -n "$missing" ]] || return 0

  # pip comes last, so a .venv without it was interrupted.
  if [[ ! -x .venv/bin/pip ]]; then
    python=$(_find_python) || exit 2
    "$python" -m venv --clear .venv
  fi
  echo "Installing requirements ($*) into .venv; the first time takes minutes."
  .venv/bin/python -m pip install -qq --disable-pip-version-check \
    "${files[@]}"
  mkdir -p .venv/installed
  for name in "$@"; do
    cp "requirements/$name.txt" ".venv/installed/$name.txt"
  done
}
