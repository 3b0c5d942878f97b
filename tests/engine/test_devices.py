"""Devices by the names of --device; what isn't there, or is no device, is told."""

import pytest
import torch

from engine.config import UserError
from engine.devices import own_gpu, pick_device


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", "mps", ""])
def test_what_is_no_device_is_refused(name):
    with pytest.raises(UserError, match=r"allowed: auto, cpu, cuda, cuda:N"):
        pick_device(name)


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda") and pick_device("cuda:1").index == 1
    with pytest.raises(UserError, match=r"--device cuda:2: there is no such GPU \(2 found\)"):
        pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device cuda: there is no such GPU"):
        pick_device("cuda")


def test_each_process_of_a_machine_has_its_own_gpu_unless_one_is_named(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_gpu(torch.device("cuda")) == torch.device("cuda:3")
    assert own_gpu(torch.device("cuda:1")) == torch.device("cuda:1")
    assert own_gpu(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    assert own_gpu(torch.device("cuda")) == torch.device("cuda")
