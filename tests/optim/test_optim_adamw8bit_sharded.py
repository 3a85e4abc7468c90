"""AdamW8bit on two processes (FSDP2): where shards are whole blocks, the bytes are those of one process."""

import pytest
import torch
import torch.distributed as dist
from processes import _dcp_load, _parts, full, on_two_processes
from torch import nn

from sana_ext.optim import AdamW8bit

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1}


def model():
    """Shards of whole blocks, shards that end inside a block, and small parameters."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 75), nn.Linear(75, 60), nn.Linear(60, 6))


def whole_blocks():
    """Two shards of every large parameter are whole blocks."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64), nn.Linear(64, 6))


def sharded(make):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = make()
    fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    return net, AdamW8bit(net.parameters(), **OPTIONS)


def alone(make):
    net = make()
    return net, AdamW8bit(net.parameters(), **OPTIONS)


def steps(net, optimizer, numbers):
    """The same gradients however the parameters are cut."""
    for number in numbers:
        torch.manual_seed(number)
        for p in net.parameters():
            p.grad = torch.randn(p.shape)
            if hasattr(p, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor

                p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements)
        optimizer.step()


def tensors(net, optimizer):
    """Parameters and states, whole, by name."""
    found = {}
    for name, p in net.named_parameters():
        found[name] = full(p).detach()
        found |= {f"{name} {key}": full(value) for key, value in optimizer.state[p].items()}
    return found


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    assert any(t.dtype == torch.uint8 for t in expected.values())
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        assert torch.equal(found[key], value), key


def test_checkpoints_pass_between_one_process_and_two(tmp_path):
    """torch.distributed.checkpoint, three steps here and two there: the bits are those of five steps of one process."""
    import torch.distributed.checkpoint as dcp

    straight = alone(whole_blocks)
    steps(*straight, range(3))
    dcp.save(_parts(*straight), checkpoint_id=tmp_path / "one", no_dist=True)
    steps(*straight, range(3, 5))
    expected = tensors(*straight)
    on_two_processes(_go_on, str(tmp_path), expected)
    pair = alone(whole_blocks)
    _dcp_load(*pair, str(tmp_path / "two"))
    steps(*pair, range(3, 5))
    assert_same_bits(tensors(*pair), expected)


def _go_on(rank, path, expected):
    import torch.distributed.checkpoint as dcp

    pair = sharded(whole_blocks)
    _dcp_load(*pair, f"{path}/one")
    steps(*pair, range(3, 5))
    assert_same_bits(tensors(*pair), expected)
    pair = sharded(whole_blocks)
    steps(*pair, range(3))
    dcp.save(_parts(*pair), checkpoint_id=f"{path}/two")


def test_codes_are_not_taken_for_fp32_states(tmp_path):
    """Where shards end inside a block: torch.distributed.checkpoint itself copies codes into fp32 tensors in silence."""
    import torch.distributed.checkpoint as dcp

    pair = alone(model)
    steps(*pair, range(2))
    dcp.save(_parts(*pair), checkpoint_id=tmp_path, no_dist=True)
    on_two_processes(_refused, str(tmp_path))


def _refused(rank, path):
    pair = sharded(model)
    with pytest.raises(
        ValueError, match=r"^sana_ext\.optim\.AdamW8bit: the loaded state of .* state1 is float32 and holds"
    ):
        _dcp_load(*pair, path)


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
