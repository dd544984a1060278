"""The configuration: sources of values, their precedence, and error messages."""

import json
import math
from contextlib import nullcontext
from dataclasses import dataclass, make_dataclass
from typing import Annotated, Literal

import pytest

from model.command_line import CONFIGS
from runtime.budget import LENGTHS
from runtime.config import ConfigError, as_dict, build, flatten, knobs, merge, read_file, read_flags
from train import Config


@dataclass(frozen=True)
class Inner:
    kind: Annotated[str, "first"] = "plain"
    size: Annotated[int, "[1, inf)", "how large"] = 4


@dataclass(frozen=True)
class Outer:
    rate: Annotated[float, "(0, 1)", "how fast"] = 0.5
    mode: Annotated[Literal["slow", "fast"], "which way"] = "slow"
    loud: Annotated[bool, "whether to shout"] = False
    inner: Inner = Inner()


def parse(*argv):
    return build(Outer, read_flags(Outer, list(argv), ""))


def test_flags_with_and_without_equals_sign():
    assert parse("--rate=0.25", "--inner.size", "9", "--mode", "fast") == Outer(0.25, "fast", inner=Inner(size=9))


def test_a_bare_boolean_flag_is_true():
    assert parse("--loud").loud and parse("--loud=true").loud and not parse("--loud=false").loud
    assert build(Config, read_flags(Config, ["--compile", "--steps=1"], "")).compile == "on"


def test_a_section_by_its_name_sets_its_first_knob():
    assert parse("--inner=fancy", "--inner.size=2").inner == Inner("fancy", 2)
    assert flatten(Outer, {"inner": "fancy"}) == {"inner.kind": "fancy"}


def test_defaults_then_file_then_flags(tmp_path):
    (tmp_path / "a.py").write_text("rate = 1 / 4\ninner = dict(size=7)\nmode = 'fast'\n")
    file = flatten(Outer, read_file("a.py", tmp_path))
    config = build(Outer, file | read_flags(Outer, ["--mode=slow"], ""))
    assert config == Outer(0.25, "slow", inner=Inner(size=7))


def test_an_int_is_accepted_as_a_float_and_as_text(tmp_path):
    (tmp_path / "a.py").write_text("model = dict(window=256)\nsteps = 1\nlr = 1\n")
    config = build(Config, flatten(Config, read_file("a.py", tmp_path)))
    assert config.model.window == "256" and config.lr == 1.0


def test_a_configuration_survives_json():
    config = Outer(0.1, "fast", True, Inner("x", 3))
    assert build(Outer, flatten(Outer, json.loads(json.dumps(as_dict(config))))) == config


def test_a_layer_replaces_exclusive_keys_of_earlier_layers():
    assert merge([{"steps": 5, "lr": 1}, {"tokens": 7}], {"steps", "tokens"}) == {"lr": 1, "tokens": 7}


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--rat=1", r"no flag called --rat \(did you mean --rate\?\)"),
        ("--inner.sise=1", r"--inner.sise \(did you mean --inner.size\?\)"),
        ("stray", "unexpected argument stray"),
        ("--rate=fast", "rate must be a number, not 'fast'"),
        ("--rate=0", "rate must be more than 0, not 0"),
        ("--rate=nan", "rate must be more than 0, not nan"),
        ("--rate=1", "rate must be less than 1, not 1"),
        ("--inner.size=2.5", "inner.size must be a whole number, not '2.5'"),
        ("--inner.size=-3", "inner.size must be at least 1, not -3"),
        ("--mode=fst", r"mode must be slow or fast, not 'fst' \(did you mean fast\?\)"),
        ("--loud=maybe", "loud must be true or false, not 'maybe'"),
        ("--rate", "expected one argument"),
    ],
)
def test_bad_flags(flag, message):
    with pytest.raises(ConfigError, match=message):
        parse(flag)


@pytest.mark.parametrize(
    "text, message",
    [
        ("rates = 0.1", r"no knob called rates \(did you mean rate\?\)"),
        ("inner = dict(sizes=1)", r"inner.sizes \(did you mean inner.size\?\)"),
        ("rate = 'high'", "rate must be a number, not 'high'"),
        ("inner = dict(size=True)", "inner.size must be a whole number, not True"),
        ("inner = dict(kind=True)", "inner.kind must be text, not True"),
        ("inner = dict(kind=0.5)", "inner.kind must be text, not 0.5"),
        ("rate = 1 / 0", "does not run: ZeroDivisionError"),
        ("rate = (", "does not run: SyntaxError"),
        ("inner = dict(size=10 ** 30)", "inner.size must be a whole number that 64 bits hold"),
        ("rate = 10 ** 400", "rate must be a number, not 1000"),
        ("rate = lambda: 0.5", "rate must be a number, not <function"),
        ("import sys\nsys.exit(3)", "does not run: SystemExit: 3; a config file is Python"),
        ("raise ValueError('two\\nlines')", "does not run: ValueError: two lines; a config file is Python"),
        ("import nowhere", "does not run: ModuleNotFoundError: No module named 'nowhere'"),
        ("rate: 0.25", "has 'rate: 0.25' in line 1, which sets no knob; a config file is Python"),
        ("# YAML\ninner:\n  size: 4", r"does not run: SyntaxError: .*line 2\).*; a config file is Python"),
        ('{"rate": 0.25}', "has \"{'rate': 0.25}\" in line 1, which sets no knob; a config file is Python"),
    ],
)
def test_bad_files(tmp_path, text, message):
    (tmp_path / "bad.py").write_text(text)
    with pytest.raises(ConfigError, match=message):
        build(Outer, flatten(Outer, read_file(str(tmp_path / "bad.py"), tmp_path)))


