"""Losses and gradients, by hand and by Trainer."""

import pytest
import torch
from tiny import VOCABULARY, assert_close, random_ids, reference_logits, tiny_model
from transformers import Trainer, TrainingArguments, set_seed

from modeling_mla import (
    LatentCache,
    LlamaMLAForCausalLM,
    LlamaMLAForSequenceClassification,
    LlamaMLAForTokenClassification,
    MistralMLAForCausalLM,
    attention_mla,
    routes_mla,
)
from modeling_mla.routes_mla import eager_attention_forward
from modeling_mla.transformers_seams_mla import cache_argument, cache_of

IMPLEMENTATIONS = ["eager", "sdpa"]
SHAPES = {
    "plain": {},
    "q_lora": {"q_lora_rank": 20, "attention_bias": True},
    "per_layer": {"kv_lora_ranks": [5, 16], "qk_rope_head_dims": [2, 4], "rope_inv_freq": [[0.7], [1.1, 0.02]]},
    "no_nope": {"qk_nope_head_dim": 0, "latent_norm": "identity"},
}


def next_token_loss(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_reach_every_parameter(shape, implementation):
    model = tiny_model(attn_implementation=implementation, **SHAPES[shape]).train()
    ids = random_ids(2, 12)
    loss = model(ids, labels=ids).loss
    # Transformers computes the loss in float32.
    assert_close(loss.double(), next_token_loss(reference_logits(model, ids), ids), 1e-5)
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_gradients_are_those_of_finite_differences():
    model = tiny_model(num_hidden_layers=1)
    hidden = torch.randn(1, 4, 32, dtype=torch.float64, requires_grad=True)
    angles = model.model.rotary_emb(hidden, torch.arange(4)[None])
    attention = model.model.layers[0].self_attn
    attention.kv_a_layernorm = torch.nn.Identity()  # Llama's norm rounds to float32
    assert torch.autograd.gradcheck(lambda x: attention(x, angles)[0], hidden)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    ids = random_ids(2, 12)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        output = model(ids, labels=ids)
        assert (cache_of(output) is None) == checkpointing, "a cache would be filled twice"
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-12)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("route", ["auto", "absorbed", "expanded"])
def test_packed_rows_equal_separate_rows(implementation, route):
    model = tiny_model(attn_implementation=implementation)
    model.set_attention_route(route)
    rows = [random_ids(1, length) for length in (5, 3, 7)]
    position_ids = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    with torch.no_grad():
        packed = model(torch.cat(rows, dim=1), position_ids=position_ids, use_cache=False).logits
        separate = torch.cat([reference_logits(model, row) for row in rows], dim=1)
    assert_close(packed, separate)
    assert (packed - reference_logits(model, torch.cat(rows, dim=1))).abs().max() > 1e-3, "packing must matter"


