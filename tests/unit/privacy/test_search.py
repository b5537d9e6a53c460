"""The search finds a mark in each form and place, across every edge, and nothing else."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nextgpu_node.privacy import gpu_memory, machine, places
from nextgpu_node.privacy.marks import Marks, raised


@pytest.fixture
def marks() -> Marks:
    return Marks()


@pytest.mark.parametrize("before", range(4))
def test_a_mark_is_found_in_every_form(marks: Marks, before: int) -> None:
    mark = marks.plant("one")
    front = os.urandom(before)
    for text in (mark, raised(mark)):
        assert marks.search(front + text).units == {"one"}
        assert marks.search((front + text).hex().encode()).count == 1
        assert marks.search(base64.b64encode(front + text + b"more")).count == 1
    assert marks.search(mark * 3).count == 3
    assert marks.search(mark[1:]).count == 0
    assert Marks().search(mark).count == 0


def test_the_letter_behind_the_prefix_names_the_unit(marks: Marks) -> None:
    one, two = marks.plant("one"), marks.plant("two")
    assert marks.search(raised(two) + one).units == {"one", "two"}
    assert marks.search(one[:20]).units == {"?"}


def test_a_mark_across_two_chunks_is_found_once(marks: Marks, tmp_path: Path) -> None:
    mark = marks.plant("one")
    for start in (-31, -16, -1, 0):
        place = places._CHUNK_BYTES + start
        (tmp_path / "f").write_bytes(bytes(place) + mark + bytes(1000))
        assert places.search_files("x", [tmp_path], marks).found.count == 1


def test_names_of_files_are_searched_and_links_are_not_followed(
    marks: Marks, tmp_path: Path
) -> None:
    mark = marks.plant("one")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / mark.decode()).touch()
    (tmp_path / "secret").write_bytes(mark)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    assert places.search_files("x", [tmp_path / "in"], marks).found.count == 1
    later = (tmp_path / "secret").stat().st_mtime + 10
    assert places.search_files("x", [tmp_path], marks, since_s=later).items == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="reading another process's memory needs root here")
def test_a_mark_in_a_sparse_large_mapping_is_found_without_reading_the_holes(
    marks: Marks,
) -> None:
    code = (
        "import mmap, sys\n"
        "mark = sys.stdin.buffer.readline().strip()\n"
        "hole = mmap.mmap(-1, 1 << 34)\n"
        "hole[(1 << 33) + 4090 : (1 << 33) + 4090 + len(mark)] = mark\n"
        "del mark\n"
        "print('ready', flush=True)\n"
        "sys.stdin.buffer.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-I", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(marks.plant("one") + b"\n")
        process.stdin.flush()
        process.stdout.readline()
        look = places.search_memory("x", process.pid, marks)
        process.stdin.close()
    assert look.found.units == {"one"}
    assert look.searched_bytes < 1 << 28


def test_a_process_that_has_ended_is_no_error(marks: Marks) -> None:
    process = subprocess.Popen([sys.executable, "-I", "-c", ""])
    process.wait()
    assert places.search_memory("x", process.pid, marks).found.count == 0
    assert places.search_descriptors("x", process.pid, marks).items == 0


def test_what_could_not_be_searched_says_so(marks: Marks) -> None:
    assert machine.search_gpu_memory("x", marks, cards=0).unsearched == "there is no GPU here"
    both = places.total(
        "x", [places.Look("", unsearched="a"), places.Look("", unsearched="a"), places.Look("")]
    )
    assert both.unsearched == "a"


def test_the_search_on_a_card_counts_texts_in_a_block(marks: Marks) -> None:
    plain, result = marks.plain_prefixes
    block = torch.tensor(list(b"xx" + plain + plain + result[:-1]), dtype=torch.uint8)
    assert gpu_memory.count(block, plain) == 2
    assert gpu_memory.count(block, result) == 0
    assert gpu_memory.count(block[:4], plain) == 0
