"""Preference losses: values, gradients, labels, weights, micro-batches, bad input."""

import math
from types import SimpleNamespace
from unittest import mock

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
from tests.preference_pairs import changed, gradients, random_pairs, random_signs, refused

DOUBLE = torch.float64
FIELDS = ("chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_tokens", "rejected_tokens")


def rows(log_probs):
    return zip(*(getattr(log_probs, name).tolist() for name in FIELDS), strict=True)


# --- Values --------------------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def minus_log_sigmoid(x):
    return math.log1p(math.exp(-x)) if x > 0 else math.log1p(math.exp(x)) - x


def ratios(log_probs, *, per_token=False, free=False):
    """Log-ratios of the chosen and the rejected, pair by pair."""
    return [
        (
            (c - (0 if free else ref_c)) / (n_c if per_token else 1),
            (r - (0 if free else ref_r)) / (n_r if per_token else 1),
        )
        for c, r, ref_c, ref_r, n_c, n_r in rows(log_probs)
    ]


def expected_losses(log_probs, labels, loss, beta, *, epsilon=0.0, gamma=0.0, **form):
    """Pair by pair, as in the papers, with a winner and a loser; None without a label.

    An uncertain label y stands for +1 with probability (1 + y) / 2: both are weighted.
    """
    pairs = [
        (first, second, (1 + y) / 2) if y else None
        for (first, second), y in zip(ratios(log_probs, **form), labels.tolist(), strict=True)
    ]
    known = [pair for pair in pairs if pair is not None]
    z_winner = max(0.0, sum(s * a + (1 - s) * b for a, b, s in known) / len(known))
    z_loser = max(0.0, sum(s * b + (1 - s) * a for a, b, s in known) / len(known))

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

    def both(first, second, s):
        return s * one(first, second) + (1 - s) * one(second, first)

    return [None if pair is None else both(*pair) for pair in pairs]


TOKENS, FREE = {"per_token": True}, {"free": True}
# Arguments, and the same for the oracle.
FORMS = {
    "dpo": ({"loss": "dpo"}, {}),
    "dpo, beta 1": ({"loss": "dpo", "beta": 1.0}, {}),
    "dpo, smoothed": ({"loss": "dpo", "label_smoothing": 0.1}, {"epsilon": 0.1}),
    "dpo, per token": ({"loss": "dpo", "length_normalized": True}, TOKENS),
    "dpo, free": ({"loss": "dpo", "reference_free": True}, FREE),
    "ipo": ({"loss": "ipo"}, TOKENS),
    "ipo, summed": ({"loss": "ipo", "length_normalized": False}, {}),
    "ipo, free": ({"loss": "ipo", "reference_free": True}, TOKENS | FREE),
    "simpo": ({"loss": "simpo", "beta": 2.0}, TOKENS | FREE),
    "simpo, margin": (
        {"loss": "simpo", "beta": 2.0, "gamma": 0.7, "label_smoothing": 0.2},
        TOKENS | FREE | {"gamma": 0.7, "epsilon": 0.2},
    ),
    "simpo, summed": ({"loss": "simpo", "length_normalized": False}, FREE),
    "kto": ({"loss": "kto"}, {}),
    "kto, per token": ({"loss": "kto", "length_normalized": True}, TOKENS),
    "kto, free": ({"loss": "kto", "reference_free": True}, FREE),
    "hinge": ({"loss": "hinge"}, {}),
    "robust": ({"loss": "robust", "label_smoothing": 0.1}, {"epsilon": 0.1}),
    "apo_zero": ({"loss": "apo_zero"}, {}),
    "apo_zero, free": ({"loss": "apo_zero", "reference_free": True}, FREE),
    "apo_down": ({"loss": "apo_down"}, {}),
    "bco": ({"loss": "bco"}, {}),
    "sft": ({"loss": "sft"}, TOKENS | FREE),
}
every_form = pytest.mark.parametrize(("kwargs", "told"), FORMS.values(), ids=list(FORMS))
every_loss = pytest.mark.parametrize("loss", LOSSES)


