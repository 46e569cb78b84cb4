"""One iteration of PPO in plain torch, for the update of `llama2.align` to be compared with: no line of it is shared.

All weights and a value head on the policy's detached hidden states are trained with torch's AdamW in float64, answer by
answer, without padding or packing. Formulas: arXiv 1707.06347 and 1506.02438; Llama 2, section 3.2.3.
"""

import copy
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Answer = tuple[list[int], list[int], float]  # prompt, answer, score


def said(model: Any, head: torch.nn.Linear, prompt: list[int], answer: list[int], heat: float) -> tuple[Tensor, Tensor]:
    """log p of the answer's tokens, and the values before them."""
    hidden = model.model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0, len(prompt) - 1 : -1]
    logs = (model.lm_head(hidden) / heat).log_softmax(-1)
    values = head(hidden.detach()).squeeze(-1)
    return logs[torch.arange(len(answer)), torch.tensor(answer)], values


def advantages_of(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation; nothing follows the last token."""
    made, ahead, last = torch.zeros_like(values), torch.tensor(0.0).double(), torch.tensor(0.0).double()
    for t in reversed(range(len(values))):
        last = rewards[t] + gamma * ahead - values[t] + gamma * lam * last
        made[t], ahead = last, values[t]
    return made


def iteration(model: Any, head: torch.nn.Linear, answers: Sequence[Answer], args: Any) -> list[float]:
    """Trains both in place on fixed answers; returns the losses of the steps."""
    reference = copy.deepcopy(model)
    old, values, made, returns = [], [], [], []
    scores = torch.tensor([score for _, _, score in answers], dtype=torch.float64)
    scores = (scores - scores.mean()) / (scores.var(correction=0) + 1e-8).sqrt()
    for (prompt, answer, _), score in zip(answers, scores, strict=True):
        with torch.no_grad():
            log, value = said(model, head, prompt, answer, args.temperature)
            ref, _ = said(reference, head, prompt, answer, args.temperature)
        rewards = -args.kl_coef * (log - ref)
        rewards[-1] += score
        old.append(log)
        values.append(value)
        made.append(advantages_of(rewards, value, args.gamma, args.lam))
        returns.append(made[-1] + value)
    every = torch.cat(made)
    made = [(a - every.mean()) / (every.var(correction=0) + 1e-8).sqrt() for a in made]
    matrices = [p for p in [*model.parameters(), *head.parameters()] if p.dim() > 1]
    vectors = [p for p in [*model.parameters(), *head.parameters()] if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)
    losses, size = [], len(answers) // args.num_mini_batches
    for turn in range(args.num_ppo_epochs):
        order = list(range(len(answers)))
        random.Random(f"{args.seed}/answers/0/{turn}").shuffle(order)
        for start in range(0, len(order), size):
            policy, critic, tokens = torch.tensor(0.0).double(), torch.tensor(0.0).double(), 0
            for i in order[start : start + size]:
                log, value = said(model, head, *answers[i][:2], args.temperature)
                ratio = (log - old[i]).exp()
                clipped = ratio.clamp(1 - args.cliprange, 1 + args.cliprange)
                policy = policy + torch.maximum(-made[i] * ratio, -made[i] * clipped).sum()
                near = values[i] + (value - values[i]).clamp(-args.cliprange_value, args.cliprange_value)
                critic = critic + torch.maximum((value - returns[i]) ** 2, (near - returns[i]) ** 2).sum() / 2
                tokens += len(log)
            loss = (policy + args.vf_coef * critic) / tokens
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *head.parameters()], args.max_grad_norm)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses
