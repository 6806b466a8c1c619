"""Script of test_distributed.py for torchrun: training on two ranks against training on the whole batch.

Prints "ranks agree" from rank 0 when everything held; an assertion that fails ends the run with an error.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parameters_to_vector

import mfpsn_fx
from mfpsn_fx.passes import fused_norms

STEPS = 3


class Net(nn.Module):
    """(T, N, 2, 6) → (N, 3), with one norm that can be fused with a neuron and one that cannot."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.sn = nn.Conv1d(2, 4, 3, padding=1), nn.BatchNorm1d(4), mfpsn_fx.MulFreePSN(4)
        self.fc, self.bn2, self.sn2 = nn.Linear(24, 5), nn.BatchNorm1d(5), mfpsn_fx.MulFreePSN(5, 3, 2)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = self.sn(self.bn(self.conv(x.flatten(0, 1))).unflatten(0, x.shape[:2]))
        y = torch.sigmoid(self.bn2(self.fc(y.flatten(2).flatten(0, 1)))).unflatten(0, x.shape[:2])
        return self.head(self.sn2(y)).mean(0)


def network(x, **options) -> nn.Module:
    torch.manual_seed(0)
    net = Net().double()
    for neuron in (net.sn, net.sn2):
        nn.init.constant_(neuron.beta, -0.3)
    model = mfpsn_fx.convert(
        net, x, kernels="shifted-add", layout="time_first", init="random", repeats=1, progress=False, **options
    )
    assert [node.args[0].target for node in fused_norms(model)] == ["bn"]
    return model


def train(model, parameters, x, y) -> list[float]:
    optimizer, losses = torch.optim.SGD(parameters, lr=0.1), []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x + 0.1 * step), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def check_state(found: dict, wanted: nn.Module, what: str) -> None:
    """Check that state is bitwise equal on both ranks, and close to that of one process."""
    for name, value in wanted.state_dict().items():
        one = found[name]
        one = one.full_tensor() if hasattr(one, "full_tensor") else one
        torch.testing.assert_close(one, value, msg=lambda m, name=name: f"{what}, {name}: {m}")
        other = [torch.empty_like(one) for _ in range(dist.get_world_size())]
        dist.all_gather(other, one.contiguous())
        assert torch.equal(*other), f"{what}, {name}: ranks differ"


def check_training(x, y, rank: int) -> None:
    alone = network(x)
    before = parameters_to_vector(alone.parameters()).detach().clone()
    wanted = train(alone, alone.parameters(), x, y)
    assert (parameters_to_vector(alone.parameters()) - before).abs().max() > 1e-3
    share = x.shape[1] // 2
    mine = slice(rank * share, (rank + 1) * share)

    model = network(x)
    assert mfpsn_fx.synchronize_statistics(model) == 4
    assert fused_norms(model)
    assert list(model.state_dict()) == list(alone.state_dict())
    sharded, not_synchronized = copy.deepcopy(model), network(x)
    wrapped = DistributedDataParallel(model)
    losses = train(wrapped, wrapped.parameters(), x[:, mine], y[mine])
    for loss, one in zip(losses, wanted, strict=True):
        dist.all_reduce(loss)
        torch.testing.assert_close(loss / 2, one)
    check_state(model.state_dict(), alone, "DDP")

    fully_shard(sharded)
    train(sharded, sharded.parameters(), x[:, mine], y[mine])
    check_state(sharded.state_dict(), alone, "FSDP2")

    compiled = network(x)
    mfpsn_fx.synchronize_statistics(compiled)
    wrapped = DistributedDataParallel(torch.compile(compiled, backend="eager", fullgraph=True))
    train(wrapped, wrapped.parameters(), x[:, mine], y[mine])
    check_state(compiled.state_dict(), alone, "DDP, compiled")

    # without synchronization, each rank's own statistics give another network
    wrapped = DistributedDataParallel(not_synchronized)
    train(wrapped, wrapped.parameters(), x[:, mine], y[mine])
    difference = parameters_to_vector(alone.parameters()) - parameters_to_vector(not_synchronized.parameters())
    assert difference.abs().max() > 1e-3


def check_uneven(x, rank: int, first: int) -> None:
    """Check gradients of the sum of all losses, for shares of ``first`` and of all other sequences, with padding."""
    mask = mfpsn_fx.lengths_to_mask(torch.tensor([5, 2, 4, 1, 5, 3]))
    mine = slice(0, first) if rank == 0 else slice(first, None)
    alone, model = network(x), network(x)
    mfpsn_fx.mask_batch_norms(alone)
    mfpsn_fx.synchronize_statistics(model)
    whole, part = x.clone().requires_grad_(), x[:, mine].clone().requires_grad_()
    with mfpsn_fx.valid_steps(mask):
        alone(whole).square().sum().backward()
    with mfpsn_fx.valid_steps(mask[:, mine]):
        model(part).square().sum().backward()
    torch.testing.assert_close(part.grad, whole.grad[:, mine])
    for p in model.parameters():
        dist.all_reduce(p.grad)
    for (name, p), q in zip(model.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
    check_state(model.state_dict(), alone, "uneven shares")
    assert torch.equal(model.eval()(x), alone.eval()(x))


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    x, y = torch.randn(5, 6, 2, 6, dtype=torch.float64), torch.randint(3, (6,))
    check_training(x, y, rank)
    check_uneven(x, rank, 1)
    check_uneven(x, rank, x.shape[1])
    dist.barrier()
    if rank == 0:
        print("ranks agree")
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
