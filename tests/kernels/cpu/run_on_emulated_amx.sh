#!/usr/bin/env bash
# Run the AMX kernels, as they are compiled for users, where no processor has AMX: under Linux in
# the Bochs emulator. By hand, on Debian 12, x86-64: a minute or two, half of one with Bochs built.
#
#   tests/kernels/cpu/run_on_emulated_amx.sh [CHECK.cpp]   instead of cross_check.cpp
#
#   EMULATED_AMX_DIR   folder for what is downloaded and built, kept (default: build/emulated-amx)
set -euo pipefail
tests=$(realpath "$(dirname "$0")")
source=$(realpath "$tests/../../../kernels/bitwatt_kernels/cpu")
check=$(realpath "${1:-$tests/cross_check.cpp}")
folder=${EMULATED_AMX_DIR:-$tests/../../../build/emulated-amx}

die() {
    echo "$0: $*" >&2
    exit 1
}

missing=()
for program in cmake cpio g++ make xz; do
    command -v "$program" >/dev/null || missing+=("${program/%xz/xz-utils}")
done
[ "${#missing[@]}" = 0 ] || die "some programs are missing: apt-get install ${missing[*]}"
mkdir -p "$folder"
cd "$folder"
folder=$PWD
exec 3>&2

step() { # step NAME COMMAND...: its output is shown only if it fails
    echo "== $1"
    local start=$SECONDS
    trap 'tail -n 20 "$folder/step.log" >&3' EXIT
    "${@:2}" >"$folder/step.log" 2>&1
    trap - EXIT
    echo "$((SECONDS - start)) s"
}

download() { # download PATH SHA256: a file of Debian's archive
    local archive
    # shellcheck disable=SC2016
    archive=$(apt-get indextargets --format '$(REPO_URI)' | grep -m 1 '/debian/$') ||
        die "apt's sources name no Debian archive"
    /usr/lib/apt/apt-helper -qq -o APT::Sandbox::User=root download-file "$archive$1" \
        "${1##*/}" "SHA256:$2"
}

get_firmware() {
    download pool/main/b/bochs/bochsbios_3.0+dfsg-1_all.deb \
        13f8f4bdd9bb5c07378b7e39042cb631ebdd41d00b0f1a3091caab17ca946a5b
    download pool/main/v/vgabios/vgabios_0.8a+ds-2_all.deb \
        921cca705c76139df423782979c3e4fe93a246ae3adc143ba17a321decf3544b
    dpkg-deb -x bochsbios_*.deb firmware.new
    dpkg-deb -x vgabios_*.deb firmware.new
    mv firmware.new firmware
}

