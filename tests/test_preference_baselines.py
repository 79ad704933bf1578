"""AMoPO and MODPO: the formulas of their authors, limits, bad input."""

import math

import numpy as np
import pytest
import torch

from raco_optim.alignment import PairLogProbs, amopo_losses, modpo_loss, preference_losses
from tests.preference_pairs import changed, gradients, random_pairs, random_signs, refused

DOUBLE = torch.float64
SIZE, M = 12, 3
WEIGHTS = [0.5, 0.3, 0.2]


def random_margins(size=SIZE):
    return torch.from_numpy(np.random.default_rng(1).normal(0, 2, (size, M)))


def softplus(x):
    return np.logaddexp(0, x)


# --- AMoPO ---------------------------------------------------------------------------------------


def test_amopo_by_its_formula():
    log_probs, signs, beta = random_pairs(), random_signs(), 1.3
    values = {name: x.detach().numpy() for name, x in vars(log_probs).items()}
    for loss, sign in zip(amopo_losses(log_probs, signs, beta=beta), signs.numpy().T, strict=True):
        terms = []
        for b in np.flatnonzero(sign):
            sides = ("chosen", "rejected") if sign[b] > 0 else ("rejected", "chosen")
            winner, loser = (beta / values[f"{x}_tokens"][b] * values[x][b] for x in sides)
            terms.append(softplus(loser - winner))
        assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)


def test_amopo_is_simpo_without_a_margin_and_asks_no_reference():
    log_probs, signs = random_pairs(), random_signs()
    alone = changed(log_probs, ref_chosen=None, ref_rejected=None)
    ours = amopo_losses(alone, signs, beta=2.0)
    simpo = preference_losses(log_probs, signs, loss="simpo", beta=2.0, gamma=0.0)
    assert all(torch.equal(a, b) for a, b in zip(ours, simpo, strict=True))


def test_micro_batches_of_amopo_add_up():
    log_probs, signs = random_pairs(), random_signs()
    signs[:, 1] = 0
    counts = signs.count_nonzero(dim=0)
    whole = amopo_losses(log_probs, signs, beta=1.0)
    assert whole[1] is None
    parts = [
        amopo_losses(log_probs.select(i), signs[i], beta=1.0, counts=counts)
        for i in torch.arange(SIZE).split([5, 7])
    ]
    for k in (0, 2):
        torch.testing.assert_close(parts[0][k] + parts[1][k], whole[k], rtol=1e-12, atol=0)


def test_bad_input_of_amopo():
    log_probs = changed(random_pairs(), chosen_tokens=None, rejected_tokens=None)
    fragments = ["`chosen_tokens` and `rejected_tokens`", "got None"]
    refused(fragments, amopo_losses, log_probs, random_signs(), beta=1.0)
    fragments = ["`beta` must be a number above 0"]
    refused(fragments, amopo_losses, random_pairs(), random_signs(), beta=0.0)


# --- MODPO ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", range(M))
@pytest.mark.parametrize("weights", [WEIGHTS, dict(zip("abc", WEIGHTS, strict=True))], ids=str)
def test_modpo_by_the_formula_of_its_authors(weights, objective):
    """Theirs has a winner and a loser, and rewards of both instead of margins."""
    log_probs, beta, k = random_pairs(), 0.1, objective
    values = {name: x.detach().numpy() for name, x in vars(log_probs).items()}
    rng = np.random.default_rng(1)
    rewards = {side: rng.normal(0, 2, (SIZE, M)) for side in ("chosen", "rejected")}
    w_rest = np.delete(WEIGHTS, k)
    sign = random_signs()[:, k]

    def term(side, b):
        ratio = values[side][b] - values[f"ref_{side}"][b]
        return (beta * ratio - np.delete(rewards[side][b], k) @ w_rest) / WEIGHTS[k]

    terms = [
        softplus(-sign[b].item() * (term("chosen", b) - term("rejected", b)))
        for b in np.flatnonzero(sign.numpy())
    ]
    margins = torch.from_numpy(rewards["chosen"] - rewards["rejected"])
    loss = modpo_loss(log_probs, sign, margins, weights, objective, beta=beta)
    assert loss.item() == pytest.approx(np.mean(terms), rel=1e-12)


def test_modpo_with_all_weight_on_one_objective_is_dpo():
    log_probs, sign = random_pairs(), random_signs()[:, 0]
    margins = torch.full((SIZE, M), math.nan)  # not read
    ours = modpo_loss(log_probs, sign, margins, [1.0, 0.0, 0.0], 0, beta=0.2)
    [dpo] = preference_losses(log_probs, sign[:, None], beta=0.2)
    assert torch.equal(ours, dpo)


def test_modpo_at_the_optimal_policy_is_the_loss_of_the_reward():
    """There beta Delta = sum_j w_j r_j, so r_k remains in the sigmoid."""
    margins, sign, beta, k = random_margins(), torch.ones(SIZE), 0.1, 1
    zero = torch.zeros(SIZE, dtype=DOUBLE)
    best = PairLogProbs(margins @ torch.tensor(WEIGHTS, dtype=DOUBLE) / beta, zero, zero, zero)
    loss = modpo_loss(best, sign, margins, WEIGHTS, k, beta=beta)
    assert loss.item() == pytest.approx(softplus(-margins[:, k].numpy()).mean(), rel=1e-12)


