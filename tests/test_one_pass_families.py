"""All weights of a language model by one backward pass, against autograd's for each loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from trl.trainer.utils import add_fused_lm_head

from raco_optim import CAGradClip, gram_matrix
from raco_optim.gradients.per_example import LayerGradients
from raco_optim.integrations.forward import completion_log_probs

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
GROUPED = SHAPE | {"num_key_value_heads": 2, "head_dim": 8}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", GROUPED | {"attention_bias": True, "tie_word_embeddings": False}),
    "llama3": ("Llama", GROUPED | {"tie_word_embeddings": False}),
    "gemma3": ("Gemma3Text", GROUPED | {"sliding_window": 8, "final_logit_softcapping": 5.0}),
    "phi3": ("Phi3", SHAPE | {"tie_word_embeddings": False}),
    "phi": ("Phi", SHAPE),  # whose head has a bias
    "gpt-neox": ("GPTNeoX", SHAPE),
    "gpt2": ("GPT2", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}),
}


def model_of(family: str) -> nn.Module:
    torch.manual_seed(0)
    name, shape = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    add_fused_lm_head(model.train())
    return model


def batch() -> dict[str, Tensor]:
    """Four pairs of texts of many lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (8, 14), generator=generator)
    there = torch.arange(14) < torch.tensor([14, 9, 12, 14, 7, 14, 10, 13])[:, None]
    return {
        "input_ids": ids.where(there, 0),
        "attention_mask": there.long(),
        "completion_mask": (there & (torch.arange(14) >= 4)).long(),
    }


def losses(z: Tensor, kind: str) -> list[Tensor]:
    signs = torch.tensor([[1, -1, 1, 1], [1, 1, -1, 1], [-1, 1, 1, -1], [1, 1, 1, -1.0]])
    chosen, rejected = z.chunk(2)
    if kind == "pairs":
        return list(nn.functional.softplus(-0.1 * signs * (chosen - rejected)).mean(1))
    return list((signs * chosen / 9).sigmoid().mean(1) - 0.7 * rejected.tanh().mean())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["pairs", "texts"])
def test_one_pass_is_one_for_each(family: str, kind: str) -> None:
    """Without and with checkpoints, in float64, where language models round some in float32."""
    model = model_of(family).double()
    parameters = list(model.parameters())
    of_losses = losses(completion_log_probs(model, batch()), kind)
    true = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in of_losses]
    if kind == "texts":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = LayerGradients(model, parameters)
    z = completion_log_probs(model, batch())
    rows, missing = layers.gradients(z, losses(z, kind), ["a", "b", "c", "d"])
    # Its table of positions is looked up once for all examples.
    assert ("wpe" in missing) if family == "gpt2" else not missing
    assert rows is not None
    errors, norms = (gram_matrix(x).trace() for x in (differences(rows, true), true))
    assert errors <= 1e-12 * norms
    gram = gram_matrix(true)
    sizes = gram.diagonal().sqrt()
    assert ((gram_matrix(rows) - gram) / sizes / sizes[:, None]).abs().max() <= 1e-6
    for row, true_row in zip(rows, true, strict=True):
        for g, of_autograd in zip(row, true_row, strict=True):
            assert (g - of_autograd).norm() <= 1e-4 * of_autograd.norm() + 1e-9


def test_mixtures_of_experts_have_a_pass_for_each_loss() -> None:
    """The experts are no layers, and the tokens of all examples meet in one dimension."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4)
    model = transformers.AutoModelForCausalLM.from_config(config)
    add_fused_lm_head(model.train())
    parameters = list(model.parameters())
    opt = CAGradClip(
        torch.optim.SGD(parameters, 0.1), [1 / 4] * 4, gradients="per_example", model=model
    )
    z = completion_log_probs(model, batch())
    opt.backward(losses(z, "pairs"), scalars=z)
    assert opt.report.gradients.startswith("dense: a parameter is in no layer that is known")
    assert "(6 of 21 parameters: model.layers.0.mlp.gate.weight" in opt.report.gradients
    found = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    z = completion_log_probs(model, batch())
    CAGradClip(torch.optim.SGD(parameters, 0.1), [1 / 4] * 4).backward(losses(z, "pairs"))
    for g, p in zip(found, parameters, strict=True):
        torch.testing.assert_close(g, p.grad)


def differences(a: Any, b: Any) -> list[list[Tensor]]:
    return [[x - y for x, y in zip(r, s, strict=True)] for r, s in zip(a, b, strict=True)]


def test_bfloat16_is_as_exact_as_autograd() -> None:
    model = model_of("llama3")
    parameters = list(model.parameters())
    true = gradients_of(model, parameters)
    with torch.autocast("cpu", torch.bfloat16):
        of_losses = losses(completion_log_probs(model, batch()), "pairs")
        each = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in of_losses]
        layers = LayerGradients(model, parameters)
        z = completion_log_probs(model, batch())
        rows, why = layers.gradients(z, losses(z, "pairs"), [*"abcd"])
    assert rows is not None and not why
    ours, theirs = (gram_matrix(differences(x, true)).trace() for x in (rows, each))
    assert ours <= 1.2**2 * theirs


def gradients_of(model: nn.Module, parameters: list[Tensor]) -> list[tuple[Tensor, ...]]:
    of_losses = losses(completion_log_probs(model, batch()), "pairs")
    return [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in of_losses]


def test_a_head_whose_rows_are_compact() -> None:
    """On an accelerator TRL's head gets the positions that count alone."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(30, 8), nn.Linear(8, 8), nn.Linear(8, 30))
    parameters = list(model.parameters())
    ids, mask = torch.randint(30, (6, 5)), torch.rand(6, 5) < 0.6

    def scores() -> Tensor:
        hidden = model[1](model[0](ids)).tanh()[mask]
        found = ChunkedLogProbFunction.apply(
            hidden, model[2].weight, model[2].bias, ids[mask], 1.3, 8, None, 0.7, ()
        )[0]
        return hidden.new_zeros(mask.shape).masked_scatter(mask, found).sum(1)

    def of(z: Tensor) -> list[Tensor]:
        return [z.square().mean(), z.sin().sum(), z[0] * z[1]]

    z = scores()
    true = [torch.autograd.grad(x, parameters, retain_graph=True) for x in of(z)]
    layers = LayerGradients(model, parameters)
    z = scores()
    rows, why = layers.gradients(z, of(z), ["a", "b", "c"])
    assert rows is not None and not why
    for g, of_autograd in zip(sum(rows, []), sum(map(list, true), []), strict=True):
        torch.testing.assert_close(g, of_autograd, rtol=1e-4, atol=1e-5)
