"""One step, and the parts of the recipe, each by what it does to a step or to the weights."""

import copy
import re
import sys
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from dataset.decoded_images import on_device
from dataset.loading import load
from dataset.splits import SPLITS
from model import checkpoint, registry
from predictor.files import sha256
from predictor.spec import PixelRule
from tests.learning import Training, make_plan
from train import main
from training import step
from training.augmentation import Mix
from training.balance import class_weights, say_uneven
from training.epoch import shuffled
from training.optimizers import make_average
from training.preview import first_batch
from training.randomness import order_generator, step_generator
from training.resolve import amp_dtype
from training.start import near
from training.step import make_batch
from training.tensorboard import Board


@pytest.fixture(scope="module")
def digits():
    return load("digits", rule=PixelRule.square(32))


def make(data, **options):
    return Training(data, **{"crop_padding": 4, "batch_size": 64, "optimizer": "sgd"} | options)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def after(steps, training):
    for indices in training.batches()[:steps]:
        training.step(indices)
    return weights(training.network)


def share(got, expected, start):
    """How far two ways are apart that lead from the same weights to the same, as a share of the way.

    Rounding gives some 1e-6, and up to 1e-4 where a ReLU or a maximum is on the edge; a wrong weighting gives 1e-2.
    """
    return float((got - expected).norm() / (expected - start).norm())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mixup": 0.4},
        {"cutmix": 1.0, "jitter": 0.2},
        {"clip_grad_norm": 0.1},
        {"balance": "loss", "rotate": 10.0, "trivial": True, "erase": 0.3, "label_smoothing": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [2, 3, 8])
def test_accumulation_gives_the_gradient_of_the_whole_batch(digits, options, accumulate):
    whole = after(3, make(digits, **options))
    parts = after(3, make(digits, accumulate=accumulate, **options))
    assert share(parts, whole, weights(make(digits).network)) < 1e-3


