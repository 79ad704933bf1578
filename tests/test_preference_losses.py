"""Preference losses: their values, their gradients, what is left out of them, what is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from raco_optim.alignment import (
    PairLogProbs,
    kto_unpaired_loss,
    preference_losses,
    reward_margins,
)
from raco_optim.alignment.losses import LOSSES, pair_losses
from tests.preference_pairs import changed, gradients, random_pairs, random_signs

DOUBLE = torch.float64
FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")
NOT_ADDITIVE = {"kto"}  # its point of reference is estimated from the pairs of a call


def rows(log_probs):
    return zip(*(getattr(log_probs, name).tolist() for name in FIELDS), strict=True)


# --- Values --------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def expected_losses(
    log_probs, signs, loss, beta, epsilon=0.0, gamma=0.0, per_token=False, free=False
):
    """Pair by pair, as the papers write it: with a winner and a loser. None without a label."""
    ratios = []
    for (c, r, ref_c, ref_r, n_c, n_r), s in zip(rows(log_probs), signs.tolist(), strict=True):
        ratio_c = (c - (0 if free else ref_c)) / (n_c if per_token else 1)
        ratio_r = (r - (0 if free else ref_r)) / (n_r if per_token else 1)
        ratios.append({1: (ratio_c, ratio_r), -1: (ratio_r, ratio_c), 0: None}[s])
    known = [pair for pair in ratios if pair is not None]
    z_winner, z_loser = (max(0.0, sum(side) / len(side)) for side in zip(*known, strict=True))

    def one(winner, loser):
        if loss == "ipo":
            return (winner - loser - 1 / (2 * beta)) ** 2
        if loss == "kto":
            desirable = 1 - sigmoid(beta * (winner - z_loser))
            undesirable = 1 - sigmoid(beta * (z_winner - loser))
            return (desirable + undesirable) / 2
        if loss == "sft":
            return -winner
        if loss == "hinge":
            return max(0.0, 1 - beta * (winner - loser))
        if loss == "bco":
            return minus_log_sigmoid(beta * winner) + minus_log_sigmoid(-beta * loser)
        if loss == "apo_zero":
            return 1 - sigmoid(beta * winner) + sigmoid(beta * loser)
        if loss == "apo_down":
            return sigmoid(beta * winner) + 1 - sigmoid(beta * (winner - loser))
        x = beta * (winner - loser) - gamma
        if loss == "robust":
            noisy = (1 - epsilon) * minus_log_sigmoid(x) - epsilon * minus_log_sigmoid(-x)
            return noisy / (1 - 2 * epsilon)
        return (1 - epsilon) * minus_log_sigmoid(x) + epsilon * minus_log_sigmoid(-x)

    return [None if pair is None else one(*pair) for pair in ratios]


# Arguments -> what the oracle is told.
FORMS = {
    "dpo": ({"loss": "dpo"}, {}),
    "dpo, beta 1": ({"loss": "dpo", "beta": 1.0}, {}),
    "dpo, smoothed": ({"loss": "dpo", "label_smoothing": 0.1}, {"epsilon": 0.1}),
    "dpo, per token": ({"loss": "dpo", "length_normalized": True}, {"per_token": True}),
    "dpo, free": ({"loss": "dpo", "reference_free": True}, {"free": True}),
    "ipo": ({"loss": "ipo"}, {"per_token": True}),
    "ipo, summed": ({"loss": "ipo", "length_normalized": False}, {}),
    "ipo, free": ({"loss": "ipo", "reference_free": True}, {"per_token": True, "free": True}),
    "simpo": ({"loss": "simpo", "beta": 2.0}, {"per_token": True, "free": True}),
    "simpo, margin": (
        {"loss": "simpo", "beta": 2.0, "gamma": 0.7, "label_smoothing": 0.2},
        {"per_token": True, "free": True, "gamma": 0.7, "epsilon": 0.2},
    ),
    "simpo, summed": ({"loss": "simpo", "length_normalized": False}, {"free": True}),
    "kto": ({"loss": "kto"}, {}),
    "kto, per token": ({"loss": "kto", "length_normalized": True}, {"per_token": True}),
    "hinge": ({"loss": "hinge"}, {}),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, {"epsilon": 0.1}),
    "apo_zero": ({"loss": "apo_zero"}, {}),
    "apo_zero, free": ({"loss": "apo_zero", "reference_free": True}, {"free": True}),
    "apo_down": ({"loss": "apo_down"}, {}),
    "bco": ({"loss": "bco"}, {}),
    "sft": ({"loss": "sft"}, {"per_token": True, "free": True}),
    "kto, free": ({"loss": "kto", "reference_free": True}, {"free": True}),
}
form = pytest.mark.parametrize("name", FORMS)
every_loss = pytest.mark.parametrize("loss", LOSSES)


@form
def test_value_of_every_pair_and_of_the_mean(name):
    kwargs, told = FORMS[name]
    log_probs, signs = random_pairs(), random_signs()
    means = preference_losses(log_probs, signs, **kwargs)
    for sign, mean in zip(signs.T, means, strict=True):
        expected = expected_losses(
            log_probs, sign, **({"loss": kwargs["loss"], "beta": kwargs.get("beta", 0.1)} | told)
        )
        each = pair_losses(log_probs, sign, **kwargs).tolist()
        assert each == pytest.approx([0.0 if x is None else x for x in expected], rel=1e-12)
        labelled = [x for x in expected if x is not None]
        assert mean.item() == pytest.approx(sum(labelled) / len(labelled), rel=1e-12)


PINNED = [  # log-ratios 3 and 1, lengths 2 and 4, beta = ln 3 unless said
    ({"loss": "dpo", "beta": math.log(3) / 2}, 1, math.log(4 / 3)),
    ({"loss": "dpo", "beta": math.log(3) / 2}, -1, math.log(4)),
    (
        {"loss": "dpo", "beta": math.log(3) / 2, "label_smoothing": 0.25},
        1,
        math.log(4) - 0.75 * math.log(3),
    ),
    ({"loss": "ipo", "beta": 0.5}, 1, (1.5 - 0.25 - 1) ** 2),
    ({"loss": "ipo", "beta": 0.5}, -1, (-1.5 + 0.25 - 1) ** 2),
    ({"loss": "ipo", "beta": 0.25, "length_normalized": False}, 1, 0.0),
    ({"loss": "kto", "beta": math.log(3) / 2}, 1, (1 / 4 + 1 / 4) / 2),
    ({"loss": "kto", "beta": math.log(3) / 2}, -1, (3 / 4 + 3 / 4) / 2),
]


@pytest.mark.parametrize(("kwargs", "sign", "expected"), PINNED)
def test_pinned_values(kwargs, sign, expected):
    log_probs = PairLogProbs(*(torch.tensor([x], dtype=DOUBLE) for x in (-7, -9, -10, -10, 2, 4)))
    [loss] = preference_losses(log_probs, torch.tensor([[sign]]), **kwargs)
    assert loss.item() == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_pinned_value_of_simpo():
    """Averages -3.5 and -2.25; the margin stands outside beta."""
    log_probs = PairLogProbs(*(torch.tensor([x], dtype=DOUBLE) for x in (-7, -9, 0, 0, 2, 4)))
    [loss] = preference_losses(log_probs, torch.tensor([[-1]]), loss="simpo", beta=2.0, gamma=2.5)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-14)


@pytest.mark.parametrize("name", ["chosen_tokens", "rejected_tokens"])
def test_an_empty_completion_counts_one_token(name):
    losses = [
        pair_losses(
            changed(random_pairs(1), **{name: torch.tensor([length])}),
            torch.tensor([1]),
            loss="simpo",
        )
        for length in (0, 1)
    ]
    assert torch.equal(*losses)
    assert losses[0].isfinite().all()


# --- TRL -----------------------------------------------------------------------------------------


class Accelerator:
    """One process, on the CPU."""

    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather


class Model:
    """A language model's interface around log-probabilities per token that are given."""

    training = True

    def __init__(self, log_probs):
        self.log_probs = log_probs

    def __call__(self, **inputs):
        like = self.log_probs.detach()
        return SimpleNamespace(
            log_probs=self.log_probs, entropy=like, mean_logits=like, is_top1=like > 0
        )


