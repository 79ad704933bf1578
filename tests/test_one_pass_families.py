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
from tests.gpu.language_models import FAMILIES, GROUPED, batch, losses, model_of

pytestmark = pytest.mark.filterwarnings("ignore")


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
    assert opt.report.gradients.startswith("dense: a parameter is in no known layer")
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
