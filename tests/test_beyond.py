"""The candidates of `benchmarks.beyond`: their formulas, limit cases and what Theorem 3.1 needs."""

import copy
import json

import numpy as np
import pytest
import torch

from benchmarks.beyond import analysis, fronts, rules, tables, toys
from benchmarks.beyond.__main__ import main
from benchmarks.beyond.candidates import CANDIDATES, COMPARED_NAMES, candidate
from benchmarks.beyond.metric import InnerMetric, inverse_roots
from benchmarks.beyond.rules import RULES
from benchmarks.beyond.study import FOLDER
from benchmarks.harness import filled
from benchmarks.multitask.toys import random_quadratics
from raco_optim import CAGradClip, mixing_coefficients, solve_subproblem
from raco_optim.cli import UsageError

RADII = (0.0, 0.4, 0.8)


def grams(m, count=20):
    """Random Gram matrices, and the degenerate ones."""
    generator = torch.Generator().manual_seed(m)
    for _ in range(count):
        g = torch.randn(m, m + 2, generator=generator, dtype=torch.float64)
        yield (g @ g.T) * torch.rand((), generator=generator).mul(8).exp()
    ones = torch.ones(m, m, dtype=torch.float64)
    yield ones  # duplicates
    signs = torch.tensor([(-1.0) ** i for i in range(m)], dtype=torch.float64)
    yield signs[:, None] * signs  # opposite
    yield torch.zeros(m, m, dtype=torch.float64)
    one = torch.zeros(m, m, dtype=torch.float64)
    one[0, 0] = 1.0  # all gradients but one are zero
    yield one
    yield torch.diag(torch.logspace(-12, 12, m, dtype=torch.float64))


def weights(m):
    w = torch.arange(1, m + 1, dtype=torch.float64)
    return w / w.sum()


@pytest.mark.parametrize("c", RADII)
@pytest.mark.parametrize("m", [1, 2, 3, 6])
@pytest.mark.parametrize("name", RULES)
def test_no_correction_is_longer_than_the_radius(name, m, c):
    """|G0 - g0| <= c |g0|, all that Theorem 3.1 needs of a rule."""
    w = weights(m)
    for H in grams(m):
        alpha = RULES[name](c)(H, w.tolist()).coefficients
        d = alpha - w
        assert alpha.isfinite().all()
        assert (d @ H @ d).clamp(min=0).sqrt() <= c * (w @ H @ w).clamp(min=0).sqrt() * (1 + 1e-7)
        if c == 0:
            torch.testing.assert_close(alpha, w, rtol=0, atol=1e-15)


@pytest.mark.parametrize("m", [2, 3, 6])
@pytest.mark.parametrize("name", RULES)
def test_a_common_scale_of_the_losses_changes_nothing(name, m):
    for H in list(grams(m))[:20]:
        for k in (1e-14, 1e14):
            first = RULES[name](0.4)(H, weights(m).tolist()).coefficients
            second = RULES[name](0.4)(H * k, weights(m).tolist()).coefficients
            torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("c", [0.4, 0.8])
def test_theorem_3_1_bounds_the_smallest_criticality(name, c):
    """Descent with eta = 1 / L on bowls: min |g0|^2 <= 2 L_w / (eta (1 - c^2) T) after T steps."""
    m, steps = 3, 60
    problem = random_quadratics(m, 6, seed=1)
    w, eta = weights(m), 1 / 4  # curvatures are at most 4
    theta = torch.full((6,), 3.0, dtype=torch.float64, requires_grad=True)
    rule = RULES[name](c)
    optimizer = torch.optim.SGD([theta], lr=eta)
    first, least = None, torch.inf
    for step in range(1, steps + 1):
        losses = problem.losses(theta)
        J = torch.stack([torch.autograd.grad(x, theta, retain_graph=True)[0] for x in losses])
        value = float(w @ torch.stack(losses).detach())
        first = value if first is None else first
        least = min(least, float((w @ J).square().sum()))
        assert least <= 2 * first / (eta * (1 - c**2) * step)
        theta.grad = rule(J @ J.T, w.tolist()).coefficients @ J
        optimizer.step()


# Limit cases


