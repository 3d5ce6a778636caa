#!/bin/sh
# The first process of the guest: has the checkout at its own path, runs the tests in it, turns the guest off.
#
# In: the checkout and its .venv, mounted below /mnt by whoever starts this; the kernel's command line, which says
# where they were. Out: the report as text on /dev/vdc; what is said meanwhile on the console.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1
mountpoint -q /sys || mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /run
mount -t cgroup2 cgroup2 /sys/fs/cgroup
ip link set lo up

for word in $(cat /proc/cmdline); do
    case $word in
        outlive.root=*) root=${word#*=} ;;
        outlive.python=*) python=${word#*=} ;;
        outlive.plan=*) plan=${word#*=} ;;
    esac
done

run() {
    modprobe overlay && mkdir -p "$root" /run/over/upper /run/over/work || return 1
    mount -t overlay -o "lowerdir=/mnt$root,upperdir=/run/over/upper,workdir=/run/over/work" \
        overlay "$root" || return 1
    # The venv's Python is the guest's own: of the same version, at the place of the host's.
    [ -e "$python" ] || { mkdir -p "$(dirname "$python")" && ln -s /usr "$python"; }
    cd "$root" && .venv/bin/python -m tests.kernels.inside "$plan" >/run/report.json
}

run
echo "guest: the tests ended with $?" >&2
if [ -s /run/report.json ]; then
    cat /run/report.json >/dev/vdc
fi
sync
echo o >/proc/sysrq-trigger
sleep 60
