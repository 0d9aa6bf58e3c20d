"""Where is computed and in which precision: what the environment and the command line say, and what each device has."""

import argparse
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minblip2 import UserError, __main__, device
from minblip2.commands import evaluate
from minblip2.training import bridge
from minblip2.training.recipes import GPU, RECIPES, SCENES

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    for name in (device.DEVICE, device.DTYPE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def machine(monkeypatch):
    """Pretend to have so many CUDA GPUs and Apple's."""
    def have(cuda=0, mps=False):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return have


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Begin to train as one of four processes of torchrun: the GPUs that it has set before it would load anything."""
    def begin(recipe, local):
        class Loading(Exception):
            pass

        def load():
            raise Loading

        found = []
        for name, value in dict(TORCHELASTIC_RUN_ID="none", RANK=local, WORLD_SIZE=4, LOCAL_RANK=local).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv(device.DTYPE, "float32")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "set_device", found.append)
        monkeypatch.setattr(bridge, "prepare_once", load)
        with pytest.raises(Loading):
            bridge.train_bridge(recipe, tmp_path, None, tmp_path / "out")
        return found

    return begin


@pytest.mark.parametrize("cuda, mps, told, default, chosen", [
    (0, False, None, None, "cpu"), (2, False, None, None, "cuda"), (1, True, None, None, "cuda"),
    (0, True, None, None, "mps"), (2, True, None, "cpu", "cpu"), (0, True, "cpu", None, "cpu"),
    (2, False, "cuda:1", "cpu", "cuda:1"), (1, True, "mps", "cpu", "mps"), (1, False, "", "cpu", "cpu")])
def test_the_environment_outweighs_the_recipe_and_the_recipe_the_machine(machine, monkeypatch, cuda, mps, told,
                                                                         default, chosen):
    machine(cuda, mps)
    if told is not None:
        monkeypatch.setenv(device.DEVICE, told)
    assert device.best_device(default) == torch.device(chosen)


@pytest.mark.parametrize("name, said", [
    ("gpu", "'gpu': choose one of cpu, cuda, mps"), ("cuda:x", "'cuda:x': choose"), ("cuda:", "'cuda:': choose"),
    ("cuda", "no device cuda here: choose one of cpu$"), ("mps", "no device mps here"), ("cpu:1", "no device cpu:1"),
    ("CPU", "'CPU': choose")])
def test_a_device_that_is_not_there_is_told_in_a_sentence(machine, monkeypatch, name, said):
    machine()
    monkeypatch.setenv(device.DEVICE, name)
    with pytest.raises(UserError, match=said):
        device.best_device("cpu")


def test_one_gpu_too_far(machine, monkeypatch):
    machine(cuda=2)
    monkeypatch.setenv(device.DEVICE, "cuda:2")
    with pytest.raises(UserError, match="no device cuda:2 here: choose one of cpu, cuda$"):
        device.best_device()


@pytest.mark.parametrize("name", device.DTYPES)
def test_the_dtype_that_was_asked_for_on_every_device(monkeypatch, name):
    monkeypatch.setenv(device.DTYPE, name)
    for kind in ("cpu", "cuda", "mps"):
        assert device.compute_dtype(torch.device(kind)) == getattr(torch, name)
    with device.autocast(torch.device("cpu")):
        assert torch.is_autocast_enabled("cpu") == (name == "bfloat16"), "gradients in float16 would have to be scaled"


def test_another_dtype_is_refused(monkeypatch):
    monkeypatch.setenv(device.DTYPE, "float8")
    with pytest.raises(UserError, match="'float8': choose one of float32, bfloat16, float16"):
        device.compute_dtype(torch.device("cpu"))


@pytest.mark.parametrize("instructions, low", [({}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": True}, True),
                                               ({"avx512_f": True}, False)])
def test_a_cpu_is_asked_for_its_instructions(monkeypatch, instructions, low):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions, raising=False)
    assert (device.compute_dtype(torch.device("cpu")) == torch.bfloat16) == low


@pytest.mark.parametrize("avx, amx", [(False, False), (True, False), (False, True)])
def test_before_pytorch_2_11_it_is_asked_otherwise(monkeypatch, avx, amx):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert (device.compute_dtype(torch.device("cpu")) == torch.bfloat16) == (avx or amx)


def test_while_computing_the_environment_says_so_and_afterwards_what_it_said(monkeypatch):
    monkeypatch.setenv(device.DTYPE, "float32")
    with pytest.raises(ZeroDivisionError), device.computing("cpu", "bfloat16"):
        assert (os.environ[device.DEVICE], os.environ[device.DTYPE]) == ("cpu", "bfloat16")
        raise ZeroDivisionError
    assert device.DEVICE not in os.environ and os.environ[device.DTYPE] == "float32"
    with device.computing():
        assert os.environ[device.DTYPE] == "float32", "what is not said stays"
    with pytest.raises(UserError), device.computing("abacus"):
        raise AssertionError("refused before anything is done")


def commands():
    """Every command by its name."""
    actions = __main__.parser()._actions
    return next(action for action in actions if isinstance(action, argparse._SubParsersAction)).choices


@pytest.mark.parametrize("name", commands())
def test_every_command_takes_device_and_dtype(name):
    if name == "demo":
        pytest.skip("a browser computes, not PyTorch")
    options = {option for action in commands()[name]._actions for option in action.option_strings}
    assert {"--device", "--dtype"} <= options


def test_a_command_computes_where_it_is_told(machine, monkeypatch, capsys):
    machine(cuda=1)
    seen = []
    monkeypatch.setattr(evaluate, "run", lambda args: seen.append(
        (device.best_device(), device.compute_dtype(torch.device("cpu")))))
    monkeypatch.setattr(sys, "argv", ["minblip2", "evaluate", "--device", "cpu", "--dtype", "float16"])
    assert __main__.main() == 0 and seen == [(torch.device("cpu"), torch.float16)]
    monkeypatch.setattr(sys, "argv", ["minblip2", "evaluate", "--device", "cuda:7"])
    assert __main__.main() == 2 and "no device cuda:7 here" in capsys.readouterr().err and len(seen) == 1


def test_a_bridge_asks_when_it_is_made_and_the_scenes_stay_on_the_cpu(machine, monkeypatch):
    machine(cuda=1)
    parts = SimpleNamespace()
    assert bridge.Bridge(SCENES, parts, None).device == torch.device("cpu")
    assert bridge.Bridge(GPU, parts, None).device == torch.device("cuda")
    monkeypatch.setenv(device.DEVICE, "cuda:0")
    assert bridge.Bridge(SCENES, parts, None).device == torch.device("cuda:0")
    assert bridge.Bridge(SCENES, parts, None, device=torch.device("cpu")).device == torch.device("cpu")
    assert {name for name, recipe in RECIPES.items() if recipe.device} == {"scenes"}


def test_nothing_is_chosen_at_import():
    code = "import os; os.environ['MINBLIP2_DEVICE'] = 'abacus'; import minblip2.__main__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_training_in_float16_is_refused_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setenv(device.DTYPE, "float16")
    with pytest.raises(UserError, match="scaled gradients"):
        bridge.train_bridge(replace(SCENES), tmp_path / "data", None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("recipe, told, local, gpus", [
    (SCENES, None, 3, []), (GPU, "cpu", 3, []), (GPU, None, 1, [1]), (SCENES, "cuda", 0, [0])])
def test_a_process_takes_a_gpu_of_its_own_only_to_compute_on_it(machine, monkeypatch, started, recipe, told, local,
                                                                 gpus):
    machine(cuda=2)
    if told:
        monkeypatch.setenv(device.DEVICE, told)
    assert started(recipe, local) == gpus


def test_more_processes_than_gpus_are_told_before_anything_is_loaded(machine, started):
    machine(cuda=2)
    with pytest.raises(UserError, match="process 3 on this machine has no GPU .* there are 2: .*--nproc-per-node 2"):
        started(GPU, 2)


@pytest.mark.parametrize("words, said", [
    (["train"], "stopped; the same command goes on where it stopped"), (["caption", "x.png"], "stopped"),
    *((["train", "--seed", "1", word], "stopped; without --restart the same command goes on where it stopped")
      for word in ("--restart", "--rest"))])
def test_ctrl_c_is_a_sentence(monkeypatch, capsys, words, said):
    def stop(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"minblip2.commands.{words[0]}.run", stop)
    monkeypatch.setattr(sys, "argv", ["minblip2", *words])
    assert __main__.main() == 130 and capsys.readouterr().err.strip() == f"minblip2: {said}"
