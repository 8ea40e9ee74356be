"""A conversion to a coded cache, from the plan to the report; whatever is measured is measured from the codes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import edit_json, mla
from tiny_source import CONTEXT, LAYERS, byte_tokenizer, convert, save_source, write_text
from transformers import AutoModelForCausalLM

from conversion.errors import SourceError, VerificationError
from conversion.evaluation.recall import measure_recall
from conversion.evaluation.scores import perplexity
from conversion.evaluation.verify import held_out_windows, verify_checkpoint
from conversion.evaluation.whole_model import check_routes
from conversion.exporters import export_checkpoint
from conversion.forward.coding import as_cached
from conversion.layers import AttentionGeometry, LayerBudget
from conversion.methods import get_method
from conversion.pipeline.conversion import Conversion
from conversion.pipeline.work.layer_store import read_layer, write_layer
from conversion.progress import silent_progress
from conversion.sources import open_source
from modeling_mla import LatentCache
from modeling_mla.cache_coded_mla import CodedLatentLayer, CodedSlidingLatentLayer
from modeling_mla.coded_states_mla import LatentCodec
from modeling_mla.latent_code_mla import LatentCode
from modeling_mla.transformers_seams_mla import cache_argument

SHARE = 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("coded")
    save_source(folder / "source", dtype=torch.bfloat16, hidden_size=128)
    write_text(folder / "text.txt")
    return folder


@pytest.fixture(scope="module")
def conversion(folder: Path) -> Conversion:
    options = {"cache": f"{SHARE:.0%}", "dtype": "float32", "calibration": str(folder / "text.txt"), "tokens": 1024}
    return convert(folder / "source", folder / "out", **options)


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def windows(count: int = 4) -> torch.Tensor:
    return torch.cat(tuple(held_out_windows(byte_tokenizer(), CONTEXT, count).values()))


def test_checkpoint_carries_its_code(conversion: Conversion) -> None:
    report = conversion.report
    model = load(conversion.output)
    for layer, budget in enumerate(report.budgets):
        assert budget.code is not None
        assert model.config.layer_latent_code(layer) == budget.code
    assert sum(budget.cache_bytes(4) for budget in report.budgets) == model.config.cache_bytes_per_token()
    cache = LatentCache(config=model.config)
    model(windows()[:1], **cache_argument(cache))
    assert all(type(layer) is CodedLatentLayer for layer in cache.layers)


def test_report_and_card_tell_bytes_and_bits(conversion: Conversion) -> None:
    found = conversion.report.verification
    source_bytes = LAYERS * 2 * 2 * 32 * 2
    assert found.cache_bytes_per_token_source == source_bytes, "in the source's own type, not in the one written"
    assert 0.9 * SHARE < found.cache_bytes_per_token / source_bytes <= SHARE
    model = load(conversion.output)
    cache = LatentCache(config=model.config)
    model(windows()[:1], **cache_argument(cache))
    assert found.cache_bytes_held == cache.nbytes > CONTEXT * found.cache_bytes_per_token

    written = json.loads((conversion.output / "report.json").read_text())
    budget = conversion.report.budgets[0]
    assert written["layers"][0]["latent_bits"] == budget.latent_bits < 16
    assert written["layers"][0]["rope_bits"] == budget.rope_bits < 16
    assert written["plan"]["cache_bytes_per_token"] == found.cache_bytes_per_token
    assert written["verification"]["cache_bytes_held"] == found.cache_bytes_held
    kept = f"{budget.latent_bits} + {budget.rope_bits} bits"
    for name in ("conversion.txt", "README.md"):
        assert kept in (conversion.output / name).read_text()
        assert str(found.cache_bytes_held) in (conversion.output / name).read_text()


def test_verification_reads_codes(conversion: Conversion, folder: Path, tmp_path: Path) -> None:
    found = conversion.report.verification
    coded = load(conversion.output)
    held_out = windows(6)
    assert found.perplexity == pytest.approx(perplexity(coded, held_out), rel=2e-3)

    uncoded = tmp_path / "uncoded"
    uncoded.mkdir()
    for file in conversion.output.iterdir():
        (uncoded / file.name).write_bytes(file.read_bytes())
    edit_json(uncoded / "config.json", latent_code=None)
    source = open_source(str(folder / "source"))
    plain = verify_checkpoint(uncoded, source, held_out_windows(byte_tokenizer(), CONTEXT, 6), silent_progress())
    assert plain.perplexity == pytest.approx(perplexity(load(uncoded), held_out), rel=1e-5)
    assert abs(plain.perplexity / found.perplexity - 1) > 4e-3
    assert max(plain.layer_errors) < max(found.layer_errors)
    assert plain.cache_bytes_per_token > 2 * found.cache_bytes_per_token


def test_calibration_reads_codes(conversion: Conversion) -> None:
    """The errors on the calibration text, behind which layers are refitted, are those of coded layers."""
    assert min(conversion.report.errors) > 1e-4


def test_recall_reads_codes(conversion: Conversion, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    original = LatentCodec.encode
    monkeypatch.setattr(LatentCodec, "encode", lambda self, rows: encoded.append(rows) or original(self, rows))
    measure_recall(load(folder / "source"), load(conversion.output), byte_tokenizer(), CONTEXT * 2, seed=0)
    assert len(encoded) == 2 * 8 * LAYERS


@torch.inference_mode()
def test_decoding_from_codes_is_checked(conversion: Conversion, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(conversion.output)
    window = windows()[0]
    assert max(check_routes(model, window)) < 1e-4
    original = LatentCodec.encode

    def wrong(self: LatentCodec, rows: torch.Tensor) -> torch.Tensor:
        return original(self, rows if rows.shape[1] > 1 else -20 * rows)

    monkeypatch.setattr(LatentCodec, "encode", wrong)
    with pytest.raises(VerificationError, match="decoding from codes"):
        check_routes(model, window)


@pytest.mark.parametrize("sliding_window", [None, 7])
def test_windows_are_coded_as_the_cache_does(sliding_window: int | None) -> None:
    geometry = AttentionGeometry(64, 4, 2, 16, torch.ones(8), 0.25, sliding_window=sliding_window)
    code = LayerBudget(24, 8, 4, 6).code
    assert code is not None
    generator = torch.Generator().manual_seed(0)
    latents, keys = (torch.randn(20, width, generator=generator) for width in (24, 8))
    latents[0] *= 50
    found = as_cached(geometry, code, latents, keys)
    layer = CodedLatentLayer(code) if sliding_window is None else CodedSlidingLatentLayer(code, sliding_window=7)
    expected = layer.update(latents[None, None], keys[None, None])
    for of_window, of_cache in zip(found, expected, strict=True):
        torch.testing.assert_close(of_window, of_cache.decode()[0, 0], rtol=0, atol=0)
    assert torch.allclose(found[0][:4], latents[:4], atol=1e-5) == (sliding_window is None)


def test_layer_keeps_its_code_in_the_work_folder(conversion: Conversion, folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder / "source"))
    geometry = source.geometry(0)
    code = replace(LayerBudget(24, 8, 4, 6).code, exact_tokens=2)
    exact = get_method("exact")
    weights = exact.factorise(geometry, source.attention(0), None, exact.smallest(geometry))
    for written in (weights, replace(weights, code=code)):
        write_layer(tmp_path / "layer.safetensors", written)
        found = read_layer(tmp_path / "layer.safetensors")
        assert found.code == written.code
        assert torch.equal(found.kv_b_proj, written.kv_b_proj)


def test_layers_of_several_codes_and_of_none(folder: Path) -> None:
    source = open_source(str(folder / "source"))
    exact = get_method("exact")
    geometry = source.geometry(0)
    weights = exact.factorise(geometry, source.attention(0), None, exact.smallest(geometry))
    rank, rotary = weights.kv_b_proj.shape[1], 2 * len(weights.inv_freq)
    codes = [LayerBudget(rank, rotary, *bits).code for bits in ((4, 6), (16, 16), (8, 8))]
    config = source.mla_config([replace(weights, code=code) for code in codes], torch.bfloat16)
    assert [config.layer_latent_code(layer) for layer in range(LAYERS)] == codes
    assert isinstance(config.latent_code, list)
    same = source.mla_config([replace(weights, code=codes[0])] * LAYERS, torch.bfloat16)
    assert LatentCode.from_dict(same.latent_code) == codes[0]
    assert source.mla_config([weights] * LAYERS, torch.bfloat16).latent_code is None


def test_inspection_counts_codes(conversion: Conversion) -> None:
    shown = mla("inspect", conversion.output, "--json")
    assert json.loads(shown.stdout)["cache_bytes_per_token"] == conversion.report.verification.cache_bytes_per_token


def test_engines_refuse_codes(conversion: Conversion, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"latent_code.*few bits.*--latent-bits 16"):
        export_checkpoint(str(conversion.output), tmp_path / "vllm", "vllm", silent_progress())
    assert list(tmp_path.iterdir()) == []
