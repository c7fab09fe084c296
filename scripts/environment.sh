# SPDX-License-Identifier: Apache-2.0
# Sourced, from the repository root, by the scripts that need an environment.

# Prints the pythons that may be Python $1, most explicit first.
_candidates() {
  printf '%s\n' "python$1" python3 python \
    "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions/$1".*/bin/python \
    "${UV_PYTHON_INSTALL_DIR:-${HOME:-}/.local/share/uv/python}/cpython-$1".*/bin/python3
}

# find_python [VERSION]: prints a Python of that version, or of the first of
# 3.12 and 3.11 that is found on PATH or among pyenv's and uv's versions.
find_python() {
  local version candidate versions=("${1:-3.12}")
  [[ $# -gt 0 ]] || versions+=(3.11)
  for version in "${versions[@]}"; do
    while IFS= read -r candidate; do
      # Run it: version managers put names of missing versions on PATH.
      if "$candidate" -c "import sys
sys.exit('%d.%d' % sys.version_info[:2] != '$version')" >/dev/null 2>&1; then
        echo "$candidate"
        return
      fi
    done < <(_candidates "$version")
  done
  echo "Python ${versions[*]} was not found on PATH or among the versions of" \
    "pyenv and uv. Install python${versions[0]} with its venv module, then run" \
    "this command again." >&2
  return 2
}

# ensure_environment NAME...: installs requirements/NAME.txt of each name into
# $environment (.venv by default), created with Python $python_version (3.12,
# else 3.11), with the arguments $pip_options. A copy of each file in it records
# what is installed.
ensure_environment() {
  local name python missing="" files=() target="${environment:-.venv}"
  for name in "$@"; do
    files+=(-r "requirements/$name.txt")
    cmp -s "requirements/$name.txt" "$target/installed/$name.txt" || missing=1
  done
  [[ -n "$missing" ]] || return 0

  # venv installs pip last, so an environment without pip is incomplete.
  if [[ ! -x "$target/bin/pip" ]]; then
    python=$(find_python ${python_version:+"$python_version"}) || exit 2
    "$python" -m venv --clear "$target"
  fi
  echo "Installing requirements ($*) into $target; the first time takes minutes."
  "$target/bin/python" -m pip install -qq --disable-pip-version-check \
    ${pip_options:-} "${files[@]}"
  mkdir -p "$target/installed"
  for name in "$@"; do
    cp "requirements/$name.txt" "$target/installed/$name.txt"
  done
}

# ensure_real: adds requirements/real.txt, which says why it installs no
# dependencies, to the environment of the other requirements.
ensure_real() {
  pip_options=--no-deps ensure_environment real
}
