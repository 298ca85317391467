#!/bin/bash
# Makes the test guest: OUT/vmlinuz and OUT/initrd.gz, from Debian packages alone.
#
#   build.sh OUT        (needs root-less access only; nothing is installed)
#
# The kernel is the cloud kernel of this Debian, downloaded and unpacked, never installed. The
# result is cached: OUT/key names what it was made from (this folder and the packages whose
# programs are copied in), and an equal key ends the run at once.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
out=$(realpath -m "${1:?usage: build.sh OUT}")
packages="busybox-static qemu-guest-agent e2fsprogs xfsprogs util-linux coreutils"
# The disks of every machine type that the tests use, then what hangs on them.
modules="virtio_pci virtio_blk virtio_scsi sd_mod ata_piix nvme virtio_console virtio_rng
  crc32c_generic ext4 xfs"
mkdir -p "$out"

key=$({
  find "$here" -type f -print0 | sort -z | xargs -0 sha256sum | sed 's/ .*\// /'
  # shellcheck disable=SC2086
  dpkg-query -W $packages
} | sha256sum | cut -d' ' -f1)
if [ -s "$out/vmlinuz" ] && [ -s "$out/initrd.gz" ] && [ "$(cat "$out/key" 2>/dev/null)" = "$key" ]
then
  echo "test guest: up to date"
  exit 0
fi

work=$(mktemp -d "$out/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
root=$work/root

unpack_kernel() {
  local deb
  deb=$(find "$out" -maxdepth 1 -name 'linux-image-*.deb' | head -n 1)
  if [ -z "$deb" ]; then
    local package
    package=$(apt-cache depends linux-image-cloud-amd64 |
      awk '/Depends: linux-image/ { print $2; exit }')
    (cd "$out" && apt-get -q download "$package" >/dev/null 2>"$work/apt.log") ||
      { cat "$work/apt.log" >&2; exit 1; }
    deb=$(find "$out" -maxdepth 1 -name 'linux-image-*.deb' | head -n 1)
  fi
  dpkg-deb -x "$deb" "$work/kernel"
  version=$(find "$work/kernel/boot" -name 'vmlinuz-*' -printf '%f\n' | sed 's/^vmlinuz-//')
}

copy_modules() {
  local base=$work/kernel module file name
  [ -d "$base/lib/modules" ] || base=$work/kernel/usr
  depmod -b "$base" "$version"
  mkdir -p "$root/lib/modules"
  # What is built into this kernel prints nothing here; the order is that of the dependencies.
  for module in $modules; do
    modprobe -d "$base" -S "$version" --show-depends "$module" 2>/dev/null |
      awk '$1 == "insmod" { print $2 }' || true
  done | awk '!seen[$0]++' | while read -r file; do
    name=$(basename "$file" .xz)
    case $file in
      *.xz) xz -dc "$file" > "$root/lib/modules/$name" ;;
      *) cp "$file" "$root/lib/modules/$name" ;;
    esac
    echo "$name" >> "$root/etc/modules"
  done
}

# A dynamic program and the closure of its libraries.
copy_program() {
  local from to=$root$2 library
  from=$(readlink -f "$1")
  install -D "$from" "$to"
  ldd "$from" 2>/dev/null | grep -oE '/[^ ]+' | sort -u | while read -r library; do
    install -D "$(readlink -f "$library")" "$root$library"
  done
}

copy_userland() {
  local applet
  cp /bin/busybox "$root/bin/busybox"
  for applet in $(/bin/busybox --list | grep -vx busybox); do
    ln -sf busybox "$root/bin/$applet"
  done
  copy_program "$(command -v qemu-ga || echo /usr/sbin/qemu-ga)" /sbin/qemu-ga
  copy_program /sbin/mkfs.ext4 /sbin/mkfs.ext4
  copy_program /sbin/mkfs.xfs /sbin/mkfs.xfs
  copy_program /sbin/fstrim /sbin/fstrim
  copy_program /sbin/blkdiscard /sbin/blkdiscard
  copy_program /usr/bin/fallocate /sbin/fallocate
  copy_program /bin/sync /sbin/sync-file
  cp /etc/mke2fs.conf "$root/etc/"
  cp "$here/init" "$root/init"
  cp "$here"/bin/* "$root/bin/"
  chmod 755 "$root/init" "$root"/bin/*
}

write_etc() {
  printf 'PRETTY_NAME="icecore test guest"\nNAME=icecore-guest\nID=icecore-guest\nVERSION_ID=1\n' \
    > "$root/etc/os-release"
  echo 'root:x:0:0:root:/:/bin/sh' > "$root/etc/passwd"
  echo 'root:x:0:' > "$root/etc/group"
  : > "$root/etc/modules"
}

mkdir -p "$root"/{bin,sbin,proc,sys,dev,run,tmp,mnt,etc,var/run,var/log,var/lib/qemu}
unpack_kernel
write_etc
copy_modules
copy_userland
(cd "$root" && find . | cpio -o -H newc --quiet | gzip -1) > "$work/initrd.gz"
rm -f "$out/key"
cp "$work/kernel/boot/vmlinuz-$version" "$out/vmlinuz"
mv "$work/initrd.gz" "$out/initrd.gz"
echo "$key" > "$out/key"
echo "test guest: kernel $version, initrd $(stat -c %s "$out/initrd.gz") bytes"
