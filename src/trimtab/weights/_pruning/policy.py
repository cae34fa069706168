"""A stochastic policy that chooses rows of a matrix, and its training from weights alone (PruneNet, arXiv:2501.15296).

    Z = W P^T + b          P [n, d], b [n]: W [n, d] is the state, a row of it is a neuron
    alpha = sigmoid(Z rho) rho [n]: the tendency to keep each row
    kappa = sigmoid(logit(alpha) + log eps - log(1 - eps)),   eps ~ U(0, 1)^n
    K     = `count` rows drawn one after the other without replacement, with probabilities proportional to kappa
    R     = 1 / KS(singular values of W, singular values of W[K])

`Z rho = W (P^T rho) + b rho` is computed in that order, so no n x n matrix is made. It also shows what the policy can
say: one direction and one offset, in whose order rows are kept. What is learnt stays P, b and rho.

Logarithms of kappa are taken as logsigmoid of its logit, in float32; no probability can become exactly 0 or 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from trimtab.core.errors import CheckpointError
from trimtab.core.files import atomic_file
from trimtab.models.views import LinearView

POLICY_VERSION = 1
PERFECT_REWARD = 99999.0
GRADIENT_NORM = 1.0
BASELINE_MEMORY = 0.9
_TINY = torch.finfo(torch.float32).tiny

Update = Literal["published", "on_policy"]


class Policy(nn.Module):
    """embedding P [n, d], bias b [n], mixing rho [n], all float32."""

    def __init__(self, embedding: Tensor, bias: Tensor, mixing: Tensor) -> None:
        super().__init__()
        self.embedding, self.bias, self.mixing = (nn.Parameter(x.float()) for x in (embedding, bias, mixing))

    @classmethod
    def draw(cls, width: int, inputs: int, generator: torch.Generator) -> Policy:
        """A policy for matrices [width, inputs] as PyTorch begins a linear layer, and rho uniform in (0, 1)."""
        bound = inputs**-0.5
        embedding = torch.rand(width, inputs, generator=generator) * (2 * bound) - bound
        bias = torch.rand(width, generator=generator) * (2 * bound) - bound
        return cls(embedding, bias, torch.rand(width, generator=generator))

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrices it is for: n, d."""
        return int(self.embedding.shape[0]), int(self.embedding.shape[1])

    def forward(self, state: Tensor) -> Tensor:
        """logit(alpha) of every row of `state` [n, d], float32 [n]."""
        logits: Tensor = state.float() @ (self.embedding.T @ self.mixing) + self.bias @ self.mixing
        return logits

    def tensors(self) -> dict[str, Tensor]:
        """A copy of what it has learnt, by name; `Policy(**tensors)` is the policy again."""
        return {name: value.detach().cpu().clone() for name, value in self.named_parameters()}

    def save(self, path: str | Path, trained: Mapping[str, str]) -> None:
        """Write one safetensors file, atomically; `trained` says how, for people. Raises OutputError."""
        header = {**trained, "trimtab_policy": str(POLICY_VERSION)}
        with atomic_file(path, also=(SafetensorError,)) as partial:
            save_file({name: value.contiguous() for name, value in self.tensors().items()}, partial, metadata=header)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read what `save` wrote. Raises CheckpointError if it is missing, damaged, or no policy of this version."""
        try:
            with safe_open(path, framework="pt") as file:
                found = (file.metadata() or {}).get("trimtab_policy")
                if found != str(POLICY_VERSION):
                    raise CheckpointError(f"{path} is not a policy of version {POLICY_VERSION} (found {found}).")
                policy = cls(**{name: file.get_tensor(name) for name in ("embedding", "bias", "mixing")})
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"policy {path} cannot be read: {error}") from None
        width = policy.shape[0]
        if policy.bias.shape != (width,) or policy.mixing.shape != (width,):
            raise CheckpointError(f"policy {path} is damaged: its tensors do not fit one another.")
        return policy


def first_matrix(linears: Sequence[LinearView]) -> Tensor:
    """The state, [n, d]: gate of these linears of one MLP, or up where there is no gate."""
    held = {linear.role: linear for linear in linears}
    if "gate_up" in held:
        return held["gate_up"].weight[held["gate_up"].rows["gate"]]
    return held["gate" if "gate" in held else "up"].weight


def logistic_noise(count: int, generator: torch.Generator) -> Tensor:
    """log eps - log(1 - eps) for eps uniform in (0, 1), float32 [count]."""
    return torch.logit(torch.rand(count, generator=generator, dtype=torch.float64).clamp(min=_TINY)).float()


def log_keep(logits: Tensor, noise: Tensor) -> Tensor:
    """log kappa."""
    return F.logsigmoid(logits + noise)


def perturbed(log_weights: Tensor, generator: torch.Generator) -> Tensor:
    """float64 like `log_weights`, on the CPU: in descending order, draws without replacement one after the other, with
    probabilities proportional to exp(log_weights) (exponential arrival times: Efraimidis and Spirakis 2006)."""
    arrivals = torch.empty(len(log_weights), dtype=torch.float64).exponential_(generator=generator)
    return log_weights.detach().double().cpu() - arrivals.log()


def draw_rows(log_weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """The first `count` rows of such draws: int64 [count], in the order in which they are drawn."""
    return torch.argsort(perturbed(log_weights, generator), descending=True, stable=True)[:count]


def log_probability(log_weights: Tensor, order: Tensor) -> Tensor:
    """Of drawing these rows in this order: sum_j (log w_j - log of the sum of the weights that are left)."""
    left = torch.ones_like(log_weights, dtype=torch.bool)
    left[order] = False
    others = torch.logsumexp(log_weights[left], 0) if bool(left.any()) else log_weights.new_tensor(-torch.inf)
    chosen = log_weights[order]
    remaining = torch.logcumsumexp(torch.cat([others[None], chosen.flip(0)]), 0)[1:].flip(0)
    return (chosen - remaining).sum()


def singular_values(weight: Tensor) -> Tensor:
    """All min(out, in) of them, float64, ascending; what float32 cannot tell from zero is zero.

    The roots of the eigenvalues of the smaller Gram matrix: a third of the time of an SVD, and in float64 as exact as
    one in float32.
    """
    wide = weight.detach().double()
    gram = wide @ wide.T if wide.shape[0] < wide.shape[1] else wide.T @ wide
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    noise = values[-1] * max(weight.shape) * torch.finfo(torch.float32).eps
    return torch.where(values > noise, values, 0.0)


def ks_distance(first: Tensor, second: Tensor) -> float:
    """The two-sample Kolmogorov-Smirnov statistic sup_x |F1(x) - F2(x)| of two ascending sets of values."""
    places = torch.cat([first, second])
    shares = [torch.searchsorted(own, places, right=True) / own.numel() for own in (first, second)]
    return float((shares[0] - shares[1]).abs().max())


def reward(distance: float) -> float:
    """1 / KS."""
    return 1 / distance if distance > 0 else PERFECT_REWARD


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a policy is trained; the defaults are the published ones.

    episodes        passes over all layers
    learning_rate   of AdamW, which makes one step for each layer of an episode
    discount        gamma: the reward of layer l counts gamma^l
    update          "published": -R log kappa, summed over the kept rows, with new noise; "on_policy": the logarithm of
                    the probability of what was drawn, with the noise it was drawn with, weighted by what the reward is
                    above the layer's moving average, in units of the episode's root mean square
    prior           weight of KL(Bernoulli(alpha) || Bernoulli(1/2))
    """

    episodes: int = 20
    learning_rate: float = 1e-3
    discount: float = 0.99
    update: Update = "published"
    prior: float = 0.0


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was done to one layer in an episode: the rows in the order they were drawn, the noise, the KS statistic."""

    order: Tensor
    noise: Tensor
    distance: float


@dataclass(frozen=True, slots=True)
class Trained:
    """policy: the one that drew the episode of the largest total reward; distances: KS, float64 [episodes, layers]."""

    policy: Policy
    distances: Tensor

    @property
    def best_episode(self) -> int:
        return int(_total_rewards(self.distances).argmax())


@torch.enable_grad()
def train(
    states: Sequence[Tensor],
    counts: Sequence[int],
    training: Training,
    generator: torch.Generator,
    advance: Callable[[str], None] = lambda detail: None,
) -> Trained:
    """Train one policy for all layers.

    states    [n, d] each: the first MLP matrix of each layer
    counts    how many rows each keeps

    Calls `advance(detail)` after each episode. Deterministic given the generator.
    """
    device = states[0].device
    width, inputs = states[0].shape
    policy = Policy.draw(width, inputs, generator).to(device)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=training.learning_rate)
    originals = [singular_values(state) for state in states]
    best, best_reward = policy.tensors(), -torch.inf
    averages: list[float] | None = None
    distances = []
    for episode in range(training.episodes):
        drawn = [_draw(policy, *layer, generator) for layer in zip(states, originals, counts, strict=True)]
        distances.append([layer.distance for layer in drawn])
        rewards = [reward(layer.distance) for layer in drawn]
        if sum(rewards) > best_reward:
            best, best_reward = policy.tensors(), sum(rewards)
        averages = averages or rewards
        weights = rewards if training.update == "published" else _advantages(rewards, averages)
        averages = [BASELINE_MEMORY * a + (1 - BASELINE_MEMORY) * r for a, r in zip(averages, rewards, strict=True)]
        for index, (state, layer) in enumerate(zip(states, drawn, strict=True)):
            logits = policy(state)
            loss = -(training.discount**index) * weights[index] * _likelihood(logits, layer, training.update, generator)
            if training.prior:
                loss = loss + training.prior * _prior(logits)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(policy.parameters(), GRADIENT_NORM)
            optimizer.step()
        advance(f"episode {episode + 1}, mean KS {sum(distances[-1]) / len(drawn):.4f}")
    return Trained(Policy(**best).to(device), torch.tensor(distances, dtype=torch.float64))


def _draw(policy: Policy, state: Tensor, original: Tensor, count: int, generator: torch.Generator) -> Drawn:
    with torch.no_grad():
        noise = logistic_noise(len(state), generator).to(state.device)
        order = draw_rows(log_keep(policy(state), noise), count, generator)
        return Drawn(order, noise, ks_distance(original, singular_values(state[order.to(state.device)])))


def _likelihood(logits: Tensor, layer: Drawn, update: Update, generator: torch.Generator) -> Tensor:
    order = layer.order.to(logits.device)
    if update == "on_policy":
        return log_probability(log_keep(logits, layer.noise), order)
    return log_keep(logits, logistic_noise(len(logits), generator).to(logits.device))[order].sum()


def _prior(logits: Tensor) -> Tensor:
    """KL(Bernoulli(alpha) || Bernoulli(1/2)), summed over rows."""
    alpha = torch.sigmoid(logits)
    entropy = -(alpha * F.logsigmoid(logits) + (1 - alpha) * F.logsigmoid(-logits))
    return (torch.log(torch.tensor(2.0)) - entropy).sum()


def _advantages(rewards: Sequence[float], averages: Sequence[float]) -> list[float]:
    above = torch.tensor(rewards, dtype=torch.float64) - torch.tensor(averages, dtype=torch.float64)
    size = float(above.square().mean().sqrt())
    return (above / size).tolist() if size > 0 else [0.0] * len(above)


def _total_rewards(distances: Tensor) -> Tensor:
    rewards: Any = torch.where(distances > 0, 1 / distances, PERFECT_REWARD)
    total: Tensor = rewards.sum(dim=1)
    return total