def test_modules_functions_and_names_with_an_underscore_are_no_knobs(tmp_path):
    (tmp_path / "a.py").write_text(
        '"""A config."""\nimport math as m\nfrom math import sqrt\nfrom collections import Counter\n'
        "_half = 0.5\ndef twice(x):\n    return 2 * x\nprint(end='')\nrate = sqrt(twice(_half)) / m.pi\n"
    )
    assert read_file("a.py", tmp_path) == {"rate": 1 / math.pi}


@pytest.mark.parametrize("interval", ["0, 1", "[0 1)", "[0,1)", "[1, 0]", "(nan, 1)", "[0, one)", "how fast"])
def test_a_malformed_interval_is_a_programming_error(interval):
    wrong = make_dataclass("Wrong", [("rate", Annotated[float, interval, "help"], 0.5)])
    with pytest.raises(ValueError) as caught:
        knobs(wrong)
    assert not isinstance(caught.value, ConfigError)


def test_an_interval_may_be_open_or_closed_on_either_side():
    sides = {"[0, 1]": [0, 0.5, 1], "(0, 1]": [0.5, 1], "[0, 1)": [0, 0.5], "(0, 1)": [0.5], "[0.5, inf)": [0.5, 1]}
    for interval, held in sides.items():
        knob = knobs(make_dataclass("Right", [("rate", Annotated[float, interval, "help"], 0.5)]))["rate"]
        for value in (0, 0.5, 1, math.inf, math.nan):
            with nullcontext() if value in held else pytest.raises(ConfigError, match=f"rate must be .*, not {value}"):
                knob.read(float(value))


def test_a_missing_file_lists_those_there(tmp_path):
    (tmp_path / "one.py").touch()
    with pytest.raises(ConfigError, match=r"no config file 'two.py'.*which has one.py"):
        read_file("two.py", tmp_path)


def helped(capsys, cls, *argv, doc="", configs=None):
    """What `-h` prints; it exits with 0."""
    with pytest.raises(SystemExit) as exit:
        read_flags(cls, list(argv), doc, configs)
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_help_has_groups_and_the_values_of_the_config_and_the_flags(capsys, tmp_path):
    (tmp_path / "a.py").write_text("lr = 0.25\nmodel = dict(n_layer=7)\ndata = 'notes'\n")
    options = {"doc": "Train.\n\n    python train.py\n", "configs": tmp_path}
    shown = helped(capsys, Config, "--config=a.py", "--steps=5", "--batch_size", "64", "-h", **options)
    lines = shown.splitlines()
    assert lines[:5] == ["Train.", "", "    python train.py", "", "length of the run"]
    assert "  --eps=float               adam and adamw: added to the denominator [1e-08]" in lines
    assert "  --lr=float                peak learning rate of adam and adamw [0.25]" in lines
    groups = [line for line in lines if line and line[0] != " "][1:]
    assert groups[-1] == "sections" and {"optimization", "learning rate schedule", "batch"} < set(groups)
    assert "n_layer" not in shown.partition("\nsections")[0] and "  -h model " in shown
    assert len(lines) < 100 and all(len(line) <= 80 for line in lines)
    model = helped(capsys, Config, "-h", "model", "--config=a.py", **options).splitlines()
    assert model[:3] == [
        "",
        "model",
        "  --model.n_layer=int       layers [7]",
    ] and "  --model.tied=true|false" in "".join(model)
    assert "  --data.corpus=str" in helped(capsys, Config, "-h", "data")
    with pytest.raises(ConfigError, match=r"-h modle: it must be model, data, kernels or all \(did you mean model\?\)"):
        read_flags(Config, ["-h", "modle"], "")


def test_every_knob_of_the_trainer_has_help_and_a_default_it_accepts(capsys):
    for key, knob in knobs(Config).items():
        assert knob.help, key
        assert knob.read(knob.default) == knob.default, key
    assert helped(capsys, Config, "-h", "all").count("\n  --") == len(knobs(Config))


def test_every_config_file_is_valid():
    for path in CONFIGS.glob("*.py"):
        config = build(Config, merge([flatten(Config, read_file(path.name, CONFIGS))], LENGTHS))
        config.model.resolved(config.data.expected_vocab_size)