def random_soft_labels(size=12, m=3):
    rng = np.random.default_rng(1)
    return random_signs(size, m) * torch.from_numpy(rng.uniform(0.05, 1, (size, m)))


@every_form
def test_values_of_pairs_and_means(kwargs, told):
    log_probs = random_pairs()
    told = {"loss": kwargs["loss"], "beta": kwargs.get("beta", 0.1)} | told
    for labels in (random_signs(), random_soft_labels()):
        for k, mean in enumerate(preference_losses(log_probs, labels, **kwargs)):
            expected = expected_losses(log_probs, labels[:, k], **told)
            each = pair_losses(log_probs, labels[:, k], **kwargs).tolist()
            assert each == pytest.approx([0.0 if x is None else x for x in expected], rel=1e-12)
            known = [x for x in expected if x is not None]
            assert mean.item() == pytest.approx(sum(known) / len(known), rel=1e-12)
            [alone] = preference_losses(log_probs, labels[:, k : k + 1], **kwargs)
            assert torch.equal(mean, alone), "the labels of other objectives do not matter"


@every_form
def test_hard_labels_beside_a_soft_one_keep_every_bit(kwargs, told):
    if kwargs["loss"] != "kto":  # z depends on all labels
        hard = random_signs(m=1)[:, 0]
        soft = hard.double().index_fill(0, torch.tensor(0), 0.3)
        a, b = (pair_losses(random_pairs(), label, **kwargs)[1:] for label in (hard, soft))
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["chosen_tokens", "rejected_tokens"])
def test_an_empty_completion_counts_one_token(name):
    empty, one = (
        changed(random_pairs(1), **{name: torch.tensor([length])}).log_ratios(
            length_normalized=True
        )
        for length in (0, 1)
    )
    assert empty == one


# --- TRL -----------------------------------------------------------------------------------------


def stand_in(**attributes):
    """A stand-in for a trainer of TRL: the attributes that its loss reads."""
    trainer = mock.MagicMock(aux_loss_enabled=False, _total_train_tokens=0, _tp_size=1)
    trainer.configure_mock(beta=0.3, **attributes)
    trainer.accelerator.device = "cpu"
    trainer.accelerator.gather = trainer.accelerator.gather_for_metrics = lambda x: x
    return trainer


def batch_of_tokens(size, length=9, prompt=2):
    """Log-probabilities per token, 0 outside the completion, and the inputs of TRL."""
    lengths = 1 + torch.arange(size) % (length - prompt)
    position = torch.arange(length)
    mask = ((position >= prompt) & (position < prompt + lengths[:, None])).long()
    log_probs = torch.randn(size, length - 1, dtype=DOUBLE) * mask[:, 1:]
    zeros = torch.zeros_like(mask)
    inputs = {"input_ids": zeros, "attention_mask": zeros + 1, "completion_mask": mask}
    return log_probs.requires_grad_(), inputs


