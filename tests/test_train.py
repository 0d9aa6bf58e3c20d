"""The training loop: schedule, groups, logs, refusal of bad input, and exact resumption after SIGKILL."""

import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from minblip2 import UserError
from minblip2.data.features import weights_checksum
from minblip2.device import autocast
from minblip2.training import loop
from minblip2.training.loop import (
    TrainConfig,
    Trainer,
    learning_rate,
    load_weights,
    parameter_groups,
    read_log,
    save_weights,
    train,
    trained_state,
)
from tests.tiny_training import CONFIG, Numbers, Toy, toy_losses


def test_learning_rate_rises_then_follows_the_cosine_to_its_floor():
    config = TrainConfig(steps=110, learning_rate=2.0, warmup=10, min_lr_ratio=0.1)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.2, 1.0, 2.0])
    assert learning_rate(60, config) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert learning_rate(110, config) == pytest.approx(0.2)
    rates = [learning_rate(step, config) for step in range(9, 111)]
    assert all(later <= earlier for earlier, later in zip(rates, rates[1:], strict=False))
    held = replace(config, steps=140, hold=30)
    assert [learning_rate(step, held) for step in range(10, 41)] == [2.0] * 31
    assert [learning_rate(step + 30, held) for step in range(10, 111)] == rates[1:]


def test_only_trainable_matrices_decay_and_the_fresh_learn_faster():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2).requires_grad_(False), nn.Linear(4, 5))
    model.temperature = nn.Parameter(torch.tensor(0.07))
    groups = {(group["weight_decay"], group["lr_scale"]): [tuple(p.shape) for p in group["params"]]
              for group in parameter_groups(model,
                                            TrainConfig(steps=1, weight_decay=0.05, new_params="3.", lr_scale=40.0))}
    assert groups == {(0.05, 1.0): [(4, 3)], (0.0, 1.0): [(), (4,), (4,), (4,)], (0.05, 40.0): [(5, 4)],
                      (0.0, 40.0): [(5,)]}


def test_trained_state_has_the_buffers_of_what_trains_and_nothing_frozen():
    model = nn.ModuleDict({"frozen": nn.BatchNorm1d(3).requires_grad_(False), "trained": nn.BatchNorm1d(3)})
    assert set(trained_state(model)) == {f"trained.{name}" for name in
                                         ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


def test_trained_state_has_what_trains_beside_a_frozen_weight(tmp_path):
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    model.low_rank = nn.Parameter(torch.ones(1, 3))
    assert set(trained_state(model)) == {"bias", "low_rank"}


def test_training_learns_logs_and_is_not_repeated(tmp_path):
    torch.manual_seed(0)
    model = Toy()
    log = train(model, toy_losses, Numbers(), CONFIG, tmp_path)
    assert [record["step"] for record in log] == list(range(1, CONFIG.steps + 1)) == [r["step"] for r in
                                                                                      read_log(tmp_path / "log.jsonl")]
    assert log[-1]["loss"] < 0.5 * log[0]["loss"]
    assert not list(tmp_path.glob("*.part")) and not (tmp_path / "checkpoint.pt").exists()
    again, before = Toy(), (tmp_path / "log.jsonl").read_bytes()
    assert train(again, toy_losses, Numbers(), CONFIG, tmp_path) == log
    assert weights_checksum(again) == weights_checksum(model) and (tmp_path / "log.jsonl").read_bytes() == before


def test_other_settings_are_refused(tmp_path):
    train(Toy(), toy_losses, Numbers(), CONFIG, tmp_path)
    with pytest.raises(UserError, match="other settings"):
        train(Toy(), toy_losses, Numbers(), replace(CONFIG, learning_rate=1.0), tmp_path)
    with pytest.raises(UserError, match="another recipe"):
        load_weights(nn.Linear(2, 2), tmp_path / "model.safetensors")


def test_broken_files_are_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="model.safetensors cannot be read"):
        load_weights(Toy(), tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "checkpoint.pt").write_bytes(b"half a fi")
    with pytest.raises(UserError, match="checkpoint.pt cannot be read"):
        train(Toy(), toy_losses, Numbers(), CONFIG, tmp_path)


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path):
    def trained(folder, accumulate, batch_size):
        torch.manual_seed(0)
        model = Toy(dropout=0.0)
        config = replace(CONFIG, steps=5, grad_accum=accumulate)
        log = train(model, toy_losses, Numbers(batch_size), config, tmp_path / folder)
        return model.state_dict(), [record["gradient"] for record in log]

    (one, lengths), (two, others) = trained("one", 1, 16), trained("two", 2, 8)
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)
    assert others == pytest.approx(lengths, rel=1e-4), "Adam does not see the scale, clipping does"


def test_a_loss_that_is_not_finite_stops_with_the_images(tmp_path):
    def broken(model, batch):
        return {"loss": toy_losses(model, batch)["loss"] * math.inf}

    with pytest.raises(UserError, match=r"step 1, on images \[0, 1"):
        train(Toy(), broken, Numbers(), CONFIG, tmp_path)


