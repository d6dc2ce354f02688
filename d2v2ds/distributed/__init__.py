"""Ranks, engines, the sharded teacher and checkpoints: the only room that imports DeepSpeed.

Nothing in here knows what is trained; the room serves any torch module.
"""

import os

import torch

# DeepSpeed decides on its accelerator while it is imported, which any module of this room may cause.
if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
