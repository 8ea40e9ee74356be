"""Every step of the attention-aware method against a brute-force answer on a tiny case."""

import naive_attention as naive
import pytest
import torch

from conversion.forward.attention import (
    attended,
    attention_of,
    causal_softmax,
    converted_output,
    source_heads,
    source_output,
    source_scores,
)
from conversion.methods import get_method
from conversion.methods.attention_aware.allocation import allocate_ranks, near_median
from conversion.methods.attention_aware.joint_latent import (
    centred,
    joint_latent,
    latent_spectrum,
    latent_targets,
    metric_roots,
)
from conversion.methods.attention_aware.value_ridge import SHRINKAGE, ridge_towards
from conversion.methods.attention_statistics import (
    AttentionStatistics,
    output_sensitivity,
    pair_energy,
    rotation_moments,
    sample_rows,
)
from conversion.methods.rotary_pca import (
    as_pairs,
    from_pairs,
    mean_rotation,
    mean_rotation_matrix,
    rotary_queries,
    shared_rotary_key,
    unexplained_energy,
)


def window(length=9, **options):
    geometry, weights = naive.random_layer(**options)
    inputs = torch.randn(length, geometry.hidden_size, dtype=torch.float64)
    rows = torch.arange(length)
    heads = source_heads(geometry, weights, inputs, rows)
    return geometry, weights, inputs, rows, heads, attention_weights(geometry, heads, rows)


def attention_weights(geometry, heads, rows):
    return attention_of(geometry, source_scores(geometry, heads, rows), rows, heads.sinks)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 6},
        {"biases": True, "rotary_dim": 4},
        {"sliding_window": 3, "attention_factor": 1.3},
        {"softcap": 0.7, "sliding_window": 3},
        {"sinks": True, "biases": True},
    ],
)
def test_attention_is_the_definition(options):
    geometry, weights = naive.random_layer(**options)
    inputs, rows = torch.randn(9, geometry.hidden_size, dtype=torch.float64), torch.tensor([0, 3, 4, 8])
    wanted = naive.source_output(geometry, weights, inputs)
    torch.testing.assert_close(source_output(geometry, weights, inputs), wanted, rtol=1e-6, atol=1e-6)
    exact = get_method("exact")
    converted = exact.factorise(geometry, weights, None, exact.smallest(geometry))
    torch.testing.assert_close(converted_output(geometry, converted, inputs), wanted, rtol=1e-6, atol=1e-6)

    heads = source_heads(geometry, weights, inputs, rows)
    contexts = attended(geometry, attention_weights(geometry, heads, rows), heads.values).transpose(0, 1).flatten(1)
    sampled = torch.nn.functional.linear(contexts, weights.o, weights.o_bias)
    torch.testing.assert_close(sampled, wanted[rows], rtol=1e-6, atol=1e-6)


