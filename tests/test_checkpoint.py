import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from model import checkpoint
from model.checkpoint import CheckpointError
from predictor import files
from predictor.files import atomic_write, sha256


def test_a_checkpoint_survives_the_round_trip(tmp_path):
    values = {"network": {"w": torch.randn(3)}, "epoch": 4, "history": [{"loss": 0.5}]}
    checkpoint.save(values, tmp_path / "last.ckpt")
    loaded = checkpoint.load(tmp_path / "last.ckpt")
    assert torch.equal(loaded["network"]["w"], values["network"]["w"])
    assert loaded["epoch"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_equal_weights_give_equal_files(tmp_path):
    for name in ("a.pt", "another-name.pt"):
        checkpoint.save({"w": torch.arange(5.0)}, tmp_path / name)
    assert sha256(tmp_path / "a.pt") == sha256(tmp_path / "another-name.pt")


def test_a_file_that_would_run_code_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"w": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="more than weights"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("body", [b"", b"hello", b"PK\x03\x04" + bytes(50)])
def test_a_damaged_file_is_named(tmp_path, body):
    path = tmp_path / "model.pt"
    path.write_bytes(body)
    with pytest.raises(CheckpointError, match=r"model\.pt") as caught:
        checkpoint.load_state_dict(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_state_dict_is_refused(tmp_path):
    checkpoint.save({"epoch": 3}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="'epoch' is a int, not a tensor"):
        checkpoint.load_state_dict(tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.load_state_dict(tmp_path / "none.pt")


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "spec.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["spec.json"]


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    """Children write file after file over each other and are killed, for real, at different moments."""
    path = tmp_path / "last.ckpt"
    code = f"""
import itertools, runpy, sys
atomic_write = runpy.run_path({files.__file__!r})["atomic_write"]
print("writing", flush=True)
for step in itertools.count():
    if step == 1:
        print("written", flush=True)
    with atomic_write({str(path)!r}) as file:
        for _ in range(20):
            file.write(bytes([step % 256]) * 50_000)
"""
    for kill in range(20):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
            assert child.stdout is not None
            for _ in range(1 + kill % 2):  # each other child has written its first file
                child.stdout.readline()
            time.sleep(0.003 * kill)
            child.send_signal(signal.SIGKILL)
        if path.exists():  # the first may have been killed before its first file was whole
            body = path.read_bytes()
            assert body == body[:1] * 1_000_000
    assert path.exists()
