"""8-bit optimizers on two processes: FSDP2's DTensors, torch.distributed.checkpoint, re-sharding, accelerate."""

import copy

import pytest
import torch
import torch.distributed as dist
from helpers import rand
from processes import _dcp_load, _parts, full, on_two_processes
from torch import nn

from sana_ext.optim import AdamW8bit, CAME8bit, fuse_backward

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
both = pytest.mark.parametrize("kind", [CAME8bit, AdamW8bit])
FACTS = ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_res_row", "exp_avg_res_col", "exp_avg_sq")


def model():
    """Every kind of parameter: matrices with rows longer and shorter than a block, convolutions, vectors."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(48, 600), nn.GELU(), nn.Linear(600, 120), nn.Unflatten(1, (120, 1)), nn.Conv1d(120, 2560, 1),
        nn.Conv1d(2560, 2560, 3, padding=1, groups=2560), nn.Flatten(), nn.Linear(2560, 7),
    )  # fmt: skip


def batch(step):
    return rand(step, 16, 48).float()


def loss(net, x):
    return net(x).square().mean()


def alone(steps, kind=CAME8bit, **options):
    net = model()
    optimizer = kind(net.named_parameters(), 1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss(net, batch(step)).backward()
        optimizer.step()
    return net, optimizer


def sharded(kind=CAME8bit, **options):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model()
    mesh = init_device_mesh("cpu", (2,))
    for layer in net:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return net, kind(net.named_parameters(), 1e-2, weight_decay=0.1, **options)


def train(rank, net, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        loss(net, batch(step)[8 * rank : 8 * rank + 8]).backward()
        optimizer.step()


def assert_near(net, optimizer, peer_net, peer, exact_codes):
    """Statistics to the order of sums; codes equal but for one in ten thousand, which is one apart."""
    codes = different = 0
    for (name, p), q in zip(net.named_parameters(), peer_net.parameters()):
        apart = (full(p) - q).abs()
        assert (apart > 1e-5).float().mean() <= 1e-4, name  # a code that differs moves one value
        assert apart.max() <= 0.05 * 1e-2 * 11, (name, apart.max())
        state, other = optimizer.state[p], peer.state[q]
        assert state["step"] == other["step"]
        for key in FACTS:
            if key in other:
                torch.testing.assert_close(full(state[key]), other[key], rtol=1e-3, atol=1e-6, msg=f"{name} {key}")
        m = full(state["exp_avg"])
        assert m.dtype == other["exp_avg"].dtype, name
        if m.dtype == torch.uint8:
            apart = (m.int() - other["exp_avg"].int()).abs()
            assert apart.max() <= 1, name
            codes += m.numel()
            different += int((apart > 0).sum())
    assert codes > 400_000
    assert different <= exact_codes * codes, f"{different} of {codes}"


def test_first_step_gives_the_codes_of_one_process():
    on_two_processes(_first_step)


def _first_step(rank):
    """One step on the same gradients: the only difference is the order of sums."""
    for code in ("256-dynamic", "2048-linear"):
        net, optimizer = sharded(code=code)
        peer_net = model()
        peer = CAME8bit(peer_net.named_parameters(), 1e-2, weight_decay=0.1, code=code)
        for step in range(3):
            peer.zero_grad()
            loss(peer_net, batch(step)).backward()
            peer.step()
            for p, q in zip(net.parameters(), peer_net.parameters()):
                from torch.distributed.tensor import distribute_tensor

                p.grad = distribute_tensor(q.grad.clone(), p.device_mesh, p.placements)
            optimizer.step()
            assert_near(net, optimizer, peer_net, peer, 1e-4)


@both
def test_a_checkpoint_gives_the_same_bits(kind, tmp_path):
    on_two_processes(_checkpoint, kind, str(tmp_path))


def test_a_checkpoint_of_two_processes_is_read_by_one(tmp_path):
    on_two_processes(_checkpoint, CAME8bit, str(tmp_path))
    # Read by one process, which goes on as it would have without the interruption.
    net, optimizer = alone(0)
    _dcp_load(net, optimizer, str(tmp_path))
    peer_net, peer = alone(3)
    for p, q in zip(net.parameters(), peer_net.parameters()):
        assert ((p - q).abs() > 2e-3).float().mean() <= 1e-3
        assert optimizer.state[p]["step"] == 3
        assert optimizer.state[p].keys() == peer.state[q].keys()


def _checkpoint(rank, kind, path):
    import torch.distributed.checkpoint as dcp

    net, optimizer = sharded(kind)
    train(rank, net, optimizer, range(3))
    dcp.save(_parts(net, optimizer), checkpoint_id=path)
    other_net, other = sharded(kind)
    _dcp_load(other_net, other, path)
    for p, q in zip(net.parameters(), other_net.parameters()):
        assert torch.equal(p.to_local(), q.to_local())
        for key, value in optimizer.state[p].items():
            loaded = other.state[q][key]
            assert loaded.dtype == value.dtype, key
            assert torch.equal(full(loaded), full(value)), key
    for pair in ((net, optimizer), (other_net, other)):
        train(rank, *pair, range(3, 5))
    assert all(torch.equal(p.to_local(), q.to_local()) for p, q in zip(net.parameters(), other_net.parameters()))


@both
def test_infinity_on_one_process_skips_on_both(kind):
    on_two_processes(_infinity, kind)


def _infinity(rank, kind):
    net, optimizer = sharded(kind)
    train(rank, net, optimizer, range(1))
    before = [p.to_local().clone() for p in net.parameters()]
    loss(net, batch(1)).backward()
    if rank == 1:
        next(net.parameters()).grad.to_local()[-1, -1] = float("inf")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(p.to_local(), q) for p, q in zip(net.parameters(), before))


@both
def test_fused_backward_on_shards(kind):
    on_two_processes(_fused, kind)


def _fused(rank, kind):
    results = []
    for fused in (False, True):
        net, optimizer = sharded(kind)
        if fused:
            fuse_backward(optimizer)
        train(rank, net, optimizer, range(2))
        results.append([p.to_local().clone() for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@both
def test_accelerate_saves_and_loads(kind, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)

    def prepared():
        net, optimizer = alone(0, kind)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
        return accelerator.prepare(net, optimizer, scheduler)

    def run(net, optimizer, scheduler, steps):
        for step in steps:
            optimizer.zero_grad()
            accelerator.backward(loss(net, batch(step)))
            optimizer.step()
            scheduler.step()

    first = prepared()
    run(*first, range(2))
    accelerator.save_state(str(tmp_path / "state"))
    weights = copy.deepcopy(first[0].state_dict())
    run(*first, range(2, 4))
    expected = copy.deepcopy(first[0].state_dict())
    accelerator.load_state(str(tmp_path / "state"))
    assert all(torch.equal(v, weights[k]) for k, v in first[0].state_dict().items())
    run(*first, range(2, 4))
    assert all(torch.equal(v, expected[k]) for k, v in first[0].state_dict().items())
