"""Which backend runs: what a machine has, the order by architecture, and the environment's word."""

import pytest
import torch
from tiny import tiny_model

from modeling_mla import backends_mla, enable_absorbed_attention
from modeling_mla.backend_base_mla import AbsorbedShape
from modeling_mla.backend_torch_mla import TorchBackend
from modeling_mla.backends_mla import BACKENDS, OVERRIDE, PREFERENCE, architecture, checked_backend, select_backend

GPU = torch.device("cuda", 0)
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="asks what a machine without a GPU says")


class Counting(TorchBackend):
    def __init__(self, name: str, reason: str | None = None) -> None:
        self.name, self.reason, self.asked = name, reason, 0

    def why_unavailable(self, device: torch.device) -> str | None:
        self.asked += 1
        return self.reason


@pytest.fixture
def machine(monkeypatch):
    """Gives the process a GPU of some architecture, on which these backends are usable or not."""

    def make(name: str, **reasons: str | None) -> dict[str, Counting]:
        made = {backend: Counting(backend, reasons.get(backend)) for backend in BACKENDS}
        for backend, stand_in in made.items():
            monkeypatch.setitem(BACKENDS, backend, stand_in)
        monkeypatch.setattr(backends_mla, "architecture", lambda device: name)
        backends_mla.forget_availability()
        return made

    yield make
    backends_mla.forget_availability()


def shape(device: torch.device = GPU) -> AbsorbedShape:
    return AbsorbedShape(1, 4, 1, 8, 16, 4, torch.bfloat16, device, has_mask=False)


@pytest.mark.parametrize("name", PREFERENCE)
def test_auto_takes_the_first_that_is_usable_and_asks_once(machine, name):
    first, *others = PREFERENCE[name]
    made = machine(name)
    for _ in range(3):
        assert select_backend("auto", shape()).name == first
    assert {made[other].asked for other in PREFERENCE[name]} == {1}
    if others:
        made = machine(name, **{first: "it is broken"})
        assert select_backend("auto", shape()).name == others[0]
        with pytest.raises(ValueError, match=f"'{first}' cannot serve this attention: it is broken. These can: auto, "):
            select_backend(first, shape())


def test_every_order_names_backends_and_ends_with_one_that_serves_all():
    for names in PREFERENCE.values():
        assert set(names) <= set(BACKENDS)
        assert names[-1] == "torch"


@pytest.mark.parametrize(
    ("capability", "name"),
    [((7, 5), "other"), ((8, 0), "sm80"), ((8, 9), "sm80"), ((9, 0), "sm90"), ((10, 3), "sm100"), ((12, 0), "sm100")],
)
def test_architecture_is_the_newest_not_newer_than_the_gpu(monkeypatch, capability, name):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert architecture(GPU) == name
    assert architecture(torch.device("cpu")) == "cpu"
    assert architecture(torch.device("mps")) == "other"


def test_environment_stands_for_auto(monkeypatch):
    monkeypatch.setenv(OVERRIDE, "torch")
    model = tiny_model()
    assert {layer.self_attn.backend for layer in model.model.layers} == {"torch"}
    model.set_attention_backend("cpu")
    assert {layer.self_attn.backend for layer in model.model.layers} == {"cpu"}, "a name that is given counts"
    monkeypatch.delenv(OVERRIDE)
    model.set_attention_backend("auto")
    assert {layer.self_attn.backend for layer in model.model.layers} == {"auto"}


@needs_no_gpu
@pytest.mark.parametrize(
    ("name", "reason"),
    [("fastest", "no backend has that name"), ("triton", "cannot be used here: (the package triton|PyTorch finds no)")],
)
def test_environment_that_cannot_be_followed_is_an_error_at_once(monkeypatch, name, reason):
    monkeypatch.setenv(OVERRIDE, name)
    wanted = rf"{OVERRIDE} is '{name}', .*{reason}.*ere can be used: auto, cpu, .*torch\."
    with pytest.raises(ValueError, match=wanted):
        tiny_model()
    with pytest.raises(ValueError, match=wanted):
        enable_absorbed_attention(torch.nn.Linear(2, 2))
    monkeypatch.delenv(OVERRIDE)
    with pytest.raises(ValueError, match=f"The MLA backend is '{name}', .*{reason}"):
        checked_backend(name)
