"""Which tests run: pairs of a product cover it, values that take long to make are made once, faults are planted where they say."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.helpers import shared
from tests.helpers.pairwise import covering_pairs
from tests.mutants.planting import mutants_of
from tests.mutants.selection import PLACES, chosen, runs_for

PRODUCT = [
    {"member": member, "base": base, "backend": backend, "dtype": dtype}
    for member, base in [("a", 1), ("a", 2), ("b", 1), ("b", 2), ("b", 3)]
    for backend, dtype in itertools.product("xyz", ["f", "h"])
]


def pairs_in(rows: Iterable[dict[str, object]]) -> set[object]:
    return {pair for row in rows for pair in itertools.combinations(row.items(), 2)}


def test_every_pair_of_a_product_is_covered_by_few_rows() -> None:
    chosen = covering_pairs(PRODUCT)
    assert pairs_in(PRODUCT[i] for i in chosen) == pairs_in(PRODUCT)
    assert chosen == sorted(set(chosen))
    assert 9 <= len(chosen) <= 11  # bases times backends is 9, and one base is of one member alone


def test_rows_of_one_axis_or_two_are_all_chosen() -> None:
    assert covering_pairs([{"a": 1}, {"a": 2}]) == [0, 1]
    assert covering_pairs([{"a": a, "b": b} for a in (1, 2) for b in (1, 2)]) == [0, 1, 2, 3]
    assert covering_pairs([]) == []


MAKER = """
import sys, time
from pathlib import Path
from tests.helpers.shared import made_together
def make(i):
    with open(sys.argv[2], "a") as made:
        made.write(f"{i}\\n")
    time.sleep(0.05)
    return i * i
assert made_together("squares", range(12), str, make, Path(sys.argv[1])) == [i * i for i in range(12)]
"""


def test_processes_share_what_takes_long_and_find_it_again(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MAKER, tmp_path / "kept", tmp_path / "made"]
    both = [subprocess.Popen(command, cwd=shared.ROOT) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert subprocess.run(command, cwd=shared.ROOT, check=True).returncode == 0
    assert sorted(map(int, (tmp_path / "made").read_text().split())) == list(range(12))  # each once


def test_nothing_is_kept_of_what_failed(tmp_path: Path) -> None:
    def fail() -> int:
        raise ValueError("no")

    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            shared.made_once("kind", "key", fail, tmp_path)
    assert shared.made_once("kind", "key", lambda: 1, tmp_path) == 1
    assert shared.made_once("kind", "key", fail, tmp_path) == 1


def test_a_changed_file_has_another_digest(tmp_path: Path) -> None:
    path = tmp_path / "source"
    path.write_text("one")
    before = shared.digest_of_files([path])
    assert before == shared.digest_of_files([path])
    path.write_text("two")
    assert before != shared.digest_of_files([path])


THREE_AXES = """
import pytest
@pytest.mark.parametrize("c", range(4))
@pytest.mark.parametrize(("a", "b"), [(a, b) for a in range(3) for b in range(3)])
def test_product(a, b, c):
    pass
@pytest.mark.parametrize("b", range(6))
@pytest.mark.parametrize("a", range(6))
def test_two_axes(a, b):
    pass
"""


@pytest.mark.parametrize(("option", "count"), [("-s", 12 + 36), ("--full", 36 + 36), ("--beyond-pairs", 24)])
def test_pytest_runs_pairs_or_the_full_product(option: str, count: int, tmp_path: Path) -> None:
    """With the repository's conftest, in a folder of its own."""
    (tmp_path / "test_planted.py").write_text(THREE_AXES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--rootdir", tmp_path, option]
    done = subprocess.run([*command, tmp_path], cwd=shared.ROOT, capture_output=True, text=True)
    assert f"{count} passed" in done.stdout, done.stdout + done.stderr


PYTHON = b"""
def f(a: int = 1, *, b: float = 0.5) -> int:
    if not a or b < 2:  # < and or
        g(a)
        raise ValueError("1 + 1")
    return (a) + (
        b  # + here
    ) * 3
"""


def test_faults_of_python_are_planted_where_they_say() -> None:
    found = {(mutant.kind, mutant.old, mutant.new, mutant.line) for mutant in mutants_of("x.py", PYTHON)}
    assert found == {
        ("off by one", "1", "2", 2),
        ("constant", "0.5", "1.0", 2),
        ("condition", "not ", "", 3),
        ("operator", "or", "and", 3),
        ("comparison", "<", "<=", 3),
        ("off by one", "2", "3", 3),
        ("dropped call", "g(a)", "pass", 4),
        ("operator", "+", "-", 6),
        ("operator", "*", "/", 8),
        ("off by one", "3", "4", 8),
    }


def test_faults_of_cpp_are_planted_where_they_say() -> None:
    source = "#include <x>\n// 1 + 1\nint f(int a) { return a + 0x1F < 3u; }  // ρ + 1\n".encode()
    found = {(mutant.kind, mutant.old, mutant.new, mutant.line) for mutant in mutants_of("x.h", source)}
    assert found == {("operator", " + ", " - ", 3), ("comparison", " < ", " <= ", 3), ("off by one", "3", "4", 3)}


def test_every_fault_of_the_package_can_be_planted_and_has_tests() -> None:
    for pattern in PLACES:
        for path in sorted(shared.ROOT.glob(pattern)):
            name, source = str(path.relative_to(shared.ROOT)), path.read_bytes()
            assert runs_for(name)
            for mutant in mutants_of(name, source):
                planted = mutant.plant(source)
                assert planted != source
                if path.suffix == ".py":
                    ast.parse(planted)


def test_a_seed_chooses_the_same_faults_of_every_place() -> None:
    first = chosen(shared.ROOT, 1)
    assert first == chosen(shared.ROOT, 1)
    assert first != chosen(shared.ROOT, 2)
    assert len(first) == sum(PLACES.values()) >= 60
