"""Freed memory stays with the process that trains, unless its user has decided otherwise."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

from edge_ilseg.allocator import CHOICES, keep_freed_memory

REPEATED = """
import resource
import torch
from edge_ilseg.allocator import give_back_memory, keep_freed_memory
torch.set_num_threads(1)

def resident_mib():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize() / 2**20

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 * 2**20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
assert keep_freed_memory({}) and keep_freed_memory({})
faults()
kept, before = faults(), resident_mib()
give_back_memory()
print(given_back, kept, before - resident_mib())
"""

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


@needs_glibc
def test_memory_that_was_freed_is_used_again_without_the_system_and_can_be_given_back() -> None:
    child = subprocess.run([sys.executable, "-c", REPEATED], capture_output=True, text=True, check=True)
    given_back, kept, returned_mib = child.stdout.split()
    assert int(given_back) > 10  # the probe sees what is to be avoided, be the pages small or huge
    assert int(kept) < int(given_back) / 10
    assert float(returned_mib) > 32


@pytest.mark.parametrize("name", CHOICES)
def test_a_user_who_has_set_the_allocator_is_left_alone(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
