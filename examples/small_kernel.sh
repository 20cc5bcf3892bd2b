#!/usr/bin/env bash
# Builds a small kernel of the distribution's own source, by small_kernel.config beside this file: FOLDER/vmlinux, which has a PVH
# entry. `trivmm image`'s initramfs does for it, whose modules it does not need. Minutes on two cores; without root.
#   examples/small_kernel.sh FOLDER [linux-source-6.1_….deb]
set -euo pipefail
[ $# -ge 1 ] || { echo "usage: $0 FOLDER [linux-source-….deb]" >&2; exit 2; }
here=$(cd "$(dirname "$0")" && pwd)
missing=()
for tool in gcc make flex bison bc xz dpkg-deb; do
    command -v "$tool" >/dev/null || missing+=("$tool")
done
echo '#include <gelf.h>' | gcc -E - >/dev/null 2>&1 || missing+=(libelf-dev)
[ "${#missing[@]}" -eq 0 ] || { echo "$0: missing ${missing[*]}; apt-get install build-essential flex bison bc xz-utils libelf-dev" >&2; exit 2; }
package=${2:+$(realpath "$2")}
mkdir -p "$1"
cd "$1"
if [ -z "$package" ]; then
    name=$(apt-cache depends linux-source | awk '/Depends: linux-source-/ {print $2; exit}')
    [ -n "$name" ] || { echo "$0: apt knows no linux-source; give its .deb" >&2; exit 1; }
    [ -e "$name"_*.deb ] || apt-get download "$name"
    package=$(ls "$PWD/$name"_*.deb | tail -n 1)
fi
rm -rf source
mkdir source
dpkg-deb --fsys-tarfile "$package" | tar -xO --wildcards './usr/src/linux-source-*.tar.xz' | tar -xJ -C source --strip-components=1
cd source
# The same source gives the same bytes.
export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=trivmm KBUILD_BUILD_HOST=trivmm
make -s KCONFIG_ALLCONFIG="$here/small_kernel.config" allnoconfig
lost=$(grep '^CONFIG_' "$here/small_kernel.config" | grep -vxFf .config || true)
[ -z "$lost" ] || { echo "$0: this source has not taken: $lost" >&2; exit 1; }
make -s -j"$(nproc)" vmlinux
cp vmlinux ../vmlinux.partial
strip ../vmlinux.partial
mv ../vmlinux.partial ../vmlinux
cd ..
rm -rf source
echo "$1/vmlinux: $(($(stat -c %s vmlinux) >> 20)) MiB"
