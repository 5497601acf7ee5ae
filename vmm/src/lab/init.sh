#!/lacuna-lab/busybox sh
# The first process of a lab: loads KVM, runs its commands, sends what came of them, ends.
# ttyS0 is the kernel's console; ttyS1 and ttyS2 take what the commands write to standard output and
# standard error; ttyS3 takes the result (vmm/src/lab/result.rs).
lab=/lacuna-lab
result=/dev/ttyS3
export PATH=$lab/bin HOME=/ LANG=C.UTF-8
$lab/busybox mkdir -p $lab/bin /dev /proc /sys /tmp
$lab/busybox --install -s $lab/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

fail() {
    printf 'lacuna-lab failed %s\n' "$*" >$result
    poweroff -f
    # Where there is nothing that could switch it off.
    sleep 1000000
}

for port in 1 2 3; do
    stty -F /dev/ttyS$port raw -echo 115200 || fail "serial port $port cannot be set up"
done
for module in irqbypass kvm @MODULE@; do
    why=$(insmod $lab/$module.ko 2>&1) || fail "module $module does not load: $why"
done
[ -c /dev/kvm ] || fail "there is no /dev/kvm"

# Through pipes, so that the commands see no terminal.
mkfifo $lab/out $lab/err
cat $lab/out >/dev/ttyS1 &
cat $lab/err >/dev/ttyS2 &
exec 3>$lab/out 4>$lab/err
statuses=
keep_in=
keep=
run() {
    $lab/lacuna "$@" </dev/null >&3 2>&4 3>&- 4>&-
    statuses="$statuses $?"
}
. $lab/order
exec 3>&- 4>&-
wait

: >$lab/files
if [ -n "$keep" ] && [ -e "$keep_in/$keep" ]; then
    (cd "$keep_in" && find "./$keep" -type f | cpio -o -H newc 2>/dev/null | gzip -c) >$lab/files
fi
{
    printf 'lacuna-lab status%s files %s\n' "$statuses" $(wc -c <$lab/files)
    cat $lab/files
    printf '\nlacuna-lab end\n'
} >$result
poweroff -f
sleep 1000000
