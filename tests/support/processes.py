"""What several test files share of optim sharded."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def on_two_processes(body, *args):
    mp.start_processes(_entry, (free_port(), body, args), nprocs=2, start_method="fork")


def _entry(rank, port, body, args):
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    body(rank, *args)
    dist.destroy_process_group()


def full(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _parts(net, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, state = get_state_dict(net, optimizer)
    return {"model": weights, "optimizer": state}


def _dcp_load(net, optimizer, path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    parts = _parts(net, optimizer)
    dcp.load(parts, checkpoint_id=path)
    set_state_dict(net, optimizer, model_state_dict=parts["model"], optim_state_dict=parts["optimizer"])
