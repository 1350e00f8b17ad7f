"""Run folders of the comparison's tests."""

from tests.unit.compare.conftest import make_run as make_run