def test_a_step_is_that_of_the_mean_loss(digits):
    """Without anything else on, a step is what PyTorch does with cross_entropy and SGD."""
    training = make(digits, crop_padding=0, momentum=0.0, lr=0.1, weight_decay=0.0, label_smoothing=0.1)
    network, start = copy.deepcopy(training.network), weights(training.network)
    indices = torch.arange(64)
    loss, correct = training.step(indices)
    images = (digits.train.crops(indices).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    logits = network(images)
    expected = nn.functional.cross_entropy(logits, digits.train.targets[indices], label_smoothing=0.1)
    expected.backward()
    torch.optim.SGD(network.parameters(), lr=0.1).step()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    assert int(correct) == int((logits.argmax(dim=1) == digits.train.targets[indices]).sum())
    assert share(weights(training.network), weights(network), start) < 1e-3


def uneven(data):
    """The data with the class 0 ten times rarer in training."""
    rare = (data.train.targets == 0).nonzero().flatten()
    kept = torch.ones(len(data.train), dtype=torch.bool)
    kept[rare[len(rare) // 10 :]] = False
    names = [name for name, keep in zip(data.train.names, kept.tolist(), strict=True) if keep]
    train = replace(data.train, rows=data.train.rows[kept], targets=data.train.targets[kept], names=names)
    return replace(data, train=train)


def test_a_balanced_loss_weights_each_image_by_its_class(digits):
    rare = uneven(digits)
    training = make(rare, crop_padding=0, balance="loss", label_smoothing=0.1)
    network, indices = copy.deepcopy(training.network), torch.arange(64)
    loss, _ = training.step(indices)
    images, targets = rare.train.crops(indices).permute(0, 3, 1, 2), rare.train.targets[indices]
    losses = nn.functional.cross_entropy(
        network((images / 255 - 0.5) / 0.25), targets, label_smoothing=0.1, reduction="none"
    )
    weights = class_weights(rare.train.targets)[targets]
    assert len(weights.unique()) > 1
    assert float(loss) == pytest.approx((weights * losses).mean().item(), rel=1e-5)


def test_class_weights_have_the_mean_one_and_give_each_class_the_same(digits):
    targets = uneven(digits).train.targets
    weights, counts = class_weights(targets), torch.bincount(targets)
    assert float(weights[targets].mean()) == pytest.approx(1, rel=1e-5)
    assert torch.allclose(weights * counts, torch.full((10,), len(targets) / 10))
    assert class_weights(torch.tensor([0, 0, 2, 0])).tolist() == pytest.approx([2 / 3, 2, 2])  # none of class 1


def test_the_sampler_draws_all_classes_alike_and_every_image_of_a_class(digits):
    targets = torch.tensor([0] * 3600 + [1] * 360 + [3] * 40)  # none of class 2
    drawn = torch.cat(shuffled(torch.Generator().manual_seed(0), targets, make_plan(balance="sampler")))
    assert len(drawn) == 4000
    counts = torch.bincount(targets[drawn], minlength=4)
    assert counts[2] == 0
    assert (counts[[0, 1, 3]] - 4000 / 3).abs().max() < 150  # five standard deviations
    assert set(drawn[targets[drawn] == 3].tolist()) == set(range(3960, 4000))
    again = torch.cat(shuffled(torch.Generator().manual_seed(0), targets, make_plan(balance="sampler")))
    assert torch.equal(drawn, again)


def test_very_unequal_classes_are_said_with_the_option_that_helps():
    targets = torch.tensor([0] * 50 + [1] * 10 + [2] * 30)
    line = say_uneven(targets, ("cat", "dog", "cow"))
    assert "50 training images of 'cat', 10 of 'dog'; --balance loss or sampler" in line
    assert say_uneven(targets[1:], ("cat", "dog", "cow")) == ""


@pytest.mark.parametrize("options", [{}, {"cutmix": 1.0}, {"freeze": True, "crop_padding": 0}], ids=str)
def test_the_report_shows_the_first_batch_and_leaves_the_training_alone(digits, options):
    augmented = {} if "freeze" in options else {"trivial": True, "erase": 0.3}
    training = make(digits, flip=True, batch_size=20, **augmented | options)
    state = torch.get_rng_state()
    images, captions = first_batch(training.learner, digits.train, training.plan, digits.labels)
    assert torch.equal(torch.get_rng_state(), state)
    assert (images.dtype, images.shape) == (torch.uint8, (20, 32, 32, 3))
    order = shuffled(order_generator(0, 0), digits.train.targets, training.plan)[0]
    batch = make_batch(training.learner, digits.train, order, training.plan, step_generator(0, 0, 0))
    targets = [digits.labels[target] for target in batch.targets[1:].tolist()]
    assert [caption.split()[0] for caption in captions] == targets
    if batch.mix:
        assert any("%" in caption for caption in captions)
    else:
        assert torch.equal(images, batch.inputs[1:])


def test_images_too_many_for_the_gpu_stay_where_they_are(digits):
    enough = digits.train.pixels.nbytes * 4
    assert on_device(digits, torch.device("cuda"), enough - 4) is digits
    meta = torch.device("meta")  # has no memory of its own, and is on every machine
    assert all(getattr(on_device(digits, meta, enough), name).pixels.is_meta for name in SPLITS)


def test_on_a_cpu_the_images_stay_where_they_are(digits):
    assert near(torch.device("cpu"), digits) is digits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_images_lie_there_and_the_steps_are_the_same(digits, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # and not TF32
    training = make(digits, device="cuda")
    training.data = near(torch.device("cuda"), digits)
    assert training.data.train.pixels.is_cuda
    start = weights(make(digits).network)
    assert share(after(3, training).cpu(), after(3, make(digits)), start) < 1e-2


def test_the_gradients_norm_is_limited(digits):
    training = make(digits, clip_grad_norm=0.01, momentum=0.0, lr=1.0, weight_decay=0.0)
    before = weights(training.network)
    assert float((after(1, training) - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_mixup_counts_both_labels(digits, monkeypatch):
    """With every image mixed half and half with its neighbour, the loss is the mean of the two labels' losses."""
    monkeypatch.setattr("training.step.draw_mix", lambda *_: Mix(0.5))
    training = make(digits, crop_padding=0)
    network, indices = copy.deepcopy(training.network), torch.arange(10)
    loss, _ = training.step(indices)
    images = (digits.train.crops(indices).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
    logits, targets = network((images + images.roll(1, 0)) / 2), digits.train.targets[indices]
    losses = [nn.functional.cross_entropy(logits, labels).item() for labels in (targets, targets.roll(1))]
    assert float(loss) == pytest.approx(sum(losses) / 2, rel=1e-5)


def test_the_average_follows_the_weights():
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    average = make_average(network, 0.5)
    nn.init.ones_(network.weight)
    values = []
    for _ in range(6):
        average.update_parameters(network)
        values.append(float(average.module.weight))
    assert values[0] == pytest.approx(0.9)  # 1 / 10 of the old one is kept at first
    assert values == sorted(values)
    assert values[-1] < 1
    settled = make_average(nn.Linear(1, 1, bias=False), 0.5)
    settled.n_averaged.fill_(1000)
    nn.init.zeros_(settled.module.weight)
    settled.update_parameters(network)
    assert float(settled.module.weight) == 0.5


def test_statistics_are_averaged_too_and_counts_are_copied():
    network = nn.BatchNorm1d(2)
    average = make_average(network, 0.5)
    average.n_averaged.fill_(1000)
    network.running_mean.fill_(4.0)
    network.num_batches_tracked.fill_(7)
    average.update_parameters(network)
    assert average.module.running_mean.tolist() == [2.0, 2.0]
    assert int(average.module.num_batches_tracked) == 7


def test_the_average_is_what_is_evaluated_and_kept(tmp_path):
    out = tmp_path / "run"
    assert main(["--data", "digits", "--epochs", "1", "--ema", "0.99", "--out", str(out)]) == 0
    last, kept = checkpoint.load(out / "last.ckpt"), checkpoint.load_state_dict(out / "model.pt")
    assert all(torch.equal(kept[name], last["ema"]["network"][name]) for name in kept)
    assert not all(torch.equal(kept[name], last["network"][name]) for name in kept)


def test_amp_computes_in_the_type_that_it_names(digits):
    for amp, kind in (("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        training = make(digits, amp=amp)
        seen = []
        training.network.classifier.register_forward_hook(lambda *args, seen=seen: seen.append(args[2].dtype))
        assert training.learner.scaler.is_enabled() == (amp == "fp16")
        after(2, training)
        assert set(seen) == {kind}
        assert {p.dtype for p in training.network.parameters()} == {torch.float32}


def test_amp_auto_is_bf16_where_the_device_computes_in_it(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    for has in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, has=has: has)
        assert amp_dtype("auto", gpu) is (torch.bfloat16 if has else torch.float32)
        monkeypatch.setattr("training.resolve.cpu_computes_bf16", lambda has=has: has)
        assert amp_dtype("auto", cpu) is (torch.bfloat16 if has else torch.float32)
        assert amp_dtype("fp16", gpu) is torch.float16
    with pytest.raises(ValueError, match="--amp bf16: this GPU has no bfloat16; pass --amp fp16 or off"):
        amp_dtype("bf16", gpu)


def test_channels_last_changes_the_layout_and_not_the_result(digits):
    training = make(digits, channels_last=True)
    assert training.network.features[3].weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    training.network.features[3].register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    assert share(after(2, training), after(2, make(digits)), weights(make(digits).network)) < 1e-3
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_compile_trains_what_eager_trains(digits, monkeypatch):
    calls = []

    def backend(graph, _):
        calls.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compiled(network, backend=backend))
    start = weights(make(digits).network)
    assert share(after(2, make(digits, compile=True)), after(2, make(digits)), start) < 1e-3
    assert calls


def test_what_cannot_be_compiled_is_one_line(tmp_path, capsys, monkeypatch):
    def backend(*_):
        raise OSError("no working C++ compiler\nfound")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compiled(network, backend=backend))
    assert main(["--data", "digits", "--compile", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "no working C++ compiler found" in error
    assert "leave --compile out" in error
    assert error.count("\n") == 1


def test_everything_together_trains(tmp_path, capsys):
    options = [
        "--data",
        "digits",
        "--epochs",
        "4",
        "--amp",
        "bf16",
        "--channels-last",
        "--ema",
        "0.95",
        "--mixup",
        "0.1",
    ]
    options += ["--cutmix", "0.5", "--clip-grad-norm", "5", "--accumulate", "2"]
    assert main([*options, "--out", str(tmp_path / "a")]) == 0
    assert main([*options, "--out", str(tmp_path / "b")]) == 0
    assert sha256(tmp_path / "a" / "model.pt") == sha256(tmp_path / "b" / "model.pt")
    assert checkpoint.load(tmp_path / "a" / "last.ckpt")["best"]["accuracy"] > 0.2  # twice chance
    assert (
        "with mixup 0.1, cutmix 0.5, ema 0.95, clip grad norm 5.0, accumulate 2, amp bf16, channels last"
        in capsys.readouterr().out
    )


def test_a_loss_of_nan_names_the_step_the_rate_and_the_checkpoint(tmp_path, capsys, monkeypatch):
    """It begins at the third step of the second epoch."""
    real, calls = step.summed_loss, []

    def summed_loss(*arguments):
        calls.append(None)
        loss, correct = real(*arguments)
        return loss * (float("nan") if len(calls) == 41 + 3 else 1), correct

    monkeypatch.setattr(step, "summed_loss", summed_loss)
    out = tmp_path / "run"
    assert (
        main(["--data", "digits", "--epochs", "3", "--schedule", "constant", "--warmup", "0", "--out", str(out)]) == 2
    )
    error = capsys.readouterr().err
    assert "the loss is nan at step 3 of 41 in epoch 2, at a learning rate of 0.003" in error
    assert f"the last good checkpoint is {out / 'last.ckpt'}, epoch 1" in error
    assert error.count("\n") == 1
    last = checkpoint.load(out / "last.ckpt")
    assert last["epoch"] == 1
    assert all(value.isfinite().all() for value in last["network"].values())


@pytest.mark.parametrize(
    ("last", "minutes", "words"),
    [
        (2 * 41, "0", "the loss on val is nan after epoch 2"),
        (41 + 5, "1e-9", "the loss is nan at step 6 of 41 in epoch 2"),
    ],
)
def test_no_checkpoint_holds_what_the_step_before_it_broke(tmp_path, capsys, monkeypatch, last, minutes, words):
    """The loss of each step until then is still a number."""
    calls = []

    def train_step(learner, *arguments, **keywords):
        calls.append(None)
        found = step.train_step(learner, *arguments, **keywords)
        if len(calls) == last:
            next(learner.network.parameters()).data.fill_(float("nan"))
        return found

    monkeypatch.setattr("training.epoch.train_step", train_step)
    out = tmp_path / "run"
    arguments = ["--data", "digits", "--epochs", "3", "--checkpoint-minutes", minutes, "--out", str(out)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert f"the last good checkpoint is {out / 'last.ckpt'}, epoch 1" in error
    assert all(value.isfinite().all() for value in checkpoint.load(out / "last.ckpt")["network"].values())


def test_out_of_memory_outside_of_a_step_is_one_line_too(tmp_path, capsys, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nSee more")

    monkeypatch.setattr("training.epoch.evaluate", full)
    assert main(["--data", "digits", "--epochs", "1", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "Tried to allocate 9.00 GiB. Pass a smaller --size" in error
    assert error.count("\n") == 1


def limit_memory(monkeypatch, most):
    """A GPU whose memory holds so many images going through the network."""
    real = nn.Conv2d.forward

    def forward(self, images):
        if self.in_channels == 3 and images.requires_grad is False and torch.is_grad_enabled() and len(images) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB")
        return real(self, images)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)


@pytest.mark.parametrize("name", ["--accumulate", "--batch-size"])
def test_out_of_memory_says_what_to_halve_until_it_trains(tmp_path, capsys, monkeypatch, name):
    limit_memory(monkeypatch, 20)
    arguments, given, tried = (
        ["--data", "digits", "--epochs", "1", "--out", str(tmp_path / "run")],
        {"--batch-size": 64},
        [],
    )
    while main([*arguments, *(str(word) for pair in given.items() for word in pair)]) == 2:
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        advice = re.search(
            r"with --batch-size (\d+), (\d+) images at a time; pass (--accumulate \d+), .* or (--batch-size \d+)$",
            error,
        )
        tried.append(int(advice[2]))
        given |= {name: next(words.split()[1] for words in advice.group(3, 4) if words.startswith(name))}
        arguments = [*arguments, "--overwrite"] if "--overwrite" not in arguments else arguments
    assert tried == [64, 32]
    assert int(given[name]) == {"--accumulate": 4, "--batch-size": 16}[name]


def test_out_of_memory_with_two_images(tmp_path, capsys, monkeypatch):
    limit_memory(monkeypatch, 1)
    assert main(["--data", "digits", "--batch-size", "2", "--out", str(tmp_path / "run")]) == 2
    assert "pass a smaller --size" in capsys.readouterr().err


def test_evaluation_takes_smaller_batches_where_the_memory_ends(digits, monkeypatch):
    from training.evaluation import evaluate

    network = registry.build("simplecnn", 10, 32)
    scale = torch.full((3,), 0.5), torch.full((3,), 0.25)
    expected = evaluate(network, digits.val, *scale)
    real = nn.Conv2d.forward

    def forward(self, images):
        if len(images) > 50:
            raise torch.OutOfMemoryError
        return real(self, images)

    monkeypatch.setattr(nn.Conv2d, "forward", forward)
    assert (evaluate(network, digits.val, *scale) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_tensorboard_gets_the_history_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            written.append(("opened", folder, purge_step))

        def add_scalar(self, *arguments):
            written.append(arguments)

        def flush(self):
            written.append("flushed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = Board(tmp_path / "tensorboard", 4)
    board.write({"epoch": 5, "lr": 0.1, "val_loss": 0.5})
    assert written == [("opened", str(tmp_path / "tensorboard"), 5), ("lr", 0.1, 5), ("val_loss", 0.5, 5), "flushed"]


def test_without_tensorboard_nothing_is_said_or_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    Board(tmp_path / "tensorboard", 0).write({"epoch": 1, "lr": 0.1})
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")
