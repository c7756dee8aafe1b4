"""The packed training forward against the model's own, sequence by sequence, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import autotool_fast.packing as packing
import autotool_fast.policy as policy
from autotool_fast.packing import pack
from autotool_fast.policy import attention, packed_hidden, packed_logp_entropy, recompute_activations
from autotool_fast.rollout.engine import SlotEngine

torch.set_num_threads(1)
VOCAB = 23
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # spreads the attention, so that a wrong mask shows
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {
    "qwen3-gqa-tied": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 2, "head_dim": 8, "tie": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 4, "head_dim": 4, "tie": False}),
    "qwen2-gqa": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 1, "tie": False}),
    "llama-gqa": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 2, "tie": True}),
}
# Both sides compute the same sums in float64 in another order; values are O(1) to O(100), so differences are some
# hundred units of 1e-16. A wrong position, mask or neighbour is off by 1e-3 and more.
EXACT = {"rtol": 1e-10, "atol": 1e-11}


def make_model(name: str) -> torch.nn.Module:
    model_class, config_class, options = MODELS[name]
    options = dict(options)
    torch.manual_seed(0)
    config = config_class(**SIZES, tie_word_embeddings=options.pop("tie"), **options)
    return model_class(config).double()


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make_model(request.param)


@pytest.fixture
def qwen():
    return make_model("qwen3-gqa-tied")


def make_sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).astype(np.int32) for length in lengths]


def mark(sequences: list[np.ndarray], seed: int = 1) -> list[np.ndarray]:
    """Holes everywhere, first tokens unmarked."""
    rng = np.random.default_rng(seed)
    return [np.r_[False, rng.random(len(s) - 1) < 0.6] for s in sequences]


def reference(model, sequences, marks, temperature=1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy from the model's own logits, one unpadded sequence at a time."""
    logps, entropies = [], []
    for ids, marked in zip(sequences, marks, strict=True):
        ids = torch.from_numpy(ids.astype(np.int64))
        logits = model(input_ids=ids[None]).logits[0, :-1] / temperature
        logp = logits.log_softmax(-1)
        keep = torch.from_numpy(marked)[1:]
        logps.append(logp.gather(-1, ids[1:, None])[:, 0][keep])
        entropies.append(-(logp.exp() * logp).sum(-1)[keep])
    return torch.cat(logps), torch.cat(entropies)


def packed(model, sequences, marks, prompts=None, **options):
    batch = pack(sequences, prompts=prompts)
    return packed_logp_entropy(model, batch, torch.from_numpy(np.concatenate(marks)), **options)


