"""A shared library of forwarding functions, made as bytes: no compiler, no file that outlives the process.

PyPI's `scipy-openblas32` names its functions `scipy_cblas_sgemm` and so on, while libmlx asks the dynamic linker for
`cblas_sgemm`. What is missing is a library that defines the plain names and jumps to the prefixed ones. It needs a few
hundred bytes of ELF, the same every time but for the addresses, so it is written here and loaded from memory.

Sources: System V ABI, chapters 4 and 5 (ELF header, dynamic section, hash table), and its x86-64 and AArch64 supplements.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from collections.abc import Mapping

SONAME = "libfulltune_blas.so"
MEMORY_FILES = "/proc/self/fd/"

# AArch64 kernels use pages of up to 64 KiB; segments aligned to that load everywhere.
_ALIGN = 0x10000
_EM_X86_64, _EM_AARCH64 = 62, 183
_PT_LOAD, _PT_DYNAMIC, _PT_GNU_STACK = 1, 2, 0x6474E551
_READ_EXECUTE, _READ_WRITE = 5, 6
_DT_NULL, _DT_HASH, _DT_STRTAB, _DT_SYMTAB, _DT_STRSZ, _DT_SYMENT, _DT_SONAME = 0, 4, 5, 6, 10, 11, 14
_EHDR, _PHDR, _SYM, _STUB = 64, 56, 24, 24  # bytes


def _jump_x86_64(address: int) -> bytes:
    """`endbr64; mov r11, address; jmp r11`. r11 is free at a call; the arguments stay where they are."""
    return b"\xf3\x0f\x1e\xfa" + b"\x49\xbb" + struct.pack("<Q", address) + b"\x41\xff\xe3"


def _jump_aarch64(address: int) -> bytes:
    """`bti c; ldr x16, [the literal 12 bytes on]; br x16; nop`, then the address. x16 is for such veneers."""
    return struct.pack("<4IQ", 0xD503245F, 0x58000070, 0xD61F0200, 0xD503201F, address)


MACHINES = {"x86_64": (_EM_X86_64, _jump_x86_64), "aarch64": (_EM_AARCH64, _jump_aarch64)}
"""Processors that `image` knows, by their names in `os.uname().machine`: ELF's number, and a jump to an address."""


def image(targets: Mapping[str, int], machine: str) -> bytes:
    """The bytes of a 64-bit little-endian shared library that defines each name as a jump to an address.

    Args:
        targets: symbol name -> absolute address in this process.
        machine: "x86_64" or "aarch64".

    Raises:
        KeyError: another machine.
    """
    elf_machine, jump = MACHINES[machine]
    names = list(targets)
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in [*names, SONAME])
    symbols_at = _EHDR + 4 * _PHDR
    hash_at = symbols_at + _SYM * (len(names) + 1)
    # One bucket holds the chain of all symbols: bucket count, chain count, bucket 0, then each symbol's successor.
    chain = [0, *range(2, len(names) + 1), 0]
    hashes = struct.pack(f"<{3 + len(chain)}I", 1, len(names) + 1, 1, *chain)
    strings_at = hash_at + len(hashes)
    code_at = -(-(strings_at + len(strings)) // 16) * 16
    dynamic_at = code_at + _STUB * len(names)

    code = b"".join(jump(address).ljust(_STUB, b"\0") for address in targets.values())
    symbols = bytes(_SYM)
    for i, name in enumerate(names):  # info 0x12: a global function; section 1: any that is not "undefined"
        symbols += struct.pack("<IBBHQQ", strings.index(b"\0" + name.encode() + b"\0") + 1, 0x12, 0, 1, code_at + _STUB * i, _STUB)
    dynamic = b"".join(
        struct.pack("<QQ", tag, value)
        for tag, value in (
            (_DT_SONAME, strings.index(SONAME.encode())),
            (_DT_HASH, hash_at),
            (_DT_STRTAB, strings_at),
            (_DT_SYMTAB, symbols_at),
            (_DT_STRSZ, len(strings)),
            (_DT_SYMENT, _SYM),
            (_DT_NULL, 0),
        )
    )
    headers = _headers(elf_machine, dynamic_at, len(dynamic))
    text = (headers + symbols + hashes + strings).ljust(code_at, b"\0") + code
    return text + dynamic


def _headers(elf_machine: int, dynamic_at: int, dynamic_size: int) -> bytes:
    """The ELF header and four program headers: code, data (the dynamic section, which the loader writes to), dynamic, stack."""
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = ident + struct.pack("<HHIQQQIHHHHHH", 3, elf_machine, 1, 0, _EHDR, 0, 0, _EHDR, _PHDR, 4, 0, 0, 0)
    at = _ALIGN + dynamic_at  # in memory; congruent to the place in the file, as mapping demands
    segments = (
        (_PT_LOAD, _READ_EXECUTE, 0, 0, dynamic_at, _ALIGN),
        (_PT_LOAD, _READ_WRITE, dynamic_at, at, dynamic_size, _ALIGN),
        (_PT_DYNAMIC, _READ_WRITE, dynamic_at, at, dynamic_size, 8),
        (_PT_GNU_STACK, _READ_WRITE, 0, 0, 0, 16),  # without it the loader asks for an executable stack
    )
    return header + b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, offset, address, address, size, size, align)
        for kind, flags, offset, address, size, align in segments
    )


def load(data: bytes) -> ctypes.CDLL:
    """Load a shared library from bytes, its symbols visible to libraries loaded later.

    From anonymous memory; where the system forbids that, from a file that only this user can reach and that is gone
    when this returns.

    Raises:
        OSError: neither way is allowed here (for example memory files and a temporary folder that are both `noexec`).
    """
    try:
        return _load_from_memory(data)
    except (OSError, AttributeError):  # AttributeError: a Python without memfd_create
        with tempfile.TemporaryDirectory(prefix="fulltune_blas_") as folder:  # made with mode 0700
            path = os.path.join(folder, SONAME)
            with open(path, "wb") as file:
                file.write(data)
            return ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)


def _load_from_memory(data: bytes) -> ctypes.CDLL:
    handle = os.memfd_create(SONAME, os.MFD_CLOEXEC)
    try:
        with open(handle, "wb", closefd=False) as file:
            file.write(data)
        # On success the descriptor stays open: the loader knows the library by this path, so no other may ever get it.
        return ctypes.CDLL(f"{MEMORY_FILES}{handle}", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        os.close(handle)
        raise
