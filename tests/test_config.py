import pytest
import yaml

from predictor.files import sha256
from train import main
from training.config import make_config, read_config


def test_flags_override_the_file_and_the_file_overrides_the_defaults(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data: digits\nout: runs/a\nepochs: 20\nlr: 3e-4\nbatch-size: 16\nfreeze: true\nminutes: null\n")
    config = make_config(str(file), {"epochs": 5, "freeze": False})
    assert (config.data, config.out, config.epochs, config.lr, config.batch_size) == ("digits", "runs/a", 5, 3e-4, 16)
    assert (config.freeze, config.minutes, config.optimizer) == (False, None, "adamw")


def test_a_runs_config_repeats_the_run(tmp_path, capsys):
    options = ["--data", "digits", "--epochs", "1", "--seed", "5", "--lr", "0.002", "--no-flip", "--jitter", "0.1"]
    assert main([*options, "--out", str(tmp_path / "a")]) == 0
    assert main(["--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]) == 0
    assert sha256(tmp_path / "a" / "model.pt") == sha256(tmp_path / "b" / "model.pt")
    a, b = (yaml.safe_load((tmp_path / run / "config.yaml").read_text()) for run in "ab")
    assert a | {"out": b["out"]} == b
    assert (a["size"], a["batch_size"], a["lr"]) == (32, 32, 0.002)  # what was chosen stands there, not null


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", "'epoch' is no option; did you mean epochs?"),
        ("zzz: 3", "'zzz' is no option; the names are those of the flags"),
        ("epochs: ten", "'epochs' is 'ten'; it must be a whole number"),
        ("epochs: 1.5", "'epochs' is 1.5; it must be a whole number"),
        ("epochs: true", "'epochs' is True; it must be a whole number"),
        ("accumulate: null", "'accumulate' is None; it must be a whole number"),
        ("lr: fast", "'lr' is 'fast'; it must be a number"),
        ("freeze: 1", "'freeze' is 1; it must be true or false"),
        ("arch: 18", "'arch' is 18; it must be a text"),
        ("epochs: 0", "--epochs 0: must be from 1"),
        ("- epochs", "holds a list, not options"),
        ("a: [", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path, capsys, text, words):
    file = tmp_path / "a.yaml"
    if text is not None:
        file.write_text(text + "\n")
    assert main(["--config", str(file), "--data", "digits", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_data_and_out_are_needed(capsys):
    assert main(["--epochs", "2"]) == 2
    assert "--data and --out: needed" in capsys.readouterr().err


def test_every_option_survives_the_file(tmp_path):
    config = make_config(None, {"data": "digits", "out": "x", "minutes": 2.5, "weights": "w.pt"})
    config.save(tmp_path / "config.yaml")
    assert make_config(None, read_config(tmp_path / "config.yaml")) == config