def test_output_sensitivity_is_the_derivative_of_the_output():
    geometry, weights, _, rows, heads, attention = window(sliding_window=5)
    analytic = output_sensitivity(geometry, weights.o, heads, attention)
    blocks = weights.o.view(-1, geometry.num_heads, geometry.head_dim)
    step = 1e-6
    scores = attention.log().nan_to_num(neginf=0.0)
    for head, i, j in ((0, 8, 5), (3, 4, 4), (5, 8, 8), (2, 6, 2)):
        moved = scores.clone()
        moved[head, i, j] += step
        change = causal_softmax(moved, rows, 5)[head, i] - causal_softmax(scores, rows, 5)[head, i]
        output = blocks[:, head] @ (change @ heads.values[head // geometry.num_key_value_groups]) / step
        assert float(analytic[head, i, j]) == pytest.approx(float(output.square().sum()), rel=1e-4)


@pytest.mark.parametrize("options", [{"softcap": 0.6}, {"sinks": True}, {"softcap": 0.6, "sinks": True}])
def test_statistics_weigh_queries_by_the_derivative_of_the_output(options):
    """To a score before its softcap, whose slope is a factor, beside sinks, which take their share."""
    geometry, weights = naive.random_layer(**options)
    inputs, rows = torch.randn(9, geometry.hidden_size, dtype=torch.float64).float().double(), torch.arange(9)
    statistics = AttentionStatistics(geometry, weights, seed=0)
    statistics.add_window(inputs)
    heads = source_heads(geometry, weights, inputs, rows)
    scores, values = source_scores(geometry, heads, rows), heads.values[0]

    def head_attention(moved):
        return attention_of(geometry, moved, rows, heads.sinks)[0]

    step, head = 1e-6, weights.o.view(-1, geometry.num_heads, geometry.head_dim)[:, 0]
    expected, before = torch.zeros(8, 8, dtype=torch.float64), head_attention(scores)
    for i in range(9):
        for j in range(i + 1):
            moved = scores.clone()
            moved[0, i, j] += step
            change = head @ ((head_attention(moved) - before)[i] @ values) / step
            expected += change.square().sum() * torch.outer(heads.queries[0, i], heads.queries[0, i])
    torch.testing.assert_close(statistics.tensors()["query_moment"][0], expected, rtol=1e-4, atol=1e-6)


def test_mean_rotation_is_the_weighted_expectation():
    geometry, weights, _, rows, heads, attention = window(kv_heads=6)
    sensitivity = output_sensitivity(geometry, weights.o, heads, attention)
    energy = pair_energy(geometry, heads.queries)
    denominator = (energy * sensitivity.sum(-1, keepdim=True)).sum(1)
    rho = mean_rotation(rotation_moments(geometry, heads.queries, sensitivity, rows), denominator)
    for head, f in ((0, 0), (4, 2), (5, 3)):
        total, weight = 0j, 0.0
        for i in range(9):
            for j in range(i + 1):
                share = float(sensitivity[head, i, j] * energy[head, i, f])
                total += share * torch.polar(torch.tensor(1.0), -geometry.inv_freq[f] * (i - j)).item()
                weight += share
        assert complex(rho[head, f]) == pytest.approx(total / weight, abs=1e-5)
    assert rho.abs().max() <= 1 + 1e-6


def test_mean_rotation_matrix_multiplies_pairs_and_keeps_the_rest():
    rho, states = torch.randn(5, 3, dtype=torch.complex128), torch.randn(5, 8, 1, dtype=torch.float64)
    turned = mean_rotation_matrix(rho, 8) @ states
    torch.testing.assert_close(as_pairs(turned, 3)[..., 0], rho * as_pairs(states, 3)[..., 0])
    assert torch.equal(turned[:, 6:], states[:, 6:])


def random_keys(kv=3, pairs=4, width=11):
    keys = torch.randn(kv, pairs, width, dtype=torch.complex128)
    samples = torch.randn(200, width, dtype=torch.float64)
    samples[:, -1] = 1
    energy = torch.rand(kv, pairs, dtype=torch.float64) + 0.1
    rho = 0.9 * torch.rand(kv, pairs, dtype=torch.float64) * torch.randn(kv, pairs, dtype=torch.complex128).sgn()
    return keys, samples, energy, rho, torch.tensor([2.0, 1.0, 0.5, 0.25])


def rotary_loss(keys, samples, weight, reconstruct):
    """Mean weighted squared error of the pairs, sample by sample."""
    truth = keys @ samples.T.to(keys.dtype)
    return float(((truth - reconstruct).abs().square().mean(-1) * weight).sum())


def test_rotary_key_reaches_the_numerical_optimum():
    keys, samples, energy, rho, inv_freq = random_keys(pairs=1)
    weight = unexplained_energy(energy, rho)
    torch.testing.assert_close(weight, energy * (1 - rho.abs().square()))
    moment = samples.T @ samples / len(samples)
    key = shared_rotary_key(keys, moment, weight, inv_freq[:1], components=1, fold=1)
    closed = rotary_loss(keys, samples, weight, (key.decoder @ key.encoder) @ samples.T.to(keys.dtype))

    truth = keys[:, 0] @ samples.T.to(keys.dtype)
    encoder = torch.randn(1, keys.shape[-1], dtype=torch.complex128, requires_grad=True)
    decoder = torch.randn(3, 1, dtype=torch.complex128, requires_grad=True)
    optimizer = torch.optim.LBFGS([encoder, decoder], max_iter=400, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        error = truth - decoder @ (encoder @ samples.T.to(keys.dtype))
        loss = (error.abs().square().mean(-1) * weight[:, 0]).sum()
        loss.backward()
        return loss

    optimizer.step(objective)
    assert closed == pytest.approx(float(objective()), rel=1e-4)


def test_rotary_key_is_lossless_with_all_components():
    keys, samples, energy, rho, inv_freq = random_keys()
    moment = samples.T @ samples / len(samples)
    key = shared_rotary_key(keys, moment, unexplained_energy(energy, rho), inv_freq, components=12, fold=1)
    torch.testing.assert_close(key.decoder @ key.encoder, keys)
    assert sorted(key.inv_freq.tolist()) == sorted(inv_freq.tolist() * 3)


def test_rotary_key_prefers_what_a_constant_cannot_explain():
    keys, samples, energy, rho, inv_freq = random_keys()
    rho[:, 2:] = 1.0
    key = shared_rotary_key(keys, samples.T @ samples, unexplained_energy(energy, rho), inv_freq, components=6, fold=1)
    assert set(key.inv_freq.tolist()) == {2.0, 1.0}


def test_folded_components_lie_between_their_frequencies():
    keys, samples, energy, rho, inv_freq = random_keys()
    key = shared_rotary_key(keys, samples.T @ samples, unexplained_energy(energy, rho), inv_freq, components=12, fold=2)
    torch.testing.assert_close(key.decoder @ key.encoder, keys)
    assert all(1.0 < value < 2.0 or 0.25 < value < 0.5 for value in key.inv_freq.tolist())


def test_rotary_queries_meet_the_key_as_the_pairs_would():
    keys, samples, energy, rho, inv_freq = random_keys()
    key = shared_rotary_key(keys, samples.T @ samples, unexplained_energy(energy, rho), inv_freq, components=12, fold=1)
    queries = torch.randn(6, 4, 11, dtype=torch.complex128)
    x, y = samples[0].to(torch.complex128), samples[1].to(torch.complex128)
    shared = from_pairs(key.encoder) @ samples[1]
    for head in range(6):
        turn = torch.polar(torch.ones(4), -5.0 * inv_freq).to(torch.complex128)
        expected = ((queries[head] @ x).conj() * (keys[head // 2] @ y) * turn).sum().real
        query = rotary_queries(2, queries, key)[head] @ samples[0]
        rotated = torch.complex(shared[:12], shared[12:]) * torch.polar(torch.ones(12), -5.0 * key.inv_freq)
        found = (torch.complex(query[:12], query[12:]).conj() * rotated).sum().real
        torch.testing.assert_close(found, expected)


def test_pairs_round_trip():
    rows = torch.randn(2, 8, 3)
    torch.testing.assert_close(from_pairs(as_pairs(rows, 4)), rows)


def test_metric_roots():
    factor = torch.randn(2, 5, 5, dtype=torch.float64)
    metric = factor @ factor.mT
    root, inverse = metric_roots(metric)
    largest = torch.linalg.eigvalsh(metric)[:, -1]
    damped = metric + 1e-4 * largest[:, None, None] * torch.eye(5)
    torch.testing.assert_close(root @ root, damped)
    torch.testing.assert_close(root @ inverse, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))


def test_joint_latent_reaches_the_numerical_optimum():
    keys, values = torch.randn(2, 4, 9, dtype=torch.float64), torch.randn(2, 4, 9, dtype=torch.float64)
    samples = torch.randn(300, 9, dtype=torch.float64)
    samples[:, -1] = 1
    token_weights = torch.rand(300, dtype=torch.float64)
    moment = (samples.T * token_weights) @ samples
    metrics = [torch.diag_embed(torch.rand(2, 4, dtype=torch.float64) + 0.5) for _ in range(2)]
    targets, plain = latent_targets(keys, values, *metrics, key_gain=1.5)
    latent = joint_latent(targets, plain, centred(moment), rank=3)

    free = (samples - (token_weights @ samples) / token_weights.sum()) * token_weights.sqrt()[:, None]

    def loss(reconstruction):
        error = (targets - reconstruction) @ free.T
        return error.square().sum()

    roots = torch.cat((1.5 * metric_roots(metrics[0])[0], metric_roots(metrics[1])[0]))
    rebuilt = roots @ torch.cat((latent.up_key, latent.up_value)) @ latent.down
    closed = float(loss(rebuilt.flatten(0, 1)))
    left = torch.randn(16, 3, dtype=torch.float64, requires_grad=True)
    right = torch.randn(3, 9, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([left, right], max_iter=500, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = loss(left @ right)
        value.backward()
        return value

    optimizer.step(objective)
    assert closed == pytest.approx(float(objective()), rel=1e-4)
    spectrum, _ = latent_spectrum(targets, centred(moment))
    assert closed == pytest.approx(float(spectrum[3:].sum()), rel=1e-8)


def test_centring_removes_the_constant():
    samples = torch.randn(50, 6, dtype=torch.float64) + 3
    samples[:, -1] = 1
    expected = (samples - samples.mean(0)).T @ (samples - samples.mean(0))
    torch.testing.assert_close(centred(samples.T @ samples), expected)


def test_ridge_satisfies_its_normal_equations():
    features, targets = torch.randn(40, 5, dtype=torch.float64) + 2, torch.randn(40, 3, dtype=torch.float64)
    row_weights = torch.rand(40, 1, dtype=torch.float64)
    start = torch.randn(3, 5, dtype=torch.float64)
    augmented = torch.cat((features, torch.ones(40, 1)), dim=1)
    projection, bias = ridge_towards(
        (augmented * row_weights).T @ augmented, (augmented * row_weights).T @ targets, start
    )

    share = row_weights / row_weights.sum()
    centred_features = features - (share * features).sum(0)
    variance = (share * centred_features.square()).sum(0)
    penalty = SHRINKAGE * (variance + 1e-3 * variance.mean())
    w, b = projection.clone().requires_grad_(), bias.clone().requires_grad_()
    residual = targets - features @ w.T - b
    ((share * residual.square()).sum() + ((w - start).square() * penalty).sum()).backward()
    torch.testing.assert_close(w.grad, torch.zeros_like(w), atol=1e-10, rtol=0)
    torch.testing.assert_close(b.grad, torch.zeros_like(b), atol=1e-10, rtol=0)


def test_allocation_is_the_best_of_all():
    gains = [torch.tensor([5.0, 4.0, 0.1, 0.0]), torch.tensor([3.0, 2.0, 1.0, 0.5]), torch.tensor([9.0, 0.3, 0.2, 0.0])]
    ranks = allocate_ranks(gains, total=7, smallest=1, largest=3)
    assert sum(ranks) == 7
    kept = sum(float(gain[:rank].sum()) for gain, rank in zip(gains, ranks, strict=True))
    best = max(
        sum(float(gain[:rank].sum()) for gain, rank in zip(gains, trial, strict=True))
        for trial in ((a, b, 7 - a - b) for a in range(1, 4) for b in range(1, 4) if 1 <= 7 - a - b <= 3)
    )
    assert kept == pytest.approx(best)


def test_allocation_keeps_its_limits():
    gains = [torch.tensor([9.0] * 10), torch.tensor([1.0] * 10)]
    assert allocate_ranks(gains, total=9, smallest=2, largest=6) == [6, 3]


def test_rates_stay_near_their_median():
    assert near_median([1.0, 2.0, 100.0, 0.0, 3.0], (0.25, 8.0)) == [1.0, 2.0, 16.0, 0.5, 3.0]
    assert near_median([0.0, 0.0, 5.0], (0.25, 8.0)) == [1.0, 1.0, 1.0]


def test_statistics_are_sums_over_windows():
    geometry, weights = naive.random_layer(dtype=torch.float32)
    windows, residual = torch.randn(3, 12, 20), torch.randn(3, 12, 20)
    together, apart = AttentionStatistics(geometry, weights, 5), AttentionStatistics(geometry, weights, 5)
    together.update(windows, residual)
    for index in range(3):
        apart.update(windows[index : index + 1], residual[index : index + 1])
    for name, value in together.tensors().items():
        torch.testing.assert_close(apart.tensors()[name], value, rtol=0, atol=0)
    assert float(together.tensors()["moment"][-1, -1]) == pytest.approx(3, rel=1e-5)
    assert float(together.tensors()["mean"][-1]) == 36


def test_sampled_rows_are_seeded_by_layer_and_window():
    rows = sample_rows(1000, 64, seed=3, window=2)
    assert torch.equal(rows, sample_rows(1000, 64, seed=3, window=2))
    assert not torch.equal(rows, sample_rows(1000, 64, seed=3, window=1))
    assert not torch.equal(rows, sample_rows(1000, 64, seed=4, window=2))
    assert len(rows.unique()) == 64
    assert torch.equal(sample_rows(10, 64, 0, 0), torch.arange(10))