def test_a_gradient_that_is_not_finite_changes_nothing(tmp_path):
    """A loss may be finite where its gradient is none: as the square root is at 0."""
    model = Toy(dropout=0.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken(model, batch):
        return {"loss": toy_losses(model, batch)["loss"] + (0 * model(batch.x)).sum().abs().sqrt()}

    with pytest.raises(UserError, match=r"the gradient of train is nan at step 1, on images \[0, 1"):
        train(model, broken, Numbers(), CONFIG, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not (tmp_path / "checkpoint.pt").exists() and not (tmp_path / "model.safetensors").exists()


def test_a_restart_that_is_killed_does_not_bring_the_old_model_back(tmp_path):
    old = train(Toy(), toy_losses, Numbers(), CONFIG, tmp_path)

    def killed(model, batch):
        if int(batch.image_ids[0]) >= 30 * 16:
            raise KeyboardInterrupt
        return toy_losses(model, batch)

    torch.manual_seed(7)
    with pytest.raises(KeyboardInterrupt):
        train(Toy(), killed, Numbers(), CONFIG, tmp_path, resume=False)
    assert not (tmp_path / "model.safetensors").exists(), "the old model would pass for the new run's"
    again = Toy()
    new = train(again, toy_losses, Numbers(), CONFIG, tmp_path)
    assert len(new) == CONFIG.steps and new != old
    torch.manual_seed(7)
    whole = Toy()
    assert train(whole, toy_losses, Numbers(), CONFIG, tmp_path / "whole") == new
    assert all(torch.equal(one, other) for one, other in zip(again.parameters(), whole.parameters(), strict=True))


def test_the_log_holds_every_step_that_a_checkpoint_has_behind_it(tmp_path, monkeypatch):
    """Else a kill right after a checkpoint would leave a gap in the log of the run that goes on."""
    held = []
    monkeypatch.setattr(loop, "save_checkpoint", lambda trainer, step, path, fingerprint: held.append(
        (step, len(read_log(path.parent / "log.jsonl")))))
    train(Toy(), toy_losses, Numbers(), CONFIG, tmp_path)
    assert held == [(step, step) for step in range(CONFIG.checkpoint_every, CONFIG.steps, CONFIG.checkpoint_every)]


def test_precision():
    with autocast(torch.device("cpu"), "bfloat16"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16
    with autocast(torch.device("cpu"), "float32"):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32
    with pytest.raises(UserError, match="precision"):
        autocast(torch.device("cpu"), "float8")


def test_weights_come_back_with_their_fingerprint(tmp_path):
    model, other = Toy(), Toy()
    save_weights(model, tmp_path / "model.safetensors", "mine")
    load_weights(other, tmp_path / "model.safetensors", "mine")
    assert weights_checksum(model) == weights_checksum(other)
    with pytest.raises(UserError, match="other settings"):
        load_weights(other, tmp_path / "model.safetensors", "yours")


@pytest.mark.parametrize("kills", [1, 3])
def test_killed_and_resumed_is_the_uninterrupted_run(tmp_path, kills):
    """SIGKILL at moments that fall between checkpoints; weights and loss curve must be the same to the last bit."""
    torch.manual_seed(0)
    model = Toy()
    log = train(model, toy_losses, Numbers(), CONFIG, tmp_path / "whole")

    command = [sys.executable, "-m", "tests.tiny_training", str(tmp_path / "killed")]
    environment = os.environ | {"TINY_TRAINING_PAUSE": "0.02"}
    log_file = tmp_path / "killed" / "log.jsonl"
    for kill in range(kills):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        enough = CONFIG.checkpoint_every * (kill + 1) + 2
        while process.poll() is None and (not log_file.exists()
                                          or log_file.read_text(encoding="utf-8").count("\n") < enough):
            time.sleep(0.005)
        assert process.poll() is None, "the run ended before it could be killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / "killed" / "checkpoint.pt").exists()
        assert not (tmp_path / "killed" / "model.safetensors").exists()
    subprocess.run(command, check=True, env=environment | {"TINY_TRAINING_PAUSE": "0"}, stderr=subprocess.DEVNULL)

    resumed = Toy()
    load_weights(resumed, tmp_path / "killed" / "model.safetensors")
    assert weights_checksum(resumed) == weights_checksum(model)
    assert read_log(log_file) == log


def test_a_log_line_that_a_kill_cut_short_is_left_out(tmp_path):
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo', encoding="utf-8")
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}]
    (tmp_path / "log.jsonl.gz").write_bytes(gzip.compress(b'{"step": 7}\n'))
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1}], "one's own comes first"
    (tmp_path / "log.jsonl").unlink()
    assert read_log(tmp_path / "log.jsonl") == [{"step": 7}]


def test_how_it_is_computed_is_no_other_run(tmp_path):
    """A run goes on with or without recomputation: it changes memory and time, not what is learned."""
    train(Toy(), toy_losses, Numbers(), replace(CONFIG, checkpoint_blocks=True), tmp_path)
    again = Toy()
    assert len(train(again, toy_losses, Numbers(), CONFIG, tmp_path)) == CONFIG.steps


def test_the_host_asks_the_device_once_in_a_step(tmp_path, monkeypatch):
    asked = []
    for name in ("item", "tolist", "__bool__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, name=name, original=original: (
            asked.append(name), original(self))[1])

    def losses(model, batch):
        return {"loss": (model(batch.x) - batch.y).square().mean(), "other": model.layers[0].weight.mean()}

    train(Toy(), losses, Numbers(), replace(CONFIG, steps=3, grad_accum=2), tmp_path)
    assert asked == ["tolist"] * 3


def test_a_frozen_part_that_was_trained_in_this_process_does_not_count_in_the_clipping(tmp_path):
    """Whether it was trained here or loaded from a file, its weights are the same: so is what is trained on it."""
    ends = []
    for stale in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).requires_grad_(False))
        if stale:
            model[1].weight.grad = torch.full((4, 4), 100.0)
        trainer = Trainer(model, lambda model, batch: {"loss": model(batch).square().mean()},
                          TrainConfig(steps=2, batch_size=3, precision="float32", grad_clip=0.01), torch.device("cpu"))
        ends.append(trainer.step(0, iter([torch.ones(3, 4)] * 2))["gradient"])
    assert ends[0] == ends[1] > 0.01