class Metrics(dict):
    def __missing__(self, key):
        return self.setdefault(key, [])


def bare(trainer, **attributes):
    """A trainer with no more than what its loss reads."""
    bare = trainer.__new__(trainer)
    bare.accelerator = Accelerator()
    bare._metrics = {"train": Metrics()}
    bare._total_train_tokens, bare._tp_size = 0, 1
    bare.aux_loss_enabled = False
    bare.precompute_ref_logps = True
    vars(bare).update(attributes)
    return bare


def tokens_of_a_batch(size, length=9, prompt=2):
    """Log-probabilities per token with 0 where there is no completion, and the mask."""
    lengths = 1 + torch.arange(size) % (length - prompt)
    position = torch.arange(length)
    mask = ((position >= prompt) & (position < prompt + lengths[:, None])).long()
    log_probs = torch.randn(size, length - 1, dtype=DOUBLE) * mask[:, 1:]
    return log_probs.requires_grad_(), mask


@pytest.mark.parametrize(
    ("loss_type", "kwargs"),
    [
        ("sigmoid", {"loss": "dpo"}),
        ("sigmoid_norm", {"loss": "dpo", "length_normalized": True}),
        ("ipo", {"loss": "ipo"}),
    ],
)
def test_one_objective_is_trl_s_loss_and_gradient(loss_type, kwargs):
    trl = pytest.importorskip("trl")
    log_probs, mask = tokens_of_a_batch(10)
    reference = torch.randn(2, 5, dtype=DOUBLE)
    model = Model(log_probs)
    trainer = bare(
        trl.DPOTrainer,
        model=model,
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        use_weighting=False,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    theirs = trainer._compute_loss(model, inputs, return_outputs=False)

    pairs = PairLogProbs(*log_probs.sum(1).chunk(2), *reference, *mask.sum(1).chunk(2))
    [ours] = preference_losses(pairs, torch.ones(5, 1), beta=0.3, **kwargs)
    assert torch.equal(ours, theirs)
    assert torch.equal(*(torch.autograd.grad(x, log_probs)[0] for x in (ours, theirs)))
    # What TRL logs: share of pairs in order, and mean margin.
    if loss_type == "sigmoid":
        margins = reward_margins(pairs, torch.ones(5), beta=0.3)
        metrics = trainer._metrics["train"]
        assert [margins.mean().item()] == pytest.approx(metrics["rewards/margins"], rel=1e-12)
        assert [(margins > 0).double().mean().item()] == pytest.approx(
            metrics["rewards/accuracies"]
        )


@pytest.mark.parametrize(
    ("loss", "epsilon"), [("simpo", 0.0), ("simpo", 0.1), ("dpo", 0.0), ("dpo", 0.1), ("ipo", 0.0)]
)
def test_one_objective_without_reference_is_trl_s_loss(loss, epsilon):
    """CPO's trainer has SimPO, and the label smoothing that DPO's no longer has."""
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    log_probs, mask = tokens_of_a_batch(10)
    summed, lengths = log_probs.sum(1), mask.sum(1)
    given = summed if loss == "dpo" else summed / lengths
    trainer = bare(
        CPOTrainer,
        alpha=0.0,
        beta=0.3,
        simpo_gamma=0.5,
        label_smoothing=epsilon,
        loss_type="sigmoid" if loss == "dpo" else loss,
    )
    theirs = trainer.cpo_loss(*given.chunk(2))[0].mean()
    pairs = PairLogProbs(*summed.chunk(2), None, None, *lengths.chunk(2))
    [ours] = preference_losses(
        pairs,
        torch.ones(5, 1),
        loss=loss,
        beta=0.3,
        label_smoothing=epsilon,
        gamma=0.5 if loss == "simpo" else 0.0,
        reference_free=True,
    )
    ours_, theirs_ = (
        torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (ours, theirs)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    torch.testing.assert_close(ours_, theirs_, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_unpaired_kto_is_trl_s_loss_and_gradient(shift):
    trl = pytest.importorskip("trl")
    log_probs, mask = tokens_of_a_batch(7)
    label = torch.tensor([True, False, True, True, False, False, True])
    reference, kl_policy, kl_reference = torch.randn(3, 7, dtype=DOUBLE)
    kl_policy = kl_policy + 1 + shift  # so that the estimate is above 0, or below it
    trainer = bare(
        trl.KTOTrainer,
        model=Model(log_probs),
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: kl_policy,
        loss_type="kto",
        beta=0.3,
        desirable_weight=1.33,
        undesirable_weight=0.7,
    )
    inputs = {
        "input_ids": torch.zeros_like(mask),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "label": label,
        "ref_logps": reference,
        "ref_KL_logps": kl_reference,
    }
    theirs = trainer._compute_loss(trainer.model, inputs, return_outputs=False)
    ours = kto_unpaired_loss(
        log_probs.sum(1),
        reference,
        torch.where(label, 1, -1),
        (kl_policy - kl_reference).mean(),
        beta=0.3,
        desirable_weight=1.33,
        undesirable_weight=0.7,
    )
    ours_, theirs_ = (torch.autograd.grad(x, log_probs)[0] for x in (ours, theirs))
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    torch.testing.assert_close(ours_, theirs_, rtol=1e-13, atol=1e-16)


# --- Gradients -----------------------------------------------------------------------------------


@form
def test_gradient_by_finite_differences(name):
    kwargs, _ = FORMS[name]
    fixed, sign = random_pairs(5), torch.tensor([1, -1, 0, 1, -1])
    if kwargs["loss"] == "kto":
        # z is a constant for autograd, but not for a difference quotient: keep it clamped.
        fixed = changed(fixed, ref_chosen=torch.zeros(5), ref_rejected=torch.zeros(5))

    def losses(chosen, rejected):
        return pair_losses(changed(fixed, chosen=chosen, rejected=rejected), sign, **kwargs)

    assert torch.autograd.gradcheck(losses, (fixed.chosen, fixed.rejected))


def test_gradient_of_kto_takes_its_point_of_reference_for_constant():
    log_probs = random_pairs(6)
    log_probs = changed(log_probs, ref_chosen=log_probs.ref_chosen - 50)  # z of the winners > 0
    [loss] = preference_losses(log_probs, torch.ones(6, 1), loss="kto", beta=0.1)
    winner = log_probs.chosen.detach() - log_probs.ref_chosen
    loser = log_probs.rejected.detach() - log_probs.ref_rejected
    z_winner, z_loser = winner.mean().clamp(min=0), loser.mean().clamp(min=0)
    assert z_winner > 10

    def slope(x):
        return [0.1 * sigmoid(0.1 * t) * sigmoid(-0.1 * t) / 12 for t in x.tolist()]

    by_chosen, by_rejected = gradients(loss, log_probs)
    assert (-by_chosen).tolist() == pytest.approx(slope(winner - z_loser), rel=1e-12)
    assert by_rejected.tolist() == pytest.approx(slope(loser - z_winner), rel=1e-12)


@every_loss
def test_the_names_chosen_and_rejected_do_not_matter(loss):
    """Swapped, with the signs turned, every bit of loss and gradient is as before."""
    log_probs, signs = random_pairs(), random_signs()
    p = log_probs
    swapped = PairLogProbs(
        p.rejected, p.chosen, p.ref_rejected, p.ref_chosen, p.rejected_tokens, p.chosen_tokens
    )
    before = preference_losses(log_probs, signs, loss=loss)
    after = preference_losses(swapped, -signs, loss=loss)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a, b)
        for x, y in zip(gradients(a, log_probs), gradients(b, log_probs), strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("beta", [1e-3, 1e-6])
def test_dpo_of_a_small_beta_is_a_constant_minus_a_mean_margin(beta):
    log_probs, sign = random_pairs(), random_signs(m=1)
    [loss] = preference_losses(log_probs, sign, beta=beta)
    n = int(sign.count_nonzero())
    for gradient, direction in zip(gradients(loss, log_probs), (-1, 1), strict=True):
        expected = direction * beta / 2 * sign[:, 0] / n
        torch.testing.assert_close(gradient, expected.to(DOUBLE), rtol=100 * beta, atol=0)
    margin = reward_margins(log_probs, sign[:, 0], beta=beta).mean()
    assert loss.item() == pytest.approx(math.log(2) - margin.item() / 2, abs=1e3 * beta**2)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("margin", [1e4, -1e4])
@form
def test_extreme_margins_stay_finite(name, margin, dtype):
    kwargs, _ = FORMS[name]
    base = random_pairs(3, dtype=dtype)
    log_probs = changed(base, chosen=(base.chosen.detach() + margin).requires_grad_())
    [loss] = preference_losses(log_probs, torch.ones(3, 1), **kwargs)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in gradients(loss, log_probs))
    if kwargs["loss"] == "dpo" and margin < 0 and len(kwargs) == 1:
        assert loss.item() == pytest.approx(1e3, rel=1e-2)


def test_label_smoothing_of_ipo_is_another_beta():
    """Why it is refused: the mixture of the loss with its opposite has the gradient that follows.

    (1 - e) (x - t)^2 + e (-x - t)^2 = (x - (1 - 2 e) t)^2 + constant, with t = 1 / (2 beta).
    """
    log_probs, sign = random_pairs(), random_signs()[:, 0]
    plain, flipped = (pair_losses(log_probs, s, loss="ipo", beta=0.2) for s in (sign, -sign))
    other = pair_losses(log_probs, sign, loss="ipo", beta=0.2 / (1 - 2 * 0.1))
    mixed = gradients((0.9 * plain + 0.1 * flipped).sum(), log_probs)
    for a, b in zip(mixed, gradients(other.sum(), log_probs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# --- What has no label ---------------------------------------------------------------------------


def with_unlabelled(log_probs, signs, value, seed=0):
    """The same pairs in the same order, with others among them that nobody labels."""
    rng = np.random.default_rng(seed)
    size = len(signs)
    at = torch.from_numpy(np.sort(rng.permutation(size + 7)[:size]))
    more = {}
    for name in FIELDS:
        x = getattr(log_probs, name)
        odd = x.new_full((size + 7,), value if x.is_floating_point() else 3)
        more[name] = odd.index_copy(0, at, x.detach())
    for name in ("chosen", "rejected"):
        more[name].requires_grad_()
    return (
        PairLogProbs(**more),
        signs.new_zeros(size + 7, signs.shape[1]).index_copy(0, at, signs),
        at,
    )


@pytest.mark.parametrize("value", [-20.0, math.nan, -math.inf], ids=str)
@form
def test_unlabelled_pairs_change_no_bit(name, value):
    kwargs, _ = FORMS[name]
    log_probs, signs = random_pairs(33, dtype=torch.float32), random_signs(33)
    signs = signs[signs.all(dim=1)]
    log_probs = log_probs.select(torch.arange(len(signs)))
    log_probs = changed(
        log_probs,
        chosen=log_probs.chosen.detach().requires_grad_(),
        rejected=log_probs.rejected.detach().requires_grad_(),
    )
    more, more_signs, at = with_unlabelled(log_probs, signs, value)
    before = preference_losses(log_probs, signs, **kwargs)
    after = preference_losses(more, more_signs, **kwargs)
    for k, (a, b) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(a, b)
        assert torch.equal(
            reward_margins(log_probs, signs[:, k], loss=kwargs["loss"]),
            reward_margins(more, more_signs[:, k], loss=kwargs["loss"]),
        )
        each = pair_losses(more, more_signs[:, k], **kwargs)
        assert torch.equal(each[at], pair_losses(log_probs, signs[:, k], **kwargs))
        assert torch.equal(each[more_signs[:, k] == 0], torch.zeros(7))
        for x, y in zip(gradients(a, log_probs), gradients(b, more), strict=True):
            assert torch.equal(x, y[at])
            assert torch.equal(y[more_signs[:, k] == 0], torch.zeros(7))
        assert all(g.isfinite().all() for g in gradients(each.sum(), more))


@form
def test_one_objective_s_labels_do_not_touch_another_s(name):
    kwargs, _ = FORMS[name]
    log_probs, signs = random_pairs(), random_signs()
    together = preference_losses(log_probs, signs, **kwargs)
    for k, loss in enumerate(together):
        assert torch.equal(loss, preference_losses(log_probs, signs[:, k : k + 1], **kwargs)[0])


@every_loss
def test_an_objective_without_a_label_has_no_loss(loss):
    log_probs = random_pairs(3)
    signs = torch.tensor([[0, 1], [0, 0], [0, -1]])
    nothing, something = preference_losses(log_probs, signs, loss=loss, counts=[5, 5])
    assert nothing is None
    assert something is not None
    assert torch.equal(pair_losses(log_probs, signs[:, 0], loss=loss), torch.zeros(3, dtype=DOUBLE))
    assert reward_margins(log_probs, signs[:, 0], loss=loss).shape == (0,)
    empty = log_probs.select(torch.tensor([], dtype=torch.int64))
    assert preference_losses(empty, signs[:0], loss=loss) == [None, None]


# --- Soft labels and weights ---------------------------------------------------------------------


def random_soft_labels(size=12, m=3):
    rng = np.random.default_rng(1)
    return random_signs(size, m) * torch.from_numpy(rng.uniform(0.05, 1, (size, m)))


@form
def test_a_soft_label_is_the_mean_over_what_it_may_be(name):
    """From the losses of the two hard labels, apart from KTO's point of reference."""
    kwargs, _ = FORMS[name]
    log_probs, labels = random_pairs(), random_soft_labels()
    if kwargs["loss"] == "kto":  # no z is above 0
        log_probs = changed(log_probs, ref_chosen=log_probs.chosen.detach() + 1)
        log_probs = changed(log_probs, ref_rejected=log_probs.rejected.detach() + 1)
        kwargs = kwargs | {"reference_free": False}
    ones = torch.ones(len(labels), dtype=torch.int64)
    first, second = (pair_losses(log_probs, sign, **kwargs) for sign in (ones, -ones))
    for label, loss in zip(labels.T, preference_losses(log_probs, labels, **kwargs), strict=True):
        known = label != 0
        expected = ((1 + label) / 2 * first + (1 - label) / 2 * second)[known].mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@form
def test_hard_labels_beside_a_soft_one_keep_every_bit(name):
    kwargs, _ = FORMS[name]
    if kwargs["loss"] == "kto":
        return  # its point of reference is that of all pairs
    log_probs, sign = random_pairs(), random_signs(m=1)[:, 0]
    hard = pair_losses(log_probs, sign, **kwargs)
    soft = sign.double()
    soft[0] = 0.3
    assert torch.equal(pair_losses(log_probs, soft, **kwargs)[1:], hard[1:])
    assert torch.equal(pair_losses(log_probs, sign.double(), **kwargs), hard)


def test_kto_of_soft_labels_takes_its_point_of_reference_over_them():
    log_probs, label = random_pairs(), random_soft_labels(m=1)[:, 0]
    p = log_probs
    first, second = (p.chosen - p.ref_chosen).tolist(), (p.rejected - p.ref_rejected).tolist()
    rows = [(a, b, (1 + y) / 2) for a, b, y in zip(first, second, label.tolist(), strict=True) if y]
    z_winner, z_loser = (
        max(0.0, sum(s * x + (1 - s) * y for x, y, s in side) / len(side))
        for side in (rows, [(b, a, s) for a, b, s in rows])
    )

    def one(winner, loser):
        good, bad = sigmoid(0.1 * (winner - z_loser)), sigmoid(0.1 * (z_winner - loser))
        return (2 - good - bad) / 2

    expected = [s * one(a, b) + (1 - s) * one(b, a) for a, b, s in rows]
    [loss] = preference_losses(log_probs, label[:, None], loss="kto")
    assert loss.item() == pytest.approx(sum(expected) / len(expected), rel=1e-12)


@form
def test_a_weight_is_a_number_of_copies(name):
    kwargs, _ = FORMS[name]
    log_probs, labels = random_pairs(), random_soft_labels()
    times = torch.from_numpy(np.random.default_rng(2).integers(0, 4, labels.shape))
    weighted = preference_losses(log_probs, labels, pair_weights=times.double(), **kwargs)
    halved = preference_losses(log_probs, labels, pair_weights=times / 2, **kwargs)
    for k in range(labels.shape[1]):
        index = torch.arange(len(labels)).repeat_interleave(times[:, k])
        [copied] = preference_losses(log_probs.select(index), labels[index, k : k + 1], **kwargs)
        torch.testing.assert_close(weighted[k], copied, rtol=1e-12, atol=0)
        torch.testing.assert_close(halved[k], copied, rtol=1e-12, atol=0)


@every_loss
@pytest.mark.parametrize("counts", [None, [9.0, 8.0, 7.0]])
def test_weights_of_one_change_no_bit(loss, counts):
    log_probs, signs = random_pairs(), random_signs()
    plain = preference_losses(log_probs, signs, loss=loss, counts=counts)
    ones = torch.ones(signs.shape)
    for a, b in zip(
        plain,
        preference_losses(log_probs, signs, pair_weights=ones, loss=loss, counts=counts),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_pair_of_weight_zero_may_be_nan():
    log_probs, signs = random_pairs(3), torch.ones(3, 1)
    broken = changed(log_probs, chosen=torch.tensor([math.nan, -1.0, -2.0], dtype=DOUBLE))
    [loss] = preference_losses(broken, signs, pair_weights=torch.tensor([[0.0], [1.0], [1.0]]))
    assert loss.isfinite()


def test_robust_undoes_what_wrong_labels_do():
    """The mean over labels that are wrong with probability epsilon is the DPO loss."""
    log_probs, sign = random_pairs(), random_signs(m=1)
    noisy = (1 - 2 * 0.2) * sign.double()  # what a fifth of wrong labels makes of them
    [robust] = preference_losses(log_probs, noisy, loss="robust", label_smoothing=0.2)
    [clean] = preference_losses(log_probs, sign)
    assert robust.item() == pytest.approx(clean.item(), rel=1e-12)


def test_smoothed_labels_are_soft_labels():
    log_probs, sign = random_pairs(), random_signs(m=1)
    [soft] = preference_losses(log_probs, 0.6 * sign.double())
    [smoothed] = preference_losses(log_probs, sign, label_smoothing=0.2)
    assert soft.item() == pytest.approx(smoothed.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("weights", "fragments"),
    [
        (torch.ones(3, 2), ["[B, m] with B = 4", "[3, 2]"]),
        (-torch.ones(4, 2), ["not negative"]),
        (torch.full((4, 2), math.inf), ["finite"]),
        (torch.full((4, 2), math.nan), ["finite"]),
    ],
)
def test_bad_weights(weights, fragments):
    refused(["`pair_weights`", *fragments], preference_losses, GOOD, LABELS, pair_weights=weights)


# --- Micro-batches -------------------------------------------------------------------------------


def added_up(log_probs, signs, sizes, counts, **kwargs):
    sums = [0.0] * signs.shape[1]
    for index in torch.arange(len(signs)).split(sizes):
        parts = preference_losses(log_probs.select(index), signs[index], counts=counts, **kwargs)
        sums = [a if b is None else a + b for a, b in zip(sums, parts, strict=True)]
    return sums


@pytest.mark.parametrize("as_tensor", [True, False])
@pytest.mark.parametrize("name", [n for n in FORMS if FORMS[n][0]["loss"] not in NOT_ADDITIVE])
def test_micro_batches_add_up_to_the_batch(name, as_tensor):
    kwargs, _ = FORMS[name]
    log_probs, signs = random_pairs(23), random_signs(23)
    signs[:4, 1] = 0  # a micro-batch without a label
    counts = signs.count_nonzero(dim=0)
    sums = added_up(
        log_probs, signs, [4, 1, 11, 7], counts if as_tensor else counts.tolist(), **kwargs
    )
    for whole, total in zip(preference_losses(log_probs, signs, **kwargs), sums, strict=True):
        torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
        for a, b in zip(gradients(total, log_probs), gradients(whole, log_probs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def test_micro_batches_of_kto_do_not_as_documented():
    log_probs, signs = random_pairs(23), random_signs(23)
    counts = signs.count_nonzero(dim=0)
    sums = added_up(log_probs, signs, [4, 1, 11, 7], counts, loss="kto")
    for whole, total in zip(preference_losses(log_probs, signs, loss="kto"), sums, strict=True):
        assert total.item() == pytest.approx(whole.item(), rel=0.2)
        assert total.item() != pytest.approx(whole.item(), rel=1e-6)


# --- Margins -------------------------------------------------------------------------------------


@form
def test_margins_are_those_that_the_loss_compares(name):
    kwargs, told = FORMS[name]
    log_probs, sign = random_pairs(), random_signs()[:, 0]
    switches = {k: v for k, v in kwargs.items() if k not in ("gamma", "label_smoothing")}
    margins = reward_margins(log_probs, sign, **switches)
    per_token, free = told.get("per_token", False), told.get("free", False)
    expected = []
    for (c, r, ref_c, ref_r, n_c, n_r), s in zip(rows(log_probs), sign.tolist(), strict=True):
        reward_c = (c - (not free) * ref_c) / (n_c if per_token else 1)
        reward_r = (r - (not free) * ref_r) / (n_r if per_token else 1)
        if s:
            expected.append(kwargs.get("beta", 0.1) * s * (reward_c - reward_r))
    assert margins.tolist() == pytest.approx(expected, rel=1e-12)
    assert not margins.requires_grad
    if kwargs["loss"] == "dpo" and "label_smoothing" not in kwargs:
        # Right order: below log 2.
        each = pair_losses(log_probs, sign, **kwargs)[sign != 0]
        assert torch.equal(margins > 0, each < math.log(2))


@pytest.mark.parametrize("length_normalized", [True, False])
@pytest.mark.parametrize("reference_free", [True, False])
def test_rewards_by_their_definition(length_normalized, reference_free):
    log_probs = random_pairs()
    rewards = log_probs.rewards(
        beta=0.2, length_normalized=length_normalized, reference_free=reference_free
    )
    for reward, side in zip(rewards, ("chosen", "rejected"), strict=True):
        ratio = getattr(log_probs, side).detach().numpy().copy()
        if not reference_free:
            ratio -= getattr(log_probs, f"ref_{side}").numpy()
        if length_normalized:
            ratio /= getattr(log_probs, f"{side}_tokens").numpy()
        np.testing.assert_allclose(reward.detach().numpy(), 0.2 * ratio, rtol=1e-14)


# --- Unpaired KTO --------------------------------------------------------------------------------


def test_unpaired_kto_leaves_out_what_has_no_label():
    policy = torch.tensor([-10.0, math.nan, -20.0], dtype=DOUBLE, requires_grad=True)
    reference = torch.tensor([-11.0, -3.0, -19.0], dtype=DOUBLE)
    labels = torch.tensor([1.0, 0.0, -1.0])
    kl = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    loss = kto_unpaired_loss(policy, reference, labels, kl, beta=1.0, undesirable_weight=3.0)
    assert loss.item() == pytest.approx((sigmoid(-0.5) + 3 * sigmoid(-1.5)) / 2, rel=1e-14)
    loss.backward()
    assert policy.grad.tolist() == pytest.approx(
        [-sigmoid(0.5) * sigmoid(-0.5) / 2, 0.0, 3 * sigmoid(1.5) * sigmoid(-1.5) / 2], rel=1e-14
    )
    assert kl.grad is None
    assert kto_unpaired_loss(policy, reference, 0 * labels, kl) is None


# --- Dtypes and devices --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
@pytest.mark.parametrize("of_signs", [torch.int8, torch.int64, torch.float32, DOUBLE])
@every_loss
def test_losses_have_the_dtype_of_the_log_probabilities(loss, of_signs, dtype):
    log_probs, signs = random_pairs(dtype=dtype), random_signs().to(of_signs)
    counts = signs.count_nonzero(dim=0).to(of_signs)
    for given in (None, counts, counts.tolist()):
        losses = preference_losses(log_probs, signs, loss=loss, counts=given)
        assert {x.dtype for x in losses} == {dtype}
    assert pair_losses(log_probs, signs[:, 0], loss=loss).dtype == dtype
    assert reward_margins(log_probs, signs[:, 0], loss=loss).dtype == dtype


@form
def test_with_signs_on_the_host_a_loss_waits_for_no_device(name):
    """On the meta device there are no values: whatever would fetch one raises."""
    kwargs, _ = FORMS[name]
    meta = PairLogProbs(**{k: x.to("meta") for k, x in vars(random_pairs()).items()})
    signs = random_signs()
    for loss in preference_losses(meta, signs, counts=[9, 9, 9], **kwargs):
        assert loss.is_meta
    assert pair_losses(meta, signs[:, 0], **kwargs).is_meta
    assert reward_margins(meta, signs[:, 0], loss=kwargs["loss"]).is_meta
    loss = kto_unpaired_loss(
        meta.chosen, meta.rejected, signs[:, 0], torch.empty((), device="meta")
    )
    assert loss.is_meta
    with pytest.raises((NotImplementedError, RuntimeError)):
        preference_losses(meta, signs.to("meta"), **kwargs)  # so that this test would notice


# --- Bad input -----------------------------------------------------------------------------------

GOOD = random_pairs(4)
LABELS = torch.tensor([[1, -1], [0, 1], [1, 1], [-1, 0]])

BAD_ARGUMENTS = {
    "loss": ({"loss": "exo"}, ["`loss`", "'dpo', 'ipo', 'simpo', 'kto'", "'exo'"]),
    "loss of TRL": ({"loss": "sigmoid"}, ["`loss`", "'sigmoid'"]),
    "beta 0": ({"beta": 0}, ["`beta`", "above 0", "got 0"]),
    "beta < 0": ({"beta": -0.1}, ["`beta`", "above 0", "-0.1"]),
    "beta Inf": ({"beta": math.inf}, ["`beta`", "finite", "inf"]),
    "beta NaN": ({"beta": math.nan}, ["`beta`", "nan"]),
    "beta text": ({"beta": "0.1"}, ["`beta`", "number", "'0.1'"]),
    "beta tensor": ({"beta": torch.tensor(0.1)}, ["`beta`", "number", "tensor"]),
    "smoothing 1/2": ({"label_smoothing": 0.5}, ["`label_smoothing`", "below 0.5", "got 0.5"]),
    "smoothing < 0": ({"label_smoothing": -0.1}, ["`label_smoothing`", "0 or more", "-0.1"]),
    "smoothing NaN": ({"label_smoothing": math.nan}, ["`label_smoothing`", "nan"]),
    "smoothed IPO": (
        {"loss": "ipo", "beta": 0.2, "label_smoothing": 0.1},
        ["`label_smoothing`", "'ipo'", "got 0.1", "beta=0.25"],
    ),
    "smoothed KTO": ({"loss": "kto", "label_smoothing": 0.1}, ["`label_smoothing`", "'kto'"]),
    "gamma < 0": ({"loss": "simpo", "gamma": -1}, ["`gamma`", "0 or more", "-1"]),
    "gamma Inf": ({"loss": "simpo", "gamma": math.inf}, ["`gamma`", "finite", "inf"]),
    "gamma of DPO": ({"gamma": 0.5}, ["`gamma`", "'dpo'", "0.5", "'simpo'"]),
}
BAD_LABELS = {
    "shape": (LABELS[:3], ["[B, m] with B = 4", "[3, 2]"]),
    "one dimension": (LABELS[:, 0], ["[B, m]", "[4]"]),
    "2": (2 * LABELS, ["in [-1, 1]", "got 2 at [0, 0]"]),
    "NaN": (torch.where(LABELS == 0, math.nan, LABELS), ["got nan at [1, 0]"]),
    "bool": (LABELS > 0, ["torch.bool", "-1"]),
    "complex": (LABELS + 0j, ["complex"]),
}


def refused(fragments, call, *args, exception=ValueError, **kwargs):
    with pytest.raises(exception) as caught:
        call(*args, **kwargs)
    assert [f for f in [*fragments, "got"] if f not in str(caught.value)] == []


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments(case):
    kwargs, fragments = BAD_ARGUMENTS[case]
    refused(fragments, preference_losses, GOOD, LABELS, **kwargs)
    refused(fragments, pair_losses, GOOD, LABELS[:, 0], **kwargs)
    if not {"label_smoothing", "gamma"} & kwargs.keys():
        refused(fragments, reward_margins, GOOD, LABELS[:, 0], **kwargs)
    if kwargs.keys() == {"beta"}:
        refused(fragments, GOOD.rewards, **kwargs)
        refused(
            fragments,
            kto_unpaired_loss,
            GOOD.chosen,
            GOOD.rejected,
            LABELS[:, 0],
            torch.tensor(0.0),
            **kwargs,
        )


@pytest.mark.parametrize("case", BAD_LABELS)
def test_bad_signs(case):
    signs, fragments = BAD_LABELS[case]
    refused(["`signs`", *fragments], preference_losses, GOOD, signs)


@every_loss
def test_signs_that_are_no_tensor(loss):
    refused(
        ["`signs`", "list"],
        preference_losses,
        GOOD,
        LABELS.tolist(),
        loss=loss,
        exception=TypeError,
    )
    for function in (pair_losses, reward_margins):
        refused(["`sign`", "None"], function, GOOD, None, loss=loss, exception=TypeError)
        refused(["`sign`", "[B] with B = 4", "[4, 2]"], function, GOOD, LABELS, loss=loss)
        refused(["`sign`", "got 3 at [0]"], function, GOOD, 3 * LABELS[:, 0], loss=loss)


@pytest.mark.parametrize(
    ("counts", "fragments"),
    [
        ([1.0], ["one number per objective, 2", "got 1"]),
        (torch.ones(3), ["[m] with m = 2", "[3]"]),
        (torch.ones(()), ["[m] with m = 2", "[]"]),
    ],
)
def test_bad_counts(counts, fragments):
    refused(["`counts`", *fragments], preference_losses, GOOD, LABELS, counts=counts)


WITHOUT_REFERENCE = changed(GOOD, ref_chosen=None, ref_rejected=None)
WITHOUT_LENGTHS = changed(GOOD, chosen_tokens=None, rejected_tokens=None)


@every_loss
def test_missing_reference(loss):
    if loss in ("simpo", "sft"):
        preference_losses(WITHOUT_REFERENCE, LABELS, loss=loss)
    else:
        fragments = ["`ref_chosen`", "`ref_rejected`", "None", "reference_free=True"]
        refused(fragments, preference_losses, WITHOUT_REFERENCE, LABELS, loss=loss)
        preference_losses(WITHOUT_REFERENCE, LABELS, loss=loss, reference_free=True)


@every_loss
def test_missing_lengths(loss):
    fragments = ["`chosen_tokens`", "`rejected_tokens`", "None", "length_normalized=False"]
    refused(
        fragments, preference_losses, WITHOUT_LENGTHS, LABELS, loss=loss, length_normalized=True
    )
    preference_losses(WITHOUT_LENGTHS, LABELS, loss=loss, length_normalized=False)
    if loss in ("ipo", "simpo", "sft"):
        refused(fragments, preference_losses, WITHOUT_LENGTHS, LABELS, loss=loss)
    else:
        preference_losses(WITHOUT_LENGTHS, LABELS, loss=loss)


@pytest.mark.parametrize("name", FIELDS)
def test_bad_log_probs(name):
    refused([f"`{name}`", "list"], changed, GOOD, **{name: [-1.0] * 4}, exception=TypeError)
    matrix = torch.zeros(4, 1)
    expected = "[B]" if name == "chosen" else "[B] with B = 4"
    refused([f"`{name}`", expected, "[4, 1]"], changed, GOOD, **{name: matrix})
    if name != "chosen":
        refused([f"`{name}`", "B = 4", "[3]"], changed, GOOD, **{name: torch.zeros(3)})
    if not name.endswith("_tokens"):
        whole = torch.zeros(4, dtype=torch.int64)
        refused([f"`{name}`", "floating", "torch.int64"], changed, GOOD, **{name: whole})
    if name in ("chosen", "rejected"):
        refused([f"`{name}`", "NoneType"], changed, GOOD, **{name: None}, exception=TypeError)
    else:
        refused([f"`{name}`", "together", "alone"], changed, GOOD, **{name: None})


@pytest.mark.parametrize(
    ("argument", "value", "exception", "fragments"),
    [
        ("policy", torch.zeros(4, 1), ValueError, ["[N]", "[4, 1]"]),
        ("policy", torch.zeros(4, dtype=torch.int64), ValueError, ["floating"]),
        ("reference", torch.zeros(3), ValueError, ["[N] with N = 4", "[3]"]),
        ("reference", None, TypeError, ["NoneType"]),
        ("labels", torch.tensor([True, False, True, True]), ValueError, ["torch.bool", "-1"]),
        ("labels", torch.zeros(3), ValueError, ["[N] with N = 4", "[3]"]),
        ("labels", torch.full((4,), 2), ValueError, ["got 2 at [0]"]),
        ("kl", torch.zeros(4), ValueError, ["[]", "[4]"]),
        ("kl", 0.0, TypeError, ["float"]),
        ("desirable_weight", -1.0, ValueError, ["0 or more", "-1.0"]),
        ("undesirable_weight", math.nan, ValueError, ["nan"]),
    ],
)
def test_bad_input_of_unpaired_kto(argument, value, exception, fragments):
    good = {
        "policy": torch.zeros(4),
        "reference": torch.zeros(4),
        "labels": torch.ones(4),
        "kl": torch.zeros(()),
    }
    refused(
        [f"`{argument}`", *fragments],
        kto_unpaired_loss,
        **(good | {argument: value}),
        exception=exception,
    )
