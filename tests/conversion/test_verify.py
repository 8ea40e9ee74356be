"""Verification measures what it says, and finds what is wrong."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from tiny_source import CONTEXT, byte_tokenizer, convert, save_source, write_text
from transformers import AutoModelForCausalLM, AutoTokenizer

from conversion.errors import CalibrationError, VerificationError
from conversion.evaluation.continuations import greedy, leading_equal
from conversion.evaluation.verify import Verification, held_out_windows, text_windows, verify_checkpoint
from conversion.evaluation.whole_model import check_routes
from conversion.exporters import export_checkpoint
from conversion.progress import silent_progress
from conversion.reporting.report import verification_tables
from conversion.sources import open_source
from conversion.text.default_mix import evaluation_texts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source, and a lossy conversion of it."""
    folder = tmp_path_factory.mktemp("verify")
    source = save_source(folder / "source", dtype=torch.float32)
    text = write_text(folder / "text.txt")
    recipe = {"cache": "50%", "latent_bits": 16, "tokens": 256, "calibration": str(text)}
    return source, convert(source, folder / "out", **recipe).output


@pytest.fixture
def converted(folders: tuple[Path, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in folders[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def windows(count: int = 3) -> torch.Tensor:
    return torch.randint(2, 258, (count, CONTEXT), generator=torch.Generator().manual_seed(5))


def verified(converted: Path, source: Path) -> Verification:
    texts = {"random tokens": windows()}
    return verify_checkpoint(converted, open_source(str(source)), texts, silent_progress())


@pytest.mark.usefixtures("with_continuations")
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
    assert found.whole_model.greedy_match == leading_equal(expected_tokens[0], found_tokens[0]) / 32
    assert found.cache_bytes_per_token * 2 == found.cache_bytes_per_token_source


def test_tensors_are_counted(folders: tuple[Path, Path]) -> None:
    source, converted = folders
    found = verified(converted, source)
    stored, original = load_file(converted / "model.safetensors"), load_file(source / "model.safetensors")
    assert found.tensors == len(stored)
    assert found.tensors_unchanged == sum("self_attn" not in name for name in original)


def test_model_that_was_saved_in_float16_passes(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Its latent norm's constant is more than float16 holds."""
    source, converted = folders
    AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float16).save_pretrained(tmp_path / "out")
    byte_tokenizer().save_pretrained(tmp_path / "out")
    found, expected = verified(tmp_path / "out", source), verified(converted, source)
    assert found.tensors == expected.tensors
    assert found.perplexity == pytest.approx(expected.perplexity, rel=1e-2)
    exported = export_checkpoint(str(tmp_path / "out"), tmp_path / "vllm", "vllm", silent_progress()).output
    assert all(tensor.isfinite().all() for tensor in load_file(exported / "model.safetensors").values())


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
            return weights._replace(w_uk=1.1 * weights.w_uk, w_uv=1.1 * weights.w_uv)

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
    found = held_out_windows(tokenizer, 64, 5)
    domains = ["prose", "documentation", "chat", "tokenised prose", "code"]
    assert list(found) == [f"held-out {domain}" for domain in domains]
    assert all(windows.shape == (1, 64) for windows in found.values())
    assert len({tokenizer.decode(row) for windows in found.values() for row in windows}) == 5
    assert all(windows.shape == (2, 64) for windows in held_out_windows(tokenizer, 64, 6).values())


def test_a_domain_shorter_than_a_window_is_left_out() -> None:
    lengths = {name: len(text.encode()) for name, text in evaluation_texts(byte_tokenizer()).items()}
    found = held_out_windows(byte_tokenizer(), max(lengths.values()), 1)
    assert list(found) == [f"held-out {max(lengths, key=lambda name: lengths[name])}"]
    with pytest.raises(CalibrationError, match=r"no held-out text has .* a shorter context"):
        held_out_windows(byte_tokenizer(), max(lengths.values()) + 1, 1)


def test_every_text_has_its_own_score(folders: tuple[Path, Path]) -> None:
    source, converted = folders
    opened, (first, second) = open_source(str(source)), windows(4).split((3, 1))
    both = verify_checkpoint(converted, opened, {"a": first, "b": second}, silent_progress())
    alone = verify_checkpoint(converted, opened, {"b": second}, silent_progress())
    assert both.text == "a, b"
    assert both.windows == 4
    assert [domain.text for domain in both.domains] == ["a", "b"]
    assert both.domains[1] == alone.domains[0]
    assert both.kl == pytest.approx((3 * both.domains[0].kl + both.domains[1].kl) / 4)
    assert math.log(both.perplexity) == pytest.approx(
        (3 * math.log(both.domains[0].perplexity) + math.log(both.domains[1].perplexity)) / 4
    )


@pytest.mark.parametrize(
    ("divergences", "far"), [((0.1, 0.2, 0.26), ["c"]), ((0.1, 0.2, 0.24), []), ((1e-6, 2e-6, 9e-3), [])]
)
def test_a_text_that_is_far_off_is_named(
    folders: tuple[Path, Path], divergences: tuple[float, ...], far: list[str]
) -> None:
    found = verified(folders[1], folders[0])
    domains = [replace(found.domains[0], text=name, kl=kl) for name, kl in zip("abc", divergences, strict=True)]
    changed = replace(found, domains=tuple(domains))
    assert changed.as_json()["far_off"] == far
    shown = io.StringIO()
    for table in verification_tables(changed):
        Console(file=shown, width=100).print(table)
    assert ("Far off: c" in shown.getvalue()) == bool(far)


def test_error_of_a_layer_is_its_attention_on_the_sources_states(folders: tuple[Path, Path]) -> None:
    reference, model = (AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in folders)
    ids = windows()[0]
    with torch.inference_mode():
        found = verified(folders[1], folders[0]).layer_errors
        states = reference(ids[None], output_hidden_states=True).hidden_states[1]
        block = reference.model.layers[1]
        read = block.input_layernorm(states)
        expected, other = (
            m.model.layers[1].self_attn(
                hidden_states=read, position_embeddings=m.model.rotary_emb(read, torch.arange(CONTEXT)[None]),
                attention_mask=torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)[None, None],
            )[0]
            for m in (reference, model)
        )  # fmt: skip
    assert len(found) == 3
    assert found[1] == pytest.approx(float((other - expected).norm() / expected.norm()) ** 2, rel=1e-4)
    assert found[1] > 1e-4


@pytest.mark.parametrize(("found", "equal"), [([1, 2, 3, 4], 4), ([1, 2, 9, 4], 2), ([9, 2, 3, 4], 0)])
def test_leading_equal(found: list[int], equal: int) -> None:
    assert leading_equal(torch.tensor([1, 2, 3, 4]), torch.tensor(found)) == equal


@pytest.mark.usefixtures("with_continuations")
def test_both_models_go_on_with_the_first_window_of_three_texts(folders: tuple[Path, Path]) -> None:
    source, converted = folders
    texts = {name: windows()[[index % 3]] for index, name in enumerate("abcd")}
    found = verify_checkpoint(converted, open_source(str(source)), texts, silent_progress()).whole_model
    assert [continuation.text for continuation in found.continuations] == ["a", "b", "c"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    for continuation, window in zip(found.continuations, windows(), strict=True):
        expected, other = (greedy(model, window[None, :32], 32)[0] for model in models)
        assert continuation.prompt == tokenizer.decode(window[:32])
        assert (continuation.source, continuation.converted) == (tokenizer.decode(expected), tokenizer.decode(other))
        assert continuation.equal_tokens == leading_equal(expected, other)
    assert found.greedy_tokens == 3 * 32
    assert found.greedy_match == sum(continuation.equal_tokens for continuation in found.continuations) / 96
