"""Keeps the C library from giving image buffers back to the kernel. Not for: limiting memory.

glibc gives large blocks back when they are freed, and each image is copied into a few fresh ones
on its way through Fast DDS and rclpy: the page faults then cost several times what the copies do
(bench/node_images.py, --malloc).
"""
import ctypes
import logging

log = logging.getLogger(__name__)

# From malloc.h, with the largest mapping threshold that glibc accepts on 64 bit.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
MMAP_THRESHOLD_BYTES = 32 << 20
TRIM_THRESHOLD_BYTES = 128 << 20


def keep_freed_memory() -> bool:
    """Let this process reuse blocks up to 32 MiB, and keep up to 128 MiB of freed memory.

    Call once, at the start of the program.

    :return: whether the C library took the settings; glibc does, others have none.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        log.debug('this C library has no mallopt; images take more CPU time')
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)
                and mallopt(_M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES))