# The kernel of this Debian; apt checks it against the archive's signed SHA256.
get_kernel() {
    local package
    package=$(apt-cache depends linux-image-cloud-amd64 |
        sed -n 's/.*Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
    [ -n "$package" ] || die "apt knows no linux-image-cloud-amd64: apt-get update"
    apt-get -q -o APT::Sandbox::User=root download "$package"
    dpkg-deb -x linux-image-*.deb kernel.new
    mv kernel.new/boot/vmlinuz-* vmlinuz
    rm -rf kernel.new
}

edit() { # edit FILE SED_SCRIPT
    cp "$1" "$1.before"
    sed -i "$2" "$1"
    ! cmp -s "$1" "$1.before" || die "nothing to edit in $1"
}

# What Bochs 3.0 lacks or gets wrong of AMX.
mend_bochs() {
    # The signed bytes of a product were zero-extended: of the tiles, their sign alone is thus
    # checked against these lines and not against Bochs' own arithmetic.
    edit cpu/avx/amx.cc 's/Bit32s(\([xy]byte\)/Bit8s(\1/g'
    # XSAVE took used tiles for unused, saved half their rows, and exchanged the rows' number and
    # their length.
    edit cpu/xsave.cc 's/tile_use_tracker == 0/tile_use_tracker != 0/
        s/row < BX_TILE_REGISTERS/row < BX_TILE_MAX_ROWS/
        s/\(vmm16u(8+n) .*\]\.\)rows/\1bytes_per_row/; s/\(vmmubyte(48+n) = .*\)bytes_per_row/\1rows/'
    # With AMX on, a store into code left half of the decoded instructions it changed: the bit of
    # fetchModeMask that stands for AMX moves a line's traces past where this loop stops.
    edit cpu/icache.h '/if (line_mask > mask) break;/d'
    # Linux offers no tiles without XFD: it wants #NM at a thread's first use, to make room then.
    edit cpu/cpuid.cc 's/leaf->eax |= (1<<3);/leaf->eax |= (1<<3) | (1<<4);/'
    edit cpu/cpu.h 's/^  Bit64u ia32_xss;/&\n  Bit64u ia32_xfd[2];  \/\/ IA32_XFD and IA32_XFD_ERR/'
    edit cpu/init.cc \
        's/^  BX_CPU_THIS_PTR msr.ia32_xss = 0;/&\n  BX_CPU_THIS_PTR msr.ia32_xfd[0] = BX_CPU_THIS_PTR msr.ia32_xfd[1] = 0;/'
    local cases='    case BX_MSR_IA32_XFD: case BX_MSR_IA32_XFD_ERROR:'
    local state='BX_CPU_THIS_PTR msr.ia32_xfd[index - BX_MSR_IA32_XFD]'
    edit cpu/msr.cc "/^  msr_desc\[BX_MSR_XSS\]/a \\
  msr_desc[BX_MSR_IA32_XFD] = new MSR_Descriptor(\"XFD\", BX_ISA_AMX);\\
  msr_desc[BX_MSR_IA32_XFD_ERROR] = new MSR_Descriptor(\"XFD_ERR\", BX_ISA_AMX);
        /^    case BX_MSR_XSS:/{
            N
            /\n *{\$/!s/^/$cases val64 = $state; break;\n/
            /\n *{\$/s/^/$cases $state = val_64; break;\n/
        }"
    edit cpu/avx/amx.cc '/::TILEZERO_Tnnn(/{n;s/$/\n  check_tile(i, i->dst());/}
        /::check_tile(bx/{n;s/$/\
  if (BX_CPU_THIS_PTR msr.ia32_xfd[0] \& BX_XCR0_XTILEDATA_MASK) {\
    BX_CPU_THIS_PTR msr.ia32_xfd[1] |= BX_XCR0_XTILEDATA_MASK;\
    exception(BX_NM_EXCEPTION, 0);\
  }/}'
    # An image longer than a block of memory was read across the block's end.
    edit memory/misc_mem.cc \
        's/\(ret = read(fd, .*get_vector(offset), \)size)/\1size < 4096 ? size : 4096)/'
}

build_bochs() {
    download pool/main/b/bochs/bochs_3.0+dfsg.orig.tar.xz \
        78f6c73d4a6472d5130a87ab9dc306d02c7c71ed8e25b3a8ef642e2a7acd282b
    rm -rf bochs-3.0
    tar xf bochs_*.orig.tar.xz
    cd bochs-3.0
    mend_bochs
    CFLAGS=-O2 CXXFLAGS=-O2 ./configure --enable-cpu-level=6 --enable-x86-64 --enable-avx \
        --enable-evex --enable-amx --enable-pci --enable-all-optimizations --disable-cdrom \
        --disable-docbook --with-nogui
    timeout 1800 nice make -j2 bochs
    mv bochs ..
    cd ..
    rm -rf bochs-3.0
}

build_check() {
    cmake -S "$source" -B library -DCMAKE_BUILD_TYPE=Release
    timeout 1800 nice cmake --build library --parallel 2
    rm -rf root
    mkdir -p root/proc root/dev
    cp library/bitwatt_cpu.so root
    # shellcheck disable=SC2016
    g++ -std=c++20 -O1 "$check" -L library -l:bitwatt_cpu.so -Wl,-rpath,'$ORIGIN' -o root/check
    local file
    for file in $(ldd root/check | grep -o '/[^ ]*'); do
        [[ $file == "$folder"/* ]] || install -D "$file" "root$file"
    done
    gcc -O1 -static -x c - -o root/init <<'EOF'
// Runs the check as the guest's first process, then switches the emulator off.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/io.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void) {
    mount("devtmpfs", "/dev", "devtmpfs", 0, 0);
    mount("proc", "/proc", "proc", 0, 0);
    const int console = open("/dev/console", O_RDWR);
    for (int i = 0; i < 3; ++i) dup2(console, i);
    char line[8192];
    for (FILE* file = fopen("/proc/cpuinfo", "r"); file && fgets(line, sizeof line, file);) {
        if (strncmp(line, "model name", 10) == 0) printf("%s", line);
        if (strncmp(line, "flags", 5) != 0) continue;
        for (char* flag = strtok(line, " \n"); flag; flag = strtok(NULL, " \n"))
            if (strncmp(flag, "amx", 3) == 0 || strncmp(flag, "avx", 3) == 0) printf("%s ", flag);
        printf("\n");
    }
    fflush(stdout);
    if (fork() == 0) {
        execl("/check", "/check", NULL);
        _exit(127);
    }
    int status;
    wait(&status);
    printf("wait status %d\n", status);
    fflush(stdout);
    sleep(1);  // until the serial port has sent it
    ioperm(0x8900, 1, 1);
    for (const char* c = "Shutdown"; *c; ++c) outb(*c, 0x8900);
    pause();
}
EOF
    (cd root && find . | cpio --quiet -o -H newc) >initrd
}

# What a boot loader does: Bochs puts the images into memory, a boot sector jumps there. See Linux's
# Documentation/arch/x86/boot.rst.
make_boot_images() {
    local setup_size
    setup_size=$((($(od -An -tu1 -j 497 -N 1 vmlinuz) + 1) * 512))
    head -c "$setup_size" vmlinuz >setup
    tail -c +"$((setup_size + 1))" vmlinuz >system
    poke() { # poke OFFSET BYTES, in printf's notation
        # shellcheck disable=SC2059
        printf "$2" | dd of=setup bs=1 seek=$(($1)) conv=notrunc status=none
    }
    u32() { # u32 NUMBER: its bytes, the lowest first
        printf '\\x%02x' $(($1 & 255)) $(($1 >> 8 & 255)) $(($1 >> 16 & 255)) $(($1 >> 24 & 255))
    }
    poke 0x210 '\xff\x81' # an unnamed loader; the kernel is loaded high, there is a heap
    poke 0x218 "$(u32 0x10000000)$(u32 "$(stat -c %s initrd)")"
    poke 0x224 '\x00\xde' # the heap's end
    poke 0x228 "$(u32 0x9e000)"
    # no5lvl: Bochs can't leave its BIOS's system management mode with five levels of page tables.
    # clearcpuid=fsrm: Linux 6.1's memmove fails where the BIOS leaves fast strings off.
    poke 0xe000 'console=ttyS0 quiet mitigations=off no5lvl clearcpuid=fsrm\0'
    # cli; ds, es, fs, gs, ss = 0x9000; sp = 0xe000; jmp 0x9020:0
    printf '%b' '\xfa\xb8\x00\x90\x8e\xd8\x8e\xc0\x8e\xe0\x8e\xe8\x8e\xd0' \
        '\xbc\x00\xe0\xea\x00\x00\x20\x90' >floppy
    truncate -s 510 floppy
    printf '\x55\xaa' >>floppy
    truncate -s 1440K floppy
    cat >bochsrc <<EOF
cpu: model=sapphire_rapids, count=1, ips=50000000, reset_on_triple_fault=0
memory: guest=512, host=512
romimage: file=firmware/usr/share/bochs/BIOS-bochs-latest
vgaromimage: file=firmware/usr/share/vgabios/vgabios.bin
optramimage1: file=setup, address=0x90000
optramimage2: file=system, address=0x100000
optramimage3: file=initrd, address=0x10000000
floppya: 1_44=floppy, status=inserted
boot: floppy
com1: enabled=1, mode=file, dev=serial
clock: sync=none
display_library: nogui
log: bochs.log
panic: action=fatal
EOF
}

run_guest() {
    rm -f serial
    # Its status says nothing: the shutdown is a fatal error to it.
    timeout 900 nice ./bochs -q -f bochsrc </dev/null || true
    [ -s serial ] || tail -n 20 bochs.log
    [ -s serial ]
}

[ -d firmware ] || step "BIOS" get_firmware
[ -f vmlinuz ] || step "kernel" get_kernel
[ -x bochs ] || step "Bochs" build_bochs
step "library and check" build_check
step "boot images" make_boot_images
step "guest" run_guest
tr -d '\r' <serial | tee output
for line in amx_int8 'all equal' 'wait status 0'; do
    grep -qxF "$line" output || die "the guest did not say: $line"
done
