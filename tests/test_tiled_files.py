"""How much memory files of `tiled` may take: of the machine, and of containers."""

import shutil
from types import SimpleNamespace

import pytest

from shardtensor.paged import files

MIB = 2**20
SECOND, FIRST = "memory.max memory.current", "memory.limit_in_bytes memory.usage_in_bytes"
# files of cgroups (folder: limit, used, of that pages of files), what /proc/self/cgroup says, MiB
CONTAINERS = {
    "none": ({}, "", 1000),
    "no limit": ({"": (SECOND, "max", 500, 0)}, "0::/", 1000),
    "second": ({"": (SECOND, 300, 200, 150)}, "0::/", 250),
    "second, within another": (
        {"a": (SECOND, 300, 200, 0), "a/b": (SECOND, "max", 200, 0)}, "0::/a/b", 100,
    ),
    "of others": ({"c": (SECOND, 10, 0, 0)}, "0::/a/b", 1000),
    "first": ({"memory/a": (FIRST, 300, 200, 50)}, "4:memory:/a\n0::/", 150),
    "first, seen from within": ({"memory": (FIRST, 300, 200, 50)}, "4:memory:/docker/a", 150),
    "first, no limit": ({"memory/a": (FIRST, 2**43, 200, 50)}, "3:cpu:/b\n4:memory:/a", 1000),
    "more used than there may be": ({"": (SECOND, 100, 200, 0)}, "0::/", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTAINERS)
def test_files_take_what_a_container_leaves(name, tmp_path):
    groups, line, want = CONTAINERS[name]
    proc = tmp_path / "proc/self"
    proc.mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {1000 * 1024} kB\n")
    (proc / "cgroup").write_text(line)
    for folder, (names, *values) in groups.items():
        at = tmp_path / "sys/fs/cgroup" / folder
        at.mkdir(parents=True, exist_ok=True)
        *numbers, paged = [v if v == "max" else v * MIB for v in values]
        for file, number in zip(names.split(), numbers, strict=True):
            (at / file).write_text(f"{number}\n")
        total = "total_" if names == FIRST else ""
        stat = f"cache 7\n{total}active_file {paged - 1}\n{total}inactive_file 1\nfile 9"
        (at / "memory.stat").write_text(stat if paged else "anon 3")
    assert files._free(tmp_path) == want * MIB


def test_files_take_no_more_than_the_disk_has(tmp_path, monkeypatch):
    assert 0 < files.Files(tmp_path).cached <= files._free()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=7))
    assert files.Files(tmp_path).cached == 7