def assert_same(ours, theirs, log_probs):
    """Equal losses and gradients."""
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
    pair = (torch.autograd.grad(x, log_probs, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(*pair, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize(
    ("loss", "epsilon"), [("simpo", 0.0), ("simpo", 0.1), ("dpo", 0.0), ("dpo", 0.1), ("ipo", 0.0)]
)
def test_losses_without_a_reference_are_those_of_trl(loss, epsilon):
    """In its CPO trainer; tests/test_trl_losses.py compares the losses of its DPO trainer."""
    pytest.importorskip("trl")
    from trl.experimental.cpo import CPOTrainer

    log_probs, inputs = batch_of_tokens(10)
    summed, lengths = log_probs.sum(1), inputs["completion_mask"].sum(1)
    given = summed if loss == "dpo" else summed / lengths
    loss_type = "sigmoid" if loss == "dpo" else loss
    trainer = stand_in(alpha=0.0, simpo_gamma=0.5, label_smoothing=epsilon, loss_type=loss_type)
    theirs = CPOTrainer.cpo_loss(trainer, *given.chunk(2))[0].mean()
    pairs = PairLogProbs(*summed.chunk(2), None, None, *lengths.chunk(2))
    form = {"loss": loss, "label_smoothing": epsilon, "gamma": 0.5 if loss == "simpo" else 0.0}
    [ours] = preference_losses(pairs, torch.ones(5, 1), beta=0.3, reference_free=True, **form)
    assert_same(ours, theirs, log_probs)


@pytest.mark.parametrize("shift", [1.0, -4.0])
def test_unpaired_kto_is_the_loss_of_trl(shift):
    """With an estimate of the KL above 0, and with one below."""
    trl = pytest.importorskip("trl")
    log_probs, inputs = batch_of_tokens(7)
    label = torch.tensor([True, False, True, True, False, False, True])
    reference, kl_policy, kl_reference = torch.randn(3, 7, dtype=DOUBLE)
    kl_policy = kl_policy + shift
    inputs |= {"label": label, "ref_logps": reference, "ref_KL_logps": kl_reference}
    like = log_probs.detach()
    output = SimpleNamespace(log_probs=log_probs, entropy=like, mean_logits=like)
    weights = {"desirable_weight": 1.33, "undesirable_weight": 0.7}
    trainer = stand_in(loss_type="kto", **weights)
    trainer._compute_kl_logps.return_value = kl_policy
    theirs = trl.KTOTrainer._compute_loss(trainer, lambda **_: output, inputs, False)
    kl = (kl_policy - kl_reference).mean()
    signs = torch.where(label, 1, -1)
    ours = kto_unpaired_loss(log_probs.sum(1), reference, signs, kl, beta=0.3, **weights)
    assert_same(ours, theirs, log_probs)


# --- Gradients -----------------------------------------------------------------------------------


@every_form
def test_gradient_by_finite_differences(kwargs, told):
    fixed, sign = random_pairs(5), torch.tensor([1, -1, 0, 1, -1])
    if kwargs["loss"] == "kto":
        # z is constant for autograd but not for a difference quotient: keep it clamped.
        fixed = changed(fixed, ref_chosen=torch.zeros(5), ref_rejected=torch.zeros(5))

    def losses(chosen, rejected):
        return pair_losses(changed(fixed, chosen=chosen, rejected=rejected), sign, **kwargs)

    assert torch.autograd.gradcheck(losses, (fixed.chosen, fixed.rejected))


def test_gradient_of_kto_does_not_pass_through_z():
    log_probs = random_pairs(6)
    log_probs = changed(log_probs, ref_chosen=log_probs.ref_chosen - 50)
    [loss] = preference_losses(log_probs, torch.ones(6, 1), loss="kto", beta=0.1)
    winner, loser = torch.tensor(ratios(log_probs), dtype=DOUBLE).T
    z_winner, z_loser = winner.mean().clamp(min=0), loser.mean().clamp(min=0)
    assert z_winner > 10

    def slope(x):
        return [0.1 * sigmoid(0.1 * t) * sigmoid(-0.1 * t) / 12 for t in x.tolist()]

    by_chosen, by_rejected = gradients(loss, log_probs)
    assert (-by_chosen).tolist() == pytest.approx(slope(winner - z_loser), rel=1e-12)
    assert by_rejected.tolist() == pytest.approx(slope(loser - z_winner), rel=1e-12)


@every_loss
def test_swapping_chosen_and_rejected_changes_no_bit(loss):
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


@every_form
def test_extreme_margins(kwargs, told):
    signs = torch.ones(3, 1)
    told = {"loss": kwargs["loss"], "beta": kwargs.get("beta", 0.1)} | told
    for margin in (1e4, -1e4):
        for dtype in (torch.float32, DOUBLE):
            base = random_pairs(3, dtype=dtype)
            log_probs = changed(base, chosen=(base.chosen.detach() + margin).requires_grad_())
            [loss] = preference_losses(log_probs, signs, **kwargs)
            assert all(g.isfinite().all() for g in gradients(loss, log_probs))
            expected = expected_losses(log_probs, signs[:, 0], **told)
            assert loss.item() == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_label_smoothing_of_ipo_is_another_beta():
    """The reason why IPO refuses it.

    (1 - e) (x - t)^2 + e (-x - t)^2 = (x - (1 - 2 e) t)^2 + constant, with t = 1 / (2 beta).
    """
    log_probs, sign = random_pairs(), random_signs()[:, 0]
    plain, flipped = (pair_losses(log_probs, s, loss="ipo", beta=0.2) for s in (sign, -sign))
    other = pair_losses(log_probs, sign, loss="ipo", beta=0.2 / (1 - 2 * 0.1))
    mixed = gradients((0.9 * plain + 0.1 * flipped).sum(), log_probs)
    for a, b in zip(mixed, gradients(other.sum(), log_probs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


# --- Pairs without a label -----------------------------------------------------------------------


def leaves(log_probs):
    names = ("chosen", "rejected")
    return changed(log_probs, **{n: getattr(log_probs, n).detach().requires_grad_() for n in names})


@pytest.mark.parametrize("value", [-20.0, math.nan, -math.inf], ids=str)
@every_form
def test_unlabelled_pairs_change_no_bit(kwargs, told, value):
    log_probs, sign = random_pairs(33, dtype=torch.float32), random_signs(33, m=1)
    odd, at = sign[:, 0] == 0, sign[:, 0].nonzero()[:, 0]
    few = leaves(log_probs.select(at))
    texts = {n: getattr(log_probs, n).masked_fill(odd, value) for n in FIELDS[:4]}
    more = leaves(changed(log_probs, **texts))
    [a], [b] = (preference_losses(p, s, **kwargs) for p, s in ((few, sign[at]), (more, sign)))
    assert torch.equal(a, b)
    for x, y in zip(gradients(a, few), gradients(b, more), strict=True):
        assert torch.equal(x, y[at])
        assert not y[odd].any()
    each = pair_losses(more, sign[:, 0], **kwargs)
    assert torch.equal(each[at], pair_losses(few, sign[at, 0], **kwargs))
    assert not each[odd].any()
    assert all(g.isfinite().all() for g in gradients(each.sum(), more))
    margins = (reward_margins(p, s[:, 0]) for p, s in ((few, sign[at]), (more, sign)))
    assert torch.equal(*margins)
    weights = (sign != 0).float()  # 1 changes no bit, and 0 is as no label
    [b] = preference_losses(more, sign.masked_fill(sign == 0, 1), pair_weights=weights, **kwargs)
    assert torch.equal(a, b)


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


# --- Weights -------------------------------------------------------------------------------------


@every_form
def test_a_weight_is_a_number_of_copies(kwargs, told):
    log_probs, labels = random_pairs(), random_soft_labels()
    times = torch.from_numpy(np.random.default_rng(2).integers(0, 4, labels.shape))
    weighted = preference_losses(log_probs, labels, pair_weights=times.double(), **kwargs)
    halved = preference_losses(log_probs, labels, pair_weights=times / 2, **kwargs)
    for k in range(labels.shape[1]):
        index = torch.arange(len(labels)).repeat_interleave(times[:, k])
        [copied] = preference_losses(log_probs.select(index), labels[index, k : k + 1], **kwargs)
        torch.testing.assert_close(weighted[k], copied, rtol=1e-12, atol=0)
        torch.testing.assert_close(halved[k], copied, rtol=1e-12, atol=0)


def test_robust_undoes_wrong_labels():
    """The mean over labels that are wrong with probability epsilon is the DPO loss."""
    log_probs, sign = random_pairs(), random_signs(m=1)
    noisy = (1 - 2 * 0.2) * sign.double()
    [robust] = preference_losses(log_probs, noisy, loss="robust", label_smoothing=0.2)
    [clean] = preference_losses(log_probs, sign)
    assert robust.item() == pytest.approx(clean.item(), rel=1e-12)


# --- Micro-batches -------------------------------------------------------------------------------


@every_form
def test_micro_batches_add_up_to_the_batch(kwargs, told):
    """Except for KTO, which estimates z in each call."""
    log_probs, signs = random_pairs(23), random_signs(23)
    signs[:4, 1] = 0  # a micro-batch without a label
    tensor = signs.count_nonzero(dim=0)
    for counts in (tensor, tensor.tolist()):
        sums = [0.0] * 3
        for i in torch.arange(23).split([4, 1, 11, 7]):
            parts = preference_losses(log_probs.select(i), signs[i], counts=counts, **kwargs)
            sums = [a if b is None else a + b for a, b in zip(sums, parts, strict=True)]
        for whole, total in zip(preference_losses(log_probs, signs, **kwargs), sums, strict=True):
            if kwargs["loss"] == "kto":
                assert total.item() == pytest.approx(whole.item(), rel=0.2)
                continue
            torch.testing.assert_close(total, whole, rtol=1e-12, atol=0)
            for a, b in zip(gradients(total, log_probs), gradients(whole, log_probs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


# --- Margins and rewards -------------------------------------------------------------------------


@every_form
def test_margins_and_rewards_by_their_definition(kwargs, told):
    log_probs, sign = random_pairs(), random_signs()[:, 0]
    form = {k: told[k] for k in ("per_token", "free") if k in told}
    beta, found = kwargs.get("beta", 0.1), ratios(log_probs, **form)
    switches = {k: v for k, v in kwargs.items() if k not in ("gamma", "label_smoothing")}
    margins = reward_margins(log_probs, sign, **switches)
    expected = [beta * s * (a - b) for (a, b), s in zip(found, sign.tolist(), strict=True) if s]
    assert margins.tolist() == pytest.approx(expected, rel=1e-12)
    assert not margins.requires_grad
    rewards = log_probs.rewards(
        beta=beta, length_normalized="per_token" in form, reference_free="free" in form
    )
    for reward, side in zip(rewards, zip(*found, strict=True), strict=True):
        assert reward.tolist() == pytest.approx([beta * x for x in side], rel=1e-14)


def test_unpaired_kto_leaves_out_unlabelled_completions():
    policy = torch.tensor([-10.0, math.nan, -20.0], dtype=DOUBLE, requires_grad=True)
    reference = torch.tensor([-11.0, -3.0, -19.0], dtype=DOUBLE)
    labels = torch.tensor([1.0, 0.0, -1.0])
    kl = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)
    loss = kto_unpaired_loss(policy, reference, labels, kl, beta=1.0, undesirable_weight=3.0)
    assert loss.item() == pytest.approx((sigmoid(-0.5) + 3 * sigmoid(-1.5)) / 2, rel=1e-14)
    loss.backward()
    slopes = [-sigmoid(0.5) * sigmoid(-0.5) / 2, 0.0, 3 * sigmoid(1.5) * sigmoid(-1.5) / 2]
    assert policy.grad.tolist() == pytest.approx(slopes, rel=1e-14)
    assert kl.grad is None
    assert kto_unpaired_loss(policy, reference, 0 * labels, kl) is None


# --- Dtypes and devices --------------------------------------------------------------------------


@every_loss
def test_losses_have_the_dtype_of_the_log_probabilities(loss):
    dtypes = (torch.float16, torch.bfloat16, torch.float32, DOUBLE)
    for dtype, other in zip(dtypes, (torch.int8, torch.int64, DOUBLE, torch.float32), strict=True):
        log_probs, signs = random_pairs(dtype=dtype), random_signs().to(other)
        counts = signs.count_nonzero(dim=0).to(other)
        for given in (None, counts, counts.tolist()):
            losses = preference_losses(log_probs, signs, loss=loss, counts=given)
            assert {x.dtype for x in losses} == {dtype}
        assert pair_losses(log_probs, signs[:, 0], loss=loss).dtype == dtype
        assert reward_margins(log_probs, signs[:, 0], loss=loss).dtype == dtype


@every_form
def test_with_signs_on_the_host_a_loss_waits_for_no_device(kwargs, told):
    """On the meta device there are no values, so fetching one raises."""
    meta = PairLogProbs(**{k: x.to("meta") for k, x in vars(random_pairs()).items()})
    signs = random_signs()
    assert all(x.is_meta for x in preference_losses(meta, signs, counts=[9, 9, 9], **kwargs))
    assert pair_losses(meta, signs[:, 0], **kwargs).is_meta
    assert reward_margins(meta, signs[:, 0], loss=kwargs["loss"]).is_meta
    kl = torch.empty((), device="meta")
    assert kto_unpaired_loss(meta.chosen, meta.rejected, signs[:, 0], kl).is_meta
    with pytest.raises((NotImplementedError, RuntimeError)):
        preference_losses(meta, signs.to("meta"), **kwargs)  # so this test would notice


# --- Bad input -----------------------------------------------------------------------------------

GOOD = random_pairs(4)
LABELS = torch.tensor([[1, -1], [0, 1], [1, 1], [-1, 0]])
IPO = {"loss": "ipo", "beta": 0.2, "label_smoothing": 0.1}


@pytest.mark.parametrize(
    ("kwargs", "fragments"),
    [
        ({"loss": "exo"}, ["`loss`", "'dpo', 'ipo', 'simpo', 'kto'", "'exo'"]),
        ({"loss": "sigmoid"}, ["`loss`", "'sigmoid'"]),
        ({"beta": 0}, ["`beta`", "above 0", "got 0"]),
        ({"beta": -0.1}, ["`beta`", "above 0", "-0.1"]),
        ({"beta": math.inf}, ["`beta`", "finite", "inf"]),
        ({"beta": math.nan}, ["`beta`", "nan"]),
        ({"beta": "0.1"}, ["`beta`", "number", "'0.1'"]),
        ({"beta": torch.tensor(0.1)}, ["`beta`", "number", "tensor"]),
        ({"label_smoothing": 0.5}, ["`label_smoothing`", "below 0.5", "got 0.5"]),
        ({"label_smoothing": -0.1}, ["`label_smoothing`", "0 or more", "-0.1"]),
        ({"label_smoothing": math.nan}, ["`label_smoothing`", "nan"]),
        (IPO, ["`label_smoothing`", "'ipo'", "got 0.1", "beta=0.25"]),
        ({"loss": "kto", "label_smoothing": 0.1}, ["`label_smoothing`", "'kto'"]),
        ({"loss": "simpo", "gamma": -1}, ["`gamma`", "0 or more", "-1"]),
        ({"loss": "simpo", "gamma": math.inf}, ["`gamma`", "finite", "inf"]),
        ({"gamma": 0.5}, ["`gamma`", "'dpo'", "0.5", "'simpo'"]),
    ],
    ids=str,
)
def test_bad_arguments(kwargs, fragments):
    refused(fragments, preference_losses, GOOD, LABELS, **kwargs)
    refused(fragments, pair_losses, GOOD, LABELS[:, 0], **kwargs)
    if not {"label_smoothing", "gamma"} & kwargs.keys():
        refused(fragments, reward_margins, GOOD, LABELS[:, 0], **kwargs)
    if kwargs.keys() == {"beta"}:
        refused(fragments, GOOD.rewards, **kwargs)
        arguments = (GOOD.chosen, GOOD.rejected, LABELS[:, 0], torch.tensor(0.0))
        refused(fragments, kto_unpaired_loss, *arguments, **kwargs)


@pytest.mark.parametrize(
    ("argument", "value", "fragments"),
    [
        ("signs", LABELS[:3], ["[B, m] with B = 4", "[3, 2]"]),
        ("signs", LABELS[:, 0], ["[B, m]", "[4]"]),
        ("signs", 2 * LABELS, ["in [-1, 1]", "got 2 at [0, 0]"]),
        ("signs", torch.where(LABELS == 0, math.nan, LABELS), ["got nan at [1, 0]"]),
        ("signs", LABELS > 0, ["torch.bool", "-1"]),
        ("signs", LABELS + 0j, ["complex"]),
        ("counts", [1.0], ["one number per objective, 2", "got 1"]),
        ("counts", torch.ones(3), ["[m] with m = 2", "[3]"]),
        ("counts", torch.ones(()), ["[m] with m = 2", "[]"]),
        ("pair_weights", torch.ones(3, 2), ["[B, m] with B = 4", "[3, 2]"]),
        ("pair_weights", -torch.ones(4, 2), ["not negative"]),
        ("pair_weights", torch.full((4, 2), math.inf), ["finite"]),
        ("pair_weights", torch.full((4, 2), math.nan), ["finite"]),
    ],
)
def test_bad_labels_counts_and_weights(argument, value, fragments):
    given = {"signs": LABELS} | {argument: value}
    refused([f"`{argument}`", *fragments], preference_losses, GOOD, **given)


@every_loss
def test_signs_must_be_tensors(loss):
    wrong = {"loss": loss, "exception": TypeError}
    refused(["`signs`", "list"], preference_losses, GOOD, LABELS.tolist(), **wrong)
    for function in (pair_losses, reward_margins):
        refused(["`sign`", "None"], function, GOOD, None, **wrong)
        refused(["`sign`", "[B] with B = 4", "[4, 2]"], function, GOOD, LABELS, loss=loss)
        refused(["`sign`", "got 3 at [0]"], function, GOOD, 3 * LABELS[:, 0], loss=loss)


@pytest.mark.parametrize(
    ("names", "without", "free"),
    [
        (FIELDS[2:4], {"reference_free": True}, {"simpo", "sft"}),
        (FIELDS[4:], {"length_normalized": False}, set(LOSSES) - {"ipo", "simpo", "sft"}),
    ],
    ids=["reference", "lengths"],
)
@every_loss
def test_missing_reference_or_lengths(loss, names, without, free):
    alone = changed(GOOD, **dict.fromkeys(names))
    [(option, value)] = without.items()
    fragments = [f"`{names[0]}`", f"`{names[1]}`", "None", f"{option}={value}"]
    preference_losses(alone, LABELS, loss=loss, **without)
    if loss in free:
        preference_losses(alone, LABELS, loss=loss)
    else:
        refused(fragments, preference_losses, alone, LABELS, loss=loss)
    if option == "length_normalized":
        refused(fragments, preference_losses, alone, LABELS, loss=loss, length_normalized=True)


@pytest.mark.parametrize("name", FIELDS)
def test_bad_log_probs(name):
    def bad(value, *fragments, exception=ValueError):
        refused([f"`{name}`", *fragments], changed, GOOD, **{name: value}, exception=exception)

    bad([-1.0] * 4, "list", exception=TypeError)
    bad(torch.zeros(4, 1), "[B]" if name == "chosen" else "[B] with B = 4", "[4, 1]")
    if name != "chosen":
        bad(torch.zeros(3), "B = 4", "[3]")
    if not name.endswith("_tokens"):
        bad(torch.zeros(4, dtype=torch.int64), "floating", "torch.int64")
    if name in ("chosen", "rejected"):
        bad(None, "NoneType", exception=TypeError)
    else:
        bad(None, "together", "alone")


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
    policy, reference, labels, kl = torch.zeros(4), torch.zeros(4), torch.ones(4), torch.zeros(())
    good = {"policy": policy, "reference": reference, "labels": labels, "kl": kl}
    wrong = good | {argument: value}
    refused([f"`{argument}`", *fragments], kto_unpaired_loss, **wrong, exception=exception)
