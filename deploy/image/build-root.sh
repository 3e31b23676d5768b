#!/bin/sh
# Build the image's root file system: build-root.sh TARGET PYTHON WHEEL OPA
#
# TARGET  an empty folder
# PYTHON  a Python 3.11 with pip, of this machine
# WHEEL   the wheel of agent-pdp
# OPA     the opa command, statically linked
#
# Runs on Debian 12, as any user, and installs nothing there. What is in the image is what
# is unpacked here: a Python, what it is linked with, the sidecar, and opa. No shell, no
# package manager, no pip.
set -eu
target=$(realpath "$1") python=$2 wheel=$(realpath "$3") opa=$(realpath "$4")
here=$(realpath "$(dirname "$0")")
requirements=$here/../../requirements/server.txt

packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
(cd "$packages" && xargs apt-get download --quiet <"$here/packages.txt")
# What scanners look for in images without a dpkg: what each package says of itself.
status=$target/var/lib/dpkg/status.d
mkdir -p "$status"
for package in "$packages"/*.deb; do
    dpkg-deb --extract "$package" "$target"
    dpkg-deb --field "$package" >"$status/$(dpkg-deb --field "$package" Package)"
done

# What the packages' own scripts would do.
cat "$target"/usr/share/ca-certificates/mozilla/*.crt >"$target/etc/ssl/certs/ca-certificates.crt"
ln -s python3.11 "$target/usr/bin/python3"
printf '%s\n' 'root:x:0:0:root:/:/nonexistent' 'pdp:x:65532:65532:pdp:/nonexistent:/nonexistent' \
    >"$target/etc/passwd"
printf '%s\n' 'root:x:0:' 'pdp:x:65532:' >"$target/etc/group"

# Where Debian's Python looks for what is not Debian's.
site=$target/usr/local/lib/python3.11/dist-packages
"$python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
    --only-binary=:all: --require-hashes --target "$site" --requirement "$requirements"
"$python" -m pip install --quiet --disable-pip-version-check --no-compile --no-deps \
    --no-index --find-links "$(dirname "$wheel")" --target "$site" agent-pdp
# Commands name the Python of this machine, and the records of packages such commands.
rm -rf "$site/bin"
sed -i '\#^\.\./\.\./bin/#d' "$site"/*.dist-info/RECORD
install -m 0755 "$opa" "$target/usr/bin/opa"
cat >"$target/usr/bin/pdp" <<'EOF'
#!/usr/bin/python3.11
import sys

from pdp.cli import main

sys.exit(main())
EOF
chmod 0755 "$target/usr/bin/pdp"

# Nothing is written while it runs, so what is compiled is compiled now.
"$python" -m compileall -q --invalidation-mode unchecked-hash \
    -s "$target" -p / "$site" "$target/usr/lib/python3.11"
find "$target/usr/share/doc" -mindepth 2 ! -type d ! -name copyright -delete
find "$target/usr/share/doc" -type d -empty -delete
rm -rf "$target"/usr/share/man "$target"/usr/share/lintian \
    "$target"/usr/lib/python3.11/test "$target"/usr/lib/python3.11/ensurepip \
    "$target"/usr/lib/python3.11/lib2to3 "$target"/usr/lib/python3.11/pydoc_data
mkdir -p "$target/run/pdp" "$target/var/lib/pdp" "$target/etc/pdp"
