"""A training run that is killed before any change of a file goes on with the same command; a few kills, see kill_train.py."""

import torch
from kill_train import kill_and_compare


def test_a_killed_run_ends_as_one_that_was_never_killed(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no worker threads
    try:
        # Among them: staging without its lock, before and after a rename, between checkpoint and sample, in the rotation.
        assert kill_and_compare(tmp_path, (2, 9, 14, 19, 26, 33, 40, 52, 64)) == 9
    finally:
        torch.set_num_threads(threads)
