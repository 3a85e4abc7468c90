"""AdamW8bit on two processes (FSDP2): where shards are whole blocks, the bytes are those of one process."""

import pytest
import torch
import torch.distributed as dist
from test_optim_sharded import full, on_two_processes
from torch import nn

from sana_ext.optim import AdamW8bit

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def model():
    """Shards of whole blocks, shards that end inside a block, and small parameters."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 75), nn.Linear(75, 60), nn.Linear(60, 6))


def test_bytes_are_those_of_one_process():
    on_two_processes(_steps)


def _steps(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    net, peer_net = model(), model()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer, peer = AdamW8bit(net.parameters(), **OPTIONS), AdamW8bit(peer_net.parameters(), **OPTIONS)

    def give_gradients(seed):
        torch.manual_seed(seed)
        for p, q in zip(net.parameters(), peer_net.parameters()):
            q.grad = torch.randn_like(q)
            p.grad = distribute_tensor(q.grad.clone(), p.device_mesh, p.placements)

    for step in range(3):
        give_gradients(step)
        optimizer.step()
        peer.step()
    kinds = []
    for p, q in zip(net.parameters(), peer_net.parameters()):
        state, other = optimizer.state[p], peer.state[q]
        kinds.append(state["state1"].dtype)
        if state["state1"].dtype == other["state1"].dtype:  # elementwise: the same to the bit
            assert torch.equal(full(p), q)
            assert all(torch.equal(full(state[key]), other[key]) for key in other)
        else:  # a shard that ends inside a block keeps fp32 states
            assert ((full(p) - q).abs() <= 0.05 * 3e-2).float().mean() > 0.99
    assert kinds[0] == torch.uint8
    assert kinds[2] == torch.uint8
    assert kinds[4] == torch.float32

    # NaN on one process skips the step on both.
    before = [full(p).clone() for p in net.parameters()]
    give_gradients(9)
    if rank == 1:
        next(net.parameters()).grad.to_local()[-1, -1] = torch.nan
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(full(p), b) for p, b in zip(net.parameters(), before))