@pytest.mark.parametrize("m", [2, 4])
def test_soft_clipping_is_the_hard_one_when_cold_and_the_library_s_at_one(m, monkeypatch):
    w = weights(m).tolist()
    for H in list(grams(m))[:20]:
        for temperature, clip in ((1e-3, "hard"), (1.0, "soft")):
            monkeypatch.setattr(rules, "TEMPERATURE", temperature)
            expected = mixing_coefficients(H, w, 0.4, clip=clip).coefficients
            torch.testing.assert_close(
                rules.Soft(0.4)(H, w).coefficients, expected, rtol=2e-3, atol=1e-9
            )


def test_budgeted_clipping_shortens_the_correction_at_a_vertex_by_the_weight():
    H = torch.tensor([[9.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    w = [0.9, 0.1]
    full = mixing_coefficients(H, w, 0.4)
    assert full.p.tolist() == [0.0, 1.0]
    short = rules.Budget(0.4)(H, w).coefficients - H.new_tensor(w)
    torch.testing.assert_close(short, 0.1 * (full.coefficients - H.new_tensor(w)))


def test_a_smoothed_gram_matrix_that_does_not_change_is_none():
    w = weights(3).tolist()
    H = next(grams(3))
    rule = rules.Smooth(0.4)
    for scale in (1.0, 1e6, 1e-6):  # as a GradScaler changes it
        expected = mixing_coefficients(H, w, 0.4).coefficients
        torch.testing.assert_close(rule(scale * H, w).coefficients, expected, rtol=1e-7, atol=1e-9)


def test_the_smoothed_gram_matrix_is_the_bias_corrected_average():
    w, rule = [0.3, 0.7], rules.Smooth(0.4)
    made = list(grams(2))[:6]
    for t, H in enumerate(made, start=1):
        average = sum(
            0.1 * 0.9 ** (t - s) * G / G.trace() for s, G in enumerate(made[:t], start=1)
        ) / (1 - 0.9**t)
        torch.testing.assert_close(rule(H, w).p, solve_subproblem(average, w, 0.4).p)


def test_without_conflict_the_radius_is_zero_and_between_opposites_all_of_c():
    w = [0.2, 0.8]
    aligned = torch.tensor([[1.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    assert rules.Conflict(0.4)(aligned, w).coefficients.tolist() == w
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    expected = mixing_coefficients(opposite, w, 0.4).coefficients
    torch.testing.assert_close(rules.Conflict(0.4)(opposite, w).coefficients, expected)


@pytest.mark.parametrize("m", [2, 3, 6])
def test_the_projection_hurts_no_loss_where_the_radius_allows_it(m):
    w = weights(m)
    for H in list(grams(m))[:20]:
        alpha = rules.Cone(1.0)(H, w.tolist()).coefficients  # |v| <= |g0|: never cut short
        norms = H.diagonal().sqrt()
        assert (H @ alpha >= -1e-9 * norms * norms.max()).all()
        u = alpha - w
        assert (u >= 0).all()
        # Complementary slackness: only losses that would be hurt are helped, to exactly zero.
        assert ((H @ alpha)[u > 1e-9].abs() <= 1e-7 * norms.max() ** 2).all()
    friendly = torch.eye(m, dtype=torch.float64) + 0.1
    assert rules.Cone(0.4)(friendly, w.tolist()).coefficients.tolist() == w.tolist()


@pytest.mark.parametrize("m", [2, 3, 5])
def test_bounded_p_is_below_its_bound_and_no_grid_point_is_better(m):
    w, c = weights(m), 0.6
    generator = torch.Generator().manual_seed(0)
    for H in list(grams(m))[:10]:
        p = rules.Tail(c)(H, w.tolist()).p
        assert (p <= 2 * w + 1e-9).all() and abs(float(p.sum()) - 1) < 1e-9
        s = c * (w @ H @ w).sqrt()

        def value(x, H=H, s=s):
            return x @ H @ w + s * (x @ H @ x).sqrt()

        others = torch.rand(3000, m, generator=generator, dtype=torch.float64)
        others = others / others.sum(1, keepdim=True)
        others = [x for x in others if (x <= 2 * w).all()]
        assert others
        scale = float(H.diagonal().max())
        assert all(value(p) <= value(x) + 1e-8 * scale for x in others)


def test_bounded_p_is_cagrad_where_the_bound_leaves_everything_free(monkeypatch):
    w = weights(4).tolist()
    monkeypatch.setattr(rules, "MASS", 1 / min(w))
    for H in list(grams(4))[:10]:
        expected = mixing_coefficients(H, w, 0.4, clip="none").coefficients
        torch.testing.assert_close(rules.Tail(0.4)(H, w).coefficients, expected)


# The inner metric


def model_and_losses(seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 3)
    inputs = torch.randn(8, 4)

    def losses():
        return list((model(inputs) - torch.arange(3.0)).square().mean(0))

    return model, losses


INNER = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def step(opt, losses):
    opt.zero_grad()
    opt.backward(losses())
    opt.step()


@pytest.mark.parametrize("inner", INNER)
def test_before_the_first_step_the_metric_is_the_identity(inner):
    found = []
    for make in (InnerMetric, CAGradClip):
        model, losses = model_and_losses()
        opt = make(INNER[inner](model.parameters()), [0.2, 0.3, 0.5], 0.4)
        opt.zero_grad()
        opt.backward(losses())
        found.append(model.weight.grad)
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("inner", INNER)
def test_the_metric_is_that_of_the_step_and_the_trust_region_holds_in_it(inner):
    model, losses = model_and_losses()
    w, c = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), 0.4
    opt = InnerMetric(INNER[inner](model.parameters()), w.tolist(), c)
    for _ in range(3):
        step(opt, losses)
    rows = [torch.autograd.grad(x, model.parameters(), retain_graph=True) for x in losses()]
    state = [opt.optimizer.state[p] for p in model.parameters()]
    if inner == "Adagrad":
        root = [s["sum"].sqrt() + 1e-10 for s in state]
    elif inner == "RMSprop":
        root = [s["square_avg"].sqrt() + 1e-8 for s in state]
    else:
        root = [(s["exp_avg_sq"] / (1 - 0.999**3)).sqrt() + 1e-8 for s in state]
    H = torch.tensor(
        [
            [
                sum(float((a * b / r).double().sum()) for a, b, r in zip(x, y, root, strict=True))
                for y in rows
            ]
            for x in rows
        ],
        dtype=torch.float64,
    )
    opt.zero_grad()
    opt.backward(losses())
    expected = mixing_coefficients(H, w, c).coefficients
    torch.testing.assert_close(opt.report.coefficients, expected, rtol=1e-4, atol=1e-5)
    d = opt.report.coefficients - w
    assert d @ H @ d <= c**2 * (w @ H @ w) * (1 + 1e-3)
    combined = [
        sum(float(a) * g for a, g in zip(expected, column, strict=True))
        for column in zip(*rows, strict=True)
    ]
    for p, g in zip(model.parameters(), combined, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-3, atol=1e-4)


def test_a_resumed_run_goes_on_in_the_same_metric():
    model, losses = model_and_losses()
    opt = InnerMetric(INNER["AdamW"](model.parameters()), [0.2, 0.3, 0.5], 0.4)
    for _ in range(3):
        step(opt, losses)
    again, again_losses = model_and_losses()
    again.load_state_dict(model.state_dict())
    resumed = InnerMetric(INNER["AdamW"](again.parameters()), [0.2, 0.3, 0.5], 0.4)
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))  # which torch does not copy
    for run, found in ((opt, losses), (resumed, again_losses)):
        step(run, found)
    torch.testing.assert_close(again.weight, model.weight, rtol=0, atol=0)


def test_an_optimizer_without_a_diagonal_preconditioner_is_refused():
    model, _ = model_and_losses()
    with pytest.raises(TypeError, match=r"`inner` must be Adam.*got SGD. Use CAGradClip"):
        InnerMetric(torch.optim.SGD(model.parameters(), lr=0.1), [0.5, 0.5], 0.4)
    with pytest.raises(TypeError, match="got LBFGS"):
        inverse_roots(torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("name", CANDIDATES)
def test_every_candidate_trains_with_heads_and_an_absent_loss(name):
    torch.manual_seed(0)
    trunk, head = torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)
    inner = torch.optim.Adam([*trunk.parameters(), *head.parameters()], lr=0.01)
    opt = candidate(name, inner, [0.3, 0.7], 0.4, list(trunk.parameters()))
    inputs = torch.randn(8, 4)
    for _ in range(2):
        first, second = (head(trunk(inputs)) - 1).square().mean(0)
        opt.zero_grad()
        opt.backward([first, second])
        gradients = torch.autograd.grad(
            0.3 * (head(trunk(inputs)) - 1).square().mean(0)[0]
            + 0.7 * (head(trunk(inputs)) - 1).square().mean(0)[1],
            list(head.parameters()),
        )
        for p, g in zip(head.parameters(), gradients, strict=True):
            torch.testing.assert_close(p.grad, g)
        opt.step()
    opt.zero_grad()
    opt.backward([(head(trunk(inputs)) - 1).square().mean(0)[0], None])
    assert opt.report.absent == ("1",)


@pytest.mark.parametrize("name", CANDIDATES)
def test_an_absent_loss_leaves_the_others_their_correction(name):
    """Its step is that of the others with weights w / W, times W, the sum of their weights w."""
    # The first two at a cosine of -0.43, and the first hurt by the weighted sum.
    rows = torch.tensor([[1.0, -2.0, 2.0], [-1.5, 1.5, 0.8], [2.0, 0.5, -3.0]]).double()

    def gradient(w, rows):
        x = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        opt = candidate(name, torch.optim.Adam([x]), w, 0.4)
        opt.backward([None if row is None else row @ x for row in rows])
        return x.grad, opt.report

    found, report = gradient([0.1, 0.4, 0.5], [rows[0], rows[1], None])
    alone, _ = gradient([0.2, 0.8], list(rows[:2]))
    torch.testing.assert_close(found, 0.5 * alone)
    assert (found - rows.new_tensor([0.1, 0.4]) @ rows[:2]).norm() > 0.01  # there is a correction
    assert report.coefficients[2] == 0
    assert report.absent == ("2",)
    assert report.p is None or report.p.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("name", ["smooth", "persistent"])
def test_a_rule_with_a_memory_resumes_as_if_it_had_not_stopped(name, tmp_path):
    rows = torch.randn(8, 2, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def new():
        x = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
        return x, candidate(name, torch.optim.Adam([x], lr=0.1), [0.3, 0.7], 0.8)

    def train(x, opt, rows):
        for row in rows:
            opt.zero_grad()
            opt.backward(list(row @ x))
            opt.step()
        return x.detach().clone()

    x, opt = new()
    middle = train(x, opt, rows[:5])
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    expected = train(x, opt, rows[5:])

    def resumed(forget=False):
        x, opt = new()
        x.data.copy_(middle)
        opt.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        if forget:
            opt.rule.load_state_dict(rules.RULES[name](0.8).state_dict())
        return train(x, opt, rows[5:])

    assert torch.equal(resumed(), expected)
    assert not torch.equal(resumed(forget=True), expected)
    for state in ({}, {"total": 0.0, "mass": 1.0}, {"total": torch.zeros(2, 2), "mass": "one"}):
        with pytest.raises(ValueError, match="`state` of the rule must hold"):
            opt.rule.load_state_dict(state)


@pytest.mark.parametrize("name", ["smooth", "persistent"])
def test_a_step_with_an_absent_loss_leaves_the_memory_as_it_is(name):
    rule, H = rules.RULES[name](0.4), torch.tensor([[4.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    rule(H, [0.3, 0.7])
    before = rule.state_dict()
    assert rule(H[:1, :1], [0.3]).coefficients.tolist() == [0.3 * 1.4]
    after = rule.state_dict()
    assert after["mass"] == before["mass"]
    assert torch.equal(after["total"], before["total"])


def test_lasting_conflict_takes_the_radius_away_and_passing_conflict_does_not():
    w, c = [0.2, 0.8], 0.4
    opposite = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)
    aligned = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert rules.Persistent(c)(opposite, w).coefficients.tolist() == w  # all that is known
    rule = rules.Persistent(c)
    for H in (aligned, opposite, aligned, opposite, aligned):
        found = rule(H, w)
    expected = mixing_coefficients(aligned, w, c).coefficients
    torch.testing.assert_close(found.coefficients, expected)


def test_the_lasting_conflict_is_the_bias_corrected_average():
    w, c = [0.3, 0.7], 0.4
    rule = rules.Persistent(c)
    cosines = [-0.2, -0.6, 0.1, -0.5]
    for t, x in enumerate(cosines, start=1):
        H = torch.tensor([[4.0, 2 * x], [2 * x, 1.0]], dtype=torch.float64)
        average = sum(0.1 * 0.9 ** (t - s) * y for s, y in enumerate(cosines[:t], start=1))
        lasting = max(0.0, -average / (1 - 0.9**t))
        expected = mixing_coefficients(H, w, c * max(0.0, 1 - 2 * lasting)).coefficients
        torch.testing.assert_close(rule(H, w).coefficients, expected)


# Measures, verdicts and the page


def records_of(losses, seeds=3):
    """Records of two tasks by method and weights, of sets; `losses(method, w, seed)` gives both."""
    return [
        {
            "settings": {"set": "toy"},
            "point": {"method": method, "weights": {"a": w, "b": 1 - w}, "seed": seed},
            "evaluation": {
                name: {"loss": loss, "score": 0.5}
                for name, loss in zip("ab", losses(method, w, seed), strict=True)
            },
            "training": {"curve": [[1.0, 1.0], [0.5, 0.5], list(losses(method, w, seed))]},
            "extra": {"constant": [[1.0, 1.0], [0.0, 0.0]]},
        }
        for seed in range(seeds)
        for w in (0.2, 0.5)
        for method in ("linear", "raco", "cone")
    ]


def test_a_method_that_is_better_everywhere_reaches_the_target(monkeypatch):
    monkeypatch.setitem(analysis.REPLICATES, "set", 200)
    shift = {"linear": 0.0, "raco": 0.1, "cone": 0.05}
    found = analysis.of_set(
        records_of(lambda method, w, s: (0.3 + shift[method] + s / 100, 0.4 + shift[method]))
    )["methods"]
    assert found["cone"]["measures"]["deviation"]["value"] == pytest.approx(
        sum(0.05 / (0.31 * w + 0.4 * (1 - w)) for w in (0.2, 0.5)) / 2
    )
    assert found["cone"]["measures"]["distance"]["value"] == pytest.approx(0.05 * 2**0.5)
    assert found["cone"]["reaches"] == {
        "by distance": True,
        "by deviation": True,
        "told worse": False,
    }
    assert found["cone"]["against"]["linear"]["deviation"]["low"] > 0
    assert found["raco"].keys() == {"measures", "against"}


def test_a_method_with_a_smaller_hypervolume_does_not_reach_it_by_deviation(monkeypatch):
    """Better where the weights look, much worse elsewhere."""
    monkeypatch.setitem(analysis.REPLICATES, "set", 200)

    def losses(method, w, seed):
        if method == "raco":
            return 0.30 + seed / 100, 0.30
        return (0.9, 0.1) if w == 0.2 else (0.5, 0.09)

    found = analysis.of_set(records_of(losses))["methods"]["cone"]
    assert found["against"]["raco"]["deviation"]["high"] < 0
    assert found["against"]["raco"]["hypervolume"]["value"] == pytest.approx(
        0.5 * 0.91 - np.mean([(0.7 - seed / 100) * 0.7 for seed in range(3)])
    )
    assert not found["reaches"]["by deviation"]


def test_seeds_that_lack_a_run_are_left_out_and_none_is_an_error():
    records = records_of(lambda *_: (0.5, 0.5))
    kept = analysis.of_complete_seeds(records[:-1])
    assert {record["point"]["seed"] for record in kept} == {0, 1}
    with pytest.raises(UsageError, match="No seed has a run of every method"):
        analysis.of_complete_seeds([*records[:1], *records[-1:]])


def test_a_point_on_the_curve_is_not_above_it_and_the_diagonal_measures_the_rest():
    curve = np.array([[0.2, 0.8], [0.4, 0.4], [0.8, 0.2]])
    assert fronts.above(np.array([0.3, 0.6]), curve) == pytest.approx(0)
    assert fronts.above(np.array([0.5, 0.5]), curve) == pytest.approx(0.1)
    assert fronts.above(np.array([0.35, 0.35]), curve) == pytest.approx(-0.05)
    assert np.isnan(fronts.above(np.array([1.0, 0.0]), curve))


def test_on_a_toy_every_method_with_radius_zero_descends_as_the_weighted_sum():
    problem = random_quadratics(2, 3, seed=0)
    start, w = torch.ones(1, 3, dtype=torch.float64), torch.tensor([[0.3, 0.7]]).double()
    made = {
        name: toys.run(problem, start, w, name, 0.0, lr=0.02, noise=0.3, adam=False, steps=5)
        for name in COMPARED_NAMES
    }
    for losses in made.values():
        torch.testing.assert_close(losses, made["linear"])


def test_an_unknown_part_or_method_is_refused(capsys):
    for arguments in (["--parts", "nonsense"], ["--methods", "nonsense"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_the_page_shows_the_committed_results():
    found = json.loads((FOLDER / tables.FILE).read_text())
    assert filled(tables.PAGE.read_text(), tables.blocks(found)) == tables.PAGE.read_text()
