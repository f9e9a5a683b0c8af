"""The rule in conftest.py that a skipped test says what it needs, tried on small suites of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

POLICY = (Path(__file__).parent / "conftest.py").read_text()


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.Pytester]:
    """For runs in this process: another would take a second to import hypothesis alone."""
    ours = "ci" if os.environ.get("CI") == "true" else "here"
    monkeypatch.delenv("CI", raising=False)
    pytester.makeconftest(POLICY)
    yield pytester
    hypothesis.settings.load_profile(ours)


def skipping(reason: str) -> str:
    return f"import pytest\n@pytest.mark.skip(reason={reason!r})\ndef test_it(): pass\n"


def test_a_skip_that_names_what_it_needs_is_a_skip(suite: pytest.Pytester) -> None:
    suite.makepyfile(skipping("needs mooncake: the engine is not installed"))
    suite.runpytest_inprocess().assert_outcomes(skipped=1)


def test_a_skip_that_names_nothing_fails(suite: pytest.Pytester) -> None:
    suite.makepyfile(skipping("flaky"))
    result = suite.runpytest_inprocess()
    result.assert_outcomes(errors=1)  # a mark skips before the test itself begins
    result.stdout.fnmatch_lines(["*needs <thing>: <detail>*"])


def test_in_ci_a_skip_for_hardware_is_a_skip(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile(skipping("needs gpu: no CUDA device is visible"))
    suite.runpytest_inprocess().assert_outcomes(skipped=1)


def test_in_ci_a_skip_for_what_can_be_installed_fails(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile(skipping("needs mooncake: the engine is not installed"))
    result = suite.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*only these may be absent: gpu, rdma*"])


def test_a_whole_module_that_skips_is_judged_too(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile("import pytest\npytest.importorskip('no_such_engine')\ndef test_it(): pass\n")
    assert suite.runpytest_inprocess().ret != pytest.ExitCode.OK


def test_a_skip_inside_the_test_is_judged_too(suite: pytest.Pytester) -> None:
    suite.makepyfile("import pytest\ndef test_it(): pytest.skip('later')\n")
    suite.runpytest_inprocess().assert_outcomes(failed=1)


def test_an_expected_failure_is_no_skip(suite: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    suite.makepyfile("import pytest\n@pytest.mark.xfail(reason='known')\ndef test_it(): assert False\n")
    suite.runpytest_inprocess().assert_outcomes(xfailed=1)
