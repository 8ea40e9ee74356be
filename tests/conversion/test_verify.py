"""Verification measures what it says, and finds what is wrong."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_source import CONTEXT, byte_tokenizer, convert, save_source, write_text
from transformers import AutoModelForCausalLM

from conversion.errors import VerificationError
from conversion.progress import silent_progress
from conversion.sources import open_source
from conversion.verify import (
    Verification,
    check_routes,
    greedy,
    held_out_windows,
    leading_match,
    text_windows,
    verify_checkpoint,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and a lossy conversion of it."""
    folder = tmp_path_factory.mktemp("verify")
    source = save_source(folder / "source", dtype=torch.float32)
    text = write_text(folder / "text.txt")
    return source, convert(source, folder / "out", cache="50%", tokens=256, calibration=str(text)).output


@pytest.fixture
def converted(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in folders[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def windows(count: int = 3) -> torch.Tensor:
    return torch.randint(2, 258, (count, CONTEXT), generator=torch.Generator().manual_seed(5))


def verified(converted: Path, source: Path) -> Verification:
    return verify_checkpoint(converted, open_source(str(source)), windows(), "random tokens", silent_progress())


def test_figures_follow_their_definitions(folders: tuple[Path, Path]) -> None:
    source, converted = folders
    found, ids = verified(converted, source), windows()
    reference = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    with torch.inference_mode():
        p, q = (m(ids).logits[:, :-1].double().log_softmax(-1) for m in (reference, model))
        expected_tokens = greedy(reference, ids[:1, :32], 32)
        found_tokens = greedy(model, ids[:1, :32], 32)
    targets = ids[:, 1:, None]
    assert found.perplexity_source == pytest.approx(math.exp(-p.gather(2, targets).mean()), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(-q.gather(2, targets).mean()), rel=1e-5)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert found.kl > 1e-3
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert 0 < found.top1_agreement < 1
    assert found.greedy_match == leading_match(expected_tokens, found_tokens)
    assert found.cache_bytes_per_token * 2 == found.cache_bytes_per_token_source


def test_tensors_are_counted(folders: tuple[Path, Path]) -> None:
    source, converted = folders
    found = verified(converted, source)
    stored, original = load_file(converted / "model.safetensors"), load_file(source / "model.safetensors")
    assert found.tensors == len(stored)
    assert found.tensors_unchanged == sum("self_attn" not in name for name in original)


def damaged(converted: Path, source: Path, change: dict[str, torch.Tensor], drop: str | None = None) -> str:
    """Rewrites the weights; the message with which the verification refuses them."""
    file = converted / "model.safetensors"
    tensors = load_file(file) | change
    tensors = {name: tensor for name, tensor in tensors.items() if name != drop}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(VerificationError) as refusal:
        verified(converted, source)
    return str(refusal.value)


def test_missing_tensor_is_found(folders: tuple[Path, Path], converted: Path) -> None:
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert f"lacks {name}" in damaged(converted, folders[0], {}, drop=name)


def test_unknown_tensor_is_found(folders: tuple[Path, Path], converted: Path) -> None:
    assert "unknown model.layers.1.extra" in damaged(converted, folders[0], {"model.layers.1.extra": torch.ones(2)})


def test_value_that_is_not_finite_is_found(folders: tuple[Path, Path], converted: Path) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    broken = load_file(converted / "model.safetensors")[name]
    broken[0, 0] = float("inf")
    assert f"{name} of {converted} is not finite" in damaged(converted, folders[0], {name: broken})


def test_changed_tensor_that_should_pass_through_is_found(folders: tuple[Path, Path], converted: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    changed = load_file(converted / "model.safetensors")[name] + 1e-3
    assert "only attention is converted" in damaged(converted, folders[0], {name: changed})


def test_routes_that_differ_are_found(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders[1], dtype=torch.float32).eval()
    with torch.inference_mode():
        assert max(check_routes(model, windows()[0])) < 1e-4
        attention = type(model.model.layers[0].self_attn)
        original = attention.absorbed_weights

        def wrong(self: torch.nn.Module, like: torch.Tensor) -> object:
            weights = original(self, like)
            return type(weights)(*(1.1 * tensor for tensor in weights))

        monkeypatch.setattr(attention, "absorbed_weights", wrong)
        with pytest.raises(VerificationError, match="absorbed and expanded attention differ"):
            check_routes(model, windows()[0])


def test_text_is_cut_into_windows_once(tmp_path: Path) -> None:
    tokenizer, text = byte_tokenizer(), write_text(tmp_path / "text.txt", length=1000).read_text()
    found = text_windows(text, "text", tokenizer, 64, 4)
    assert found.flatten().tolist() == tokenizer(text)["input_ids"][:256]
    assert text_windows(text, "text", tokenizer, 64, 99).shape == (15, 64)


def test_held_out_text_covers_every_domain() -> None:
    tokenizer = byte_tokenizer()
    found = held_out_windows(tokenizer, 64, 6)
    assert found.shape == (6, 64)
    assert len({tokenizer.decode(row) for row in found}) == 6


@pytest.mark.parametrize(("found", "share"), [([1, 2, 3, 4], 1.0), ([1, 2, 9, 4], 0.5), ([9, 2, 3, 4], 0.0)])
def test_leading_match(found: list[int], share: float) -> None:
    assert leading_match(torch.tensor([1, 2, 3, 4]), torch.tensor(found)) == share
