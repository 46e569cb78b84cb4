"""Rewards, advantages and losses: beside numpy (1e-10), beside numbers worked out by hand, and by enumeration."""

import itertools
import math

import numpy as np
import numpy_align as theirs
import pytest
import torch

from llama2 import InputError
from llama2.align.advantages import (
    adapted,
    gae,
    gated,
    group_advantages,
    leave_one_out,
    token_rewards,
    whitened,
    within,
)
from llama2.align.losses import Level, cispo, kl, ratios, surrogate, value_loss

T = torch.float64
EXACT = 1e-10
OLD = [[-1, -0.5, -2], [-0.7, -1.2, -0.3, -0.9]]
NEW = [[-0.7, -0.6, -2.1], [-0.9, -0.9, -0.35, -1.3]]
REF = [[-1.1, -0.7, -1.8], [-0.6, -1, -0.5, -1]]
V_OLD = [[0.2, 0.3, 0.5], [0.1, 0, -0.2, -0.4]]
V_NEW = [[0.5, 0.2, 0.6], [0, 0.3, -0.1, -0.5]]
LENGTHS = torch.tensor([3, 4])
OWNER = torch.tensor([0, 0, 0, 1, 1, 1, 1])


def padded(rows: list[list[float]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row, dtype=T) for row in rows], batch_first=True)


def flat(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row], dtype=T)


def close(found: torch.Tensor, wanted: object, bound: float = 1e-6) -> None:
    assert np.abs(found.numpy() - np.asarray(wanted)).max() < bound


# -- by hand -----------------------------------------------------------------------------------------------------


def test_the_gate_and_the_whitening() -> None:
    helpful, safe = torch.tensor([2, -1, 0.5, 3], dtype=T), torch.tensor([1, -2, 0, -3], dtype=T)
    found = gated(helpful, safe, torch.tensor([False, False, True, False]))
    assert found.tolist() == [2, -2, 0, -3]
    close(whitened(found), [1.432078, -0.650945, 0.390567, -1.171700], 1e-5)
    assert math.log(0.15 / 0.85) == pytest.approx(-1.734601, abs=1e-6)
    close(gated(helpful[:1], torch.tensor([17.0], dtype=T), torch.tensor([True])), [17.0])  # no sigmoid on the way


def test_ppo_by_hand() -> None:
    kl_NT = padded(OLD) - padded(REF)
    rewards = token_rewards(torch.tensor([1, -0.5], dtype=T), kl_NT, LENGTHS, 0.05)
    close(rewards[0], [-0.005, -0.01, 1.01, 0])
    close(rewards[1], [0.005, 0.01, -0.01, -0.505])
    advantages, returns = gae(rewards, padded(V_OLD), LENGTHS, 1.0, 0.95)
    close(advantages[0], [0.735775, 0.674500, 0.510000, 0])
    close(advantages[1], [-0.555049, -0.484262, -0.309750, -0.105000])
    mask = within(LENGTHS, 4)
    assert float(whitened(advantages, mask)[0, 0]) == pytest.approx(1.292991, abs=1e-5)
    held = advantages[mask]
    spread = (held - held.mean()) / held.std()
    found = surrogate(ratios(flat(NEW), flat(OLD), OWNER, 2), spread)
    assert float(found.loss.mean()) == pytest.approx(-0.001643, abs=1e-6)
    assert float(found.clipped.double().mean()) == pytest.approx(2 / 7)
    for clip, wanted in ((0.2, 0.146076), (None, 0.139136)):
        loss, _ = value_loss(flat(V_NEW), flat(V_OLD), returns[mask], clip)
        assert float(loss.mean()) == pytest.approx(wanted, abs=1e-6)


def test_kl_by_hand() -> None:
    new, ref = flat(NEW), flat(REF)
    found = [float(kl(new, ref, kind).mean()) for kind in ("k1", "k2", "k3")]
    assert found == pytest.approx([-0.021429, 0.033750, 0.034326], abs=1e-6)


@pytest.mark.parametrize(("how", "wanted"), [("answer", 0.186683), ("token", 0.328006), ("constant", 0.287005)])
def test_grpo_by_hand(how: str, wanted: float) -> None:
    new = flat(NEW).requires_grad_()
    advantages = torch.tensor([0.8, -1.2], dtype=T)[OWNER]
    loss = surrogate(ratios(new, flat(OLD), OWNER, 2), advantages).loss
    losses = [part.detach().numpy() for part in loss.split([3, 4])]
    assert theirs.reduced(losses, how, 4) == pytest.approx(wanted, abs=1e-6)
    if how == "answer":
        (loss / LENGTHS[OWNER] / 2).sum().backward()
        assert new.grad is not None
        close(new.grad, [0, -0.120645, -0.120645, 0.122810, 0.202479, 0.142684, 0])


