"""The files about the project agree with each other: one version, targets that exist, and a page that shows the stored runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click import ClickException

import sam_kernels
from tools import versions
from tools.check_wheel import problems_of, wheel_for
from tools.environments import is_for_cuda, pinned
from tools.wheels import version_of

ROOT = Path(__file__).resolve().parents[2]


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def called_targets(script: str) -> set[str]:
    """The targets of the Makefile that lines of a workflow or a shell script call."""
    return set(re.findall(r"^\s*(?:- run: )?make ([a-z-]+)", script, re.MULTILINE))


def test_every_file_has_the_version_of_the_package() -> None:
    (citation,) = re.findall(r"^version: (\S+)$", text_of("CITATION.cff"), re.MULTILINE)
    (project,) = re.findall(r'^version = "(.+)"$', text_of("pyproject.toml"), re.MULTILINE)
    newest = re.search(r"^## \[?(?:Unreleased\]?: )?(\d+\.\d+\.\d+)", text_of("CHANGELOG.md"), re.MULTILINE)
    assert newest is not None
    assert {citation, project, newest[1]} == {sam_kernels.__version__}


def test_the_workflow_calls_targets_that_the_makefile_has() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    called = called_targets(text_of(".github/workflows/ci.yml"))
    assert len(called) >= 5
    assert called - targets == set()


def test_the_workflow_calls_what_ci_run_calls() -> None:
    own = called_targets(text_of(".ci/run")) - {"install"}  # part of every target
    assert own >= {"test", "test-frameworks"}
    assert own <= called_targets(text_of(".github/workflows/ci.yml"))


# What make versions writes

RUN = {"torch": "2.13.0+cpu", "python": "3.11.7", "system": "Linux", "backends": ["native", "foreach"], "status": "passed"}
RUN |= {"passed": 3, "failed": 0, "seconds": 1}
NOT_RUN = {"torch": "2.6.0", "python": "3.11.7", "status": "not run", "reason": "only for CUDA"}


def test_the_page_shows_the_stored_runs() -> None:
    rows = json.loads(versions.RUNS.read_text(encoding="utf-8"))
    assert {row["status"] for row in rows} <= {"passed", "failed", "not run"}
    page = versions.PAGE.read_text(encoding="utf-8")
    assert versions.with_table(page, rows) == page
    shown = {row["torch"].partition("+")[0] for row in rows}
    assert set(versions.promised()) <= shown


def test_a_failed_run_shows_its_failures_and_one_that_was_not_made_its_reason() -> None:
    shown = versions.table([{**RUN, "status": "failed", "failed": 2}, NOT_RUN]).splitlines()
    assert shown[2] == "| 2.13.0+cpu | 3.11.7 | Linux | native, foreach | 3 passed, **2 failed** |"
    assert shown[3] == "| 2.6.0 | 3.11.7 | – | – | not run: only for CUDA |"


def test_new_rows_take_the_places_of_old_ones() -> None:
    newer, elsewhere = {**RUN, "passed": 4}, {**RUN, "torch": "2.6.0a0+debian", "python": "3.13.5"}
    assert versions.merged([RUN, NOT_RUN], [newer]) == [NOT_RUN, newer]
    of_debian = {**elsewhere, "torch": "2.6.0+debian"}
    assert versions.merged([NOT_RUN, RUN], [of_debian]) == [of_debian, RUN]
    assert versions.merged([of_debian], [NOT_RUN]) == [of_debian]


def test_a_page_without_markers_is_an_error() -> None:
    with pytest.raises(ClickException, match="versions: begin"):
        versions.with_table(f"{versions.END}\n{versions.BEGIN}", [RUN])


# What make wheel and make check-wheel decide by


def test_a_torch_for_cuda_is_told_by_what_it_requires() -> None:
    assert is_for_cuda(["filelock", 'nvidia-cublas-cu12 (==12.4.5.8) ; platform_system == "Linux"'])
    assert is_for_cuda(['cuda-bindings<14,>=13.0.3; platform_system == "Linux"'])
    assert not is_for_cuda(["filelock", "sympy>=1.13.3", "networkx"])


def test_a_package_without_a_pin_is_an_error() -> None:
    assert pinned("torch") == [line for line in text_of("constraints.txt").splitlines() if line.startswith("torch==")]
    with pytest.raises(LookupError, match="no line for no-such-package"):
        pinned("no-such-package")


@pytest.mark.parametrize(
    ("devices", "runtimes", "words"),
    [
        (["cpu"], ["/torch/lib/libgomp.so.1"], []),
        ([], ["/torch/lib/libgomp.so.1"], ["no native backend: because"]),
        (["cpu"], ["/torch/lib/libgomp.so.1", "/usr/lib/libgomp.so.1"], ["expected one OpenMP runtime"]),
        ([], None, ["no native backend: because", "expected one OpenMP runtime"]),
    ],
)
def test_a_wheel_without_kernels_or_with_another_runtime_is_not_sound(devices, runtimes, words) -> None:
    info = {"backends": {"native": {"devices": devices, "reason": "because"}}, "openmp_runtimes": runtimes}
    found = problems_of(info)
    assert len(found) == len(words)
    assert all(problem.startswith(word) for problem, word in zip(found, words, strict=True))


def test_what_is_no_python_cannot_build_a_wheel(tmp_path: Path) -> None:
    assert version_of(str(tmp_path / "python")) is None
    assert version_of("/bin/false") is None


def test_no_wheel_for_this_python_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "sam_kernels-0.1.0-cp27-cp27-manylinux_2_28_x86_64.whl").touch()
    with pytest.raises(ClickException, match="run make wheel"):
        wheel_for(tmp_path)


# What the page of support says is tested


def test_the_page_names_the_versions_that_tests_are_pinned_to() -> None:
    page = text_of("docs/support.md")
    frameworks = page.partition("## Frameworks")[2].partition("## Wheels")[0]
    rows = re.findall(r"^\| ([a-z-]+) \| (\d[\d.]*) \|", frameworks, re.MULTILINE)
    pins = text_of("tests/frameworks/constraints.txt").splitlines()
    assert len(rows) == 8
    assert [f"{name}=={version}" for name, version in rows if f"{name}=={version}" not in pins] == []
    (newest,) = pinned("triton")
    (oldest,) = re.findall(r"^OLDEST_TRITON := (\S+)$", text_of("Makefile"), re.MULTILINE)
    assert re.findall(r"^\| (3\.\d+\.\d+) \| tested", page, re.MULTILINE) == [newest.partition("==")[2], oldest]


def test_the_page_names_the_minimum_versions_of_the_extras() -> None:
    project = text_of("pyproject.toml")
    for name, minimum in re.findall(r"^\| \S+ \| \S+ \| `(\w+)` \| ≥ (\S+) \|", text_of("docs/support.md"), re.MULTILINE):
        (extra,) = re.findall(rf"^{name} = \[(.*)\]", project, re.MULTILINE)
        assert f'"{name}>={minimum}"' in extra