def test_swapping_chosen_and_rejected_changes_no_bit_of_modpo():
    log_probs, sign, margins = random_pairs(), random_signs()[:, 0], random_margins()
    p = log_probs
    swapped = PairLogProbs(p.rejected, p.chosen, p.ref_rejected, p.ref_chosen)
    before = modpo_loss(log_probs, sign, margins, WEIGHTS, 0, beta=0.1)
    after = modpo_loss(swapped, -sign, -margins, WEIGHTS, 0, beta=0.1)
    assert torch.equal(before, after)
    for a, b in zip(gradients(before, log_probs), gradients(after, log_probs), strict=True):
        assert torch.equal(a, b)


def test_modpo_gradient_by_finite_differences():
    fixed, sign, margins = random_pairs(), random_signs()[:, 2], random_margins()

    def loss(chosen, rejected):
        log_probs = changed(fixed, chosen=chosen, rejected=rejected)
        return modpo_loss(log_probs, sign, margins, WEIGHTS, 2, beta=0.1)

    assert torch.autograd.gradcheck(loss, (fixed.chosen, fixed.rejected))


@pytest.mark.parametrize("value", [-20.0, math.nan])
def test_pairs_without_a_label_change_no_bit_of_modpo(value):
    log_probs, sign, margins = random_pairs(), random_signs()[:, 0], random_margins()
    labelled = sign.nonzero()[:, 0]
    left = PairLogProbs(**{name: x.detach()[labelled] for name, x in vars(log_probs).items()})
    before = modpo_loss(left, sign[labelled], margins[labelled], WEIGHTS, 0, beta=0.1)
    odd = sign == 0
    chosen = log_probs.chosen.detach().masked_fill(odd, value).requires_grad_()
    poisoned = changed(log_probs, chosen=chosen)
    after = modpo_loss(
        poisoned, sign, margins.masked_fill(odd[:, None], value), WEIGHTS, 0, beta=0.1
    )
    assert torch.equal(before, after)
    gradient, _ = gradients(after, poisoned)
    assert torch.equal(gradient != 0, ~odd)
    assert modpo_loss(poisoned, 0 * sign, margins, WEIGHTS, 0, beta=0.1) is None


def test_micro_batches_of_modpo_add_up():
    log_probs, sign, margins = random_pairs(), random_signs()[:, 0], random_margins()
    sign[:4] = 0
    whole = modpo_loss(log_probs, sign, margins, WEIGHTS, 0, beta=0.1)
    count = sign.count_nonzero()
    parts = [
        modpo_loss(log_probs.select(i), sign[i], margins[i], WEIGHTS, 0, beta=0.1, count=count)
        for i in torch.arange(SIZE).split([4, 1, 7])
    ]
    assert parts[0] is None
    total = parts[1] + parts[2]
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
    for a, b in zip(gradients(total, log_probs), gradients(whole, log_probs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_modpo_has_the_dtype_of_the_log_probabilities():
    single = PairLogProbs(**{name: x.float() for name, x in vars(random_pairs()).items()})
    loss = modpo_loss(single, random_signs()[:, 0], random_margins(), WEIGHTS, 0, beta=0.1)
    assert loss.dtype == torch.float32
    whole = modpo_loss(random_pairs(), random_signs()[:, 0], random_margins(), WEIGHTS, 0, beta=0.1)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_modpo_stays_finite_far_out(beta):
    log_probs = random_pairs()
    for margin in (1e4, -1e4):
        margins = torch.full((SIZE, M), margin, dtype=DOUBLE)
        loss = modpo_loss(log_probs, torch.ones(SIZE), margins, [0.01, 0.99, 0.0], 0, beta=beta)
        assert loss.isfinite()
        assert all(g.isfinite().all() for g in gradients(loss, log_probs))


@pytest.mark.parametrize(
    ("wrong", "fragments"),
    [
        (
            {"objective": 2, "weights": [0.5, 0.5, 0.0]},
            ["`weights`", "divides", "[0.5, 0.5, 0.0]", "objective 2"],
        ),
        ({"weights": [0.5, 0.3, 0.3]}, ["`weights`", "sum to 1"]),
        ({"weights": [0.5, 0.5]}, ["`margins`", "m = 2", "[12, 3]"]),
        ({"objective": 3}, ["`objective`", "3 weights", "got 3"]),
        ({"objective": -1}, ["`objective`", "got -1"]),
        ({"objective": "a"}, ["`objective`", "'a'"]),
        ({"margins": random_margins(11)}, ["`margins`", "B = 12", "[11, 3]"]),
        ({"margins": [[0.0] * M] * SIZE, "exception": TypeError}, ["`margins`", "tensor", "list"]),
        ({"sign": torch.full((SIZE,), 2)}, ["`sign`", "got 2 at [0]"]),
        ({"beta": -1}, ["`beta`", "above 0", "-1"]),
        (
            {"log_probs": changed(random_pairs(), ref_chosen=None, ref_rejected=None)},
            ["`ref_chosen`", "got None"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_of_modpo(wrong, fragments):
    pairs = {"log_probs": random_pairs(), "sign": random_signs()[:, 0]}
    good = {"margins": random_margins(), "weights": WEIGHTS, "objective": 0, "beta": 0.1}
    refused(fragments, modpo_loss, **(pairs | good | wrong))