def train(model: LlamaMLAForCausalLM, folder: str, steps: int, batch: int, accumulation: int, **options) -> list[float]:
    """The losses that Trainer reports over rows of unequal lengths."""
    rows = [random_ids(1, length)[0] for length in (4, 9, 14, 6, 11, 5, 8, 13)]
    padded = [torch.nn.functional.pad(row, (0, 14 - len(row)), value=0) for row in rows]
    data = [
        {
            "input_ids": ids,
            "attention_mask": (torch.arange(14) < len(row)).long(),
            "labels": torch.where(torch.arange(14) < len(row), ids, -100),
        }
        for ids, row in zip(padded, rows, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_accumulated_batches_give_the_loss_of_one_batch(tmp_path):
    """Rows differ in length: a mean of means would be another number."""
    whole = train(tiny_model(), str(tmp_path), steps=3, batch=8, accumulation=1)
    accumulated = train(tiny_model(), str(tmp_path), steps=3, batch=2, accumulation=4)
    assert accumulated == pytest.approx(whole, abs=2e-5)


def test_training_lowers_the_loss(tmp_path):
    set_seed(0)
    options = {"activation_checkpointing": True}
    losses = train(tiny_model(attention_dropout=0.1), str(tmp_path), steps=15, batch=8, accumulation=1, **options)
    assert losses[-1] < 0.7 * losses[0]


def test_dropout_acts_in_training_only():
    model, ids = tiny_model(attention_dropout=0.5), random_ids(2, 8)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)
        assert_close(model(ids).logits, reference_logits(model, ids))
        model.train()
        assert (model(ids, use_cache=False).logits - model(ids, use_cache=False).logits).abs().max() > 1e-3


@pytest.mark.parametrize("cls", [LlamaMLAForSequenceClassification, LlamaMLAForTokenClassification])
def test_classification_heads_learn(cls):
    model = tiny_model(cls, num_labels=3, pad_token_id=0).train()
    ids = random_ids(2, 8)
    labels = torch.tensor([0, 2]) if cls is LlamaMLAForSequenceClassification else torch.randint(0, 3, (2, 8))
    output = model(ids, labels=labels)
    assert output.logits.shape == (*labels.shape, 3)
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_resized_and_tied_embeddings():
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model(random_ids(1, 3)).logits.shape[-1] == VOCABULARY + 3
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("sliding_window", [None, 4])
def test_back_propagation_through_a_cache(batch, sliding_window):
    """Chunks of one text, each with a loss, one backward pass: gradients are those of the whole text."""
    cls = LlamaMLAForCausalLM if sliding_window is None else MistralMLAForCausalLM
    options = {} if sliding_window is None else {"sliding_window": sliding_window}
    model, ids = tiny_model(cls, **options), random_ids(batch, 12)
    next_token_loss(model(ids, use_cache=False).logits, ids).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    cache, logits = LatentCache(config=model.config), []
    for chunk in ids.split([5, 1, 3, 3], dim=1):
        logits.append(model(chunk, **cache_argument(cache)).logits)
    with torch.no_grad():
        model(ids[:, :1], **cache_argument(cache))
    next_token_loss(torch.cat(logits, dim=1), ids).backward()
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name])


@pytest.mark.parametrize("limit", [1 << 29, 1])
def test_rows_packed_by_position_alone(limit, monkeypatch):
    """What DataCollatorWithFlattening gives to flash attention: no mask, positions that start again."""

    def packing_aware(module, query, key, value, attention_mask, scaling, position_ids=None, **kwargs):
        assert attention_mask is None
        sequence = (position_ids == 0).cumsum(-1)
        visible = (sequence[:, :, None] == sequence[:, None, :]).tril()
        return eager_attention_forward(
            module, query, key, value, torch.where(visible, 0.0, float("-inf"))[:, None], scaling=scaling
        )

    monkeypatch.setitem(attention_mla.ALL_ATTENTION_FUNCTIONS._local_mapping, "flash_attention_2", packing_aware)
    monkeypatch.setattr(routes_mla, "EXPANDED_LIMIT", limit)
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    rows = [random_ids(1, length) for length in (5, 3, 7)]
    positions = torch.cat([torch.arange(row.shape[1]) for row in rows])[None]
    with torch.no_grad():
        packed = model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False).logits
        separate = torch.cat([reference_logits(model, row) for row in rows], dim=1)
    assert_close(packed, separate)
    model.set_attention_route("absorbed")
    with pytest.raises(ValueError, match="absorbed route was asked for, but the positions start again"):
        model(torch.cat(rows, dim=1), position_ids=positions, use_cache=False)


def test_the_absorbed_route_is_refused_where_it_would_change_the_result():
    model, ids = tiny_model(attention_dropout=0.5), random_ids(1, 6)
    model.set_attention_route("absorbed")
    with pytest.raises(ValueError, match="but attention weights are wanted"):
        model(ids, output_attentions=True)
    with pytest.raises(ValueError, match=r"but dropout is 0.5"):
        model.train()(ids, use_cache=False)


@pytest.mark.parametrize("widths", [{"v_head_dim": 6}, {"v_head_dim": 18}, {"v_head_dim": 12}])
def test_sdpa_on_a_cpu_keeps_no_attention_weights_for_the_gradient(widths):
    """Whichever of keys (12 channels) and values is wider; gradients are those of plain attention."""
    gradients = []
    ids = random_ids(2, 64)
    for implementation in ("eager", "sdpa"):
        model = tiny_model(attn_implementation=implementation, **widths)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            loss = next_token_loss(model(ids, use_cache=False).logits, ids)
        loss.backward()
        weights = 2 * model.config.num_attention_heads * 64 * 64
        assert (weights in saved) == (implementation == "eager")
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, 1e-10)
