"""A limit on the memory that a test may take."""

import resource
from contextlib import contextmanager

import psutil


@contextmanager
def memory_limit(num_bytes):
    """Make allocations fail that exceed the current size of the process by ``num_bytes``; Linux only.

    A high-water mark such as ``ru_maxrss`` would not do: after an earlier, higher peak it stays as it is.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (psutil.Process().memory_info().data + num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
