"""The metadata of `Config`'s fields assigns each field to its algorithms; all else follows it."""

import re
from pathlib import Path

import pytest
from rich.console import Console

from purejaxppo import Config, ConfigError
from purejaxppo.cli import commands
from purejaxppo.config import ALGORITHMS, FIELDS, fields_of, variants_of
from purejaxppo.sweeps.compare import variant, variant_names

ROOT = Path(__file__).parent.parent
OTHERS = {
    "objective": "unclipped",
    "early_stop_kl": 0.1,
    "clip_eps_high": 0.3,
    "loss_reduction": "constant",
    "ref_kl_loss": "k3",
    "clip_value": True,
    "baseline": "none",
}


def test_every_variant_has_a_case_here():
    assert set(OTHERS) == {name for name, field in FIELDS.items() if field.metadata["variant"]}
    own = [name for algorithm in ALGORITHMS for name in fields_of(algorithm)]
    assert len(own) == len(set(own)) == 17


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_variant_is_refused_by_other_algorithms_and_other_fields_are_not(algorithm, name):
    own = FIELDS[name].metadata["of"]
    settings = {"algorithm": algorithm, name: OTHERS[name]}
    if algorithm in own:
        assert getattr(Config.from_dict(settings), name) == OTHERS[name]
        return
    with pytest.raises(ConfigError) as error:
        Config.from_dict(settings)
    expected = f"{name} = {OTHERS[name]!r} is for {own[0]} only: leave it out, or set algorithm="
    assert str(error.value) == f"{expected}{own[0]!r}"
    plain = {"max_kl": 0.5, "clip_eps": 0.3, "baseline_decay": 0.5, "cg_iterations": 3}
    Config.from_dict({"algorithm": algorithm} | plain)


def test_compare_knows_every_variant_that_has_a_name():
    assert variants_of("trpo") == {} and len(variant_names()) == 8
    for name in variant_names():
        algorithm, kind = name.split("/")
        config = variant("CartPole-v1", name)
        assert config.algorithm == algorithm and kind in (config.objective, config.baseline)
    assert all(name in re.sub(r"\s+", " ", commands.compare.__doc__) for name in variant_names())


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_has_a_heading_for_each_algorithm(command, capsys, monkeypatch):
    monkeypatch.setattr(commands, "console", Console(width=200))
    with pytest.raises(SystemExit):
        commands.main([command, "--help"])
    shown = capsys.readouterr().out
    places = [shown.index(f"{algorithm} options") for algorithm in ALGORITHMS]
    assert places == sorted(places)
    for start, end, algorithm in zip(places, [*places[1:], len(shown)], ALGORITHMS, strict=True):
        for name in FIELDS:
            option = f"--{name.replace('_', '-')} "
            is_own = name in fields_of(algorithm)
            assert (f" {option}" in shown[start:end].replace(",", " ")) == is_own, name


@pytest.mark.checkout
def test_the_readme_lists_the_fields_of_each_algorithm():
    text = (ROOT / "README.md").read_text()
    for algorithm in ALGORITHMS:
        (row,) = re.findall(rf"^\| `{algorithm}` \|.*$", text, re.M)
        assert tuple(re.findall(r"`(\w+)`", row.split("|")[3])) == fields_of(algorithm)
