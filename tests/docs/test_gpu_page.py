"""The page of the last run on GPUs says what pytest reported: counts, worst errors by precision, what failed."""

from __future__ import annotations

import pytest

from tests.gpu.page import page

CASE = """<testcase classname="tests.gpu.test_matrix" name="{name}"><properties>
<property name="precision" value="{precision}"/>
<property name="error" value="{error}"/><property name="error" value="1e-16"/>
</properties>{end}</testcase>"""
SUITE = """<testsuites><testsuite time="61.2" timestamp="2026-11-28T14:01:22.1">
<properties><property name="devices" value="2 x H100"/><property name="backend" value="NCCL 2.28"/>
<property name="commit" value="abc"/></properties>{cases}</testsuite></testsuites>"""


def test_it_says_what_was_reported(tmp_path):
    cases = [
        CASE.format(name="one", precision="fp64", error="2e-15", end=""),
        CASE.format(name="two", precision="fp64", error="3e-15", end=""),
        CASE.format(name="three", precision="bf16", error="0.09", end="<failure/>"),
        '<testcase classname="tests.gpu.test_memory" name="four"><skipped/></testcase>',
    ]
    (tmp_path / "report.xml").write_text(SUITE.format(cases="".join(cases)))
    text = page(tmp_path / "report.xml")
    for line in (
        "| date | 2026-11-28 14:01 |", "| devices | 2 x H100 |", "| commit | abc |",
        "| tests | 1 failed, 2 passed, 1 skipped in 61 s |", "| fp64 | 2 | 3.0e-15 | 1e-12 |",
        "| bf16 | 1 | 9.0e-02 | 5e-02 |", "- `tests.gpu.test_matrix.three`",
    ):  # fmt: skip
        assert line in text.splitlines()


def test_a_run_without_a_test_is_no_run(tmp_path):
    skipped = '<testcase classname="tests.gpu.test_memory" name="b"><skipped/></testcase>'
    elsewhere = '<testcase classname="tests.ops.test_cross_entropy" name="c"></testcase>'
    (tmp_path / "report.xml").write_text(SUITE.format(cases=skipped + elsewhere))
    with pytest.raises(SystemExit, match="no test ran"):
        page(tmp_path / "report.xml")
