"""Loop devices: a file as a block device (loop(4), linux/loop.h)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os

LOOP_GET_STATUS64 = 0x4C05
LOOP_CONFIGURE = 0x4C0A
LOOP_CTL_GET_FREE = 0x4C82
LO_FLAGS_AUTOCLEAR = 4
LO_FLAGS_DIRECT_IO = 16
BLOCK = 4096
"""Logical block size: direct I/O works whatever the host's disk has, and it is btrfs's own sector size."""

_U64, _U32 = ctypes.c_uint64, ctypes.c_uint32


class _LoopInfo64(ctypes.Structure):
    """struct loop_info64."""

    _fields_ = (
        ("lo_device", _U64),
        ("lo_inode", _U64),
        ("lo_rdevice", _U64),
        ("lo_offset", _U64),
        ("lo_sizelimit", _U64),
        ("lo_number", _U32),
        ("lo_encrypt_type", _U32),
        ("lo_encrypt_key_size", _U32),
        ("lo_flags", _U32),
        ("lo_file_name", ctypes.c_char * 64),
        ("lo_crypt_name", ctypes.c_char * 64),
        ("lo_encrypt_key", ctypes.c_ubyte * 32),
        ("lo_init", _U64 * 2),
    )


class _LoopConfig(ctypes.Structure):
    """struct loop_config."""

    _fields_ = (("fd", _U32), ("block_size", _U32), ("info", _LoopInfo64), ("reserved", _U64 * 8))


def attach(file_fd: int, name: str) -> tuple[int, str]:
    """An fd and the path of a free loop device, made a view of `file_fd` with direct I/O.

    It is freed when nobody has it open or mounted any more (LO_FLAGS_AUTOCLEAR), so mount it before closing the fd.
    `name`: what lsblk(8) and the like may show of it, 63 bytes.
    """
    config = _LoopConfig(fd=file_fd, block_size=BLOCK)
    config.info.lo_flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO
    config.info.lo_file_name = os.fsencode(name)[-63:]
    control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    try:
        while True:
            path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(fd, LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(fd)
                if error.errno == errno.EBUSY:
                    continue
                raise OSError(error.errno, error.strerror, f"LOOP_CONFIGURE {path}") from None
            # Mounting a device that is open for writing is refused where the kernel is strict (BLK_DEV_WRITE_MOUNTED).
            try:
                return os.open(path, os.O_RDONLY | os.O_CLOEXEC), path
            finally:
                os.close(fd)
    finally:
        os.close(control)


def find(file: str) -> tuple[int, str] | None:
    """An fd and the path of the loop device whose file this is, if there is one; by inode, not by name."""
    wanted = os.stat(file)
    with os.scandir("/sys/block") as devices:
        names = [entry.name for entry in devices if entry.name.startswith("loop")]
    for name in names:
        if os.path.exists(f"/sys/block/{name}/loop/backing_file") and (fd := open_view_of(name, wanted)) is not None:
            return fd, f"/dev/{name}"
    return None


def open_view_of(device: str, file: os.stat_result) -> int | None:
    """An fd of /dev/DEVICE where that is a loop device over `file`, else None."""
    try:
        fd = os.open(f"/dev/{device}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    info = _LoopInfo64()
    try:
        fcntl.ioctl(fd, LOOP_GET_STATUS64, info)
    except OSError:
        os.close(fd)
        return None
    if (info.lo_device, info.lo_inode) != (file.st_dev, file.st_ino):
        os.close(fd)
        return None
    return fd