def gradients(model, value: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def distance(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in the 2-norm."""
    return float((actual - wanted).norm() / wanted.norm())


# Eleven lengths that fall into two buckets, a repeated one, the shortest possible and one of a single token.
LENGTHS = [31, 3, 30, 29, 28, 30, 27, 26, 26, 2, 1]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_log_probs_and_entropies_equal_the_models_own(model, temperature):
    sequences = make_sequences(LENGTHS)
    marks = mark(sequences)
    assert len(pack(sequences).buckets.members) > 1
    with torch.no_grad():
        result = packed(model, sequences, marks, temperature=temperature)
        logp, entropy = reference(model, sequences, marks, temperature)
    torch.testing.assert_close(result.logp, logp, **EXACT)
    torch.testing.assert_close(result.entropy, entropy, **EXACT)


def test_packed_gradients_equal_the_models_own(model):
    sequences = make_sequences(LENGTHS)
    marks = mark(sequences)
    rng = torch.Generator().manual_seed(2)
    weights = torch.randn(2, sum(m.sum() for m in marks), generator=rng, dtype=torch.float64)
    result = packed(model, sequences, marks)
    ours = gradients(model, (weights[0] * result.logp + weights[1] * result.entropy).sum())
    logp, entropy = reference(model, sequences, marks)
    theirs = gradients(model, (weights[0] * logp + weights[1] * entropy).sum())
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-10, msg=name)  # sums over 200 tokens


def make_groups(seed: int = 0) -> tuple[list[np.ndarray], list[int]]:
    """Groups of 4, 10 and 1 sequences with prompts of 9, 1 and 5 tokens, mixed, one sequence without; and the lengths
    of their prompts. Ends are of 1 to 14 tokens."""
    rng = np.random.default_rng(seed)
    sequences, prompts = [], []
    for shared, ends in ((9, [1, 5, 12, 5]), (1, [3, 14, 2, 2, 1, 7, 8, 9, 9, 6]), (5, [4]), (0, [6])):
        prompt = rng.integers(0, VOCAB, shared)
        for end in ends:
            sequences.append(np.concatenate([prompt, rng.integers(0, VOCAB, end)]).astype(np.int32))
            prompts.append(shared)
    order = rng.permutation(len(sequences))
    return [sequences[i] for i in order], [prompts[i] for i in order]


def test_shared_prompts_change_neither_results_nor_gradients(model):
    """Marked in prompts too, and at the first token behind one."""
    sequences, prompts = make_groups()
    marks = [m | (np.arange(len(m)) == n) & (n > 0) for m, n in zip(mark(sequences), prompts, strict=True)]
    assert pack(sequences, prompts=prompts).tokens == sum(map(len, sequences)) - 3 * 9 - 9 * 1
    generator = torch.Generator().manual_seed(2)
    weights = torch.randn(2, sum(m.sum() for m in marks), generator=generator, dtype=torch.float64)
    expected = reference(model, sequences, marks, 0.7)
    wanted = gradients(model, (weights[0] * expected[0] + weights[1] * expected[1]).sum())
    result = packed(model, sequences, marks, prompts, temperature=0.7)
    torch.testing.assert_close(tuple(result), expected, **EXACT)
    ours = gradients(model, (weights[0] * result.logp + weights[1] * result.entropy).sum())
    for name, gradient in wanted.items():
        assert distance(ours[name], gradient) <= 1e-6, name  # these models' norms round to float32, per row or per sum


def test_shared_prompts_save_the_work_and_their_gradient_comes_from_all_who_share(qwen):
    """A token that only the prompt has gets the gradient of every sequence behind it."""
    prompt = np.array([20, 21, 22])
    ends = [np.array([1, 2]), np.array([3]), np.array([4, 5, 6])]
    sequences = [np.concatenate([prompt, end]) for end in ends]
    marks = [np.arange(len(s)) >= 3 for s in sequences]
    qwen.config.tie_word_embeddings = False
    qwen.lm_head.weight = torch.nn.Parameter(qwen.lm_head.weight.detach().clone())
    seen = []
    hook = qwen.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    shared = gradients(qwen, packed(qwen, sequences, marks, [3, 3, 3]).logp.sum())["model.embed_tokens.weight"]
    hook.remove()
    assert seen == [3 + 2 + 1 + 3]
    alone = [
        gradients(qwen, packed(qwen, [s], [m]).logp.sum())["model.embed_tokens.weight"]
        for s, m in zip(sequences, marks, strict=True)
    ]
    assert all((a[20:] != 0).any() for a in alone)
    assert distance(shared, sum(alone)) <= 1e-6


def test_shared_prompts_in_bfloat16_are_as_close_as_prompts_of_their_own():
    """Sums of a prompt's gradients over its group are rounded to 8 bits once more for each member."""
    sequences, prompts = make_groups()
    marks = mark(sequences)
    model = make_model("qwen2-gqa")
    wanted = gradients(model, packed(model, sequences, marks).logp.sum())
    model = model.to(torch.bfloat16)
    errors = []
    for shared in (None, prompts):
        found = gradients(model, packed(model, sequences, marks, shared).logp.sum())
        errors.append({name: distance(found[name].double(), gradient) for name, gradient in wanted.items()})
    for name, error in errors[1].items():
        assert error <= 1.5 * errors[0][name] + 2.0**-8, name


def test_the_order_of_packing_does_not_matter(qwen):
    sequences = make_sequences([5, 9, 1, 7])
    marks = mark(sequences)
    with torch.no_grad():
        alone = [packed(qwen, [s], [m]).logp for s, m in zip(sequences, marks, strict=True)]
        for order in itertools.permutations(range(4)):
            result = packed(qwen, [sequences[i] for i in order], [marks[i] for i in order]).logp
            torch.testing.assert_close(result, torch.cat([alone[i] for i in order]), **EXACT)


def test_how_lengths_are_grouped_does_not_matter(qwen, monkeypatch):
    sequences = make_sequences(LENGTHS)
    marks = mark(sequences)
    results = {}
    for name, smallest in (("one each", 1), ("several", 4), ("one for all", 99)):
        grouped = packing._length_buckets
        monkeypatch.setattr(packing, "_length_buckets", lambda n, grouped=grouped, k=smallest: grouped(n, 1.0, k))
        with torch.no_grad():
            results[name] = (len(pack(sequences).buckets.members), packed(qwen, sequences, marks).logp)
        monkeypatch.undo()
    assert results["one for all"][0] == 1 < results["several"][0] < results["one each"][0]
    for _, logp in results.values():
        torch.testing.assert_close(logp, results["one for all"][1], **EXACT)


def test_a_sequence_does_not_see_its_neighbours(qwen):
    first, second, third = make_sequences([6, 8, 5])
    marks = [np.r_[False, np.ones(len(s) - 1, bool)] for s in (first, second, third)]
    other = (third + 1) % VOCAB
    with torch.no_grad():
        a = packed(qwen, [first, second, third], marks).logp
        b = packed(qwen, [other, second, first], [marks[2], marks[1], marks[0]]).logp
    torch.testing.assert_close(a[5:12], b[4:11], **EXACT)
    torch.testing.assert_close(a[:5], b[11:], **EXACT)


def test_a_token_does_not_see_what_follows_it(qwen):
    (sequence,) = make_sequences([9])
    changed = sequence.copy()
    changed[6:] = (changed[6:] + 1) % VOCAB
    marks = [np.r_[False, np.ones(8, bool)]]
    with torch.no_grad():
        a, b = (packed(qwen, [s], marks).logp for s in (sequence, changed))
    torch.testing.assert_close(a[:5], b[:5], **EXACT)
    assert (a[5:] - b[5:]).abs().min() > 1e-4


def test_only_marked_tokens_and_their_prefixes_get_gradient(qwen):
    """Tokens after the last marked one cannot matter, whatever they are."""
    sequence = np.arange(9, dtype=np.int32)
    marks = [np.r_[[False] * 3, True, [False] * 5]]
    qwen.config.tie_word_embeddings = False
    qwen.lm_head.weight = torch.nn.Parameter(qwen.lm_head.weight.detach().clone())
    gradient = gradients(qwen, packed(qwen, [sequence], marks).logp.sum())["model.embed_tokens.weight"]
    assert (gradient[:3].abs().sum(-1) > 0).all()
    assert (gradient[3:] == 0).all()


def test_nothing_marked_is_a_differentiable_zero(qwen):
    sequences = make_sequences([4, 5])
    result = packed(qwen, sequences, [np.zeros(4, bool), np.zeros(5, bool)])
    assert result.logp.shape == (0,)
    assert all((g == 0).all() for g in gradients(qwen, result.logp.sum() + result.entropy.sum()).values())


def test_a_first_token_cannot_be_marked(qwen):
    sequences = make_sequences([4, 5])
    marks = [np.zeros(4, bool), np.r_[True, np.zeros(4, bool)]]
    with pytest.raises(AssertionError, match="first token"):
        packed(qwen, sequences, marks)


def test_float32_models_give_float32_results():
    model = make_model("qwen3").float()
    sequences = make_sequences([5, 7])
    marks = mark(sequences)
    result = packed(model, sequences, marks)
    assert result.logp.dtype == torch.float32
    logp, _ = reference(model.double(), sequences, marks)
    # Some hundred roundings of 6e-8 on values below 10.
    torch.testing.assert_close(result.logp.double(), logp, rtol=0, atol=1e-4)


# The attention function comes and goes


def test_the_models_attention_is_restored(qwen):
    before = qwen.config._attn_implementation
    packed_hidden(qwen, pack(make_sequences([3, 4])))
    assert qwen.config._attn_implementation == before
    ids = torch.tensor([[1, 2, 3]])
    assert qwen(input_ids=ids).logits.shape == (1, 3, VOCAB)


def test_the_models_attention_is_restored_after_an_error(qwen, monkeypatch):
    before = qwen.config._attn_implementation
    monkeypatch.setattr(qwen.model.layers[1].mlp, "forward", lambda x: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        packed_hidden(qwen, pack(make_sequences([3, 4])))
    assert qwen.config._attn_implementation == before


def test_attention_blocks_nest(qwen):
    before = qwen.config._attn_implementation
    with attention(qwen, policy.PACKED_ATTENTION):
        with attention(qwen, "eager"):
            assert qwen.config._attn_implementation == "eager"
        assert qwen.config._attn_implementation == policy.PACKED_ATTENTION
    assert qwen.config._attn_implementation == before


def test_a_sliding_window_shorter_than_the_sequences_is_refused():
    options = {**SIZES, "num_key_value_heads": 2}
    sequences = make_sequences([6])
    for window, fits in ((5, False), (6, True)):
        model = MistralForCausalLM(MistralConfig(**options, sliding_window=window)).double()
        if not fits:
            with pytest.raises(ValueError, match="sliding window"):
                packed_hidden(model, pack(sequences))
            continue
        marks = mark(sequences)
        with torch.no_grad():
            torch.testing.assert_close(
                packed(model, sequences, marks).logp, reference(model, sequences, marks)[0], **EXACT
            )


FULL = {"num_key_value_heads": 2, "layer_types": ["full_attention"] * SIZES["num_hidden_layers"]}
HEADS = {
    "bias": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2)),
    "divided": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=3.0)),
    "multiplied": lambda: CohereForCausalLM(CohereConfig(**SIZES, num_key_value_heads=2, logit_scale=0.25)),
    "capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **FULL, head_dim=4, final_logit_softcapping=0.5, attn_logit_softcapping=None)
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_what_a_model_does_to_its_logits_is_done_by_trainer_and_sampler(kind):
    torch.manual_seed(0)
    model = HEADS[kind]().double()
    if kind == "bias":
        model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))
    sequences = make_sequences([4, 9])
    marks = mark(sequences)
    expected = reference(model, sequences, marks)
    result = packed(model, sequences, marks)
    # Some of these models compute their norms in float32, whatever the weights' type.
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(tuple(result), expected, **close)
    actual = gradients(model, result.logp.sum() - 2 * result.entropy.sum())
    wanted = gradients(model, expected[0].sum() - 2 * expected[1].sum())
    assert actual.keys() == wanted.keys()
    for name, gradient in actual.items():
        torch.testing.assert_close(gradient, wanted[name], **close)

    engine = SlotEngine(model, slots=1, max_len=16)
    with engine.session(stop_ids=(), temperature=1.0):
        engine.submit(sequences[0], [0], np.array([5]), 8)
        while not engine.step():
            pass
        ids, logp, entropy = (values.copy() for values in vars(engine.row(0)).values())
    sampled = np.arange(len(ids)) >= 4
    expected = reference(model, [ids], [sampled])
    torch.testing.assert_close(torch.from_numpy(logp[sampled]).double(), expected[0], **close)
    torch.testing.assert_close(torch.from_numpy(entropy[sampled]).double(), expected[1], **close)


@pytest.mark.parametrize("name", MODELS)
def test_recomputed_activations_give_the_same_gradients_with_less_saved(name):
    sequences, prompts = make_groups()
    found, sizes = [], []
    for recompute in (False, True):
        model = make_model(name)
        if recompute:
            recompute_activations(model)
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, int] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logp, _ = packed(model, sequences, mark(sequences), prompts)
        found.append(gradients(model, logp.sum()))
        sizes.append(sum(saved.values()))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert sizes[1] < 0.6 * sizes[0]