def test_variants_by_hand() -> None:
    new, old, advantages = flat(NEW), flat(OLD), torch.tensor([0.8, -1.2], dtype=T)[OWNER]
    ratio = ratios(new, old, OWNER, 2)
    wide = surrogate(ratio, advantages, 0.2, 0.28).loss.mean(), surrogate(ratio, advantages, 0.2, 0.4).loss.mean()
    assert [float(x) for x in wide] == pytest.approx([0.318863, 0.310879], abs=1e-6)
    of_answer = ratios(new, old, OWNER, 2, "sequence")
    gspo = [part.mean() for part in surrogate(of_answer, advantages).loss.split([3, 4])]
    assert float(sum(gspo) / 2) == pytest.approx(0.136173, abs=1e-6)
    assert float(cispo(ratio, advantages, new, 1.1).loss.mean()) == pytest.approx(-0.135285, abs=1e-6)
    whole = ratios(new, old, OWNER, 2, "answer")
    assert whole[[0, 3]].tolist() == pytest.approx([1.105171, 0.704688], abs=1e-6)
    rloo = [part.mean() for part in surrogate(whole, advantages).loss.split([3, 4])]
    assert float(sum(rloo) / 2) == pytest.approx(0.037932, abs=1e-6)
    for kind, wanted in (("k3_ratio", 0.188100), ("k3", 0.188093)):
        loss = surrogate(ratio, advantages).loss + 0.04 * kl(new, flat(REF), kind, ratio)  # type: ignore[arg-type]
        assert theirs.reduced([p.numpy() for p in loss.split([3, 4])], "answer", 4) == pytest.approx(wanted, abs=1e-6)


def test_groups_by_hand() -> None:
    scores = torch.tensor([[1, 0, 0.5, 0.5], [2, 2, 2, 1]], dtype=T)
    close(group_advantages(scores), [[1.224445, -1.224445, 0, 0], [0.499900] * 3 + [-1.499700]])
    close(leave_one_out(scores), [[0.666667, -0.666667, 0, 0], [0.333333] * 3 + [-1]])
    close(group_advantages(scores, "none"), [[0.5, -0.5, 0, 0], [0.25] * 3 + [-0.75]])
    close(group_advantages(scores, "batch"), [[0.632376, -0.632376, 0, 0], [0.316188] * 3 + [-0.948563]])
    for found in (group_advantages(scores), leave_one_out(scores), group_advantages(scores, "batch")):
        close(found.sum(1), [0, 0])
    close(group_advantages(torch.full((1, 3), 0.7, dtype=T)), [[0, 0, 0]], EXACT)


def test_answers_without_a_score_do_not_count() -> None:
    scores = torch.tensor([[1, math.nan, 0]], dtype=T)
    without = torch.tensor([[1, 0]], dtype=T)
    for made in (group_advantages, leave_one_out):
        found = made(scores)[0].tolist()
        assert found[1] == 0 and found[::2] == pytest.approx(made(without)[0].tolist())
    assert leave_one_out(torch.tensor([[1, math.nan]], dtype=T)).tolist() == [[0, 0]]


def test_a_group_of_one_is_refused() -> None:
    for made in (group_advantages, leave_one_out):
        with pytest.raises(InputError, match="at least 2 answers"):
            made(torch.zeros(3, 1))


def test_the_adaptive_coefficient() -> None:
    beta, found = 0.15, []
    for seen in (12, 7, 3):
        beta = adapted(beta, seen, 6, 512, 10000)
        found.append(beta)
    assert found == pytest.approx([0.151536, 0.152829, 0.151264], abs=1e-6)


