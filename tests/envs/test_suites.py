"""The table of suites: what is not installed is one sentence, and nothing is imported unasked."""

import subprocess
import sys

import pytest
from sentences import sentence_of

from purejaxppo import envs
from purejaxppo.envs.suites import SUITES, suite_of
from purejaxppo.types import Discrete

MISSING = """
import a_package_that_nobody_has


def list_envs():
    return ["one"]
"""
NEEDS_WHEN_CALLED = """
def list_envs():
    import another_package_that_nobody_has

    return ["one"]
"""
NO_PICTURES = """
def list_envs():
    return ["one", "two"]


def make(name, **settings):
    from small_envs import counter

    return counter(**settings)._replace(name=name)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(name, code)`: a module with this code, in the table of suites under its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def add(name, code, extra=None):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.setitem(SUITES, name, suite_of(name, draws=False, extra=extra))
        monkeypatch.delitem(sys.modules, name, raising=False)

    return add


@pytest.mark.parametrize(
    ("code", "package"),
    [
        (MISSING, "a_package_that_nobody_has"),
        (NEEDS_WHEN_CALLED, "another_package_that_nobody_has"),
    ],
)
def test_a_suite_that_is_not_installed_names_the_extra(module, code, package):
    module("absent", code, extra="absent-suite")
    expected = (
        f"the suite absent needs the package {package}: pip install 'purejaxppo[absent-suite]'"
    )
    for call in (lambda: envs.list_envs("absent"), lambda: envs.make("absent/one")):
        assert sentence_of(call) == expected
    assert "CartPole-v1" in envs.list_envs("gymnax")


def test_a_second_suite_has_names_of_its_own_and_no_pictures(module):
    module("second", NO_PICTURES)
    assert envs.list_envs("second") == ["one", "two"]
    assert {"CartPole-v1", "second/one", "second/two"} <= set(envs.list_envs())
    env = envs.make("second/two", limit=3)
    assert env.name == "second/two"  # as a config and a policy name it
    assert (env.max_episode_steps, env.action_space) == (3, Discrete(3))
    assert envs.make("second/two", limit=3) is env
    assert "'one'" in sentence_of(lambda: envs.make("second/onne"))
    message = sentence_of(lambda: envs.drawing("second/one"))
    assert message == "second/one cannot be drawn: its suite brings no pictures"


def test_listing_one_suite_imports_no_other_and_importing_envs_none(module, tmp_path):
    module("second", NO_PICTURES)
    code = """
import sys
from purejaxppo import envs
from purejaxppo.envs.suites import SUITES, suite_of
SUITES["second"] = suite_of("second", draws=False)
before = "gymnax" in sys.modules
print(before, envs.list_envs("second"), "gymnax" in sys.modules, "second" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.stdout.strip() == "False ['one', 'two'] False True", done.stderr