# -- beside numpy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_beside_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, 6)
    new, old, ref, values, fresh = ([rng.normal(size=n) for n in lengths] for _ in range(5))
    helpful, safe, tagged = rng.normal(size=6), rng.normal(size=6) * 3, rng.random(6) < 0.3
    scores = theirs.whiten(theirs.gate(helpful, safe, list(tagged), 0.15))
    ours = whitened(gated(torch.from_numpy(helpful), torch.from_numpy(safe), torch.from_numpy(tagged)))
    close(ours, scores, EXACT)
    wanted = theirs.gae(scores, [o - r for o, r in zip(old, ref, strict=True)], values, 0.07, 0.97, 0.9)
    old_NT, ref_NT, values_NT = (padded([row.tolist() for row in held]) for held in (old, ref, values))
    sizes = torch.from_numpy(lengths)
    advantages, returns = gae(token_rewards(ours, old_NT - ref_NT, sizes, 0.07), values_NT, sizes, 0.97, 0.9)
    mask = within(sizes, advantages.shape[1])
    close(advantages[mask], np.concatenate(wanted), EXACT)
    owner = torch.repeat_interleave(torch.arange(6), sizes)
    joined = {name: torch.from_numpy(np.concatenate(held)) for name, held in
              {"new": new, "old": old, "values": values, "fresh": fresh}.items()}  # fmt: skip
    levels: tuple[Level, ...] = ("token", "sequence", "answer")
    for level in levels:
        ratio = ratios(joined["new"], joined["old"], owner, 6, level)
        found = surrogate(ratio, advantages[mask], 0.2, 0.28).loss
        close(found, np.concatenate(theirs.policy(new, old, wanted, 0.2, 0.28, level)), EXACT)
    for clip in (None, 0.2):
        loss, _ = value_loss(joined["fresh"], joined["values"], returns[mask], clip)
        close(loss, theirs.value(joined["fresh"].numpy(), joined["values"].numpy(), returns[mask].numpy(), clip), EXACT)
    grid = rng.normal(size=(5, 4))
    for scale in ("group", "batch", "none"):
        close(group_advantages(torch.from_numpy(grid), scale), theirs.group(grid, scale), EXACT)  # type: ignore[arg-type]
    close(leave_one_out(torch.from_numpy(grid)), theirs.leave_one_out(grid), EXACT)


# -- by enumeration ----------------------------------------------------------------------------------------------


def test_what_the_gradients_of_kl_estimators_are() -> None:
    """Over all outcomes of a softmax: k1 has none, k2 and k3 with its ratio that of KL(pi || ref), k3 the other one."""
    torch.manual_seed(0)
    logits, ref = torch.randn(5, dtype=T, requires_grad=True), torch.randn(5, dtype=T).log_softmax(-1)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    log = logits.log_softmax(-1)
    p = log.detach().exp()
    right, other = gradient((log.exp() * (log - ref)).sum()), gradient((ref.exp() * (ref - log)).sum())
    ratio = (log - log.detach()).exp()
    assert gradient((p * kl(log, ref, "k1")).sum()).abs().max() < 1e-12
    for found in (kl(log, ref, "k2"), kl(log, ref, "k3_ratio", ratio)):
        assert (gradient((p * found).sum()) - right).abs().max() < 1e-12
    assert (gradient((p * kl(log, ref, "k3")).sum()) - other).abs().max() < 1e-12
    assert (right - other).abs().max() > 0.01


def test_leave_one_out_is_unbiased() -> None:
    """Over all pairs of the 16 answers of two symbols out of 4: the mean gradient is that of the expected reward; that
    of groups without the division is half of it, and divided by the deviation it points elsewhere."""
    torch.manual_seed(1)
    table = torch.randn(5, 4, dtype=T, requires_grad=True)
    answers = list(itertools.product(range(4), repeat=2))
    reward = torch.randn(16, dtype=T)
    log = torch.stack([table[4].log_softmax(-1)[a] + table[a].log_softmax(-1)[b] for a, b in answers])
    p = log.exp()
    wanted = torch.autograd.grad((p * reward).sum(), table, retain_graph=True)[0]
    pairs = list(itertools.product(range(16), repeat=2))
    scores = torch.stack([reward[list(pair)] for pair in pairs])
    weight = torch.stack([p[i] * p[j] for i, j in pairs]).detach()
    logs = torch.stack([log[list(pair)] for pair in pairs])

    def gradient(advantages: torch.Tensor) -> torch.Tensor:
        loss = (weight[:, None] * advantages * logs).sum() / 2
        return torch.autograd.grad(loss, table, retain_graph=True)[0]

    assert (gradient(leave_one_out(scores)) - wanted).abs().max() < 1e-14
    assert (2 * gradient(group_advantages(scores, "none")) - wanted).abs().max() < 1e-14
    grpo = gradient(group_advantages(scores))
    cosine = float((grpo * wanted).sum() / grpo.norm() / wanted.norm())
    assert 0.8 < cosine < 0.999
